// Packs dense convolutions and cuts a call into work items.
#include "conv.h"

#include <cstring>

#include "amx.h"
#include "pack.h"
#include "scratch.h"

namespace mbv2 {
namespace {

constexpr uint32_t kConvMagic = 0x6d627663;  // "mbvc"

PackedHeader header_for(const ConvDims& d, Tier tier) {
  return {kConvMagic,
          static_cast<uint32_t>(tier),
          static_cast<int32_t>(d.in_channels),
          0,
          static_cast<int32_t>(d.out_channels),
          d.kernel,
          0,
          0};
}

// bf16x3 has no windows of its own: splitting them into parts would cost as much as it saves.
const TierKernels& conv_kernels(const ConvDims& d, Tier tier) {
  return *tier_kernels(tier == Tier::avx512bf16x3 && d.kernel != 1 ? Tier::avx512 : tier);
}

}  // namespace

ConvLayout conv_layout(const ConvDims& d, Tier tier) {
  const TierKernels* kernels = &conv_kernels(d, tier);
  if (kernels->parts) return tile_layout(d, kernels->parts);
  const int64_t header = packed_header(*kernels);
  ConvLayout l;
  l.vector = kernels->vector;
  l.out_padded = round_up(d.out_channels, l.vector);
  l.panel = panel_width(l.out_padded / l.vector, kernels->max_panel);
  l.w = header;
  l.b = round_up(l.w + d.kernel * d.kernel * d.in_channels * l.out_padded, header);
  l.size = (l.b + round_up(l.out_padded, header)) * kernels->real_bytes() / 4;
  return l;
}

bool pack_conv(const ConvDims& d, const float* weight, const float* bias, Tier tier, float* packed) {
  const ConvLayout l = conv_layout(d, tier);
  const TierKernels& kernels = conv_kernels(d, tier);
  const int64_t window = d.kernel * d.kernel, depth = window * d.in_channels;
  return write_packed(header_for(d, tier), kernels, l.size * 4 / kernels.real_bytes(), packed, [&](float* numbers) {
    if (kernels.parts) return pack_tiles(d, weight, bias, kernels.parts, numbers);
    for (int64_t o = 0; o < d.out_channels; ++o) {
      const int64_t panel = o / (l.panel * l.vector), first = panel * l.panel * l.vector;
      const int64_t width = l.out_padded - first < l.panel * l.vector ? l.out_padded - first : l.panel * l.vector;
      float* to = numbers + l.w + first * depth + (o - first);
      for (int64_t t = 0; t < window; ++t)
        for (int64_t i = 0; i < d.in_channels; ++i)
          to[(t * d.in_channels + i) * width] = weight[(o * d.in_channels + i) * window + t];
      numbers[l.b + o] = bias ? bias[o] : 0.0f;
    }
  });
}

bool packed_conv_tier(const float* packed, int64_t size, const ConvDims& dims, Tier* tier) {
  PackedHeader header;
  if (!read_header(packed, size, kConvMagic, &header, tier)) return false;
  const PackedHeader expected = header_for(dims, *tier);
  return same_but_weights(header, expected) && conv_layout(dims, *tier).size == size;
}

bool is_pointwise(const ConvArgs& a) {
  return a.dims.kernel == 1 && a.stride == 1 && a.out_height == a.height && a.out_width == a.width;
}

int64_t conv_lines(const ConvArgs& a) {
  return is_pointwise(a) ? ceil_divide(a.batch * a.height * a.width, kPointwiseLine) : a.batch * a.out_height;
}

void run_conv(const ConvArgs& args, Tier tier, const Parallel& parallel) {
  if (args.batch == 0 || args.out_height == 0 || args.out_width == 0) return;
  struct Call {
    const ConvArgs& args;
    const ConvLayout layout;
    const TierKernels& kernels;
    int64_t lines, panels, line_parts, panel_parts;
  } call{args, conv_layout(args.dims, tier), conv_kernels(args.dims, tier), conv_lines(args), 0, 1, 1};
  call.panels = ceil_divide(call.layout.out_padded, call.layout.panel * call.layout.vector);
  // Threads share the lines if every one gets several, else the output channels.
  if (parallel.threads > 1) {
    if (call.lines >= 4 * parallel.threads || call.panels < parallel.threads)
      call.line_parts = call.lines < parallel.threads ? call.lines : parallel.threads;
    else
      call.panel_parts = parallel.threads;
  }
  const auto body = [](void* context, int64_t begin, int64_t end) {
    const Call& c = *static_cast<const Call*>(context);
    float* scratch = thread_scratch().reserve(c.kernels.conv_scratch_floats(c.args, c.layout));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t lines = i / c.panel_parts, panels = i % c.panel_parts;
      const ConvItem item{c.lines * lines / c.line_parts, c.lines * (lines + 1) / c.line_parts,
                          c.panels * panels / c.panel_parts, c.panels * (panels + 1) / c.panel_parts};
      c.kernels.conv_work(c.args, c.layout, item, scratch);
    }
  };
  const int64_t items = call.line_parts * call.panel_parts;
  if (items == 1)
    body(&call, 0, 1);
  else
    parallel.parallel_for(items, &call, body);
}

}  // namespace mbv2
