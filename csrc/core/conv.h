// The contract of the layers around the blocks: a dense convolution with its BatchNorm folded and its activation, as
// the stem (3x3, stride 2, 3 input channels) and the head (1x1, 320 -> 1280) of MobileNets have them.
//
//   y[q][o] = act( b[o] + sum_{dy,dx,i} w[o][dy][dx][i] * x[stride*q + (dy,dx) - pad][i] )        (zero outside the
//   image)
//
// x may have any strides (a camera's NCHW picture is read as it is); y is dense channels_last. Arithmetic as
// block.h has it: fp32, or the fp16 tier's, or products of bf16.
#pragma once

#include "block.h"

namespace mbv2 {

struct ConvDims {
  int64_t in_channels, out_channels;
  int kernel;
};

struct ConvArgs {
  ConvDims dims;
  int64_t batch, height, width, out_height, out_width;
  int64_t stride, pad_top, pad_left;
  Clamp activation;
  DType dtype;
  const void* x;
  int64_t x_stride_image, x_stride_row, x_stride_pixel, x_stride_channel;  // in elements
  void* y;
  const float* packed;  // from pack_conv(), for the same tier
};

//   w [out panels][k][k][Cin][panel]      b [out padded]          the bf16 tier's: amx.h
struct ConvLayout {
  int vector, panel;
  int64_t out_padded;
  int64_t w, b;  // offsets in numbers, as PackedLayout's
  int64_t size;  // in floats
};

ConvLayout conv_layout(const ConvDims& dims, Tier tier);
bool pack_conv(const ConvDims& dims, const float* weight, const float* bias, Tier tier, float* packed);
bool packed_conv_tier(const float* packed, int64_t size, const ConvDims& dims, Tier* tier);

void run_conv(const ConvArgs& args, Tier tier, const Parallel& parallel);

// One work item: output lines [line_begin, line_end), panels [panel_begin, panel_end). A line is a row of an output
// image; for a 1x1 convolution of stride 1 it is a run of kPointwiseLine pixels, wherever their images begin.
constexpr int64_t kPointwiseLine = 56;
struct ConvItem {
  int64_t line_begin, line_end, panel_begin, panel_end;
};
bool is_pointwise(const ConvArgs& args);
int64_t conv_lines(const ConvArgs& args);

}  // namespace mbv2
