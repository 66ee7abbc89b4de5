"""nn.GQAttention: against Hugging Face's attention modules and torch's own attention, and everything else its docstring promises."""

import copy
import io
import math
import re

import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gqa_autograd import functional
from gqa_autograd.nn import GQAttention, rotary_embedding

E, H_Q, H_KV, D = 32, 4, 2, 16
SIZES = {"embed_dim": E, "num_heads": H_Q, "num_kv_heads": H_KV, "head_dim": D}
HF_SIZES = {
    "vocab_size": 32,
    "hidden_size": E,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": H_Q,
    "num_key_value_heads": H_KV,
    "head_dim": D,
    "rms_norm_eps": 1e-2,
    "attn_implementation": "eager",
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def randomize(module: nn.Module) -> nn.Module:
    """Weights far from 0 and 1, so that the scores vary and a norm's weight doesn't commute with the rotation."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module


def gradients(y: torch.Tensor, x: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return dict(zip(("x", *names), torch.autograd.grad(y, (x, *parameters), dy), strict=True))


# --- Hugging Face: the same weights, the same answer ---
def hf_llama():
    config = transformers.LlamaConfig(**HF_SIZES, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    return transformers.LlamaModel(config), 0, {"bias": True}


def hf_mistral():
    config = transformers.MistralConfig(**HF_SIZES, sliding_window=3)
    return transformers.MistralModel(config), 1, {"window": 3}


def hf_qwen3(layer):
    kinds = ["full_attention", "sliding_attention"]
    config = transformers.Qwen3Config(**HF_SIZES, layer_types=kinds, sliding_window=4, use_sliding_window=True)
    return transformers.Qwen3Model(config), layer, {"qk_norm": config.rms_norm_eps, "window": (None, 4)[layer]}


def hf_gemma2(layer):
    kinds = ["full_attention", "sliding_attention"]
    config = transformers.Gemma2Config(**HF_SIZES, layer_types=kinds, sliding_window=2, query_pre_attn_scalar=5, attn_logit_softcapping=1.5)
    return transformers.Gemma2Model(config), layer, {"softcap": 1.5, "scale": 5.0**-0.5, "window": (None, 2)[layer]}


HF = {
    "llama": hf_llama,
    "mistral": hf_mistral,
    "qwen3": lambda: hf_qwen3(0),
    "qwen3-sliding": lambda: hf_qwen3(1),
    "gemma2": lambda: hf_gemma2(0),
    "gemma2-sliding": lambda: hf_gemma2(1),
}


def hf_case(name: str):
    """Their attention module, what their model calls it with, and ours with their weights."""
    model, layer, options = HF[name]()
    model = randomize(model).double().train()
    theirs, seen = model.layers[layer].self_attn, {}
    handle = theirs.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    positions = torch.tensor([[0], [40]]) + torch.arange(11)
    model(torch.randint(HF_SIZES["vocab_size"], (2, 11)), position_ids=positions, use_cache=False)
    handle.remove()
    ours = GQAttention(**SIZES, rope=model.config.rope_parameters["rope_theta"], dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    call = {key: seen[key] for key in ("attention_mask", "position_embeddings")}
    return theirs, ours, seen["hidden_states"].detach(), positions, call


@pytest.mark.parametrize("rotation", ["position_embeddings", "positions"])
@pytest.mark.parametrize("name", HF)
def test_same_as_hugging_face(name, rotation):
    theirs, ours, x, positions, call = hf_case(name)
    rotate_by = {"positions": positions, "position_embeddings": call["position_embeddings"]}
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_theirs = theirs(hidden_states=x_theirs, **call)[0]
    y_ours = ours(x_ours, **{rotation: rotate_by[rotation]})
    # Their softmax and norms are float32 whatever the input
    torch.testing.assert_close(y_ours, y_theirs, rtol=1e-5, atol=2e-6)
    want, got = gradients(y_theirs, x_theirs, theirs), gradients(y_ours, x_ours, ours)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rotary_embedding_has_the_bits_of_hugging_face():
    config = transformers.LlamaConfig(**HF_SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    positions = torch.tensor([[0, 1, 2, 4095, 131071, 1000003]])
    want = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)(torch.empty(0), positions)
    torch.testing.assert_close(rotary_embedding(positions, D, 1e6), want, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rotary_embedding(positions, D, 1e6), want, rtol=0, atol=0)


# --- torch's own attention: what the checkpoints above leave out ---
def plain(module: GQAttention, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    heads = (
        p(x).unflatten(-1, (-1, size)).transpose(1, 2)
        for p, size in ((module.q_proj, module.head_dim), (module.k_proj, module.head_dim), (module.v_proj, module.v_head_dim))
    )
    return module.o_proj(F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(1, 2).flatten(2))


def band(S: int, left: int, right: int) -> torch.Tensor:
    distance = torch.arange(S) - torch.arange(S)[:, None]
    return (distance >= -left) & (distance <= right)


@pytest.mark.parametrize(
    ("options", "left", "right"),
    [
        ({}, 9, 0),
        ({"causal": False}, 9, 9),
        ({"causal": False, "window": 3}, 2, 2),
        ({"num_kv_heads": 1, "head_dim": None}, 9, 0),
        ({"num_kv_heads": None}, 9, 0),
        ({"v_head_dim": 6, "window": 5}, 4, 0),
        ({"bias": True}, 9, 0),
        ({"bias": True, "out_bias": False}, 9, 0),
        ({"out_bias": True, "deterministic": True}, 9, 0),
    ],
    ids=str,
)
def test_same_as_sdpa(options, left, right):
    module = randomize(GQAttention(**SIZES | options, dtype=torch.float64))
    assert (module.q_proj.bias is not None) == options.get("bias", False)
    assert (module.o_proj.bias is not None) == options.get("out_bias", options.get("bias", False))
    x = torch.randn(2, 9, E, dtype=torch.float64, requires_grad=True)
    y, want = module(x), plain(module, x, band(9, left, right))
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(gradients(y, x, module), gradients(want, x, module))


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_window_counts_the_token_itself(causal, window):
    module = randomize(GQAttention(**SIZES, causal=causal, window=window))
    x = torch.randn(1, 11, E, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x)[:, 5].sum(), x)
    seen = dx[0].abs().amax(1).nonzero().flatten().tolist()
    assert seen == list(range(5 - window + 1, 6 if causal else 5 + window))


def test_no_tokens():
    assert GQAttention(**SIZES, rope=1e4, qk_norm=True)(torch.randn(2, 0, E)).shape == (2, 0, E)


# --- rotation ---
def test_positions():
    module = randomize(GQAttention(**SIZES, rope=100.0, dtype=torch.float64))
    x = torch.randn(2, 7, E, dtype=torch.float64)
    counted = module(x)
    torch.testing.assert_close(module(x, positions=torch.arange(7)), counted, rtol=0, atol=0)
    torch.testing.assert_close(module(x, positions=torch.arange(7, dtype=torch.int32).unsqueeze(0)), counted, rtol=0, atol=0)
    # The rotation is relative: a shift leaves all as it was, but for the rounding of float32 angles; a stretch does not
    torch.testing.assert_close(module(x, positions=torch.arange(7) + 50), counted, rtol=1e-4, atol=1e-4)
    assert (module(x, positions=2 * torch.arange(7)) - counted).abs().max() > 0.1
    # Each row of the batch by its own positions
    both = torch.stack((torch.arange(7), 3 * torch.arange(7)))
    want = torch.cat([module(x[b : b + 1], positions=both[b]) for b in range(2)])
    torch.testing.assert_close(module(x, positions=both), want)


def test_position_embeddings_come_before_rope():
    given = rotary_embedding(torch.arange(5)[None], D, 100.0)
    x = torch.randn(2, 5, E)
    module = randomize(GQAttention(**SIZES, rope=100.0))
    other = GQAttention(**SIZES, rope=7.0)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x, position_embeddings=given), module(x), rtol=0, atol=0)
    torch.testing.assert_close(other(x, position_embeddings=tuple(t.expand(2, 5, D) for t in given)), module(x), rtol=0, atol=0)


# --- dtypes ---
def heads_of(module: GQAttention, *args, **kwargs):
    """What the attention child is called with, and the module's answer."""
    seen = []
    handle = module.attention.register_forward_pre_hook(lambda module, args: seen.extend(args))
    y = module(*args, **kwargs)
    handle.remove()
    return seen, y


ROTATIONS = {
    "none": (None, lambda S: {}),
    "rope": (1e4, lambda S: {}),
    "positions": (1e4, lambda S: {"positions": torch.arange(S)}),
    "position_embeddings": (None, lambda S: {"position_embeddings": rotary_embedding(torch.arange(S)[None], D)}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("mode", ["autocast", "parameters"])
def test_nothing_promotes_the_heads(mode, rotation, dtype, recwarn):
    rope, arguments = ROTATIONS[rotation]
    module = GQAttention(**SIZES, rope=rope, qk_norm=True, dtype=None if mode == "autocast" else dtype)
    x = torch.randn(2, 5, E, dtype=None if mode == "autocast" else dtype, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=mode == "autocast"):
        heads, y = heads_of(module, x, **arguments(5))
    assert [t.dtype for t in (*heads, y)] == [dtype] * 4
    y.float().sum().backward()
    assert {p.grad.dtype for p in (x, *module.parameters())} == {x.dtype}
    assert not [str(w.message) for w in recwarn if "Mismatch dtype" in str(w.message)]


@pytest.mark.parametrize("mode", ["autocast", "parameters"])
def test_angles_are_float32(mode):
    exact = GQAttention(**SIZES, rope=1e4)
    module = exact if mode == "autocast" else copy.deepcopy(exact).bfloat16()
    x = torch.randn(1, 9, E)
    # In bfloat16 these would be one and the same position
    positions = torch.arange(9) + 4097
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        (q, k, _), _ = heads_of(module, x if mode == "autocast" else x.bfloat16(), positions=positions)
    (q_exact, k_exact, _), _ = heads_of(exact, x, positions=positions)
    torch.testing.assert_close((q.float(), k.float()), (q_exact, k_exact), rtol=0.02, atol=0.02)


def test_norm_keeps_the_precision_of_its_weight():
    module = GQAttention(**SIZES, qk_norm=True)
    with torch.no_grad():
        module.q_norm.weight.fill_(1.003)
    x = torch.randn(64, 1, D).bfloat16()
    want = (1.003 * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert (module.q_norm(x) == want).double().mean() > 0.99


def test_float32_on_cuda_is_refused_by_a_message_that_names_autocast():
    module = GQAttention(**SIZES)
    with FakeTensorMode():
        parameters = {name: torch.empty(p.shape, device="cuda") for name, p in module.named_parameters()}
        with pytest.raises(TypeError, match=r"on CUDA must be float16 or bfloat16, got float32; .*torch\.autocast\('cuda'"):
            torch.func.functional_call(module, parameters, torch.empty(2, 5, E, device="cuda"))


# --- parameters ---
def test_names_and_no_buffers():
    module = GQAttention(**SIZES, bias=True, out_bias=False, qk_norm=True, rope=1e4)
    names = {f"{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")} | {"o_proj.weight", "q_norm.weight", "k_norm.weight"}
    assert set(module.state_dict()) == names
    assert list(module.buffers()) == []
    assert [type(getattr(module, f"{p}_proj")) for p in "qkvo"] == [nn.Linear] * 4
    assert list(module.attention.parameters()) == []


def test_meta_device():
    options = {**SIZES, "bias": True, "qk_norm": 1e-3, "rope": 1e4, "window": 3}
    with torch.device("meta"):
        module = GQAttention(**options)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    module.to_empty(device="cpu")
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(math.nan)
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    built = GQAttention(**options)
    torch.testing.assert_close(dict(module.named_parameters()), dict(built.named_parameters()), rtol=0, atol=0)
    assert built.q_proj.weight.std() > 0.05
    torch.testing.assert_close(module.q_norm.weight.detach(), torch.ones(D))
    x = torch.randn(2, 5, E)
    torch.testing.assert_close(module(x), built(x), rtol=0, atol=0)


def test_device_and_dtype_reach_every_parameter():
    module = GQAttention(**SIZES, bias=True, qk_norm=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


def test_extra_repr():
    module = GQAttention(
        **SIZES, v_head_dim=8, rope=500.0, causal=False, window=3, softcap=2.0, scale=0.5, deterministic=True, qk_norm=1e-3
    )
    assert module.extra_repr() == "32, num_heads=4, num_kv_heads=2, head_dim=16, v_head_dim=8, rope=500.0"
    assert "(attention): InnerAttention(causal=False, window=3, softcap=2.0, scale=0.5, deterministic=True)" in repr(module)
    assert "(q_norm): HeadNorm((16,), eps=0.001" in repr(module)
    plainest = GQAttention(8, 2)
    assert plainest.extra_repr() == "8, num_heads=2, num_kv_heads=2, head_dim=4"
    assert "(attention): InnerAttention(causal=True)" in repr(plainest)


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


# --- what is refused ---
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 0}, ValueError, "embed_dim must be at least 1, got 0"),
        ({"embed_dim": 32.0}, TypeError, "embed_dim must be an int, got 32.0"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"num_heads": True}, TypeError, "num_heads must be an int, got True"),
        ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=3"),
        ({"num_kv_heads": 8}, ValueError, "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=8"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        (
            {"embed_dim": 30, "head_dim": None},
            ValueError,
            "embed_dim must be a multiple of num_heads where head_dim is not given, got embed_dim=30, num_heads=4",
        ),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"head_dim": 15, "rope": 1e4}, ValueError, "head_dim must be even with rope, got 15"),
        ({"v_head_dim": -1}, ValueError, "v_head_dim must be at least 1, got -1"),
        ({"qk_norm": 0}, ValueError, "qk_norm must be above 0, got 0"),
        ({"qk_norm": "rms"}, TypeError, "qk_norm must be a number, got 'rms'"),
        ({"rope": 0.0}, ValueError, "rope must be above 0, got 0.0"),
        ({"rope": math.inf}, ValueError, "rope must be finite, got inf"),
        ({"rope": True}, TypeError, "rope must be a number, got True"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": (3, 0)}, TypeError, "window must be an int, got (3, 0)"),
        ({"softcap": -1.0}, ValueError, "softcap must be at least 0, got -1.0"),
        ({"softcap": None}, TypeError, "softcap must be a number, got None"),
        ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ({"scale": "auto"}, TypeError, "scale must be a number, got 'auto'"),
        ({"deterministic": 1}, TypeError, "deterministic must be True, False or None, got 1"),
        ({"dropout": 0.1}, ValueError, "dropout must be 0, got 0.1; "),
        ({"dropout": 0.1}, ValueError, "put nn.Dropout after this module"),
        ({"dropout": None}, TypeError, "dropout must be a number, got None"),
    ],
    ids=str,
)
def test_constructor_refuses(options, error, message):
    with pytest.raises(error, match=r"^GQAttention: .*" + re.escape(message)):
        GQAttention(**SIZES | options)


def test_constructor_accepts_the_values_that_switch_off():
    off = GQAttention(**SIZES, qk_norm=False, rope=None, window=None, softcap=0, scale=None, dropout=0)
    assert off.q_norm is None
    assert off.k_norm is None
    assert GQAttention(**SIZES, qk_norm=True).q_norm.eps == 1e-6


def pair(*shape):
    return torch.ones(shape), torch.ones(shape)


X = torch.zeros(2, 5, E)
ROPE = {"rope": 1e4}


@pytest.mark.parametrize(
    ("options", "x", "call", "error", "message"),
    [
        ({}, [1.0], {}, TypeError, "x must be a torch.Tensor, got list"),
        ({}, X[..., 1:], {}, ValueError, "x must be [B, S, E] with E=32, got shape (2, 5, 31)"),
        ({}, X[None], {}, ValueError, "x must be [B, S, E] with E=32, got shape (1, 2, 5, 32)"),
        ({}, X[0], {}, NotImplementedError, "x must be [B, S, E], there is no packed form [T, E] yet, got shape (5, 32)"),
        ({}, X, {"cu_seqlens": torch.tensor([0, 5])}, NotImplementedError, "cu_seqlens must be None, there is no packed form yet"),
        ({}, X[0], {"cu_seqlens": torch.tensor([0, 5])}, NotImplementedError, "got Tensor; pass x as [B, S, E]"),
        ({}, X, {"max_seqlen": 5}, NotImplementedError, "max_seqlen must be None, there is no packed form yet, got int"),
        ({}, X, {"kv_cache": object()}, NotImplementedError, "kv_cache must be None, there is no decoding yet, got object"),
        ({}, X, {"positions": torch.arange(5)}, ValueError, "positions must be None without rope"),
        (
            ROPE,
            X,
            {"positions": torch.arange(5), "position_embeddings": pair(1, 5, D)},
            ValueError,
            "positions and position_embeddings must not be given together",
        ),
        (ROPE, X, {"positions": [0, 1, 2, 3, 4]}, TypeError, "positions must be a torch.Tensor, got list"),
        (ROPE, X, {"positions": torch.arange(5.0)}, TypeError, "positions must be integers, got torch.float32"),
        (ROPE, X, {"positions": torch.ones(5, dtype=torch.bool)}, TypeError, "positions must be integers, got torch.bool"),
        (ROPE, X, {"positions": torch.arange(4)}, ValueError, "positions must be [S] or [B, S] with B=2, S=5, got shape (4,)"),
        (ROPE, X, {"positions": torch.tensor(3)}, ValueError, "positions must be [S] or [B, S] with B=2, S=5, got shape ()"),
        (ROPE, X, {"positions": torch.ones(3, 5).int()}, ValueError, "positions must be [S] or [B, S] with B=2, S=5, got shape (3, 5)"),
        (
            ROPE,
            X,
            {"positions": torch.ones(2, 1, 5).int()},
            ValueError,
            "positions must be [S] or [B, S] with B=2, S=5, got shape (2, 1, 5)",
        ),
        ({}, X, {"position_embeddings": torch.ones(2, 5, D)}, TypeError, "position_embeddings must be a pair (cos, sin), got Tensor"),
        ({}, X, {"position_embeddings": pair(1, 5, D)[:1]}, TypeError, "position_embeddings must be a pair (cos, sin), got tuple"),
        ({}, X, {"position_embeddings": (None, None)}, TypeError, "position_embeddings cos must be a torch.Tensor, got NoneType"),
        *(
            (
                {},
                X,
                {"position_embeddings": pair(*shape)},
                ValueError,
                f"position_embeddings cos must be [1, S, D] or [B, S, D] with B=2, S=5, D=16, got shape {shape}",
            )
            for shape in ((5, D), (3, 5, D), (1, 4, D), (2, 5, D // 2), (2, 5, 1), (2, 1, D), (1, 5, D, 1))
        ),
        (
            {},
            X,
            {"position_embeddings": (torch.ones(1, 5, D), torch.ones(1, 1, D))},
            ValueError,
            "position_embeddings sin must be [1, S, D] or [B, S, D] with B=2, S=5, D=16, got shape (1, 1, 16)",
        ),
    ],
)
def test_forward_refuses(options, x, call, error, message):
    module = GQAttention(**SIZES, **options)
    with pytest.raises(error, match=r"^GQAttention: .*" + re.escape(message)):
        module(x, **call)
