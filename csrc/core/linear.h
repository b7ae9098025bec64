// The contract of the classifier: the mean over an image's pixels, and a matrix product of few rows, bound by reading
// its weights.
//
//   y[n][c] = sum_p x[n][p][c] / pixels
//   y[n][o] = b[o] + sum_i w[o][i] * x[n][i]
//
// All dense, of one storage type; fp32 arithmetic. The weights are read where torch keeps them: they are read once, so
// that packing them would cost as much memory again and gain nothing.
#pragma once

#include "block.h"

namespace mbv2 {

struct LinearArgs {
  int64_t rows, in_features, out_features;
  DType dtype;
  const void *x, *weight, *bias;  // bias may be null
  void* y;
};

struct PoolArgs {
  int64_t batch, pixels, channels;
  DType dtype;
  const void* x;  // channels_last
  void* y;
};

void run_linear(const LinearArgs& args, Tier tier, const Parallel& parallel);

// Outputs that are computed together: as many streams of weights keep more of memory's bandwidth busy than one.
constexpr int64_t kLinearOutputs = 8;

}  // namespace mbv2
