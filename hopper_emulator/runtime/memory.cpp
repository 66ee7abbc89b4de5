// Every load and store of the kernel comes by here: it is compiled with -fsanitize=thread, whose calls are answered below instead of by its
// library. An address is shared memory, the thread's own stack, a variable of the module, or else must lie in an argument of the kernel.
#include <link.h>

#include <cstring>

#include "kernel_calls.h"
#include "parts.h"

namespace emu {
namespace {

// One storage that arguments live in, with margins; `valid` has a byte for each of its bytes
struct Region {
  const char* base;
  size_t bytes;
  const uint8_t* valid;
};

std::vector<Region> regions;
const char *module_begin, *module_end;

int find_module(dl_phdr_info* info, size_t, void*) {
  const char* here = reinterpret_cast<const char*>(&regions);
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) & segment = info->dlpi_phdr[i];
    const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + segment.p_vaddr);
    if (segment.p_type != PT_LOAD || here < begin || here >= begin + segment.p_memsz) continue;
    module_begin = reinterpret_cast<const char*>(info->dlpi_addr), module_end = begin + segment.p_memsz;
    return 1;
  }
  return 0;
}

bool in_module(const void* address) {
  if (!module_begin) dl_iterate_phdr(find_module, nullptr);
  return address >= module_begin && address < module_end;
}

void access(const void* address, size_t bytes, bool write, Site site) {
  size_t at = shared_offset(address);
  if (at != SIZE_MAX) {
    preempt();
    write ? ordinary_write(at, bytes, site) : ordinary_read(at, bytes, site);
  } else if (on_stack(address)) {
    check_registers(address, bytes, write, site);
  } else if (!in_module(address)) {
    check_global(address, bytes, site, write ? "a store" : "a load");
  }
}

}  // namespace

void check_global(const void* address, size_t bytes, Site site, const char* what) {
  const char* begin = static_cast<const char*>(address);
  for (const Region& region : regions) {
    if (begin < region.base || begin + bytes > region.base + region.bytes) continue;
    const uint8_t* valid = region.valid + (begin - region.base);
    if (!memchr(valid, 0, bytes)) return;
  }
  fail("out of bounds", site, "%s of %zu bytes at {global %p}, which belong to no argument", what, bytes, address);
}

void atomic(void* address, int bytes) {
  Site site = EMU_SITE;
  if (shared_offset(address) != SIZE_MAX) fail("unknown", site, "an atomic operation on shared memory");
  access(address, bytes, true, site);
  preempt();
}

}  // namespace emu

extern "C" {
EMU_EXPORT void emu_regions(int n, const void** bases, const size_t* bytes, const uint8_t** valid) {
  emu::regions.clear();
  for (int i = 0; i < n; i++) emu::regions.push_back({static_cast<const char*>(bases[i]), bytes[i], valid[i]});
}

#define ACCESS(NAME, BYTES)                                                   \
  void __tsan_read##NAME(void* p) { emu::access(p, BYTES, false, EMU_SITE); } \
  void __tsan_write##NAME(void* p) { emu::access(p, BYTES, true, EMU_SITE); }
ACCESS(1, 1)
ACCESS(2, 2) ACCESS(4, 4) ACCESS(8, 8) ACCESS(16, 16)
#undef ACCESS
#define UNALIGNED(BYTES)                                                                 \
  void __tsan_unaligned_read##BYTES(void* p) { emu::access(p, BYTES, false, EMU_SITE); } \
  void __tsan_unaligned_write##BYTES(void* p) { emu::access(p, BYTES, true, EMU_SITE); }
    UNALIGNED(2) UNALIGNED(4) UNALIGNED(8) UNALIGNED(16)
#undef UNALIGNED
    // Where the module was loaded: what addr2line and nm count from
    EMU_EXPORT uint64_t emu_base() {
  return emu::in_module(nullptr), reinterpret_cast<uint64_t>(emu::module_begin);
}
void __tsan_read_range(void* p, size_t bytes) { emu::access(p, bytes, false, EMU_SITE); }
void __tsan_write_range(void* p, size_t bytes) { emu::access(p, bytes, true, EMU_SITE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
