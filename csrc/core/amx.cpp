// Packs weights for the tiers that multiply tiles, and cuts their calls into work items.
#include "amx.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pack.h"

namespace mbv2 {
namespace {

// Rounded to nearest, ties to even; a NaN stays one.
uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// weight(channel, k) as tiles.
template <class Weight>
void fill_tiles(int64_t channels, int64_t depth, float* packed, const Weight& weight) {
  auto* to = reinterpret_cast<uint16_t*>(packed);
  const TileDepth d = tile_depth(depth);
  for (int64_t first = 0; first < channels; first += kTileRows)
    for (int64_t k = 0; k < d.padded(); k += 2)
      for (int64_t c = first; c < first + kTileRows; ++c)
        for (int64_t i = k; i < k + 2; ++i)
          *to++ = c < channels && i < depth ? to_bf16(weight(c, i)) : static_cast<uint16_t>(0);
}
// weight(channel, k) as fp32, in the order in which it is split. False if it holds what tiles cannot multiply.
template <class Weight>
bool fill_strips(int64_t channels, int64_t depth, float* to, const Weight& weight) {
  bool tame = true;
  for (int64_t panel = 0; panel < channels; panel += 2 * kTileRows)
    for (int64_t step = 0; step < depth; step += kTileDepth)
      for (int64_t first = panel; first < panel + 2 * kTileRows; first += kTileRows)
        for (int64_t i = step; i < step + kTileRows; ++i)
          for (int64_t k = i; k < step + kTileDepth; k += kTileRows)
            for (int64_t c = first; c < first + kTileRows; ++c, ++to) {
              *to = c < channels && k < depth ? weight(c, k) : 0.0f;
              tame = tame && std::fabs(*to) < kTooLarge;
            }
  return tame;
}
template <class Weight>
void fill(int64_t channels, int64_t depth, int parts, float* packed, int64_t at, const Weight& weight) {
  if (parts == 1) return fill_tiles(channels, depth, packed + at, weight);
  if (!fill_strips(channels, depth, packed + at, weight)) reinterpret_cast<PackedHeader*>(packed)->wild = 1;
}

void fill_bias(const float* bias, int64_t channels, float* to) {
  for (int64_t c = 0; bias && c < channels; ++c) to[c] = bias[c];
}

// Where of 32 hidden channels position p of d comes from.
int64_t channel_at(int64_t p) { return p / 32 * 32 + (p % 32 < 16 ? 2 * (p % 32) : 2 * (p % 32 - 16) + 1); }

// Floats that hold the tiles, in whole cache lines.
int64_t tile_floats(int64_t padded_channels, int64_t depth, int parts) {
  if (parts == 1) return round_up(padded_channels * tile_depth(depth).padded() / 2, kPackedHeader);
  return round_up(padded_channels, 2 * kTileRows) * round_up(depth, kTileDepth);
}

}  // namespace

PackedLayout tile_layout(const BlockDims& d, int parts) {
  PackedLayout l;
  l.vector = kTileRows;
  l.real_bytes = sizeof(float);
  l.hidden_panel = l.out_panel = 2;
  l.out_pairs = 0;
  l.hidden_padded = round_up(d.hidden_channels, 2 * kTileRows);
  l.out_padded = round_up(d.out_channels, kTileRows);
  int64_t at = kPackedHeader;
  const auto section = [&](int64_t floats) {
    const int64_t begin = at;
    at += round_up(floats, kPackedHeader);
    return begin;
  };
  l.w1 = section(d.expand ? tile_floats(l.hidden_padded, d.in_channels, parts) : 0);
  l.b1 = section(d.expand ? l.hidden_padded : 0);
  l.wd = section(d.kernel * d.kernel * l.hidden_padded);
  l.b2 = section(l.hidden_padded);
  l.w2 = section(tile_floats(l.out_padded, l.hidden_padded, parts));
  l.b3 = section(l.out_padded);
  l.size = at;
  l.parts = parts;
  return l;
}

void pack_tiles(const BlockDims& d, const RawWeights& raw, int parts, float* packed) {
  const PackedLayout l = tile_layout(d, parts);
  if (d.expand) {
    fill(d.hidden_channels, d.in_channels, parts, packed, l.w1,
         [&](int64_t c, int64_t k) { return raw.w_expand[c * d.in_channels + k]; });
    fill_bias(raw.b_expand, d.hidden_channels, packed + l.b1);
  }
  const int64_t taps = d.kernel * d.kernel;
  for (int64_t p = 0; p < l.hidden_padded; ++p) {
    const int64_t c = parts == 1 ? channel_at(p) : p;
    if (c >= d.hidden_channels) continue;
    for (int64_t t = 0; t < taps; ++t)
      packed[l.wd + p / kTileRows * kTileRows * taps + t * kTileRows + p % kTileRows] = raw.w_depthwise[c * taps + t];
    packed[l.b2 + p] = raw.b_depthwise ? raw.b_depthwise[c] : 0.0f;
  }
  fill(d.out_channels, l.hidden_padded, parts, packed, l.w2, [&](int64_t o, int64_t k) {
    const int64_t c = parts == 1 ? channel_at(k) : k;
    return c < d.hidden_channels ? raw.w_project[o * d.hidden_channels + c] : 0.0f;
  });
  fill_bias(raw.b_project, d.out_channels, packed + l.b3);
}

ConvLayout tile_layout(const ConvDims& d, int parts) {
  ConvLayout l;
  l.vector = kTileRows;
  l.panel = 2;
  l.out_padded = round_up(d.out_channels, kTileRows);
  l.w = kPackedHeader;
  l.b = l.w + tile_floats(l.out_padded, d.kernel * d.kernel * d.in_channels, parts);
  l.size = l.b + l.out_padded;
  return l;
}

void pack_tiles(const ConvDims& d, const float* weight, const float* bias, int parts, float* packed) {
  const ConvLayout l = tile_layout(d, parts);
  const int64_t taps = d.kernel * d.kernel;
  fill(d.out_channels, taps * d.in_channels, parts, packed, l.w, [&](int64_t o, int64_t k) {
    return weight[(o * d.in_channels + k % d.in_channels) * taps + k / d.in_channels];
  });
  fill_bias(bias, d.out_channels, packed + l.b);
}

Plan tile_plan(const BlockArgs& a, const PackedLayout& l, int threads) {
  const int64_t reach = (a.dims.kernel - 1) * a.dilation + 1;
  // Measured (csrc/TUNING.md), and flat around these values. With three parts e takes twice and d three times the
  // memory: the larger kCache holds 196 pixels of 576 hidden channels.
  const int64_t kPixels = l.parts == 1 ? 448 : a.dims.expand ? 392 : 196;
  const int64_t kCache = (l.parts == 1 ? 768 : 1200) * 1024, kChunk = l.parts == 1 ? 96 : 384;
  const int64_t e_bytes = l.parts == 1 ? 2 : 4;
  Plan p;
  // Channels a chunk, as equal as panels allow. Behind half a microsecond without multiplications tiles wait for 0.3.
  p.chunk = round_up(ceil_divide(l.hidden_padded, ceil_divide(l.hidden_padded, kChunk)), 2 * kTileRows);
  // Rows a group: as many pixels as make a call of the kernels worth its while, if e's rows and d stay in L2. Without
  // expand several rows always: the depthwise pass reads what they share from L1.
  const int64_t row_of_e = a.dims.expand ? (a.width + 2 * a.pad_left) * l.hidden_padded * e_bytes : 0;
  const int64_t row_of_d = a.out_width * l.hidden_padded * 2 * l.parts;
  const auto fits = [&](int64_t rows) {
    return std::min((rows - 1) * a.stride + reach, a.height) * row_of_e + rows * row_of_d <= kCache;
  };
  int64_t group = std::max<int64_t>(kPixels / std::max<int64_t>(a.out_width, 1), a.dims.expand ? 1 : 4);
  group = std::min(group, std::max<int64_t>(a.out_height, 1));
  while (group > 1 && !fits(group)) --group;
  p.group_rows = ceil_divide(a.out_height, ceil_divide(a.out_height, group));
  p.band_rows = std::max<int64_t>(a.out_height, 1);
  if (l.parts == 1) {  // no partial sums: always rows
    p.row_parts = whole_images(a, threads) ? 1 : std::max<int64_t>(std::min<int64_t>(threads, a.out_height), 1);
    p.splits = 1;
    return p;
  }
  share_out(a, l, threads, &p);
  // Images of few pixels go together where a thread has several: weights are split once for all of them.
  if (p.group_rows == a.out_height && p.row_parts * p.splits == 1) {
    constexpr int64_t kTogether = 196, kChunkOfEach = 96;
    const int64_t chunk = std::min(kChunkOfEach, l.hidden_padded);
    const int64_t held = a.height * (row_of_e / l.hidden_padded * chunk) + a.out_height * row_of_d;
    const int64_t most = std::min(kTogether / std::max<int64_t>(a.out_height * a.out_width, 1), kCache / held);
    const int64_t groups = round_up(ceil_divide(a.batch, std::max<int64_t>(most, 1)), threads);
    p.images = std::max<int64_t>(ceil_divide(a.batch, std::max<int64_t>(groups, 1)), 1);
    if (p.images > 1) p.chunk = chunk;
  }
  return p;
}

}  // namespace mbv2
