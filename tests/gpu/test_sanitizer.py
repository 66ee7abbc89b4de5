"""compute-sanitizer over small calls: no access out of bounds, no race in shared memory, no read of memory that nobody wrote."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sanitizer import unexplained

pytestmark = pytest.mark.gpu
# {tool: {pattern over a finding's lines: why it is none}}
EXPLAINED: dict[str, dict[str, str]] = {"memcheck": {}, "racecheck": {}, "initcheck": {}}
CALLS = [("memcheck", "all"), ("racecheck", "few"), ("racecheck", "grad"), ("initcheck", "few"), ("initcheck", "grad")]


@pytest.mark.parametrize(("tool", "calls"), CALLS)
def test_sanitizer(tool, calls):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip(f"no compute-sanitizer here: {tool} was not run")
    # Without the caching allocator each tensor is an allocation of its own, so that its bounds, and what nobody wrote, are known
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = Path(__file__).with_name("small_step.py")
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "50", sys.executable, str(script), calls]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=560)
    assert "small_step: done" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    rest = unexplained(done.stdout, EXPLAINED[tool])
    assert not rest, f"{len(rest)} findings, the first:\n{rest[0]}"
