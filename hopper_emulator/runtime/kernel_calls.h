// What kernel.h calls. Each of these notes where it was called from, so none of them is ever inlined.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emu {

void mbarrier_init(void* barrier, uint32_t count);
void mbarrier_wait(const void* barrier, uint32_t parity);
void mbarrier_arrive(const void* barrier, uint32_t announced);
void mbarrier_expect(const void* barrier, uint32_t bytes);
void fence_inits();
void proxy_fence();

void named_sync(int id, int threads);
void named_arrive(int id, int threads);
uint64_t exchange(uint64_t value, int lane);
void warp_sync();
void set_registers(int wanted, bool more);

void tma_load(const void* map, const void* barrier, void* shared, const int64_t* at, int rank);
void tma_store(const void* map, const void* shared, const int64_t* at, int rank, bool add);
void bulk_load(void* shared, const void* global, const void* barrier, uint32_t bytes);
void bulk_store(void* global, const void* shared, uint32_t bytes, bool add);
void tma_store_commit();
void tma_store_wait(int but);
void copy_async(void* shared, const void* global, int bytes, bool valid);
void copy_commit();
void copy_wait(int but);

enum class Element { bfloat16, float16 };
struct Product {
  Element element;
  int N;
  bool transpose_A, transpose_B, register_A;
  uint64_t A, B;  // shared memory descriptors
  const uint32_t* A_registers;
  float* C;
  bool accumulate;
};
void product(const Product&);
void product_commit();
void product_wait(int but);

void store_matrices(void* address, const uint32_t* registers, int count, bool transposed);
void load_matrices(const void* address, uint32_t* registers, int count, bool transposed);
void atomic(void* address, int bytes);

}  // namespace emu
