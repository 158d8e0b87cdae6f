"""Test set-up: kernels run in Triton's interpreter when there is no GPU; real data is optional.

TRITON_INTERPRET must be set before the first import of triton, hence here and before torch. One thread: tests are
many and small, and a second thread costs more than it gives.
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

import pytest  # noqa: E402

SHARED = Path(os.environ.get("SEPTET_REAL_DATA", ROOT.parent / "shared" / "data"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (minutes)")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pass --slow to run it"))


@pytest.fixture
def shared():
    """Folder of real data (data/*/README.md beside the project); tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data folder {SHARED.name} beside the project, or SEPTET_REAL_DATA=folder")
    return SHARED


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
