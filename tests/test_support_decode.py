"""explain and warmup of decoding, its tiles and its thread blocks; all of it without a GPU."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gqa_autograd
from gqa_autograd import support, support_decode, testing, testing_decode
from gqa_autograd.kernels import build, config
from gqa_autograd.testing_decode import DecodeCase


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("S_page", [None, 16])
def test_explain_names_the_operator_that_runs(S_page, return_lse):
    given = testing_decode.make(DecodeCase(2, (30, 0), 6, 2, 8, S_page, dtype=torch.float32))
    said = gqa_autograd.explain(*given.arguments[:3], cache_seqlens=given.cache_seqlens, return_lse=return_lse, **given.options)
    function = gqa_autograd.attention_decode_with_lse if return_lse else gqa_autograd.attention_decode
    with testing.recorded() as bodies:
        function(*given.arguments, **given.options)
    assert said == support.Explanation(tuple(bodies), support.REFERENCE, None, None)


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize(("S_page", "form"), [(None, "dense"), (16, "small"), (32, "small"), (64, "paged"), (256, "paged")])
@pytest.mark.parametrize("D", config.D_DECODE)
def test_explain_shows_the_tile_of_a_cuda_call(D, S_page, form, softcap):
    with FakeTensorMode():
        q, cache = (torch.empty(shape, dtype=torch.float16, device="cuda") for shape in ((2, 3, 12, D), (2, S_page or 50, 2, D)))
        lengths, table = (torch.empty(shape, dtype=torch.int32, device="cuda") for shape in ((2,), (2, 9)))
        table = table if S_page else None
        said = gqa_autograd.explain(q, cache, cache, cache_seqlens=lengths, page_table=table, softcap=softcap)
    assert said.body == support.KERNEL
    assert said.forward_tile == config.DECODE[D, softcap > 0, form]
    assert f"form='{form}'" in str(said)


def test_explain_raises_what_the_call_would():
    given = testing_decode.make(DecodeCase(2, (30, 0), 6, 2, 8, dtype=torch.float32))
    with pytest.raises(TypeError, match="attention_decode: cache_seqlens must be int32, got int64"):
        gqa_autograd.explain(*given.arguments[:3], cache_seqlens=given.cache_seqlens.long())


def test_tiles_fit_their_boxes_and_their_multiprocessor():
    """The rings, the queries and what the launch keeps for itself, 1 KiB a block, out of 228 KiB."""
    for (D, softcap, form), tile in config.DECODE.items():
        assert (D, softcap, form) == (tile.D, tile.softcap, tile.form)
        assert tile.block_N % tile.box == 0
        assert {"dense": 64, "paged": 64, "small": 16}[form] == tile.box
        smem = 2 * D * (64 + tile.block_N * (tile.k_stages + tile.v_stages)) + 1024 + 1024
        assert smem * tile.blocks_per_sm <= 228 * 1024
        # At least 64 KB a multiprocessor on their way
        assert tile.blocks_per_sm * tile.block_N * D * 2 * (tile.k_stages + tile.v_stages) >= 2**16


@pytest.mark.parametrize("tile", [config.DECODE[D, False, "dense"] for D in config.D_DECODE], ids=lambda tile: f"d{tile.D}")
def test_thread_blocks(tile):
    """As many as the device holds at a time, and no more than there can be work for; never from what the lengths are."""
    for B, S_q, H_q, capacity in itertools.product((1, 3, 64), (0, 1, 8, 64), (8, 96, 568), (1, 64, 129, 8192, 65536)):
        blocks, fewest = config.decode_blocks(tile, B, S_q, H_q, 8, capacity, 132)
        tiles = B * 8 * max(1, -(-S_q * (H_q // 8) // 64)) * -(-capacity // tile.block_N)
        assert 1 <= blocks <= 132 * tile.blocks_per_sm
        assert blocks == min(132 * tile.blocks_per_sm, -(-tiles // fewest))
    with pytest.raises(
        NotImplementedError, match=r"attention_decode: B H_kv S_q capacity on CUDA must be below 1073741824 tiles of 64 rows"
    ):
        config.decode_blocks(tile, 2**20, 64, 64, 64, 2**30, 132)


def test_warmup_builds_all_forms_of_a_head_size(monkeypatch):
    from gqa_autograd import kernels

    made = []
    launch = SimpleNamespace(compiled=lambda tile, dtype: made.append((tile, dtype)))
    monkeypatch.setattr(kernels, "decode_launch", launch, raising=False)
    appending = []
    monkeypatch.setattr(kernels, "cache", SimpleNamespace(executable=lambda *configuration: appending.append(configuration)), raising=False)
    assert gqa_autograd.warmup((64, 128), (torch.bfloat16, torch.float16), decode=True, softcap=True) == build.built()
    wanted = {
        (config.DECODE[D, True, form], dtype)
        for D in (64, 128)
        for form in config.DECODE_FORMS
        for dtype in (torch.bfloat16, torch.float16)
    }
    assert set(made) == wanted
    assert len(made) == len(wanted)
    assert appending == [(dtype, paged) for dtype in (torch.bfloat16, torch.float16) for paged in (False, True)]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"D": (64, 96)}, NotImplementedError, "warmup: D on CUDA must be one of (64, 128, 256), got 96"),
        ({"dtype": torch.float32}, TypeError, "warmup: dtype must be float16 or bfloat16, got float32"),
    ],
)
def test_warmup_refuses_before_it_builds(monkeypatch, options, kind, message):
    from gqa_autograd import kernels

    monkeypatch.setattr(kernels, "decode_launch", SimpleNamespace(), raising=False)
    with pytest.raises(kind) as caught:
        gqa_autograd.warmup(**{"D": 64, **options}, decode=True)
    assert str(caught.value) == message


def test_warmup_launches_each_form(monkeypatch):
    from gqa_autograd import kernels

    seen = []
    monkeypatch.setattr(kernels, "decode_launch", SimpleNamespace(compiled=lambda tile, dtype: None), raising=False)
    monkeypatch.setattr(kernels, "cache", SimpleNamespace(executable=lambda dtype, paged: None), raising=False)
    appended = []
    monkeypatch.setattr(
        support_decode.ops_cache,
        "cache_append_",
        lambda k, v, k_new, v_new, lengths, table: appended.append((k.shape[1], int(lengths), table is None)),
    )
    monkeypatch.setattr(
        support_decode.functional_decode,
        "attention_decode",
        lambda q, k, v, lengths, page_table, softcap: seen.append((q.shape[3], k.shape[1], page_table is None, softcap)),
    )
    gqa_autograd.warmup(128, decode=True, device="cpu")
    assert seen == [(128, 1, True, 0.0), (128, 64, False, 0.0), (128, 16, False, 0.0)]
    assert appended == [(1, 0, True), (64, 0, False), (16, 0, False)]
