// What packing and planning of blocks and convolutions share.
#pragma once

#include <cstdint>

#include "block.h"

namespace mbv2 {

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }

// The first cache line of a packed array says what it holds.
constexpr int64_t kPackedHeader = 16;  // floats
struct PackedHeader {
  uint32_t magic, tier;
  int32_t in_channels, hidden_channels, out_channels, kernel, expand, reserved;
};
static_assert(sizeof(PackedHeader) <= kPackedHeader * sizeof(float), "the header has one cache line");

// False when the array is too short, was not made for `magic`, or names a tier that cannot run here.
bool read_header(const float* packed, int64_t size, uint32_t magic, PackedHeader* header, Tier* tier);

// The panel width, in vectors, for a matrix `vectors` wide.
int panel_width(int64_t vectors, int widest);

}  // namespace mbv2
