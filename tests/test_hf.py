"""transformers generates with our cache and with our attention what it generates with its own, token for token at temperature 0."""

import pytest
import torch
import transformers
from nn_cases import randomize

from gqa_autograd.hf import NAME, HFCache, register

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=5)),
}
ATTENTIONS = ("eager", "sdpa", NAME)
register()


@pytest.fixture(params=MODELS)
def model(request):
    return randomize(MODELS[request.param]()).double().eval()


def make(model, batch=2, max_length=30):
    return HFCache(model.config, batch, max_length, dtype=model.dtype, device=model.device)


def generate(model, ids, cache, **options):
    torch.manual_seed(0)
    done = model.generate(
        ids, past_key_values=cache, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return done.sequences, torch.stack(done.logits)


def own(model, ids, attention="eager", **options):
    model.set_attn_implementation(attention)
    return generate(model, ids, transformers.DynamicCache(config=model.config), **options)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generates_the_same(model, attention):
    ids = torch.randint(2, 40, (2, 7))
    want, want_logits = own(model, ids)
    model.set_attn_implementation(attention)
    cache = make(model)
    addresses = [t.data_ptr() for t in (*cache.cache.k, *cache.cache.v)]
    got, logits = generate(model, ids, cache)
    # Tokens that vary, or nothing would be shown
    assert len(set(want[0, 7:].tolist())) > 2
    assert torch.equal(got, want)
    # Their softmax is float32 whatever the input
    torch.testing.assert_close(logits, want_logits, rtol=1e-4, atol=1e-4)
    # The last token is never fed
    assert cache.cache.lengths.tolist() == [15, 15]
    assert [t.data_ptr() for t in (*cache.cache.k, *cache.cache.v)] == addresses
    cache.reset()
    assert torch.equal(generate(model, ids, cache)[0], want)


def test_prompts_padded_on_the_left(model):
    """In float64 their eager attention makes NaN of a query that is padding."""
    ids = torch.randint(2, 40, (2, 7))
    ids[1, :3] = 0
    mask = (ids != 0).long()
    want, want_logits = own(model, ids, "sdpa", attention_mask=mask)
    got, logits = generate(model, ids, make(model), attention_mask=mask)
    assert want_logits.isfinite().all()
    assert torch.equal(got, want)
    torch.testing.assert_close(logits, want_logits)


def test_padding_is_refused_by_our_attention(model):
    ids = torch.randint(2, 40, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    model.set_attn_implementation(NAME)
    with pytest.raises(NotImplementedError, match="gqa_autograd: prompts must not be padded"):
        generate(model, ids, make(model), attention_mask=mask)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_beams(model, attention):
    ids = torch.randint(2, 40, (2, 5))
    want, _ = own(model, ids, num_beams=3)
    model.set_attn_implementation(attention)
    assert torch.equal(generate(model, ids, make(model, batch=6), num_beams=3)[0], want)


def test_crop_goes_back(model):
    model.set_attn_implementation("sdpa")
    ids, cache = torch.randint(2, 40, (2, 7)), make(model)
    with torch.no_grad():
        want = model(ids).logits
        model(ids[:, :6], past_key_values=cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 3
        got = model(ids[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(got, want[:, 3:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="HFCache: crop takes how many tokens to remove as a negative number, got 2"):
        cache.crop(2)


def test_more_tokens_than_it_was_made_for(model):
    with pytest.raises(ValueError, match="sequence 0 must have room for the new tokens, got 12 \\+ 1 tokens for 12 rows"):
        generate(model, torch.randint(2, 40, (2, 7)), make(model, max_length=12))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_trains_the_same(model, attention):
    """The attention alone, without a cache."""
    ids = torch.randint(2, 40, (2, 9))
    gradients = []
    for name in ("eager", attention):
        model.set_attn_implementation(name)
        loss = model(ids, labels=ids, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_what_the_attention_refuses():
    attend = transformers.AttentionInterface()[NAME]
    q = torch.randn(1, 4, 5, 16)
    with pytest.raises(ValueError, match=r"gqa_autograd: dropout must be 0, got 0\.5"):
        attend(torch.nn.Identity(), q, q, q, dropout=0.5)
    with pytest.raises(NotImplementedError, match="packed sequences are not supported through transformers"):
        attend(torch.nn.Identity(), q, q, q, cu_seq_lens_q=torch.tensor([0, 5]))
