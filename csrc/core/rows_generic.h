// The functions of rows.h. A register of doubles is half a vector's floats.
//
// No #pragma once: included once a tier, after tile_generic.h, which says what may not be done here.

template <class T>
struct Register;  // of a tier's size, not aligned
template <>
struct Register<float> {
  typedef float Type __attribute__((vector_size(4 * V::width), aligned(4), may_alias));
};
template <>
struct Register<double> {
  typedef double Type __attribute__((vector_size(4 * V::width), aligned(8), may_alias));
};

using Doubles = Register<double>::Type;
typedef float FloatsOfDoubles __attribute__((vector_size(2 * V::width), aligned(4), may_alias));
static constexpr int kDoubles = V::width / 2;

static ALWAYS_INLINE Doubles widened(const double* p) { return *reinterpret_cast<const Doubles*>(p); }
static ALWAYS_INLINE Doubles widened(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const FloatsOfDoubles*>(p), Doubles);
}
static ALWAYS_INLINE void put_row(double* p, Doubles v) { *reinterpret_cast<Doubles*>(p) = v; }
static ALWAYS_INLINE void put_row(float* p, Doubles v) {
  *reinterpret_cast<FloatsOfDoubles*>(p) = __builtin_convertvector(v, FloatsOfDoubles);
}

// In several parts: one sum alone would wait for its last addition.
template <class A, class B>
static double row_dot(const A* a, const B* b, int64_t n) {
  constexpr int kParts = 4;
  Doubles parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts * kDoubles <= n; i += kParts * kDoubles)
    UNROLL for (int j = 0; j < kParts; ++j) parts[j] += widened(a + i + j * kDoubles) * widened(b + i + j * kDoubles);
  for (; i + kDoubles <= n; i += kDoubles) parts[0] += widened(a + i) * widened(b + i);
  const Doubles all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  double sum = 0;
  for (int j = 0; j < kDoubles; ++j) sum += all[j];
  for (; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

static void row_scale(double factor, const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) put_row(to + i, factor * widened(from + i));
  for (; i < n; ++i) to[i] = static_cast<float>(factor * static_cast<double>(from[i]));
}

static void row_add_scaled(double factor, const float* from, int64_t n, double* to) {
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) put_row(to + i, widened(to + i) + factor * widened(from + i));
  for (; i < n; ++i) to[i] += factor * static_cast<double>(from[i]);
}

static void row_combine(double f, const float* u, double g, const float* v, double h, const double* w, int64_t n,
                        float* to) {
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles)
    put_row(to + i, f * widened(u + i) + (g * widened(v + i) + h * widened(w + i)));
  for (; i < n; ++i)
    to[i] = static_cast<float>(f * static_cast<double>(u[i]) + (g * static_cast<double>(v[i]) + h * w[i]));
}

template <int Count, class T>
static ALWAYS_INLINE void row_sum_of(const T* from, int64_t pitch, int64_t rows, T* to) {
  Doubles sums[Count] = {};
  for (; rows > 0; --rows, from += pitch)
    UNROLL for (int j = 0; j < Count; ++j) sums[j] += widened(from + j * kDoubles);
  UNROLL for (int j = 0; j < Count; ++j) put_row(to + j * kDoubles, sums[j]);
}

template <class T>
static void row_sum(const T* from, int64_t pitch, int64_t rows, int64_t n, T* to) {
  constexpr int kCount = 8;
  int64_t i = 0;
  for (; i + kCount * kDoubles <= n; i += kCount * kDoubles) row_sum_of<kCount>(from + i, pitch, rows, to + i);
  for (; i + kDoubles <= n; i += kDoubles) row_sum_of<1>(from + i, pitch, rows, to + i);
  for (; i < n; ++i) {
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) sum += static_cast<double>(from[row * pitch + i]);
    to[i] = static_cast<T>(sum);
  }
}

static constexpr RowKernels kRowKernels = {
    row_dot<float, float>, row_dot<float, double>, row_dot<double, double>, row_scale, row_add_scaled,
    row_combine,           row_sum<float>,         row_sum<double>};
