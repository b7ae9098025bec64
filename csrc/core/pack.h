// What packing and planning of blocks and convolutions share.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#include "block.h"

namespace mbv2 {

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }

// The first cache line of a packed array says what it holds.
constexpr int64_t kPackedHeader = 16;  // floats
struct PackedHeader {
  uint32_t magic, tier;
  int32_t in_channels, hidden_channels, out_channels, kernel, expand;
  int32_t wild;  // bf16x3 only: weights that tiles cannot multiply
};
static_assert(sizeof(PackedHeader) <= kPackedHeader * sizeof(float), "the header has one cache line");

// Whether it is one for these dims, whatever the weights are.
inline bool same_but_weights(PackedHeader header, const PackedHeader& expected) {
  header.wild = 0;
  return std::memcmp(&header, &expected, sizeof header) == 0;
}

// False when the array is too short, was not made for `magic`, or names a tier that cannot run here.
bool read_header(const float* packed, int64_t size, uint32_t magic, PackedHeader* header, Tier* tier);

// Numbers of a packed array's header, for the tier.
inline int64_t packed_header(const TierKernels& kernels) { return kPackedHeader * 4 / kernels.real_bytes(); }

// fill(numbers) writes a tier's packed array as fp32, all but the header, into zeros; false if it holds what becomes
// infinite in fp16.
bool write_packed(const PackedHeader& header, const TierKernels& kernels, int64_t numbers, float* packed,
                  const std::function<void(float*)>& fill);

// A matrix in panels of `panel` channels, dst[panel][depth][channel], zeros in the channels behind the last. Or paired:
// one panel, dst[depth / 2][pairs][lanes], of an even depth.
struct PanelMatrix {
  const float* src;  // src[channel * channel_stride + k * depth_stride]
  int64_t channels, depth, channel_stride, depth_stride;
  int64_t padded, panel;  // in floats
  float* dst;
  int pairs = 0, lanes = 0;
};
// The vectors of such a panel; 0 if the tier would not gain by one.
int paired_vectors(const TierKernels& kernels, int64_t channels, int64_t depth);
inline int64_t panel_count(const PanelMatrix& m) { return ceil_divide(m.padded, m.panel); }
void pack_panels(const PanelMatrix& matrix, int64_t panel_begin, int64_t panel_end);

// Whether whole images share out evenly.
inline bool whole_images(const BlockArgs& a, int threads) {
  return threads <= 1 || a.batch % threads == 0 || a.batch >= 4 * threads;
}

// Cuts images for several threads where they do not: plan's row_parts and splits.
void share_out(const BlockArgs& args, const PackedLayout& layout, int threads, Plan* plan);

// The panel width, in vectors, for a matrix `vectors` wide.
int panel_width(int64_t vectors, int widest);

}  // namespace mbv2
