"""compute-sanitizer's memcheck over a small step: no access out of bounds, no misaligned one, no error of the CUDA API."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def test_memcheck():
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer here: memcheck was not run")
    # Without the caching allocator each tensor is an allocation of its own, so that its bounds are known
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = Path(__file__).with_name("small_step.py")
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "small_step: done" in run.stdout
    assert "ERROR SUMMARY: 0 errors" in run.stdout
