"""A checkout runs its own code, whichever checkout the environment was installed from."""

import subprocess
import sys
from pathlib import Path

import pytest
import trees

MET = "this checkout's own"
BROKEN = ["kernels/swiglu.py", "train/sft.py"]
NAMES = ["minimind_fast.kernels.swiglu", "minimind_fast.stages.sft"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy elsewhere whose kernel and stage raise where they are imported."""
    made = trees.copy(tmp_path_factory.mktemp("elsewhere") / "clone")
    for name in BROKEN:
        with (made / name).open("a", encoding="utf-8") as file:
            file.write(f"\nraise RuntimeError({MET!r})\n")
    for name in NAMES:
        test = f"def test_it():\n    import {name}\n"
        (made / "tests" / f"test_meets_{name.split('.')[-1]}.py").write_text(test, encoding="utf-8")
    return made


def run(clone: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=clone, env=trees.environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", NAMES)
def test_an_import_from_its_root_meets_it(clone, name):
    done = run(clone, "-c", f"import {name}")
    assert done.returncode == 1 and MET in done.stderr, done.stderr


def test_pytest_meets_them(clone):
    # By its own name, as a user types it: `python -m pytest` would put the folder on the path by itself.
    pytest_itself = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    tests = [f"tests/test_meets_{name.split('.')[-1]}.py" for name in NAMES]
    done = run(clone, "-c", pytest_itself, "-p", "no:cacheprovider", "-p", "no:xdist", *tests)
    assert done.returncode == 1 and "2 failed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count(f"E   RuntimeError: {MET}") == 2


@pytest.mark.parametrize("link, folder", [("kernels", "kernels"), ("stages", "train")])
def test_kernels_and_stages_are_links_within_the_checkout(link, folder):
    path = trees.ROOT / "minimind_fast" / link
    assert path.is_symlink() and not Path(path.readlink()).is_absolute()
    assert path.resolve() == trees.ROOT / folder


@pytest.mark.parametrize("script", ["pretrain", "tokenizer", "pipeline"])
def test_a_script_run_by_its_path_takes_its_own_package(clone, script, tmp_path):
    """Python looks in train/ first, and then where the environment is editable from: in another checkout.

    All stages start alike; here it is pretraining.
    """
    own = clone / "minimind_fast" / "plugins.py"  # of every script
    text = own.read_text(encoding="utf-8")
    try:
        own.write_text(f"{text}\nraise RuntimeError({MET!r})\n", encoding="utf-8")
        command = [sys.executable, str(clone / "train" / f"{script}.py"), "--help"]
        done = subprocess.run(
            command, cwd=tmp_path, env=trees.environment(), capture_output=True, text=True, timeout=120
        )
    finally:
        own.write_text(text, encoding="utf-8")
    assert done.returncode == 1 and MET in done.stderr, done.stdout + done.stderr
