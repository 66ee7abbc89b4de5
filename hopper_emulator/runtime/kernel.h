// What a kernel that TileLang generated finds here in place of CUDA and of TileLang's own templates. What is missing the kernels at hand
// don't use; the compiler then names it. Wrappers are always inlined, so that the runtime sees the kernel's own line as the caller.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel_calls.h"

#define EMU_INLINE inline __attribute__((always_inline))
#define __global__
#define __device__
#define __forceinline__ EMU_INLINE
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __shared__ static __attribute__((section("emu_shared")))
#define __align__(n) __attribute__((aligned(n)))
#define CUDART_INF_F INFINITY

typedef unsigned char uchar;
typedef unsigned int uint;

// Constant for the life of a fiber: asked once and kept
struct Dim {
  unsigned x, y, z;
};
Dim emu_thread() __attribute__((const));
Dim emu_block() __attribute__((const));
Dim emu_grid() __attribute__((const));
Dim emu_threads() __attribute__((const));
#define threadIdx emu_thread()
#define blockIdx emu_block()
#define gridDim emu_grid()
#define blockDim emu_threads()

#define EMU_VECTOR(T, NAME)                                      \
  struct NAME##1 { T x; };                                       \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };             \
  struct alignas(4 * sizeof(T)) NAME##4 { T x, y, z, w; };       \
  EMU_INLINE NAME##1 make_##NAME##1(T x) { return {x}; }         \
  EMU_INLINE NAME##2 make_##NAME##2(T x, T y) { return {x, y}; } \
  EMU_INLINE NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTOR(float, float)
EMU_VECTOR(int, int)
EMU_VECTOR(unsigned, uint)
EMU_VECTOR(unsigned short, ushort)
#undef EMU_VECTOR

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  EMU_INLINE explicit bfloat16_t(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    // Round to nearest even; NaN stays NaN
    bits = (wide & 0x7fffffff) > 0x7f800000 ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  EMU_INLINE operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
};
struct half_t {
  _Float16 value;
  half_t() = default;
  EMU_INLINE explicit half_t(float v) : value(v) {}
  EMU_INLINE operator float() const { return value; }
};
struct __nv_bfloat162 {
  bfloat16_t x, y;
};
struct half2 {
  half_t x, y;
};
typedef half2 __half2;
EMU_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {bfloat16_t(a.x), bfloat16_t(a.y)}; }
EMU_INLINE float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
EMU_INLINE half2 __float22half2_rn(float2 a) { return {half_t(a.x), half_t(a.y)}; }
EMU_INLINE float2 __half22float2(half2 a) { return {a.x, a.y}; }
template <class T>
EMU_INLINE uint __pack_half2(T low, T high) {
  T both[2] = {low, high};
  uint packed;
  memcpy(&packed, both, 4);
  return packed;
}
template <class T>
EMU_INLINE uint __pack_nv_bfloat162(T low, T high) {
  return __pack_half2(low, high);
}

template <class A, class B>
EMU_INLINE auto max(A a, B b) {
  return a < b ? b : a;
}
template <class A, class B>
EMU_INLINE auto min(A a, B b) {
  return b < a ? b : a;
}
EMU_INLINE float max(float a, float b) { return fmaxf(a, b); }
EMU_INLINE float min(float a, float b) { return fminf(a, b); }

template <class T>
EMU_INLINE T emu_from_lane(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emu::exchange(bits, lane);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
void emu_whole_warp(unsigned mask, int width = 32);
template <class T>
EMU_INLINE T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emu_whole_warp(mask, width), emu_from_lane(value, lane);
}
template <class T>
EMU_INLINE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emu_whole_warp(mask, width), emu_from_lane(value, (threadIdx.x & 31) ^ bits);
}
template <class T>
EMU_INLINE T __shfl_down_sync(unsigned mask, T value, int by, int width = 32) {
  int lane = threadIdx.x & 31;
  return emu_whole_warp(mask, width), emu_from_lane(value, lane + by < 32 ? lane + by : lane);
}
template <class T>
EMU_INLINE T __shfl_up_sync(unsigned mask, T value, int by, int width = 32) {
  int lane = threadIdx.x & 31;
  return emu_whole_warp(mask, width), emu_from_lane(value, lane >= by ? lane - by : lane);
}
EMU_INLINE int __any_sync(unsigned mask, int predicate) {
  int any = predicate != 0;
  for (int bits = 16; bits; bits >>= 1) any |= __shfl_xor_sync(mask, any, bits);
  return any;
}
EMU_INLINE int __all_sync(unsigned mask, int predicate) { return !__any_sync(mask, !predicate); }
EMU_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned found = predicate ? 1u << (threadIdx.x % 32) : 0;
  for (int distance = 1; distance < 32; distance *= 2) found |= __shfl_xor_sync(mask, found, distance);
  return found;
}
EMU_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
EMU_INLINE int __clz(int x) { return x ? __builtin_clz(x) : 32; }
EMU_INLINE void __syncwarp(unsigned mask = ~0u) { emu_whole_warp(mask), emu::warp_sync(); }
EMU_INLINE void __syncthreads() { emu::named_sync(0, blockDim.x); }
template <class T>
EMU_INLINE T atomicAdd(T* address, T value) {
  emu::atomic(address, sizeof(T));
  T before = *address;
  *address = before + value;
  return before;
}
// Thread blocks run one after another, so whatever a block wrote is there for the next
EMU_INLINE void __threadfence() {}
template <class T>
EMU_INLINE T __ldcg(const T* address) {
  return *address;
}
// TileLang's names. The wide ones are atomic element by element
template <class T, class V>
EMU_INLINE void AtomicAdd(T* address, V value) {
  atomicAdd(address, T(value));
}
EMU_INLINE void AtomicAddx2(float* address, float2 value) { atomicAdd(address, value.x), atomicAdd(address + 1, value.y); }
EMU_INLINE void AtomicAddx4(float* address, float4 value) {
  AtomicAddx2(address, {value.x, value.y}), AtomicAddx2(address + 2, {value.z, value.w});
}

struct alignas(64) CUtensorMap {
  char opaque[128];
};

struct Barrier {
  uint64_t word;
  EMU_INLINE void init(uint32_t count) { emu::mbarrier_init(this, count); }
  EMU_INLINE void wait(uint32_t parity) { emu::mbarrier_wait(this, parity); }
  EMU_INLINE void arrive() { emu::mbarrier_arrive(this, 0); }
  EMU_INLINE void arrive_and_expect_tx(uint32_t bytes) { emu::mbarrier_arrive(this, bytes); }
  EMU_INLINE void expect_transaction(uint32_t bytes) { emu::mbarrier_expect(this, bytes); }
};

namespace tl {
enum class DataType { kBFloat16, kFloat16, kFloat32 };

template <int N>
EMU_INLINE bool tl_shuffle_elect() {
  int thread = threadIdx.x;
  if (thread % 32) return false;
  if (N == 0) return thread == 0;
  return thread / 32 % ((N + 31) / 32) == 0;
}
EMU_INLINE void prefetch_tma_descriptor(const CUtensorMap&) {}
EMU_INLINE void fence_barrier_init() { emu::fence_inits(); }
EMU_INLINE void fence_proxy_async() { emu::proxy_fence(); }
template <int N>
EMU_INLINE void warpgroup_reg_alloc() {
  emu::set_registers(N, true);
}
template <int N>
EMU_INLINE void warpgroup_reg_dealloc() {
  emu::set_registers(N, false);
}
EMU_INLINE void __sync_thread_partial(int id, int threads) { emu::named_sync(id, threads); }
EMU_INLINE void __named_barrier_arrive(int id, int threads) { emu::named_arrive(id, threads); }

// Coordinates have 32 bits, whatever the expression has
template <class B, class... X>
EMU_INLINE void tma_load(const CUtensorMap& map, B& barrier, void* shared, X... at) {
  const int64_t place[] = {int32_t(at)...};
  emu::tma_load(&map, &barrier, shared, place, sizeof...(at));
}
template <class... X>
EMU_INLINE void tma_store(const CUtensorMap& map, const void* shared, X... at) {
  const int64_t place[] = {int32_t(at)...};
  emu::tma_store(&map, shared, place, sizeof...(at), false);
}
template <class... X>
EMU_INLINE void tma_store_add(const CUtensorMap& map, const void* shared, X... at) {
  const int64_t place[] = {int32_t(at)...};
  emu::tma_store(&map, shared, place, sizeof...(at), true);
}
// Rows of bytes; the adding one has its arguments the other way round
template <class B>
EMU_INLINE void tma_load(void* shared, const void* global, B& barrier, uint32_t bytes) {
  emu::bulk_load(shared, global, &barrier, bytes);
}
EMU_INLINE void tma_store(void* global, const void* shared, uint32_t bytes) { emu::bulk_store(global, shared, bytes, false); }
EMU_INLINE void tma_store_add(const float* shared, float* global, uint32_t bytes) { emu::bulk_store(global, shared, bytes, true); }
EMU_INLINE void tma_store_arrive() { emu::tma_store_commit(); }
template <int N, bool read = true>
EMU_INLINE void tma_store_wait() {
  emu::tma_store_wait(N);
}

template <int N>
EMU_INLINE void cp_async_gs(void* shared, const void* global) {
  emu::copy_async(shared, global, N, true);
}
template <int N>
EMU_INLINE void cp_async_gs_conditional(void* shared, const void* global, bool valid) {
  emu::copy_async(shared, global, N, valid);
}
EMU_INLINE void cp_async_commit() { emu::copy_commit(); }
template <int N>
EMU_INLINE void cp_async_wait() {
  if (N == 0) emu::copy_commit();  // cp.async.wait_all, which waits for uncommitted ones too
  emu::copy_wait(N);
}

extern "C" unsigned char buf_dyn_shmem[];
struct GmmaDescriptor {
  uint64_t bits = 0;
  EMU_INLINE operator uint64_t() const { return bits; }
  // Only the low half, with the address, moves
  template <class T>
  EMU_INLINE GmmaDescriptor operator+(T units) const {
    return {bits >> 32 << 32 | uint32_t(uint32_t(bits) + uint32_t(units))};
  }
};
template <int layout, int leading, int stride>
EMU_INLINE void initialize_wgmma_descriptor(GmmaDescriptor& descriptor, void* start) {
  uint64_t units = (static_cast<unsigned char*>(start) - buf_dyn_shmem) >> 4 & 0x3fff;
  descriptor.bits = units | uint64_t(leading & 0x3fff) << 16 | uint64_t(stride & 0x3fff) << 32 | uint64_t(layout) << 62;
}
template <class T>
EMU_INLINE void increase_descriptor_offset(GmmaDescriptor& descriptor, T bytes) {
  descriptor = descriptor + (bytes >> 4);
}
template <class T>
EMU_INLINE void warpgroup_fence_operand(T*, int) {}
EMU_INLINE void warpgroup_arrive() {}
template <DataType type>
constexpr emu::Element element_of() {
  static_assert(type != DataType::kFloat32, "the emulator knows wgmma of 16-bit types only");
  return type == DataType::kBFloat16 ? emu::Element::bfloat16 : emu::Element::float16;
}
template <DataType A, DataType B, DataType C, int M, int N, int K, bool ta, bool tb, int sa = 1, int sb = 1>
EMU_INLINE void wgmma_ss(uint64_t a, uint64_t b, uint32_t* c, int accumulate) {
  static_assert(M == 64 && K == 16 && A == B && C == DataType::kFloat32 && sa == 1 && sb == 1, "a wgmma that the emulator doesn't know");
  emu::product({element_of<A>(), N, ta, tb, false, a, b, nullptr, reinterpret_cast<float*>(c), accumulate != 0});
}
template <DataType A, DataType B, DataType C, int M, int N, int K, bool ta, bool tb, int sa = 1, int sb = 1>
EMU_INLINE void wgmma_rs(const uint32_t* a, uint64_t b, uint32_t* c, int accumulate) {
  static_assert(M == 64 && K == 16 && A == B && C == DataType::kFloat32 && sa == 1 && sb == 1, "a wgmma that the emulator doesn't know");
  emu::product({element_of<A>(), N, false, tb, true, 0, b, a, reinterpret_cast<float*>(c), accumulate != 0});
}
EMU_INLINE void warpgroup_commit_batch() { emu::product_commit(); }
template <int N>
EMU_INLINE void wait_wgmma() {
  emu::product_wait(N);
}
template <int N>
EMU_INLINE void warpgroup_wait() {
  emu::product_wait(N);
}

struct MaxOp {
  template <class T>
  EMU_INLINE T operator()(T a, T b) {
    return ::max(a, b);
  }
};
struct MinOp {
  template <class T>
  EMU_INLINE T operator()(T a, T b) {
    return ::min(a, b);
  }
};
struct SumOp {
  template <class T>
  EMU_INLINE T operator()(T a, T b) {
    return a + b;
  }
};
struct SyncThreadsBarrier {
  template <int>
  static EMU_INLINE void sync() {
    __syncthreads();
  }
};
template <int threads>
struct NamedBarrier {
  template <int id>
  static EMU_INLINE void sync() {
    emu::named_sync(id, threads);
  }
};

// Over threads whose indices differ by scale, 2 scale, ... below `threads`: beyond a warp through shared memory, in a warp by shuffles
template <class Op, int threads, int scale, int first = 0, class Sync = SyncThreadsBarrier, int batch = 1, int stride = 0>
struct AllReduce {
  template <class T>
  static EMU_INLINE T run(T x, T* workspace = nullptr) {
    for (int step = threads / 2; step >= scale; step /= 2) {
      if (step < 32) {
        x = Op()(x, __shfl_xor_sync(~0u, x, step));
        continue;
      }
      Sync::template sync<1>();
      workspace[threadIdx.x - first] = x;
      Sync::template sync<2>();
      x = Op()(x, workspace[(threadIdx.x - first) ^ step]);
    }
    return x;
  }
};

#define EMU_MATRICES(NAME, COUNT, TRANSPOSED)                                      \
  template <class... R>                                                            \
  EMU_INLINE void ptx_stmatrix_##NAME(const void* address, R... values) {          \
    static_assert(sizeof...(values) == COUNT);                                     \
    const uint registers[] = {uint(values)...};                                    \
    emu::store_matrices(const_cast<void*>(address), registers, COUNT, TRANSPOSED); \
  }
EMU_MATRICES(m8n8_x1, 1, false)
EMU_MATRICES(m8n8_x2, 2, false) EMU_MATRICES(m8n8_x4, 4, false) EMU_MATRICES(m8n8_x1_trans, 1, true) EMU_MATRICES(m8n8_x2_trans, 2, true)
    EMU_MATRICES(m8n8_x4_trans, 4, true)
#undef EMU_MATRICES
#define EMU_MATRICES(NAME, COUNT, TRANSPOSED)                                     \
  EMU_INLINE void ptx_ldmatrix_##NAME(const void* address, void* into) {          \
    emu::load_matrices(address, static_cast<uint32_t*>(into), COUNT, TRANSPOSED); \
  }
        EMU_MATRICES(x1, 1, false) EMU_MATRICES(x2, 2, false) EMU_MATRICES(x4, 4, false) EMU_MATRICES(x1_trans, 1, true)
            EMU_MATRICES(x2_trans, 2, true) EMU_MATRICES(x4_trans, 4, true)
#undef EMU_MATRICES
}  // namespace tl
