"""A training step and an inference call of every head size at odd lengths: what test_sanitizer.py runs under compute-sanitizer."""

import torch

import gqa_autograd

for D in (64, 128, 256):
    for causal in (True, False):
        for S_q, S_kv in ((131, 77), (77, 131), (1, 1)):
            q = torch.randn(1, S_q, 4, D, dtype=torch.bfloat16, device="cuda", requires_grad=D < 256)
            k, v = (torch.randn(1, S_kv, 2, D, dtype=torch.bfloat16, device="cuda", requires_grad=D < 256) for _ in range(2))
            with torch.no_grad():
                gqa_autograd.attention(q, k, v, causal=causal)
            if D < 256:
                gqa_autograd.attention(q, k, v, causal=causal).sum().backward()
torch.cuda.synchronize()
print("small_step: done")
