#include "pack.h"

#include <cstring>
#include <vector>

#include "amx.h"
#include "block.h"

namespace mbv2 {
namespace {

constexpr uint32_t kMagic = 0x6d627632;  // "mbv2"

void pack_bias(const float* bias, int64_t channels, int64_t padded, float* dst) {
  for (int64_t c = 0; c < padded; ++c) dst[c] = bias && c < channels ? bias[c] : 0.0f;
}

PackedHeader header_for(const BlockDims& d, Tier tier) {
  return {kMagic,
          static_cast<uint32_t>(tier),
          static_cast<int32_t>(d.in_channels),
          static_cast<int32_t>(d.hidden_channels),
          static_cast<int32_t>(d.out_channels),
          d.kernel,
          d.expand,
          0};
}

// A plain matrix [channel][depth].
void pack_matrix(const float* src, int64_t channels, int64_t depth, int64_t padded, int64_t panel, float* dst,
                 int pairs = 0, int lanes = 0) {
  const PanelMatrix matrix{src, channels, depth, depth, 1, padded, panel, dst, pairs, lanes};
  pack_panels(matrix, 0, panel_count(matrix));
}

// As Steps<true> in tile_generic.h takes it: lanes 2s and 2s + 1 of a vector are one channel's weights for an even step
// of the depth and the next. Which channel: two vectors side by side hold 16 of 16 lanes each, in each 128 bits of the
// first channels 4i and 4i + 1, of the second 4i + 2 and 4i + 3 (their sums come in order out of one shuffle); a last
// vector alone holds 8 in order.
void pack_pairs(const PanelMatrix& m) {
  for (int v = 0; v < m.pairs; ++v)
    for (int lane = 0; lane < m.lanes; ++lane) {
      const bool alone = v % 2 == 0 && v + 1 == m.pairs;
      const int slot = lane / 2, of_two = v / 2 * m.lanes + slot / 2 * 4 + v % 2 * 2 + slot % 2;
      const int64_t channel = alone ? v * m.lanes / 2 + slot : of_two;
      const float* from = m.src + channel * m.channel_stride + lane % 2 * m.depth_stride;
      float* to = m.dst + v * m.lanes + lane;
      for (int64_t k = 0; k < m.depth; k += 2, to += m.pairs * m.lanes)
        *to = channel < m.channels ? from[k * m.depth_stride] : 0.0f;
    }
}

}  // namespace

int paired_vectors(const TierKernels& kernels, int64_t channels, int64_t depth) {
  const int64_t pairs = ceil_divide(channels, kernels.vector / 2);
  return pairs <= kernels.paired_panel && depth % 2 == 0 ? static_cast<int>(pairs) : 0;
}

void pack_panels(const PanelMatrix& m, int64_t panel_begin, int64_t panel_end) {
  if (m.pairs) return pack_pairs(m);
  for (int64_t first = panel_begin * m.panel; first < m.padded && first < panel_end * m.panel; first += m.panel) {
    const int64_t width = first + m.panel <= m.padded ? m.panel : m.padded - first;
    const int64_t given = first + width <= m.channels ? width : m.channels > first ? m.channels - first : 0;
    const float* from = m.src + first * m.channel_stride;
    // Channel by channel, so that memory is read in runs; and not all of the depth at once, so that what is written
    // stays in L1.
    constexpr int64_t kRun = 64;
    for (int64_t begin = 0; begin < m.depth; begin += kRun) {
      const int64_t run = m.depth - begin < kRun ? m.depth - begin : kRun;
      float* to = m.dst + first * m.depth + begin * width;
      if (m.channel_stride == 1) {
        for (int64_t k = 0; k < run; ++k)
          for (int64_t c = 0; c < given; ++c) to[k * width + c] = from[(begin + k) * m.depth_stride + c];
      } else {
        for (int64_t c = 0; c < given; ++c)
          for (int64_t k = 0; k < run; ++k)
            to[k * width + c] = from[c * m.channel_stride + (begin + k) * m.depth_stride];
      }
      for (int64_t k = 0; k < run; ++k)
        for (int64_t c = given; c < width; ++c) to[k * width + c] = 0;
    }
  }
}

// The panel width that leaves no narrow rest if there is one, else the widest: a tile of one or two vectors loads a
// pixel for every one or two multiply-adds, a tile of three or four for every three or four.
int panel_width(int64_t vectors, int widest) {
  if (vectors <= widest) return static_cast<int>(vectors);
  for (int panel = widest; panel >= 3; --panel)
    if (vectors % panel == 0) return panel;
  if (widest < 3 || vectors % 2 == 0) return widest < 2 ? 1 : 2;
  return widest;
}

bool read_header(const float* packed, int64_t size, uint32_t magic, PackedHeader* header, Tier* tier) {
  if (size < kPackedHeader) return false;
  std::memcpy(header, packed, sizeof *header);
  if (header->magic != magic) return false;
  *tier = static_cast<Tier>(header->tier);
  for (const TierStatus* status : all_tiers())  // it may come from another machine
    if (status->tier == *tier) return status->runnable;
  return false;
}

PackedLayout packed_layout(const BlockDims& d, Tier tier) {
  const TierKernels* kernels = &block_kernels(d, tier);
  if (kernels->parts) return tile_layout(d, kernels->parts);
  PackedLayout l;
  l.vector = kernels->vector;
  l.real_bytes = kernels->real_bytes();
  l.hidden_padded = round_up(d.hidden_channels, l.vector);
  l.out_padded = round_up(d.out_channels, l.vector);
  l.hidden_panel = panel_width(l.hidden_padded / l.vector, kernels->max_panel);
  l.out_panel = panel_width(l.out_padded / l.vector, kernels->max_panel);
  l.out_pairs = paired_vectors(*kernels, d.out_channels, d.hidden_channels);
  const int64_t header = packed_header(*kernels);
  int64_t at = header;
  const auto section = [&](int64_t numbers) {
    const int64_t begin = at;
    at = round_up(at + numbers, header);
    return begin;
  };
  l.w1 = section(d.expand ? d.in_channels * l.hidden_padded : 0);
  l.b1 = section(d.expand ? l.hidden_padded : 0);
  l.wd = section(d.kernel * d.kernel * l.hidden_padded);
  l.b2 = section(l.hidden_padded);
  l.w2 = section(d.hidden_channels * l.out_padded);
  l.b3 = section(l.out_padded);
  l.size = at * l.real_bytes / 4;
  return l;
}

bool write_packed(const PackedHeader& header, const TierKernels& kernels, int64_t numbers, float* packed,
                  const std::function<void(float*)>& fill) {
  const int64_t begin = packed_header(kernels);
  std::memset(packed, 0, static_cast<size_t>(numbers * kernels.real_bytes()));
  std::memcpy(packed, &header, sizeof header);
  if (!kernels.narrow) {
    fill(packed);
    return true;
  }
  std::vector<float> wide(static_cast<size_t>(numbers));
  fill(wide.data());
  return kernels.narrow(wide.data() + begin, numbers - begin, packed + kPackedHeader);
}

bool pack(const BlockDims& d, const RawWeights& raw, Tier tier, float* packed) {
  const PackedLayout l = packed_layout(d, tier);
  return write_packed(header_for(d, tier), block_kernels(d, tier), l.size * 4 / l.real_bytes, packed, [&](float* to) {
    if (l.parts) return pack_tiles(d, raw, l.parts, to);
    if (d.expand) {
      pack_matrix(raw.w_expand, d.hidden_channels, d.in_channels, l.hidden_padded, l.hidden_panel * l.vector,
                  to + l.w1);
      pack_bias(raw.b_expand, d.hidden_channels, l.hidden_padded, to + l.b1);
    }
    pack_matrix(raw.w_depthwise, d.hidden_channels, d.kernel * d.kernel, l.hidden_padded, l.vector, to + l.wd);
    pack_bias(raw.b_depthwise, d.hidden_channels, l.hidden_padded, to + l.b2);
    pack_matrix(raw.w_project, d.out_channels, d.hidden_channels, l.out_padded, l.out_panel * l.vector, to + l.w2,
                l.out_pairs, l.vector);
    pack_bias(raw.b_project, d.out_channels, l.out_padded, to + l.b3);
  });
}

bool packed_tier(const float* packed, int64_t size, const BlockDims& dims, Tier* tier) {
  PackedHeader header;
  if (!read_header(packed, size, kMagic, &header, tier)) return false;
  const PackedHeader expected = header_for(dims, *tier);
  return same_but_weights(header, expected) && packed_layout(dims, *tier).size == size;
}

}  // namespace mbv2
