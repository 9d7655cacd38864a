"""What `python -m build` makes, installed into an empty folder, trains in another.

The environment's own packages stand in for the dependencies. One run belongs to the suite; the launchers' runs are `slow`.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import trees
from launching import free_port

SIZES = ["--hidden_size", "64", "--num_hidden_layers", "2", "--max_seq_len", "64", "--batch_size", "4"]
SIZES += ["--max_steps", "2", "--num_threads", "1", "--log_interval", "1", "--sample_tokens", "0"]


def run(command: list[str], cwd: Path, **env: str) -> str:
    """To its good end -> all that it said."""
    done = subprocess.run(
        command, cwd=cwd, env=trees.environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Source archive, then from it the wheel, as `python -m build` goes; without a network."""
    folder = tmp_path_factory.mktemp("build")
    tree = trees.copy(folder / "tree")
    sdist = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", sdist, str(folder)], tree)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "."],
        next((folder / "source").iterdir()),
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """The wheel, installed into an empty folder."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)], folder)
    return folder


@pytest.fixture(scope="module")
def train(site, tmp_path_factory):
    """Runs a command in an empty folder, with the wheel's package only -> the folder."""
    folder = tmp_path_factory.mktemp("empty")

    def start(*command: str) -> Path:

        path = f"{site / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        run([*command, *SIZES], folder, PYTHONPATH=str(site), PATH=path, DS_ACCELERATOR="cpu")
        return folder

    return start


def steps(run: Path) -> int:
    """That a run has taken."""
    return json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]


def test_the_wheel_holds_all_that_the_package_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, place in (("minimind_fast", ""), ("kernels", "minimind_fast/"), ("train", "minimind_fast/")):
        for file in (trees.ROOT / folder).rglob("*"):
            if file.is_file() and not {"__pycache__", ".minimind_fast_cache"} & set(file.parts):
                name = place + str(file.relative_to(trees.ROOT)).replace("train/", "stages/", 1 if place else 0)
                assert name in names, f"{name} is not in the wheel"
    assert not {name.split("/")[0] for name in names} - {"minimind_fast", f"{wheel.name.split('-py3')[0]}.dist-info"}


def test_an_installed_package_trains(train, site):
    folder = train("minimind-fast", "train", "pretrain")
    assert steps(folder / "out" / "pretrain") == 2 and (folder / "out" / "pretrain" / "weights").is_dir()
    asked = [sys.executable, "-c", "import minimind_fast; print(minimind_fast.__file__)"]
    assert run(asked, folder, PYTHONPATH=str(site)).startswith(str(site))  # not the environment's own


@pytest.mark.slow
def test_the_next_stage_goes_on_from_it(train):
    train("minimind-fast", "train", "pretrain")
    assert steps(train("minimind-fast", "train", "sft") / "out" / "sft") == 2


LAUNCHERS = [
    "deepspeed -q --num_gpus 2 --master_port {} --module",
    "torchrun --nproc_per_node 2 --master_port {} -m",
]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["deepspeed", "torchrun"])
def test_launchers_start_its_stages(train, launcher):
    words = launcher.format(free_port()).split()
    folder = train(*words, "minimind_fast.stages.pretrain", "--save_dir", words[0])
    assert steps(folder / words[0] / "pretrain") == 2
