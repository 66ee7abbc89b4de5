"""What the emulator knows of Hopper, feature by feature, on small kernels: against torch, and the same in every schedule."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad

pytest.importorskip("tilelang")

from small_kernels import changed, emulator, lowered, with_body

import hopper_emulator
from hopper_emulator import EmulationError, Emulator, Unknown
from hopper_emulator import build as building

SCHEDULES = ("eager", "lazy", 1, 2, 3)
NAN = float("nan")


def memory(tensor):
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def copied(argument):
    """With the same strides and the same gaps."""
    if not isinstance(argument, torch.Tensor):
        return argument
    storage = argument.untyped_storage().clone()
    return torch.tensor([], dtype=argument.dtype).set_(storage, argument.storage_offset(), argument.shape, argument.stride())


def run(kernel, *arguments):
    """The arguments after a run; every schedule must give the same bits."""
    outcomes = [[copied(a) for a in arguments] for _ in SCHEDULES]
    for schedule, outcome in zip(SCHEDULES, outcomes, strict=True):
        kernel(*outcome, schedule=schedule)
    for outcome in outcomes[1:]:
        for first, other in zip(outcomes[0], outcome, strict=True):
            assert not isinstance(first, torch.Tensor) or torch.equal(memory(first), memory(other))
    return outcomes[0]


def failure(kernel, *arguments, schedule="eager"):
    before = [copied(a) for a in arguments]
    with pytest.raises(EmulationError) as caught:
        kernel(*arguments, schedule=schedule)
    for a, b in zip(before, arguments, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(memory(a), memory(b))
    return caught.value


def quoted(kernel, error):
    """The line of the generated CUDA that the error names."""
    return (kernel.library.parent / "kernel.cpp").read_text().splitlines()[error.line - 1]


def integers(*shape, dtype=torch.float32):
    return torch.randint(-8, 9, shape).to(dtype)


# M, N, K, transpose A, transpose B, type, A in registers, loaded by TMA
PRODUCTS = [
    (64, 8, 16, False, True, "float16", False, False),
    (64, 16, 64, True, False, "bfloat16", False, True),
    (64, 24, 32, False, True, "bfloat16", True, True),
    (64, 32, 32, False, False, "float16", False, False),
    (64, 40, 128, False, True, "bfloat16", False, True),
    (64, 96, 32, False, False, "bfloat16", True, False),
    (128, 160, 64, False, True, "bfloat16", False, False),
    (64, 256, 64, True, False, "float16", False, False),
]


@pytest.mark.parametrize("configuration", PRODUCTS, ids=str)
def test_wgmma_is_the_matrix_product(configuration):
    M, N, K, transpose_A, transpose_B, dtype, *_ = configuration
    A, B = integers(M, K, dtype=getattr(torch, dtype)), integers(K, N, dtype=getattr(torch, dtype))
    stored = [x.T.contiguous() if t else x for x, t in ((A, transpose_A), (B, transpose_B))]
    *_, C = run(emulator("product", *configuration), *stored, torch.full((M, N), NAN))
    assert torch.equal(C.double(), A.double() @ B.double())


def test_the_products_use_all_swizzles_and_both_orders_of_each_operand():
    text = "".join(lowered("product", *configuration).device for configuration in PRODUCTS)
    for part in (
        *(f"descriptor<{swizzle}, " for swizzle in (1, 2, 3)),
        *(f", 16, {a}, {b}, 1, 1>" for a, b in (("false", "false"), ("false", "true"), ("true", "true"))),
        *("wgmma_ss<", "wgmma_rs<", "tma_load(A_desc", "tma_load(B_desc", " 64, 8, 16,", " 64, 256, 16,"),
    ):
        assert part in text


SHIFTED_ROWS = [(5 * lane + 3) % 32 for lane in range(32)]
LOADS = [f"tl::ptx_ldmatrix_{form}(row, r);" for form in ("x1", "x2", "x4", "x1_trans", "x2_trans", "x4_trans")]
REGISTERS = ("r[0]", "r[0], r[1]", "r[0], r[1], r[2], r[3]")
STORES = [f"tl::ptx_stmatrix_m8n8_x{2**n}{order}(row, {REGISTERS[n]});" for order in ("", "_trans") for n in range(3)]
CASES = "\n  ".join(f"if (which == {number}) {call}" for number, call in enumerate(LOADS + STORES))
# The lanes whose addresses an instruction ignores have none
MATRICES = f"""
  __shared__ __align__(16) uchar s[512];
  int t = threadIdx.x;
  uint r[4] = {{}};
  uchar* row = t < 8 << which % 3 ? s + (5 * t + 3) % 32 * 16 : nullptr;
  *(uint4*)(s + 16 * t) = which < 6 ? *(uint4*)(X + 4 * t) : make_uint4(0, 0, 0, 0);
  for (int i = 0; i < 4; ++i) if (which >= 6) r[i] = X[4 * t + i];
  __syncthreads();
  {CASES}
  __syncthreads();
  *(uint4*)(Y + 4 * t) = which < 6 ? make_uint4(r[0], r[1], r[2], r[3]) : *(uint4*)(s + 16 * t);
"""


@functools.cache
def matrices():
    return Emulator(with_body(MATRICES))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_ldmatrix_gives_each_lane_two_neighbours_of_each_matrix(power, transposed):
    shared = torch.randperm(256).to(torch.int16).view(32, 8)
    _, Y, _ = run(matrices(), shared.view(torch.int32).flatten(), torch.zeros(128, dtype=torch.int32), 3 * transposed + power)
    fragments = torch.zeros(32, 4, 2, dtype=torch.int16)
    for i, matrix in enumerate(shared[SHIFTED_ROWS].view(4, 8, 8)[: 2**power]):
        # PTX ISA: lanes 4 r to 4 r + 3 hold row r, two columns each
        fragments[:, i] = (matrix.T if transposed else matrix).reshape(32, 2)
    assert torch.equal(Y.view(torch.int16).view(32, 4, 2), fragments)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_stmatrix_puts_the_lanes_elements_back_to_their_rows(power, transposed):
    registers = torch.randperm(256).to(torch.int16).view(32, 4, 2)
    _, Y, _ = run(matrices(), registers.view(torch.int32).flatten(), torch.zeros(128, dtype=torch.int32), 6 + 3 * transposed + power)
    shared = torch.zeros(32, 8, dtype=torch.int16)
    for i in range(2**power):
        matrix = registers[:, i].reshape(8, 8)
        shared[SHIFTED_ROWS[8 * i : 8 * i + 8]] = matrix.T if transposed else matrix
    assert torch.equal(Y.view(torch.int16).view(32, 8), shared)


def test_a_pipeline_of_cp_async_groups_keeps_its_order():
    X = torch.randn(6, 256)
    assert "cp_async_wait<2>" in lowered("pipeline", 6, 3).device
    _, Y = run(emulator("pipeline", 6, 3), X, torch.full_like(X, NAN))
    assert torch.equal(Y, X.flip(1) * 2)


@pytest.mark.parametrize("width", [64, 256])
def test_cp_async_of_four_and_of_sixteen_bytes(width):
    X = torch.randn(3, width)
    assert f"cp_async_gs<{width // 16}>" in lowered("async_copy", width).device
    _, Y = run(emulator("async_copy", width), X, torch.full_like(X, NAN))
    assert torch.equal(Y, X.flip(1))


@pytest.mark.parametrize(
    ("wait", "too_little", "configuration"),
    [("tl::cp_async_wait<0>();", "", ("async_copy", 256)), ("cp_async_wait<2>", "cp_async_wait<3>", ("pipeline", 6, 3))],
    ids=["none", "too few groups"],
)
def test_a_cp_async_that_nobody_waits_for_is_named(wait, too_little, configuration):
    kernel = changed(wait, too_little, *configuration)
    for schedule in SCHEDULES:
        error = failure(kernel, torch.randn(6, 256), torch.full((6, 256), NAN), schedule=schedule)
        assert error.kind == "unwaited"
        assert "cp.async" in str(error)
        assert "x[" in quoted(kernel, error)


def test_wait_all_waits_also_for_copies_that_no_group_holds():
    X = torch.randn(2, 256)
    _, Y = run(changed("tl::cp_async_commit();", "", "async_copy", 256), X, torch.full_like(X, NAN))
    assert torch.equal(Y, X.flip(1))


def test_a_bulk_copy_moves_rows_and_wants_them_aligned():
    X = torch.randn(4, 256)
    assert "tma_load((&(x[0])), (&(X[" in lowered("rows", 256).device
    assert torch.equal(run(emulator("rows", 256), X, torch.full_like(X, NAN))[1], X)
    shifted = torch.randn(4 * 256 + 1)[1:].view(4, 256)
    error = failure(emulator("rows", 256), shifted, torch.full_like(X, NAN))
    assert error.kind == "tma"
    assert "multiples of 16" in str(error)


def board(width):
    """20 x 24, with gaps between the rows."""
    return torch.randn(20, width)[:, :24]


PLACES = [(0, 0), (4, 8), (-3, -5), (15, 20), (-3, 20), (15, -5), (-8, 3), (20, 0), (1, 1), (100, -100)]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_tma_load_is_zero_outside_of_the_tensor(place):
    r, c = place
    X = board(28)
    _, Y, *_ = run(emulator("boxes", 8, 16), X, torch.full((8, 16), NAN), board(32), board(32), r, c, 0, 0)
    assert torch.equal(Y, pad(X, [200] * 4)[200 + r :, 200 + c :][:8, :16])


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_tma_stores_and_adding_stores_leave_everything_outside_untouched(place):
    r, c = place
    X, Z, W = board(28), board(32), board(32)
    _, _, Z_after, W_after, *_ = run(emulator("boxes", 8, 16), X, torch.full((8, 16), NAN), Z, W, 2, 3, r, c)
    box = X[2:10, 3:19]
    for before, after, new in ((Z, Z_after, lambda _: box), (W, W_after, lambda old: old + box + box)):
        whole, expected = pad(before, [200] * 4), copied(before)
        target = whole[200 + r :, 200 + c :][:8, :16]
        target.copy_(new(target.clone()))
        expected.copy_(whole[200:220, 200:224])
        assert torch.equal(memory(after), memory(expected))


def test_a_tma_coordinate_has_32_bits():
    kernel = changed("(&(x[0])), c, r)", "(&(x[0])), c + (1ll << 32), r)", "boxes", 8, 16)
    X = board(28)
    _, Y, *_ = run(kernel, X, torch.full((8, 16), NAN), board(32), board(32), 1, 2, 0, 0)
    assert torch.equal(Y, X[1:9, 2:18])


def test_a_tensor_map_refuses_a_base_and_a_stride_that_are_not_multiples_of_16_bytes():
    rest = [torch.zeros(8, 16), board(32), board(32), 0, 0, 0, 0]
    for X, what in ((torch.randn(20 * 28 + 1)[1:].view(20, 28)[:, :24], "address"), (board(26), "stride")):
        error = failure(emulator("boxes", 8, 16), X, *rest)
        assert error.kind == "host"
        assert what in str(error)
        assert "multiple of 16" in str(error)


# n, m, axis; what AllReduce goes over: threads, step
@pytest.mark.parametrize(
    ("configuration", "lanes"),
    [((32, 16, 1), "4, 1"), ((32, 64, 1), "16, 1"), ((8, 128, 1), "32, 1"), ((1, 512, 1), "128, 1"), ((64, 8, 0), "128, 2")],
    ids=str,
)
def test_reductions_within_a_warp_and_over_warps(configuration, lanes):
    n, m, axis = configuration
    X = integers(n, m) - 20
    assert all(f"AllReduce<tl::{op}Op, {lanes}, 0" in lowered("reductions", *configuration).device for op in ("Sum", "Max"))
    kept = m if axis == 0 else n
    _, total, largest = run(emulator("reductions", *configuration), X, torch.full((kept,), NAN), torch.full((kept,), NAN))
    assert torch.equal(total, X.sum(axis))
    assert torch.equal(largest, X.amax(axis))


def test_shuffles_votes_and_a_named_barrier():
    X = torch.randint(0, 1000, (64,), dtype=torch.int32)
    X[40] = 1001
    _, Y = run(emulator("exchanges"), X, torch.full((7, 64), -1, dtype=torch.int32))
    lanes, warps = torch.arange(32), X.view(2, 32)
    down, up = (lanes + 3).where(lanes + 3 < 32, lanes), (lanes - 3).where(lanes >= 3, lanes)
    for row, source in ((0, lanes ^ 5), (1, down), (2, up), (3, torch.full((32,), 7))):
        assert torch.equal(Y[row].view(2, 32), warps[:, source])
    assert torch.equal(Y[4:6], torch.tensor([[0] * 32 + [1] * 32, [1] * 32 + [0] * 32], dtype=torch.int32))
    assert torch.equal(Y[6].view(2, 32), warps[[0, 0]])


def test_threads_that_pass_a_barrier_by_read_too_early():
    words = torch.zeros(64, dtype=torch.int32), torch.zeros(7, 64, dtype=torch.int32)
    blocks = *(torch.zeros(3, 32, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.int64)), 0.0, 0, 0
    for barrier, name, configuration, arguments in (
        ("tl::__sync_thread_partial(3, 64);", "exchanges", (), words),
        ("__syncthreads();", "grid", (3, None, None), blocks),
    ):
        kernel = changed(barrier, "", name, *configuration)
        kinds = {failure(kernel, *arguments, schedule=schedule).kind for schedule in SCHEDULES}
        assert kinds <= {"race", "unwritten"}


def test_atomic_additions_of_several_blocks_add_up():
    X = integers(5, 256)
    assert all(name in lowered("sums").device for name in ("AtomicAdd(", "AtomicAddx2("))
    _, by_column, counter = run(emulator("sums"), X, torch.ones(256), torch.zeros(1, dtype=torch.int32))
    assert torch.equal(by_column, X.sum(0) + 1)
    assert counter.item() == 5 * 128


@pytest.mark.parametrize("scalars", [(-1.5, -7, -(2**40)), (3e38, 2**31 - 40, 2**62)], ids=str)
@pytest.mark.parametrize("size", [(3, None, None), (2, 3, None), (2, 3, 4)], ids=str)
def test_grids_scalars_and_static_shared_memory(size, scalars):
    f, i, n = scalars
    blocks = size[0] * (size[1] or 1) * (size[2] or 1)
    empty = (torch.zeros(blocks, 32, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.int64))
    F, N, L, *_ = run(emulator("grid", *size), *empty, f, i, n)
    assert torch.equal(F, torch.full_like(F, f))
    assert torch.equal(N, (i + 31 - torch.arange(32, dtype=torch.int32)).expand(blocks, 32))
    assert torch.equal(L, (n + torch.arange(blocks)).view(blocks, 1).expand(blocks, 32))


def window():
    """Rows of 8, with a gap of 2 before and after each, in a storage of 4 x 12."""
    return torch.randn(4, 12)[:, 2:10]


def test_elements_of_a_view_can_be_read_and_written():
    X, Z = window(), window()
    _, Y, after, *_ = run(emulator("element"), X, torch.zeros(1), Z, 3, 7, 1, 0)
    assert Y.item() == X[3, 7]
    Z[1, 0] = 1
    assert torch.equal(memory(after), memory(Z))


@pytest.mark.parametrize("outside", [(0, 8), (1, -1), (0, -1), (0, -3), (3, 10), (-5, 0), (4, 0)], ids=str)
def test_a_gap_and_what_lies_around_the_storage_are_out_of_bounds(outside):
    kernel = emulator("element")
    for place, argument, access in (((*outside, 0, 0), "argument 0", "Y[0] = "), ((0, 0, *outside), "argument 2", "Z[")):
        error = failure(kernel, window(), torch.zeros(1), window(), *place)
        assert error.kind == "out of bounds"
        assert argument in str(error)
        assert access in quoted(kernel, error)


def test_casts_round_as_torch_does():
    X = torch.cat([torch.randn(90), torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 65520.0, 1e-7, 1e-40, 3.4e38, -3.4e38, NAN])])
    X = torch.cat([X, torch.tensor([float("inf"), -float("inf"), *([1 + 2**-11] * 26)])])
    _, B, H = run(emulator("casts"), X, torch.zeros(128, dtype=torch.bfloat16), torch.zeros(128, dtype=torch.float16))
    torch.testing.assert_close(B, X.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(H, X.half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "text",
    [
        "Y[0] = tl::no_such_function(X[0]);",
        'asm volatile("no.such.instruction %0;\\n" :: "r"(which));',
        "tl::wgmma_ss<tl::DataType::kFloat32, tl::DataType::kFloat32, tl::DataType::kFloat32, 64, 8, 8, false, false>(0, 0, 0, 0);",
    ],
    ids=["function", "PTX", "product"],
)
def test_what_is_unknown_is_named_with_its_line(text):
    code = with_body(f"  int x = 1;\n  {text}\n  Y[1] = x;")
    with pytest.raises(Unknown) as caught:
        Emulator(code)
    line = next(number for number, line in enumerate(code.device.splitlines(), 1) if text in line)
    assert f"line {line}: " in str(caught.value)
    assert (text if "asm" not in text else "no.such.instruction %0;") in str(caught.value)


def test_a_warp_operation_on_some_lanes_only_is_unknown():
    text = "Y[threadIdx.x] = __shfl_xor_sync(0xffffu, X[threadIdx.x], 1);"
    error = failure(Emulator(with_body(text)), *(torch.zeros(128, dtype=torch.int32) for _ in range(2)), 0)
    assert error.kind == "unknown"
    assert "0xffff only" in str(error)
    assert text in str(error)


def test_inline_ptx_takes_its_meaning_from_the_table():
    asm = 'asm volatile("{\\n.reg .pred p;\\n\\tmov.u32 %0, %1; }\\n" : "=r"(y) : "r"(X[which]) : "memory");'
    text = f"int y;\n  {asm}\n  Y[threadIdx.x] = y;"
    kernel = Emulator(with_body(text), {"{ .reg .pred p; mov.u32 %0, %1; }": "{0} = {1};"})
    X = torch.arange(128, dtype=torch.int32)
    _, Y, _ = run(kernel, X, torch.zeros_like(X), 77)
    assert torch.equal(Y[:32], torch.full((32,), 77, dtype=torch.int32))


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOPPER_EMULATOR_CACHE", str(tmp_path))
    monkeypatch.setattr(building, "CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match=r"needs a C\+\+ compiler.*no-such-compiler.*CXX"):
        Emulator(lowered("words"))


BUILD_AND_RUN = """
import sys, torch
from hopper_emulator import Code, Emulator
kernel = Emulator(Code(*(open(path).read() for path in sys.argv[1:])))
X, Y = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
kernel(X, Y, 5)
assert torch.equal(Y[:32], X[:32] + 5)
"""


def test_two_processes_can_build_the_same_kernel_at_once(tmp_path):
    # The runtime, which takes longest, is there already
    runtime = building._runtime()[0].parent
    shutil.copytree(runtime, tmp_path / "cache" / runtime.name)
    for name, text in lowered("words")._asdict().items():
        (tmp_path / name).write_text(text)
    paths = {"HOPPER_EMULATOR_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(hopper_emulator.__file__).parents[1])}
    command = [sys.executable, "-c", BUILD_AND_RUN, str(tmp_path / "device"), str(tmp_path / "host")]
    both = [subprocess.Popen(command, env=os.environ | paths, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    assert len(list((tmp_path / "cache").glob("*/kernel.so"))) == 1
