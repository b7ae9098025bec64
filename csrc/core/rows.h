// Arithmetic on rows of numbers, in fp64: for what the items of a training step's phases leave, and what stands between
// the phases. It is little, but in SSE2 it took 4 ms more of a training step of 240 (csrc/TUNING.md).
#pragma once

#include <cstdint>

namespace mbv2 {

struct RowKernels {
  double (*dot)(const float* a, const float* b, int64_t n);
  double (*dot_mixed)(const float* a, const double* b, int64_t n);
  double (*dot_doubles)(const double* a, const double* b, int64_t n);
  // to[i] = factor * from[i]
  void (*scale)(double factor, const float* from, int64_t n, float* to);
  // to[i] += factor * from[i]
  void (*add_scaled)(double factor, const float* from, int64_t n, double* to);
  // to[i] = f * u[i] + (g * v[i] + h * w[i])
  void (*combine)(double f, const float* u, double g, const float* v, double h, const double* w, int64_t n, float* to);
  // to[i] = sum of from[row * pitch + i] over the rows
  void (*sum_floats)(const float* from, int64_t pitch, int64_t rows, int64_t n, float* to);
  void (*sum_doubles)(const double* from, int64_t pitch, int64_t rows, int64_t n, double* to);
};

}  // namespace mbv2
