"""GQAttention in use: hooked, sharded, wrapped, checkpointed, compiled, exported."""

import copy
import io
import math

import pytest
import torch
import torch._dynamo.testing
from nn_cases import H_KV, H_Q, ROTATIONS, SIZES, D, E, band, gradients, heads_of, randomize
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gqa_autograd import functional
from gqa_autograd.nn import GQAttention


# --- hooks, sharding, replacement ---
def test_attention_child_gets_the_heads_and_gives_lse():
    module = randomize(GQAttention(**SIZES, v_head_dim=6, rope=1e4, qk_norm=True, softcap=3.0, scale=0.4, dtype=torch.float64))
    x = torch.randn(2, 5, E, dtype=torch.float64, requires_grad=True)
    (q, k, v), (y, lse) = heads_of(module, x, return_lse=True)
    assert (q.shape, k.shape, v.shape) == ((2, 5, H_Q, D), (2, 5, H_KV, D), (2, 5, H_KV, 6))
    torch.testing.assert_close(y, module(x), rtol=0, atol=0)
    z = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(H_Q // H_KV, dim=2))
    z = (3.0 * torch.tanh(0.4 * z / 3.0)).masked_fill(~band(5, 5, 0), -math.inf)
    torch.testing.assert_close(lse, z.logsumexp(-1))
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), x, retain_graph=True), torch.autograd.grad(z.logsumexp(-1).sum(), x))


@pytest.mark.parametrize("deterministic", [None, False, True])
def test_deterministic_reaches_the_function(deterministic, monkeypatch):
    module, seen = GQAttention(**SIZES, deterministic=deterministic), []

    def spy(function):
        return lambda *args, **kwargs: seen.append(kwargs["deterministic"]) or function(*args, **kwargs)

    for name in ("attention", "attention_with_lse"):
        monkeypatch.setattr(functional, name, spy(getattr(functional, name)))
    module(torch.randn(1, 3, E))
    module(torch.randn(1, 3, E), return_lse=True)
    assert seen == [deterministic] * 2


def test_attention_child_may_be_replaced():
    class Values(nn.Module):
        def forward(self, q, k, v):
            return v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)

    module = GQAttention(**SIZES)
    module.attention = Values()
    x = torch.randn(2, 5, E)
    v = module.v_proj(x).unflatten(-1, (H_KV, D)).repeat_interleave(2, dim=2)
    torch.testing.assert_close(module(x), module.o_proj(v.flatten(2)))
    assert module(x[:0]).shape == (0, 5, E)


def test_column_parallel_shards_add_up():
    module = randomize(GQAttention(**SIZES, bias=True, out_bias=False, qk_norm=True, rope=1e4, v_head_dim=8, dtype=torch.float64))
    x = torch.randn(2, 7, E, dtype=torch.float64)
    parts = []
    for rank in range(2):
        shard = copy.deepcopy(module)
        for name in ("q_proj", "k_proj", "v_proj"):
            whole = getattr(module, name)
            rows = slice(rank * whole.out_features // 2, (rank + 1) * whole.out_features // 2)
            part = nn.Linear(E, whole.out_features // 2, dtype=torch.float64)
            part.load_state_dict({"weight": whole.weight[rows], "bias": whole.bias[rows]})
            setattr(shard, name, part)
        columns = slice(rank * module.o_proj.in_features // 2, (rank + 1) * module.o_proj.in_features // 2)
        shard.o_proj = nn.Linear(module.o_proj.in_features // 2, E, bias=False, dtype=torch.float64)
        shard.o_proj.load_state_dict({"weight": module.o_proj.weight[:, columns]})
        parts.append(shard(x))
    torch.testing.assert_close(parts[0] + parts[1], module(x))


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_projections_may_be_wrapped_and_parametrised(name):
    module = randomize(GQAttention(**SIZES, rope=1e4))
    x = torch.randn(2, 5, E)
    wrapped, merged = copy.deepcopy(module), copy.deepcopy(module)
    adapter = randomize(LowRank(getattr(wrapped, name)))
    setattr(wrapped, name, adapter)
    getattr(merged, name).load_state_dict({"weight": adapter.base.weight + adapter.b.weight @ adapter.a.weight})
    torch.testing.assert_close(wrapped(x), merged(x))
    before = module(x)
    parametrizations.weight_norm(getattr(module, name))
    torch.testing.assert_close(module(x), before)
    with torch.no_grad():
        getattr(module, name).parametrizations.weight.original0.mul_(2)
    assert (module(x) - before).abs().max() > 0.1


def test_checkpointing_recomputes_the_same():
    module = randomize(GQAttention(**SIZES, rope=1e4, qk_norm=True, dtype=torch.float64))
    x = torch.randn(2, 5, E, dtype=torch.float64, requires_grad=True)
    calls = []
    module.attention.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(checkpoint(module, x, use_reentrant=False), x, module)
    assert len(calls) == 2
    torch.testing.assert_close(again, gradients(module(x), x, module), rtol=0, atol=0)


# --- compile and export ---
def dynamic(t: torch.Tensor, *sizes: int) -> torch.Tensor:
    for size in sizes:
        torch._dynamo.mark_dynamic(t, size)
    return t


@pytest.mark.parametrize("rotation", ["rope", "positions", "position_embeddings"])
def test_compiles_to_one_graph_for_all_sizes(rotation):
    rope, arguments = ROTATIONS[rotation]
    module = randomize(GQAttention(**SIZES, rope=rope, qk_norm=True, window=4, dtype=torch.float64))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for grad, graphs in ((True, 1), (False, 2)):
        for B, S in ((2, 5), (3, 9)):
            x = dynamic(torch.randn(B, S, E, dtype=torch.float64, requires_grad=grad), 0, 1)
            given = arguments(S)
            for t in (*given.get("position_embeddings", ()), *([given["positions"]] if "positions" in given else [])):
                dynamic(t, t.dim() - 2 if t.dim() == 3 else 0)
            with torch.set_grad_enabled(grad):
                y, want = compiled(x, **given), module(x, **given)
            torch.testing.assert_close(y, want)
            if grad:
                torch.testing.assert_close(gradients(y, x, module), gradients(want, x, module))
        assert counter.frame_count == graphs


def test_compiles_with_symbolic_numbers():
    module = randomize(GQAttention(**SIZES, rope=500.0, softcap=2.0, scale=0.3, dtype=torch.float64))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for B, S in ((2, 5), (3, 9)):
        x = torch.randn(B, S, E, dtype=torch.float64, requires_grad=True)
        y, want = compiled(x), module(x)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(gradients(y, x, module), gradients(want, x, module))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiles_with_static_sizes_autocast_and_lse():
    module = GQAttention(**SIZES, rope=1e4, qk_norm=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = torch.randn(2, 5, E, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (y, lse), (y_want, lse_want) = compiled(x, return_lse=True), module(x, return_lse=True)
    assert (y.dtype, lse.dtype, counter.frame_count) == (torch.bfloat16, torch.float32, 1)
    torch.testing.assert_close((y, lse), (y_want, lse_want), rtol=0.02, atol=0.02)


def test_exports():
    module = randomize(GQAttention(**SIZES, rope=1e4, qk_norm=True, softcap=2.0)).eval()
    S = torch.export.Dim("S", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(2, 5, E),), dynamic_shapes={"x": {1: S}})
    operators = {str(node.target) for node in program.graph.nodes if "gqa_autograd" in str(node.target)}
    assert operators == {"gqa_autograd.attention_fwd.default"}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (2, 11):
        x = torch.randn(2, length, E)
        torch.testing.assert_close(loaded(x), module(x))
