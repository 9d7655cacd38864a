"""Run scripts and commands one after another, each in a fork of a process that has imported everything beforehand.

A fork is a process of its own, with its own arguments, folder, environment and world of ranks, without the seconds that
every start of Python spends on importing PyTorch and DeepSpeed. It ends without Python's own end, so that what happens there
(a rank that leaves) is tested in real processes. This file is the helper and the process that forks.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from minimind_fast import cli

PRELOADED = ["torch._dynamo", "deepspeed", "deepspeed.runtime.engine", "torch.utils.tensorboard", "matplotlib.pyplot"]
PRELOADED += ["minimind_fast.training.setup", *sorted({place.split(":")[0] for place, _ in cli.COMMANDS.values()})]


class Fork:
    """A running fork; of subprocess.Popen's methods those that tests need."""

    def __init__(self, forks: Forks, pid: int, log: Path) -> None:
        self.forks, self.pid, self.log = forks, pid, log
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus a signal's number where one ended it."""
        if self.returncode is None:
            self.returncode = self.forks.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """The exit code, at its end."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout, self.log.read_bytes())
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """What it has written, at its end; its errors stand among it."""
        self.wait(timeout)
        return self.log.read_text(encoding="utf-8", errors="replace"), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # its number is its own as long as nobody has asked for the exit code
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """Starts the process that forks."""

    def __init__(self, env: dict[str, str]) -> None:
        command = [sys.executable, __file__]
        self.env = env
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, what: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        target: str,
        argv: list[str],
        cwd: Path,
        log: Path,
        said: str = "",
        before: str = "",
        env: dict[str, str] | None = None,
    ) -> Fork:
        """Start a script or a command of `minimind-fast`.

        Args:
            target: a path that ends in .py, a module with dots in its name (python -m), "-c", or a command's name.
            argv: its arguments; for "-c" the first is the program.
            cwd: the folder that it runs in.
            log: file for its output and errors.
            said: its standard input.
            before: Python to execute first.
            env: all its environment; without it that of the process that forks.
        """
        log.write_bytes(b"")  # what another left there is not this one's
        job = dict(target=target, argv=argv, cwd=str(cwd), log=str(log), said=said, before=before, env=env or self.env)
        return Fork(self, self.ask({"start": job}), log)

    def close(self) -> None:
        """End; forks that still run are no longer waited for."""
        self.process.communicate(timeout=20)


def become(target: str, argv: list[str], cwd: str, log: str, said: str, before: str, env: dict[str, str]) -> Any:
    """What a fork does; its exit code, as sys.exit takes it."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    there, here = os.pipe()
    os.write(here, said.encode())
    os.close(here)
    for source, standard in ((there, 0), (output, 1), (output, 2)):
        os.dup2(source, standard)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 it lives as long as the fork
    exec(before, {})
    sys.argv = [target, *argv[target == "-c" :]]
    if target == "-c":
        exec(argv[0], {"__name__": "__main__"})
        return 0
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


def run(command: list[str], env: dict[str, str] | None = None, input: str = "", **how: Any) -> Any:
    """subprocess.run of Python, for a program that is a fork itself, by one more fork.

    Args:
        command: begins with Python's own path.
        env: all its environment; without it that of the program.
        input: its standard input.
        how: stdout=PIPE keeps what it says, errors too; else it is printed.
    """
    first, target, *argv = command
    assert first == sys.executable, command
    if target == "-m":
        target, *argv = argv
    file, log = tempfile.mkstemp()
    job = dict(target=target, argv=argv, cwd=os.getcwd(), log=log, said=input, before="", env=env or dict(os.environ))
    pid = fork(job)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(file, encoding="utf-8") as said:
        text = said.read()
    os.unlink(log)
    if how.get("stdout") is None:
        print(text, end="", flush=True)
    return subprocess.CompletedProcess(command, code, text)


def main() -> None:
    sys.modules["forking"] = sys.modules["__main__"]  # for a fork that imports it
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            answer = fork(asked["start"])
        else:
            ended, status = os.waitpid(asked["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
