// What the tiers that multiply tiles (x86_avx512amx.cpp, x86_avx512bf16x3.cpp) have of their own: how their weights are
// packed and how their calls are cut.
//
// A register tile of AMX is 16 rows of 64 bytes. One instruction multiplies 16 pixels by up to 32 bf16 numbers of depth
// with that depth by 16 channels, and adds to 16 x 16 fp32 sums. The second matrix lies in pairs of depth: its row
// k / 2 is [channel][k % 2].
//
//   tiles   [channels / 16][step of the depth][pair][channel][2]
//
// That is how the bf16 tier has it (`parts` 1). A depth is cut into steps of equal size, at most 32 and even; the last
// one may be filled up with zeros.
//
//   block   w1  tiles of depth Cin, bf16         b1  [hidden padded]
//           wd  [hidden / 32][part][k*k][16]     b2  [hidden / 32][part][16]
//           w2  tiles of depth hidden padded     b3  [out padded]
//   conv    w   tiles of depth k*k*Cin, bf16     b   [out padded]
//
// Part 0 of 32 hidden channels are the even ones, part 1 the odd ones, and d has them, and w2 its depth, in that order:
// so the depthwise pass takes a vector of bf16 numbers apart. A convolution's depth has the order [k][k][Cin].
// Biases and depthwise weights are fp32. Hidden channels are padded to 32, outputs to 16, with zeros.
//
// bf16x3 (`parts` 3) makes tiles of three parts out of fp32 weights while it runs. The same sections, each as
//
//   strips  [channels / 32][depth / 32][16 of the channels][i < 16][i or 16 + i][channel]     fp32
//
// with hidden channels, outputs and w2's depth in their own order.
#pragma once

#include "block.h"
#include "conv.h"

namespace mbv2 {

constexpr int64_t kTileRows = 16, kTileDepth = 32;
// Where bf16x3's partial products of numbers could overflow.
constexpr float kTooLarge = 0x1p97f;

// Always inlined, as functions that a tier's file and others compile have to be (csrc/README.md).
#define MBV2_ALWAYS_INLINE inline __attribute__((always_inline))
struct TileDepth {
  int64_t step, steps;  // numbers a step, and how many
  MBV2_ALWAYS_INLINE int64_t padded() const { return step * steps; }
  MBV2_ALWAYS_INLINE int64_t column() const { return padded() * kTileRows; }  // numbers of the tiles of 16 channels
};
static MBV2_ALWAYS_INLINE TileDepth tile_depth(int64_t depth) {
  const int64_t steps = (depth + kTileDepth - 1) / kTileDepth, step = (depth + steps - 1) / steps;
  return {(step + 1) / 2 * 2, steps};
}
#undef MBV2_ALWAYS_INLINE

// PackedLayout and ConvLayout with offsets in floats.
PackedLayout tile_layout(const BlockDims& dims, int parts);
ConvLayout tile_layout(const ConvDims& dims, int parts);
// Into zeros, behind the header.
void pack_tiles(const BlockDims& dims, const RawWeights& raw, int parts, float* packed);
void pack_tiles(const ConvDims& dims, const float* weight, const float* bias, int parts, float* packed);

Plan tile_plan(const BlockArgs& args, const PackedLayout& layout, int threads);

}  // namespace mbv2
