// What TileLang's host code calls: it asks for functions by name, makes tensor maps and launches. Nothing of a real TVM or CUDA is behind
// it.
#include "host.h"

#include <tvm/ffi/c_api.h>

#include <cstdio>
#include <cstring>

#include "parts.h"
#include "tensor_map.h"

namespace emu {
namespace {

char host_message[2048];
uint32_t run_seed;
const char* const SERVICES[] = {"__tvm_set_device", "__tvm_tensormap_create_tiled"};
struct Entry {
  const char* name;
  Caller call;
  const KernelFacts* facts;
};
std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

int refuse(const char* format, long long value) {
  snprintf(host_message, sizeof host_message, format, value);
  return -1;
}

// cuTensorMapEncodeTiled and the rules of its documentation
int make_map(const TVMFFIAny* a) {
  static const int BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // by CUtensorMapDataType
  static const int SPAN[] = {0, 32, 64, 128};
  TensorMap& map = *static_cast<TensorMap*>(a[0].v_ptr);
  memset(&map, 0, sizeof map);
  map.element = BYTES[a[1].v_int64];
  map.rank = a[2].v_int64;
  map.base = static_cast<char*>(a[3].v_ptr);
  const TVMFFIAny* next = a + 4;
  for (int d = 0; d < map.rank; d++) map.sizes[d] = next++->v_int64;
  for (int d = 0; d < map.rank; d++) map.strides[d] = next++->v_int64;
  for (int d = 0; d < map.rank; d++) map.box[d] = next++->v_int64;
  next += map.rank;  // element strides
  int interleave = next++->v_int64;
  map.swizzle = next++->v_int64;
  next++;  // L2 promotion
  map.fill_nan = next++->v_int64;
  map.strides[0] = map.element;
  if (interleave) return refuse("the emulator doesn't know interleaved tensor maps (mode %lld)", interleave);
  if (reinterpret_cast<uintptr_t>(map.base) % 16) return refuse("tensor map: address %lld is not a multiple of 16", (long long)map.base);
  int64_t inner = map.box[0] * map.element;
  if (inner % 16) return refuse("tensor map: a box row of %lld bytes is not a multiple of 16", inner);
  if (map.swizzle && inner > SPAN[map.swizzle]) return refuse("tensor map: a box row of %lld bytes is longer than its swizzle", inner);
  for (int d = 0; d < map.rank; d++) {
    if (map.sizes[d] < 1 || map.sizes[d] > (int64_t(1) << 32)) return refuse("tensor map: size %lld is not from 1 to 2^32", map.sizes[d]);
    if (map.box[d] < 1 || map.box[d] > 256) return refuse("tensor map: box size %lld is not from 1 to 256", map.box[d]);
    if (d && (map.strides[d] % 16 || map.strides[d] < 0 || map.strides[d] >= (int64_t(1) << 40)))
      return refuse("tensor map: stride %lld is not a multiple of 16 below 2^40", map.strides[d]);
  }
  return 0;
}

int launch_kernel(const Entry& entry, const TVMFFIAny* arguments, int n) {
  std::function<void()> body;
  int used = entry.call(arguments, body);
  // Grid of as many dimensions as the kernel uses, block of three, and the dynamic shared memory where there is some
  const TVMFFIAny* rest = arguments + used;
  int dimensions = n - used - 3 - entry.facts->dynamic_shared;
  unsigned size[6] = {1, 1, 1, 1, 1, 1};
  if (dimensions < 1 || dimensions > 3) return refuse("the emulator doesn't know a launch with %lld numbers", n - used);
  for (int d = 0; d < dimensions; d++) size[d] = rest[d].v_int64;
  for (int d = 0; d < 3; d++) size[3 + d] = rest[dimensions + d].v_int64;
  launch.grid = {size[0], size[1], size[2]}, launch.block = {size[3], size[4], size[5]};
  launch.shared_bytes = entry.facts->dynamic_shared ? rest[dimensions + 3].v_int64 : 0;
  int threads = block_threads();
  if (launch.shared_bytes > SHARED_LIMIT)
    return refuse("the launch asks for %lld bytes of shared memory, a Hopper block has 232448", launch.shared_bytes);
  if (threads % 32 || threads > MAX_THREADS) return refuse("a block of %lld threads: a multiple of 32 up to 1024 is needed", threads);
  for (int d = 0; d < 3; d++) {
    const int64_t most = d == 0 ? INT32_MAX : 65535;
    if (size[d] < 1 || size[d] > most)
      return refuse("a grid dimension of %lld: CUDA wants 1 to 2^31 - 1 in x, to 65535 in y and z", size[d]);
  }
  if (size[4] != 1 || size[5] != 1) return refuse("the emulator doesn't know blocks of several dimensions (%lld)", size[4]);
  launch.registers = std::min(255, REGISTER_FILE / (threads * entry.facts->blocks_per_sm)) / 8 * 8;
  seed_schedule(run_seed);
  for (unsigned z = 0; z < size[2]; z++)
    for (unsigned y = 0; y < size[1]; y++)
      for (unsigned x = 0; x < size[0]; x++)
        if (!run_block({x, y, z}, body)) return -1;
  return 0;
}

}  // namespace

void add_kernel(const char* name, Caller call, const KernelFacts* facts) { entries().push_back({name, call, facts}); }

}  // namespace emu

using namespace emu;

extern "C" {
// The names under which the host code is compiled; see build.py
int emu_host_find(void*, const char* name, void** found) {
  for (const char* const& service : SERVICES)
    if (!strcmp(name, service)) return *found = const_cast<char*>(service), 0;
  for (Entry& entry : entries())
    if (!strcmp(name, entry.name)) return *found = const_cast<char*>(entry.name), 0;
  snprintf(host_message, sizeof host_message, "the emulator doesn't know the host function %s", name);
  return -1;
}

int emu_host_call(void* handle, TVMFFIAny* arguments, int32_t n, TVMFFIAny*) {
  if (handle == SERVICES[0]) return 0;
  if (handle == SERVICES[1]) return make_map(arguments);
  for (Entry& entry : entries())
    if (handle == entry.name) return launch_kernel(entry, arguments, n);
  return -1;
}

void emu_host_error(const char* kind, const char* text) { snprintf(host_message, sizeof host_message, "%s: %s", kind, text); }

int emu_host_allocate(void*, void*) { return refuse("the emulator doesn't know allocations by the host code (%lld)", 0); }

EMU_EXPORT void emu_begin(int how, uint32_t seed, int order) {
  schedule = Schedule(how);
  check_order = order;
  run_seed = seed;
  host_message[0] = 0;
  clear_failure();
}
EMU_EXPORT const char* emu_failure() { return failure(); }
EMU_EXPORT const char* emu_host_failure() { return host_message; }
}
