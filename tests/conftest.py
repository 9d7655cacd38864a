"""What every test file shares: where the real data lies, and the marks that need special machines."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, MiniMind's tokenizers and golden models; not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the shared folder with real data beside the repository")
    return folder


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
