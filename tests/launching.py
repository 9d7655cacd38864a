"""Start a training script as a user would, in processes of its own.

Without a GPU they are forks of one process that has imported everything (`forking`), which saves seconds a start.
"""

import atexit
import dataclasses
import functools
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from forking import Forks

from minimind_fast.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--hidden_size", "64", "--num_hidden_layers", "2", "--max_seq_len", "64", "--batch_size", "4"]
TINY += ["--num_threads", "1", "--log_interval", "1", "--sample_tokens", "0"]
_WORDS = [
    *"abcdefghij",
    "stone",
    "river",
    "moon",
    "bird",
    "runs",
    "sleeps",
    "under",
    "near",
    "small",
    "山",
    "水",
    "月",
    "鸟",
]


def write_corpus(path: Path, rows: int, seed: int = 0) -> Path:
    """A JSONL of random short documents."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as f:
        for _ in range(rows):
            text = " ".join(rng.choices(_WORDS, k=rng.randint(5, 60)))
            f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def load_script(name: str) -> Any:
    """A script of train/ as a module."""
    spec = importlib.util.spec_from_file_location(f"train_{name}", ROOT / "train" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def own_config(module: Any) -> type:
    """The dataclass of the options of a stage's script, which `load_script` gave."""
    own = [c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == module.__name__]
    return next((c for c in own if issubclass(c, TrainConfig)), TrainConfig)  # type: ignore[arg-type]


def free_port() -> int:
    """A TCP port that nobody uses right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


_forks: list[Forks] = []  # of this process, once it has asked for one


def environment() -> dict[str, str]:
    """What a user's shell would hand on: nothing of what tests set for themselves."""
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINIMIND_KERNELS")}


def forks() -> Forks:
    """The process that forks, started once."""
    if not _forks:
        _forks.append(Forks(environment() | {"DS_ACCELERATOR": "cpu"}))
        atexit.register(_forks[0].close)
    return _forks[0]


def start(
    script: str,
    args: list,
    ranks: int = 1,
    cwd: Path | None = None,
    file_limit_bytes: int = 0,
    fresh: bool = False,
    env: dict[str, str] | None = None,
    before: str = "",
) -> list:
    """Start one process a rank, on a free port; output and errors are captured.

    Args:
        script: in train/; a module with dots in its name; or "-c", with the program as the first argument.
        args: command-line arguments.
        ranks: 1 is a plain start, without a launcher's variables.
        cwd: the folder that it runs in.
        file_limit_bytes: as if the disk were full; 0 is none.
        fresh: start Python anew, and not as a fork.
        env: variables besides those that are there.
        before: Python that each process executes first.

    Returns:
        What `finish` waits for.
    """
    limit = "pass"
    if file_limit_bytes:
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({file_limit_bytes}, {file_limit_bytes}))"
    target = str(ROOT / "train" / script) if script.endswith(".py") else script
    first = ["-m"] if "." in target and not target.endswith(".py") else []
    port = free_port()
    processes: list = []
    for rank in range(ranks):
        own = environment() | (env or {})
        if ranks > 1:
            own.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            own.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        words = [str(arg) for arg in args]
        if fresh or torch.cuda.is_available():
            if before:
                assert target.endswith(".py"), target
                start_it = f"import runpy; runpy.run_path({target!r}, run_name='__main__')"
                first, target = ["-c"], f"{before}\n{start_it}"
            whole = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=lambda: exec(limit))
            processes.append(subprocess.Popen([sys.executable, *first, target, *words], env=own, cwd=cwd, **whole))
        else:
            log = Path(tempfile.mkstemp(prefix="said-", dir=_logs())[1])
            processes.append(forks().start(target, words, cwd or Path.cwd(), log, before=f"{limit}\n{before}", env=own))
    return processes


@functools.cache
def _logs() -> str:
    """A folder for what forks write, gone with this process."""
    folder = tempfile.TemporaryDirectory(prefix="minimind-tests-")
    atexit.register(folder.cleanup)
    return folder.name


def finish_all(processes: list, expect: int | None = 0, timeout: float = 300) -> list[str]:
    """Wait for all; the output of each. Fails with the output when one ends otherwise than expected."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in processes:
            process.kill()
    if expect is not None:
        for rank, process in enumerate(processes):
            assert process.returncode == expect, f"rank {rank} ended with {process.returncode}:\n{outputs[rank]}"
    return outputs


def finish(processes: list, expect: int | None = 0, timeout: float = 300) -> str:
    """Wait for all; the output of rank 0."""
    return finish_all(processes, expect, timeout)[0]


def run(script: str, args: list, ranks: int = 1, expect: int | None = 0, cwd: Path | None = None, **how: Any) -> str:
    """Start, wait, and give the output of rank 0."""
    return finish(start(script, args, ranks, cwd, **how), expect)


def read_log(folder: Path) -> dict[int, dict]:
    """{step: numbers} of a run's log; a repeated step keeps its last line."""
    rows: dict[int, dict] = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return rows


def hears(number: int) -> str:
    """For `start(before=...)`: the signal acts as usual, though the suite may run where it is ignored (nohup, a job)."""
    return f"import signal; signal.signal({int(number)}, signal.SIG_DFL)\n"


def held_at(step: int, go: Path) -> str:
    """For `start(before=...)`: once a step is logged, the run waits until `go` exists, so that no machine is too fast."""
    return (
        "import pathlib, time\nfrom minimind_fast.training.log import Progress\nlog = Progress.log\n"
        "def held(self, step, *rest):\n    log(self, step, *rest)\n"
        f"    while step == {step} and not pathlib.Path({str(go)!r}).exists(): time.sleep(0.005)\n"
        "Progress.log = held\n"
    )


def wait_for_step(folder: Path, step: int, processes: list, timeout: float = 120) -> None:
    """Return when the run's log has reached a step."""
    begin = time.monotonic()
    while time.monotonic() - begin < timeout:
        if (folder / "log.jsonl").exists():
            lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            if any(json.loads(line)["step"] >= step for line in lines if line.endswith("}")):
                return
        if any(p.poll() is not None for p in processes):
            raise AssertionError("a rank ended early:\n" + finish(processes, expect=None))
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {timeout} s")
