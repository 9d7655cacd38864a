"""Run scripts and commands one after another, each in a fork of a process that has imported everything beforehand.

A fork is a process of its own, with its own arguments, folder, environment and world of ranks, without the seconds that
every start of Python spends on importing PyTorch and DeepSpeed. This file is the helper and the process that forks.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from minimind_fast import cli

PRELOADED = ["torch._dynamo", "deepspeed", "deepspeed.runtime.engine", "torch.utils.tensorboard", "matplotlib.pyplot"]
PRELOADED += ["minimind_fast.training.setup", *sorted({place.split(":")[0] for place, _ in cli.COMMANDS.values()})]


class Forks:
    """Starts the process that forks."""

    def __init__(self, env: dict[str, str]) -> None:
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, what: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, target: str, argv: list[str], cwd: Path, log: Path, said: str = "", before: str = "") -> int:
        """Start a script or a command of `minimind-fast`.

        Args:
            target: a path that ends in .py, a module with dots in its name (python -m), or a command's name.
            argv: its arguments.
            cwd: the folder that it runs in.
            log: file for its output and errors.
            said: its standard input.
            before: Python to execute first.

        Returns:
            The fork's process id.
        """
        log.write_bytes(b"")  # what another left there is not this one's
        job = dict(target=target, argv=argv, cwd=str(cwd), log=str(log), said=said, before=before)
        return self.ask({"start": job})

    def wait(self, pid: int) -> int:
        """The exit code of a fork, at its end."""
        return self.ask({"wait": pid})

    def close(self) -> None:
        self.process.communicate(timeout=20)


def become(target: str, argv: list[str], cwd: str, log: str, said: str, before: str) -> Any:
    """What a fork does; its exit code, as sys.exit takes it."""
    os.chdir(cwd)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    there, here = os.pipe()
    os.write(here, said.encode())
    os.close(here)
    for source, standard in ((there, 0), (output, 1), (output, 2)):
        os.dup2(source, standard)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 it lives as long as the fork
    exec(before, {})
    sys.argv = [target, *argv]
    if target.endswith(".py"):
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")
        return 0
    if "." in target:
        sys.path.insert(0, cwd)
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return 0
    return cli.main(argv)


def fork(job: dict[str, Any]) -> int:
    """The process id of a fork that does a job."""
    pid = os.fork()
    if pid:
        return pid
    try:
        code = become(**job)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            print(fork(asked["start"]), flush=True)
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)


if __name__ == "__main__":
    main()
