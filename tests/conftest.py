"""One fresh compile cache per session, a clean dynamo per test, and one line for the tests that need a GPU."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch

# Compile caches don't see an edit of a Python backward formula (pitfall 4): a cache from an earlier session could hide a fault
_CACHE = tempfile.mkdtemp(prefix="gqa_autograd-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)


# The tensors are small and the workers share the cores
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="every kernel, case and schedule in the emulator: about two hours on 2 cores")


def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def pytest_runtest_setup(item):
    # Skipped from here, and not by a mark, all of them share one line of the summary
    if item.get_closest_marker("gpu") is not None and not _hopper():
        pytest.skip("no NVIDIA Hopper GPU here: the kernels were not tested")


@pytest.fixture(autouse=True)
def clean():
    """No graph, seed or global switch survives a test."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
