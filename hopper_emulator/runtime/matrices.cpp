// ldmatrix and stmatrix: a warp moves 8 x 8 matrices of 16-bit elements; lane 8 i + r holds the address of row r of matrix i.
#include <cstring>

#include "kernel.h"
#include "parts.h"

namespace emu {
namespace {

// Of matrix `m`, this lane's register holds elements (row, column) and (row, column + 1), or, transposed, (column, row) and (column + 1,
// row)
struct Element16 {
  int row, column;
};
Element16 held(int half, bool transposed) {
  int lane = current() % 32, a = lane / 4, b = lane % 4 * 2 + half;
  return transposed ? Element16{b, a} : Element16{a, b};
}

char* row_address(const void* mine, int m, int row) {
  uint64_t bits = reinterpret_cast<uint64_t>(mine);
  return reinterpret_cast<char*>(exchange(bits, 8 * m + row));
}

void check_aligned(const void* address, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("tma", site, "ldmatrix or stmatrix at an address that is not a multiple of 16 bytes");
  if (shared_offset(address) == SIZE_MAX) fail("out of bounds", site, "ldmatrix or stmatrix at an address that is not shared");
}

}  // namespace

void store_matrices(void* address, const uint32_t* registers, int count, bool transposed) {
  Site site = EMU_SITE;
  for (int m = 0; m < count; m++)
    for (int half = 0; half < 2; half++) {
      Element16 e = held(half, transposed);
      char* to = row_address(address, m, e.row) + 2 * e.column;
      check_aligned(to - 2 * e.column, site);
      ordinary_write(shared_offset(to), 2, site);
      uint16_t bits = registers[m] >> (16 * half);
      memcpy(to, &bits, 2);
    }
  exchange(0, 0);
}

void load_matrices(const void* address, uint32_t* registers, int count, bool transposed) {
  Site site = EMU_SITE;
  for (int m = 0; m < count; m++) {
    uint32_t both = 0;
    for (int half = 0; half < 2; half++) {
      Element16 e = held(half, transposed);
      const char* from = row_address(address, m, e.row) + 2 * e.column;
      check_aligned(from - 2 * e.column, site);
      ordinary_read(shared_offset(from), 2, site);
      uint16_t bits;
      memcpy(&bits, from, 2);
      both |= uint32_t(bits) << (16 * half);
    }
    registers[m] = both;
  }
  exchange(0, 0);
}

}  // namespace emu

Dim emu_thread() { return {unsigned(emu::current()), 0, 0}; }
Dim emu_block() { return {emu::block_index.x, emu::block_index.y, emu::block_index.z}; }
Dim emu_grid() { return {emu::launch.grid.x, emu::launch.grid.y, emu::launch.grid.z}; }
Dim emu_threads() { return {emu::launch.block.x, emu::launch.block.y, emu::launch.block.z}; }
void emu_whole_warp(unsigned mask, int width) {
  emu::Site site = EMU_SITE;
  if (mask != ~0u) emu::fail("unknown", site, "a warp operation on the lanes 0x%x only", mask);
  if (width != 32) emu::fail("unknown", site, "a shuffle within segments of %d lanes", width);
}
