"""The disk cache: several processes with one empty cache folder at once, then one that only reads."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

STEP = """
import time, torch, gqa_autograd
start = time.monotonic()
gqa_autograd.warmup(64, causal=False, device="cuda")
q = torch.randn(1, 65, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
out = gqa_autograd.attention(q, q, q)
out.sum().backward()
reference = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3).transpose(1, 2)
torch.testing.assert_close(out, reference, rtol=2e-2, atol=2e-2)
print("seconds", time.monotonic() - start)
"""


def test_several_processes_fill_one_cache(tmp_path):
    env = {**os.environ, "TILELANG_CACHE_DIR": str(tmp_path)}

    def start():
        return subprocess.Popen([sys.executable, "-c", STEP], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    for process in [start() for _ in range(3)]:
        log, _ = process.communicate(timeout=400)
        assert process.returncode == 0, log[-2000:]
    log, _ = (reader := start()).communicate(timeout=100)
    assert reader.returncode == 0
    assert "begins to compile" not in log
