"""What every test file shares: where the real data lies, and the marks that need special machines."""

import os
from pathlib import Path

# Before PyTorch is imported, here and in processes that tests start: workers share the cores, and threads that wait for
# each other go to sleep. Two spinning threads for each of two workers take ten times as long on two cores.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# Processes that tests start run this checkout's package too, whatever the environment was installed from.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
# The same examples in every run: a failure can be repeated, and CI does not fail by the luck of a draw.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, MiniMind's tokenizers and golden models; not part of the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the shared folder with real data beside the repository")
    return folder


def pytest_collection_modifyitems(config, items):
    asked = config.getoption("markexpr")
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = "needs an NVIDIA GPU: torch.cuda.is_available() is False"
    if "aot" not in asked:
        skips["aot"] = "minutes of compilation: run with -m aot, as CI does"
    if "slow" not in asked:
        skips["slow"] = "minutes of installing and launching: run with -m slow, as CI does"
    if "proof" not in asked:
        skips["proof"] = "minutes of compiling and executing: run make proof, as CI does"
    if "whole" not in asked:
        skips["whole"] = "an hour of compiling and executing: run make proof WHOLE=1"
    for item in items:
        for name in skips:
            if item.get_closest_marker(name):  # keywords would hold the names of folders too
                item.add_marker(pytest.mark.skip(reason=skips[name]))
