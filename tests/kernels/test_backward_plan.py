"""What a backward passes to its kernels, with lists in the kernels' places: views, copies, workspaces, parts, who waits for whom."""

import warnings

import pytest
import torch

pytest.importorskip("tilelang", reason="no tilelang here: the launch code was not tested")

from gqa_autograd import meta
from gqa_autograd.kernels import backward_launch, config, device
from gqa_autograd.kernels.backward_launch import Call

AWAIT_ALL = 2**31 - 1
CAUSAL = (-1, 0)
# dO of the preprocess kernel, and of the main one; LSE2, DELTA, the sum of dQ, TURN and TABLE of the main one
DO, MAIN_DO, WORKSPACE = 1, 3, slice(4, 9)


class Recorder:
    """In the place of a backward's kernels: which were asked for, and the arguments of each that ran."""

    def __init__(self):
        self.asked, self.calls = [], []

    def __call__(self, cfg, dtype, has_dlse):
        self.asked.append((cfg, dtype, has_dlse))
        names = ("preprocess", "main", "postprocess", "combine")[: 4 if cfg.form == "split" else 3]
        return tuple(lambda *arguments, name=name: self.calls.append((name, arguments)) for name in names)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def arguments(self, name: str) -> tuple:
        (found,) = (arguments for called, arguments in self.calls if called == name)
        return found


@pytest.fixture
def kernels(monkeypatch) -> Recorder:
    """On a device that is current."""
    recorder = Recorder()
    monkeypatch.setattr(device, "require_hopper", lambda function, where: None)
    monkeypatch.setattr(device, "multiprocessors", lambda where: 132)
    monkeypatch.setattr(device, "is_current", lambda index: True)
    monkeypatch.setattr(backward_launch, "compiled", recorder)
    return recorder


def make(B=40, S_q=200, S_kv=300, H_q=4, H_kv=2, D=64, D_v=None):
    """q, k, v, do, out and lse; rows in a batch enough to be left whole."""
    D_v = D_v or D
    shapes = (B, S_q, H_q, D), (B, S_kv, H_kv, D), (B, S_kv, H_kv, D_v), (B, S_q, H_q, D_v), (B, S_q, H_q, D_v)
    return [*(torch.randn(shape).bfloat16() for shape in shapes), torch.randn(B, H_q, S_q)]


def launch(tensors, dlse=None, scale=0.125, window=(-1, -1), softcap=0.0, deterministic=True):
    """Returns the gradients, NaN where nothing was written."""
    q, k, v, do, out, lse = tensors
    tile = config.backward("test", q.shape[3], v.shape[3], *window, softcap)
    gradients = tuple(t.fill_(torch.nan) for t in meta.attention_bwd(q, k, v))
    backward_launch.launch(tile, Call(do, q, k, v, out, lse, dlse, scale, window, softcap, deterministic), *gradients)
    return gradients


def launch_varlen(tensors, cu_q, cu_k, deterministic=True, window=CAUSAL):
    q, k, v, do, out, lse = tensors
    tile = config.backward("test", q.shape[3], v.shape[3], *window, 0.0, packed=True)
    gradients = tuple(t.fill_(torch.nan) for t in meta.attention_bwd(q, k, v))
    call = Call(do, q, k, v, out, lse, None, 0.125, window, 0.0, deterministic)
    backward_launch.launch_varlen(tile, call, cu_q, cu_k, *gradients)
    return gradients


def same(found, wanted) -> bool:
    """One tensor: the same elements of the same memory."""
    return found.data_ptr() == wanted.data_ptr() and found.stride() == wanted.stride() and found.shape == wanted.shape


@pytest.mark.parametrize("with_dlse", [False, True])
def test_plain_tensors_are_passed_as_they_lie(kernels, with_dlse):
    q, k, v, do, out, lse = tensors = make()
    dlse = torch.randn(lse.shape) if with_dlse else None
    dq, dk, dv = launch(tensors, dlse, softcap=20.0)
    assert kernels.asked == [(config.BACKWARD[64, 64, "full", True, "dense"], torch.bfloat16, with_dlse)]
    assert kernels.names == ["preprocess", "main", "postprocess"]
    passed = kernels.arguments("preprocess")
    assert all(same(p, t) for p, t in zip(passed[:4], (out, do, lse, lse if dlse is None else dlse), strict=True))
    # With a softcap at D 64 blocks of 64 queries: 4 for each of 160 heads; of 128 keys: 3
    *_, lse2, delta, turns = passed
    q_, k_, v_, do_, *space = kernels.arguments("main")[:9]
    assert all(same(p, t) for p, t in zip((q_, k_, v_, do_), (q, k, v, do), strict=True))
    assert all(p is t for p, t in zip((space[0], space[1], space[3]), (lse2, delta, turns), strict=True))
    dk_, dv_, scale, softcap, left, right, *order = kernels.arguments("main")[9:]
    assert dk_ is dk
    assert dv_ is dv
    assert (scale, softcap, left, right) == (0.125, 20.0, 500, 500)
    # Tiles of a head, key blocks, parts, KV heads that go together, heads, patience
    assert order == [4, 3, 1, 1, 16, 4, AWAIT_ALL]
    assert all(p is t for p, t in zip(kernels.arguments("postprocess"), (space[2], turns, dq, 0.125), strict=True))


@pytest.mark.parametrize("sizes", config.D_BACKWARD, ids=str)
def test_the_workspace_is_what_is_documented(kernels, sizes):
    """Two float32 and a row of dQ in float32 for each row of q up to a whole block, an int32 for each of these blocks and one more. All of
    it uninitialised memory: no fill is launched."""
    D, D_v = sizes
    tensors = make(S_q=129, D=D, D_v=D_v)
    launch(tensors, window=CAUSAL)
    block_M = config.BACKWARD[D, D_v, "causal", False, "dense"].block_M
    lse2, delta, dq_sum, turns, table = kernels.arguments("main")[WORKSPACE]
    tiles = 40 * 4 * -(-129 // block_M)
    assert lse2.shape == delta.shape == (tiles, block_M)
    assert dq_sum.dtype == lse2.dtype == delta.dtype == torch.float32
    assert dq_sum.numel() == tiles * block_M * D
    assert dq_sum.shape[0] == tiles
    assert turns.dtype == table.dtype == torch.int32
    assert turns.shape == (tiles + 1,)
    # Only packed sequences have one
    assert table.shape[0] == 1


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("how", ["address", "strides", "expanded"])
def test_what_tma_cannot_read_is_copied(kernels, which, how):
    tensors = make(S_q=70, S_kv=70)
    t = tensors[which]
    if how == "address":
        tensors[which] = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
    elif how == "strides":
        tensors[which] = t.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        tensors[which] = t[:, :1].expand_as(t)
    launch(tensors)
    passed = kernels.arguments("main")[which]
    assert device.readable(passed)
    assert passed.data_ptr() != tensors[which].data_ptr()
    assert torch.equal(passed, tensors[which])
    if which == MAIN_DO:
        # The first kernel reads it by plain loads, from rows one after another
        assert kernels.arguments("preprocess")[DO].is_contiguous()
        assert torch.equal(kernels.arguments("preprocess")[DO], tensors[which])


def test_a_permuted_do_that_tma_can_read_is_read_in_place(kernels):
    tensors = make(S_q=70, S_kv=70)
    tensors[3] = tensors[3].transpose(1, 2).contiguous().transpose(1, 2)
    launch(tensors)
    assert same(kernels.arguments("main")[MAIN_DO], tensors[3])
    assert torch.equal(kernels.arguments("preprocess")[DO], tensors[3])


def test_views_of_a_fused_qkv_are_passed_as_they_lie(kernels):
    tensors = make(S_q=50, S_kv=50)
    tensors[:3] = torch.randn(40, 50, 8, 64).bfloat16().split([4, 2, 2], 2)
    launch(tensors)
    assert all(same(p, t) for p, t in zip(kernels.arguments("main")[:3], tensors[:3], strict=True))


def test_sides_of_a_window(kernels):
    tensors = make()
    for window, sides in ((CAUSAL, (500, 0)), ((7, 0), (7, 0)), ((-1, 3), (500, 3)), ((10**12, -1), (500, 500))):
        kernels.calls.clear()
        launch(tensors, window=window)
        assert kernels.arguments("main")[13:15] == sides


@pytest.mark.parametrize("shape", [{"S_q": 0}, {"S_kv": 0}, {"B": 0}, {"H_q": 0, "H_kv": 0}], ids=str)
def test_without_queries_or_keys_nothing_is_launched(kernels, shape):
    tensors = make(**shape)
    gradients = launch(tensors)
    empty = tuple(t.fill_(torch.nan) for t in meta.attention_bwd(*tensors[:3]))
    offsets = torch.zeros(2, dtype=torch.int32)
    tile = config.backward("test", 64, 64, *CAUSAL, 0.0, packed=True)
    q, k, v, do, out, lse = tensors
    backward_launch.launch_varlen(tile, Call(do, q, k, v, out, lse, None, 0.125, CAUSAL, 0.0, True), offsets, offsets, *empty)
    assert not kernels.calls
    for t in (*gradients, *empty):
        assert not t.any()


# --- parts ---
@pytest.mark.parametrize(
    ("shape", "parts"), [((1, 4096, 4096, 8, 1), (8, 1)), ((1, 2048, 2048, 32, 8), (2, 1)), ((1, 8192, 128, 2, 1), None)], ids=str
)
def test_a_small_grid_is_split_and_added_up(kernels, shape, parts):
    B, _, S_kv, _, H_kv = shape
    tensors = make(*shape, 128)
    dq, dk, dv = launch(tensors, window=CAUSAL if parts else (-1, -1))
    mask = "causal" if parts else "full"
    assert kernels.asked == [(config.BACKWARD[128, 128, mask, False, "split"], torch.bfloat16, False)]
    assert kernels.names == ["preprocess", "main", "postprocess", "combine"]
    dk_parts, dv_parts, *_, heads, queries, width, _inner, _patience = kernels.arguments("main")[9:]
    assert (heads, queries) == parts if parts else queries > 1
    for of_parts in (dk_parts, dv_parts):
        assert of_parts.shape == (heads * queries * B, S_kv, H_kv, 128)
        assert of_parts.dtype == torch.float32
    assert width == min(16, H_kv)
    for passed, of in zip(kernels.arguments("combine"), (dk_parts, dv_parts, dk, dv), strict=True):
        assert passed.data_ptr() == of.data_ptr()
        assert passed.shape == (heads * queries, B * S_kv * H_kv, 128)[-passed.ndim :]
    assert same(kernels.arguments("postprocess")[2], dq)


# --- who waits for whom ---
@pytest.mark.parametrize("packed", [False, True])
def test_all_earlier_sums_are_awaited_or_the_first(kernels, packed):
    for deterministic, patience in ((True, AWAIT_ALL), (False, 1)):
        kernels.calls.clear()
        if packed:
            launch_varlen(make(B=1), *[torch.tensor([0, 200], dtype=torch.int32)] * 2, deterministic)
        else:
            launch(make(), deterministic=deterministic)
        assert kernels.arguments("main")[-1] == patience
    assert len(set(kernels.asked)) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_torch_warns_where_it_was_asked_to(kernels, packed):
    """Only what is not deterministic, and only in the mode that asks for warnings."""

    def run(deterministic):
        if packed:
            launch_varlen(make(B=1), *[torch.tensor([0, 200], dtype=torch.int32)] * 2, deterministic)
        else:
            launch(make(), deterministic=deterministic)

    function = "attention_varlen_bwd" if packed else "attention_bwd"
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match=f"^{function}: the order of dq's sums is not fixed, its bits may change from run to run$"):
        run(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(True)
        torch.use_deterministic_algorithms(False)
        run(False)


@pytest.mark.parametrize(
    ("D", "deterministic", "S_q", "one_by_one"),
    [(64, False, 32768, False), (192, False, 4095, False), (192, False, 4096, True), (256, True, 16384, False)],
)
def test_heads_of_long_sequences_of_wide_heads_go_one_after_the_other(kernels, D, deterministic, S_q, one_by_one):
    launch(make(1, S_q, 64, 4, 2, D), deterministic=deterministic)
    assert kernels.arguments("main")[-2] == (1 if one_by_one else 4)


@pytest.mark.parametrize(
    ("D", "S_kv", "width"),
    [(64, 1, 16), (64, 2048, 16), (64, 2049, 15), (64, 16384, 2), (64, 40000, 1), (256, 4096, 16), (256, 8192, 8), (256, 40000, 4)],
)
def test_the_longer_the_sequences_the_fewer_kv_heads_go_together(kernels, D, S_kv, width):
    launch(make(5, 1, S_kv, 4, 4, D))
    assert kernels.arguments("main")[-3] == width


@pytest.mark.parametrize(
    ("D", "lengths", "width"),
    [(64, (9000, 1000), 3), (64, (16383,), 2), (64, (30,) * 20, 8), (64, (), 8), (256, (9000, 1000), 6), (256, (30000, 4000), 2)],
    ids=str,
)
def test_a_packed_head_has_the_keys_of_all_sequences(kernels, D, lengths, width):
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    launch_varlen(make(1, sum(lengths) + 1, sum(lengths) + 1, 8, 8, D), cu_seqlens, cu_seqlens)
    assert kernels.arguments("main")[-3] == width


# --- packed ---
def test_packed_sequences(kernels):
    """The offsets stay where they are; a tile and a key block more for each sequence than all tokens in one row would have, and one."""
    q, k, v, do, out, lse = tensors = make(1, 500, 700)
    cu_q, cu_k = (torch.tensor(values, dtype=torch.int32) for values in ([0, 100, 130, 500], [0, 0, 300, 650]))
    dq, dk, dv = launch_varlen(tensors, cu_q, cu_k)
    assert kernels.asked == [(config.BACKWARD[64, 64, "causal", False, "packed"], torch.bfloat16, False)]
    assert kernels.names == ["preprocess", "main", "postprocess"]
    head_tiles, key_blocks = 500 // 64 + 4, 700 // 128 + 4
    passed = kernels.arguments("preprocess")
    assert all(same(p, t) for p, t in zip(passed[:6], (out, do, lse, lse, cu_q, cu_k), strict=True))
    assert passed[10:] == (700, 0, head_tiles)
    main = kernels.arguments("main")
    assert all(same(p, t) for p, t in zip((*main[:4], *main[9:11]), (q, k, v, do, dk, dv), strict=True))
    lse2, delta, dq_sum, turns, table = main[WORKSPACE]
    assert all(p is t for p, t in zip(passed[6:10], (lse2, delta, turns, table), strict=True))
    assert lse2.shape == delta.shape == (4 * head_tiles, 64)
    assert dq_sum.numel() == 4 * head_tiles * 64 * 64
    assert turns.shape == (4 * head_tiles + 1,)
    assert table.shape[0] == key_blocks + -(-65 // 6)
    assert main[11:] == (0.125, 0.0, 1200, 0, head_tiles, key_blocks, 1, 1, 2, 4, AWAIT_ALL)
    given = (dq_sum, turns, cu_q, dq)
    assert all(p is t for p, t in zip(kernels.arguments("postprocess")[:4], given, strict=True))
    assert kernels.arguments("postprocess")[4:] == (0.125, head_tiles)


def test_strided_offsets_are_copied(kernels):
    offsets = torch.tensor([0, 9, 200, 9], dtype=torch.int32)[::2]
    launch_varlen(make(1, 200, 200), offsets, offsets)
    for passed in kernels.arguments("preprocess")[4:6]:
        assert passed.is_contiguous()
        assert passed.tolist() == [0, 200]


def test_another_device_is_current_for_all_launches(kernels, monkeypatch):
    order = []

    class Guard:
        def __init__(self, index):
            pass

        def __enter__(self):
            order.append("enter")

        def __exit__(self, *error):
            order.append(tuple(kernels.names))

    monkeypatch.setattr(device, "is_current", lambda index: False)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    launch(make())
    launch_varlen(make(B=1), *[torch.tensor([0, 200], dtype=torch.int32)] * 2)
    dense = ("preprocess", "main", "postprocess")
    assert order == ["enter", dense, "enter", dense * 2]
