"""nn.GQAttention: against Hugging Face's attention modules and torch's own attention, and everything else its docstring promises."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
import transformers
from nn_cases import H_KV, H_Q, ROTATIONS, SIZES, D, E, band, gradients, heads_of, plain, randomize
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gqa_autograd.nn import GQAttention, rotary_embedding

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
    assert module(torch.empty(2, 5, E, device="meta")).shape == (2, 5, E)
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
