"""Small TileLang kernels, each for a few features of the emulator; `emulator` gives one by its name."""

import functools

import tilelang
import tilelang.language as T

from hopper_emulator import Code, Emulator, lower

TARGET = {"kind": "cuda", "arch": "sm_90a"}
# Copies in a pipeline go by cp.async, not by TMA and a producer warp
BY_CP_ASYNC = {tilelang.PassConfigKey.TL_DISABLE_WARP_SPECIALIZED: True, tilelang.PassConfigKey.TL_DISABLE_TMA_LOWER: True}
UNGUARDED = {tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True}


@tilelang.jit(target=TARGET)
def product(M, N, K, transpose_A, transpose_B, dtype, register_A, by_tma):
    """C = A B, both operands in shared memory as they lie in global memory; or A in registers."""
    shape_A, shape_B = [K, M] if transpose_A else [M, K], [N, K] if transpose_B else [K, N]

    @T.prim_func
    def product(A: T.Tensor(shape_A, dtype), B: T.Tensor(shape_B, dtype), C: T.Tensor([M, N], "float32")):
        with T.Kernel(1, threads=M * 2) as _:
            a = T.alloc_shared(shape_A, dtype)
            b = T.alloc_shared(shape_B, dtype)
            c = T.alloc_fragment([M, N], "float32")
            full = T.alloc_barrier(M * 2)
            if by_tma:
                T.tma_copy(A, a, barrier=full)
                T.tma_copy(B, b, barrier=full)
                T.mbarrier_arrive(full)
                T.mbarrier_wait_parity(full, 0)
            else:
                T.copy(A, a)
                T.copy(B, b)
            if register_A:
                in_registers = T.alloc_fragment([M, K], dtype)
                T.copy(a, in_registers)
                T.gemm(in_registers, b, c, transpose_B=transpose_B, clear_accum=True)
            else:
                T.gemm(a, b, c, transpose_A=transpose_A, transpose_B=transpose_B, clear_accum=True)
            T.copy(c, C)

    return product


@tilelang.jit(target=TARGET, pass_configs=BY_CP_ASYNC)
def pipeline(n, stages):
    @T.prim_func
    def pipeline(X: T.Tensor([n, 256], "float32"), Y: T.Tensor([n, 256], "float32")):
        with T.Kernel(1, threads=64) as _:
            x = T.alloc_shared([256], "float32")
            for i in T.Pipelined(n, num_stages=stages):
                T.copy(X[i, :], x)
                for j in T.Parallel(256):
                    Y[i, j] = x[255 - j] * 2.0

    return pipeline


@tilelang.jit(target=TARGET)
def async_copy(width):
    n = T.dynamic("n")

    @T.prim_func
    def async_copy(X: T.Tensor([n, width], "float32"), Y: T.Tensor([n, width], "float32")):
        with T.Kernel(n, threads=64) as b:
            x = T.alloc_shared([width], "float32")
            T.async_copy(X[b, :], x)
            T.ptx_wait_group(0)
            for j in T.Parallel(width):
                Y[b, j] = x[width - 1 - j]

    return async_copy


@tilelang.jit(target=TARGET)
def rows(width):
    """Y = X by bulk copies, which need no tensor map."""
    n = T.dynamic("n")

    @T.prim_func
    def rows(X: T.Tensor([n, width], "float32"), Y: T.Tensor([n, width], "float32")):
        with T.Kernel(n, threads=64) as b:
            x = T.alloc_shared([width], "float32")
            full = T.alloc_barrier(64)
            T.tma_copy(X[b, :], x, barrier=full)
            T.mbarrier_arrive(full)
            T.mbarrier_wait_parity(full, 0)
            T.copy(x, Y[b, :])

    return rows


@tilelang.jit(target=TARGET)
def boxes(height, width):
    """The box of X at (r, c) goes to Y and to the boxes of Z and, added twice, of W at (to_r, to_c)."""
    R, C, X_stride, Z_stride = T.dynamic("R"), T.dynamic("C"), T.dynamic("X_stride", "int64"), T.dynamic("Z_stride", "int64")

    @T.prim_func
    def boxes(
        X: T.StridedTensor([R, C], [X_stride, 1], "float32"),
        Y: T.Tensor([height, width], "float32"),
        Z: T.StridedTensor([R, C], [Z_stride, 1], "float32"),
        W: T.StridedTensor([R, C], [Z_stride, 1], "float32"),
        r: T.int32,
        c: T.int32,
        to_r: T.int32,
        to_c: T.int32,
    ):
        with T.Kernel(2, threads=128) as _:
            x = T.alloc_shared([height, width], "float32")
            full = T.alloc_barrier(128)
            T.tma_copy(X[r : r + height, c : c + width], x, barrier=full)
            T.mbarrier_arrive(full)
            T.mbarrier_wait_parity(full, 0)
            for i, j in T.Parallel(height, width):
                Y[i, j] = x[i, j]
            T.copy(x, Z[to_r : to_r + height, to_c : to_c + width])
            T.atomic_add(W[to_r : to_r + height, to_c : to_c + width], x, use_tma=True)

    return boxes


@tilelang.jit(target=TARGET)
def reductions(n, m, axis):
    kept = m if axis == 0 else n

    @T.prim_func
    def reductions(X: T.Tensor([n, m], "float32"), total: T.Tensor([kept], "float32"), largest: T.Tensor([kept], "float32")):
        with T.Kernel(1, threads=128) as _:
            x = T.alloc_fragment([n, m], "float32")
            y = T.alloc_fragment([kept], "float32")
            z = T.alloc_fragment([kept], "float32")
            T.copy(X, x)
            T.reduce_sum(x, y, dim=axis)
            T.reduce_max(x, z, dim=axis)
            T.copy(y, total)
            T.copy(z, largest)

    return reductions


@tilelang.jit(target=TARGET)
def exchanges():
    """Each row of Y is what one kind of exchange makes of X; warp 0 hands the last one over by named barrier 3."""

    @T.prim_func
    def exchanges(X: T.Tensor([64], "int32"), Y: T.Tensor([7, 64], "int32")):
        with T.Kernel(1, threads=64) as _:
            t = T.get_thread_binding()
            x = T.alloc_var("int32")
            s = T.alloc_shared([64], "int32")
            x = X[t]
            Y[0, t] = T.shfl_xor(x, 5)
            Y[1, t] = T.shfl_down(x, 3)
            Y[2, t] = T.shfl_up(x, 3)
            Y[3, t] = T.shfl_sync(x, 7)
            Y[4, t] = T.any_sync(x > 1000)
            Y[5, t] = T.all_sync(x < 1000)
            if t < 32:
                s[t] = x
                T.named_barrier_arrive(3, 64)
            else:
                T.sync_threads(3, 64)
                s[t] = s[t - 32]
            Y[6, t] = s[t]

    return exchanges


@tilelang.jit(target=TARGET)
def sums():
    n = T.dynamic("n")

    @T.prim_func
    def sums(X: T.Tensor([n, 256], "float32"), by_column: T.Tensor([256], "float32"), counter: T.Tensor([1], "int32")):
        with T.Kernel(n, threads=128) as b:
            for j in T.Parallel(256):
                T.atomic_add(by_column[j], X[b, j])
            T.atomic_add(counter[0], 1)

    return sums


@tilelang.jit(target=TARGET)
def grid(nx, ny, nz):
    """Each block writes the scalars and, through static shared memory, its threads' numbers from the other end; ny and nz may be None."""
    blocks = nx * (ny or 1) * (nz or 1)

    @T.macro
    def write(F, N, L, f, i, n, block):
        t = T.get_thread_binding()
        s = T.alloc_shared([32], "int32", scope="shared")
        s[t] = t
        F[block, t] = f
        N[block, t] = i + s[31 - t]
        L[block, t] = n + block

    @T.prim_func
    def grid(
        F: T.Tensor([blocks, 32], "float32"),
        N: T.Tensor([blocks, 32], "int32"),
        L: T.Tensor([blocks, 32], "int64"),
        f: T.float32,
        i: T.int32,
        n: T.int64,
    ):
        if ny is None:
            with T.Kernel(nx, threads=32) as x:
                write(F, N, L, f, i, n, x)
        elif nz is None:
            with T.Kernel(nx, ny, threads=32) as (x, y):
                write(F, N, L, f, i, n, y * nx + x)
        else:
            with T.Kernel(nx, ny, nz, threads=32) as (x, y, z):
                write(F, N, L, f, i, n, (z * ny + y) * nx + x)

    return grid


@tilelang.jit(target=TARGET, pass_configs=UNGUARDED)
def element():
    """Y[0] = X[i, j] and Z[k, l] = 1, without TileLang's guards."""
    R, C, X_stride, Z_stride = T.dynamic("R"), T.dynamic("C"), T.dynamic("X_stride", "int64"), T.dynamic("Z_stride", "int64")

    @T.prim_func
    def element(
        X: T.StridedTensor([R, C], [X_stride, 1], "float32"),
        Y: T.Tensor([1], "float32"),
        Z: T.StridedTensor([R, C], [Z_stride, 1], "float32"),
        i: T.int32,
        j: T.int32,
        k: T.int32,
        l: T.int32,  # noqa: E741
    ):
        with T.Kernel(1, threads=32) as _:
            if T.get_thread_binding() == 0:
                Y[0] = X[i, j]
                Z[k, l] = 1.0

    return element


@tilelang.jit(target=TARGET)
def casts():
    n = T.dynamic("n")

    @T.prim_func
    def casts(X: T.Tensor([n], "float32"), B: T.Tensor([n], "bfloat16"), H: T.Tensor([n], "float16")):
        with T.Kernel(T.ceildiv(n, 32), threads=32) as b:
            for j in T.Parallel(32):
                B[b * 32 + j] = T.cast(X[b * 32 + j], "bfloat16")
                H[b * 32 + j] = T.cast(X[b * 32 + j], "float16")

    return casts


@tilelang.jit(target=TARGET)
def words():
    """The frame for a body written by hand: one warp, X and Y of int32, and which of its cases is wanted."""

    @T.prim_func
    def words(X: T.Tensor([128], "int32"), Y: T.Tensor([128], "int32"), which: T.int32):
        with T.Kernel(1, threads=32) as _:
            t = T.get_thread_binding()
            Y[t] = X[t] + which

    return words


@functools.cache
def lowered(name, *configuration):
    return lower(globals()[name], *configuration)


@functools.cache
def emulator(name, *configuration):
    return Emulator(lowered(name, *configuration))


@functools.cache
def changed(old, new, name, *configuration):
    """The kernel with other words in its CUDA."""
    code = lowered(name, *configuration)
    assert old in code.device
    return Emulator(Code(code.device.replace(old, new), code.host))


def with_body(body):
    """The kernel `words` with this body."""
    code = lowered("words")
    head = code.device.split(") {\n")[0]
    return Code(f"{head}) {{\n{body}\n}}\n", code.host)
