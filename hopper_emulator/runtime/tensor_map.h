// A tensor map as the host makes it, and the walk that TMA takes over its box.
#pragma once
#include <cstdint>

namespace emu {

struct TensorMap {
  char* base;
  int64_t sizes[5], strides[5];  // in elements; in bytes
  uint32_t box[5];
  uint8_t rank, element, swizzle, fill_nan;  // element: its bytes
};

// CUtensorMap is 128 opaque bytes
static_assert(sizeof(TensorMap) <= 128);

// Swizzles move 16-byte units within 128, 64 or 32 bytes, by bits 7 and up of the address
inline uint32_t swizzled(uint32_t at, int mode) {
  const int bits = mode == 3 ? 7 : mode == 2 ? 3 : mode == 1 ? 1 : 0;
  return at ^ (((at >> 7) & bits) << 4);
}

// Calls unit(shared offset, global address or null, bytes) for each piece of at most 16 bytes: null where the box leaves the tensor
template <class F>
void each_piece(const TensorMap& map, uint32_t shared, const int64_t* at, F unit) {
  const uint32_t inner = map.box[0], per_unit = 16 / map.element;
  uint32_t rows = 1;
  for (int d = 1; d < map.rank; d++) rows *= map.box[d];
  for (uint32_t row = 0; row < rows; row++) {
    uint32_t rest = row;
    int64_t offset = 0;
    bool inside = true;
    for (int d = 1; d < map.rank; d++) {
      int64_t x = at[d] + rest % map.box[d];
      rest /= map.box[d];
      inside &= x >= 0 && x < map.sizes[d];
      offset += x * map.strides[d];
    }
    for (uint32_t e = 0; e < inner; e += per_unit) {
      const int64_t x = at[0] + e;
      const uint32_t place = swizzled(shared + (row * inner + e) * map.element, map.swizzle);
      if (x >= 0 && x + per_unit <= map.sizes[0] && e + per_unit <= inner) {
        unit(place, inside ? map.base + offset + x * map.element : nullptr, 16);
        continue;
      }
      for (uint32_t i = 0; i < per_unit && e + i < inner; i++) {
        bool in = inside && x + i >= 0 && x + i < map.sizes[0];
        unit(place + i * map.element, in ? map.base + offset + (x + i) * map.element : nullptr, map.element);
      }
    }
  }
}

}  // namespace emu
