// What stands between two phases of a training step: BatchNorm and its way back, on vectors of channels, in fp64. The
// mathematics of each function is that of its namesake, train_..., in mbv2_kernels/training_reference.py.
#pragma once

#include "block.h"

namespace mbv2 {

// statistics [3][channels]: mean and variance of the convolution's output, and the pixels behind them; or
// [2][channels]: fixed ones, the same at every step.
struct Norm {
  int64_t channels;
  const double* statistics;
  bool fixed;
  const float *gamma, *beta;
  double eps;
};

// Sums over pixels of g and of g * v: of this process, and of all that share the statistics.
struct NormSums {
  const double *g, *gv, *all_g, *all_gv;
};

// gv = a * g + b * v + c, and the gradients of the convolution's bias, of gamma and of beta.
struct NormGradients {
  float *a, *b, *c, *bias, *gamma, *beta;
};

// A 1x1 convolution v = weight x with a BatchNorm.
struct LinearNorm {
  Norm norm;
  int64_t in_channels;
  const float* weight;  // [channels][in_channels]
};

void statistics(int64_t channels, const double* total, const double* squares, double pixels, double* out);
void norm(const Norm& norm, float* scale, float* shift);
void norm_backward(const Norm& norm, const NormSums& sums, const NormGradients& out);

// out [3][channels], mean_x [in_channels]; from sums of x and x x^T. Of `linear.norm` only the channels are read.
void linear_statistics(const LinearNorm& linear, const double* sum_x, const double* gram, double pixels, Tier tier,
                       const Parallel& parallel, double* out, double* mean_x);
void fold(const LinearNorm& linear, const double* mean_x, Tier tier, const Parallel& parallel, float* w1, float* b1);
void linear_sums(const LinearNorm& linear, const float* t, Tier tier, const Parallel& parallel, double* sums);

struct LinearGradients {
  NormGradients norm;      // a, b, c null
  float *weight, *m, *c0;  // m and c0 null with fixed statistics
};
void linear_backward(const LinearNorm& linear, const float* w1, const float* t, const NormSums& sums,
                     const double* sum_x, const double* gram, const double* mean_x, Tier tier, const Parallel& parallel,
                     const LinearGradients& out);

// What a tier multiplies in fp64 and in fp32: out[i * out_row + j] = sum_k a[i * a_row + k * a_step] * b[k][j], for a
// strip of columns j: two registers, strip_width().
template <class T>
struct StripProduct {
  const T* a;
  int64_t a_row, a_step;
  const T* b;
  int64_t rows, depth;
  T* out;
  int64_t out_row;
};
template <class T>
constexpr int64_t strip_width(int64_t vector) {
  return 2 * vector * static_cast<int64_t>(sizeof(float)) / static_cast<int64_t>(sizeof(T));
}

}  // namespace mbv2
