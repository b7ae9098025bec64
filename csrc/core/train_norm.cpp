// BatchNorm's arithmetic between the phases. The one part that costs are three products of the expand layer's weight,
// which the tiers multiply: in fp64 where a variance comes out of it as a difference, in fp32 where a gradient does.
#include "train_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pack.h"
#include "rows.h"
#include "scratch.h"

namespace mbv2 {
namespace {

// A channel's BatchNorm: gamma * (v - centre) * invstd + beta = v * scale + shift.
struct Channel {
  double centre, invstd, scale, pixels;
  Channel(const Norm& n, int64_t c)
      : centre(n.statistics[c]),
        invstd(1 / std::sqrt(n.statistics[n.channels + c] + n.eps)),
        // The phases get it in fp32, and everything is computed from what they get.
        scale(static_cast<double>(static_cast<float>(invstd * static_cast<double>(n.gamma[c])))),
        pixels(n.fixed ? 1 : std::max(n.statistics[2 * n.channels + c], 1.0)) {}
  double shift(const Norm& n, int64_t c) const { return static_cast<double>(n.beta[c]) - centre * scale; }
};

struct ChannelBackward {
  double a, b = 0, c = 0, bias = 0, gamma, beta;
  double mean = 0;  // c = mean - b * centre
  ChannelBackward(const Norm& n, const NormSums& sums, int64_t at) {
    const Channel channel(n, at);
    a = channel.scale;
    beta = sums.g[at];
    gamma = (sums.gv[at] - channel.centre * beta) * channel.invstd;
    if (n.fixed) {
      bias = a * beta;
      return;
    }
    const double all_gamma = (sums.all_gv[at] - channel.centre * sums.all_g[at]) * channel.invstd;
    const double per_pixel = a / channel.pixels;
    b = static_cast<double>(static_cast<float>(-per_pixel * channel.invstd * all_gamma));
    mean = -per_pixel * sums.all_g[at];
    c = mean - b * channel.centre;
  }
};

void put(float* to, int64_t at, double value) {
  if (to) to[at] = static_cast<float>(value);
}

void put(const NormGradients& out, int64_t at, const ChannelBackward& back) {
  put(out.a, at, back.a);
  put(out.b, at, back.b);
  put(out.c, at, back.c);
  put(out.bias, at, back.bias);
  put(out.gamma, at, back.gamma);
  put(out.beta, at, back.beta);
}

// Calls body(begin, end) for runs of rows, each worth a thread's while, and whole units but the last.
template <class Body>
void for_rows(int64_t rows, int64_t unit, int64_t products_a_row, const Parallel& parallel, const Body& body) {
  constexpr int64_t kProducts = 1 << 19;
  const int64_t step = round_up(ceil_divide(kProducts, products_a_row), unit);
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * step, std::min((i + 1) * step, rows));
  };
  const int64_t items = ceil_divide(rows, step);
  if (items <= 1 || parallel.threads == 1) return run(0, items);
  using Run = decltype(run);
  parallel.parallel_for(items, &run,
                        [](void* context, int64_t begin, int64_t end) { (*static_cast<Run*>(context))(begin, end); });
}

// A thread's memory of other numbers.
template <class T>
T* reserve(Arena& arena, int64_t size) {
  return reinterpret_cast<T*>(arena.reserve(static_cast<size_t>(size) * sizeof(T) / sizeof(float)));
}
thread_local Arena matrix_strips;  // of the calling thread
thread_local Arena weight_strips;

void multiply(const TierKernels& kernels, const StripProduct<double>& product) { kernels.multiply_doubles(product); }
void multiply(const TierKernels& kernels, const StripProduct<float>& product) { kernels.multiply_floats(product); }

enum class Shape { any, upper };  // upper: nothing below the diagonal

// body(channel, its row of weight, that row times a matrix [in_channels][in_channels], element(i, j)), all in T
template <class T, Shape kShape, class Element, class Body>
void times_matrix(const LinearNorm& linear, const Element& element, const TierKernels& kernels,
                  const Parallel& parallel, const Body& body) {
  const int64_t in = linear.in_channels, width = strip_width<T>(kernels.vector), pitch = round_up(in, width);
  const auto depth = [&](int64_t strip) { return kShape == Shape::upper ? std::min(strip + width, in) : in; };
  T* matrix = reserve<T>(matrix_strips, in * pitch);  // [strip][in_channels][width]
  for (int64_t strip = 0; strip < pitch; strip += width)
    for (int64_t i = 0; i < depth(strip); ++i)
      for (int64_t j = 0; j < width; ++j)
        matrix[strip * in + i * width + j] = strip + j < in ? static_cast<T>(element(i, strip + j)) : 0;
  for_rows(linear.norm.channels, 4, in * in, parallel, [&](int64_t begin, int64_t end) {
    T *rows = reserve<T>(thread_scratch(), (end - begin) * (in + pitch)), *products = rows + (end - begin) * in;
    const float* weight = linear.weight + begin * in;
    for (int64_t i = 0; i < (end - begin) * in; ++i) rows[i] = static_cast<T>(weight[i]);
    for (int64_t strip = 0; strip < pitch; strip += width)
      multiply(kernels,
               StripProduct<T>{rows, in, 1, matrix + strip * in, end - begin, depth(strip), products + strip, pitch});
    for (int64_t c = begin; c < end; ++c) body(c, rows + (c - begin) * in, products + (c - begin) * pitch);
  });
}

}  // namespace

void statistics(int64_t channels, const double* total, const double* squares, double pixels, double* out) {
  const double count = std::max(pixels, 1.0);
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = total[c] / count, var = squares[c] / count - mean * mean;
    out[c] = mean;
    out[channels + c] = var < 0 ? 0 : var;
    out[2 * channels + c] = pixels;
  }
}

void norm(const Norm& n, float* scale, float* shift) {
  for (int64_t c = 0; c < n.channels; ++c) {
    const Channel channel(n, c);
    scale[c] = static_cast<float>(channel.scale);
    shift[c] = static_cast<float>(channel.shift(n, c));
  }
}

void norm_backward(const Norm& n, const NormSums& sums, const NormGradients& out) {
  for (int64_t c = 0; c < n.channels; ++c) put(out, c, ChannelBackward(n, sums, c));
}

void linear_statistics(const LinearNorm& linear, const double* sum_x, const double* gram, double pixels, Tier tier,
                       const Parallel& parallel, double* out, double* mean_x) {
  const TierKernels& kernels = *tier_kernels(tier);
  const int64_t in = linear.in_channels, channels = linear.norm.channels;
  const double count = std::max(pixels, 1.0);
  for (int64_t i = 0; i < in; ++i) mean_x[i] = sum_x[i] / count;
  // weight^T covariance weight, where each pair of different channels counts twice
  const auto covariance = [&](int64_t i, int64_t j) {
    return i > j ? 0 : (i < j ? 2 : 1) * (gram[i * in + j] / count - mean_x[i] * mean_x[j]);
  };
  times_matrix<double, Shape::upper>(linear, covariance, kernels, parallel,
                                     [&](int64_t c, const double* weight, const double* product) {
                                       const double var = kernels.rows->dot_doubles(weight, product, in);
                                       out[c] = kernels.rows->dot_doubles(weight, mean_x, in);
                                       out[channels + c] = var < 0 ? 0 : var;
                                       out[2 * channels + c] = pixels;
                                     });
}

void fold(const LinearNorm& linear, const double* mean_x, Tier tier, const Parallel& parallel, float* w1, float* b1) {
  const RowKernels& rows = *tier_kernels(tier)->rows;
  const int64_t in = linear.in_channels;
  for_rows(linear.norm.channels, 1, 8 * in, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Channel channel(linear.norm, c);
      float* to = w1 + c * in;
      rows.scale(channel.scale, linear.weight + c * in, in, to);
      double shift = channel.shift(linear.norm, c);
      if (!linear.norm.fixed) shift += channel.scale * channel.centre - rows.dot_mixed(to, mean_x, in);
      b1[c] = static_cast<float>(shift);
    }
  });
}

void linear_sums(const LinearNorm& linear, const float* t, Tier tier, const Parallel& parallel, double* sums) {
  const RowKernels& rows = *tier_kernels(tier)->rows;
  const int64_t in = linear.in_channels;
  for_rows(linear.norm.channels, 1, 8 * in, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) sums[c] = rows.dot(linear.weight + c * in, t + c * in, in);
  });
}

void linear_backward(const LinearNorm& linear, const float* w1, const float* t, const NormSums& sums,
                     const double* sum_x, const double* gram, const double* mean_x, Tier tier, const Parallel& parallel,
                     const LinearGradients& out) {
  const TierKernels& kernels = *tier_kernels(tier);
  const int64_t in = linear.in_channels, channels = linear.norm.channels;
  std::vector<ChannelBackward> backs;
  backs.reserve(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) {
    backs.emplace_back(linear.norm, sums, c);
    put(out.norm, c, backs.back());
  }
  const auto back = [&](int64_t c) -> const ChannelBackward& { return backs[static_cast<size_t>(c)]; };
  if (linear.norm.fixed) {
    for (int64_t c = 0; c < channels; ++c) kernels.rows->scale(back(c).a, t + c * in, in, out.weight + c * in);
    return;
  }
  // The products of x's deviations from its mean: of numbers that large means do not drown, in fp32.
  const auto products = [&](int64_t i, int64_t j) { return gram[i * in + j] - mean_x[i] * sum_x[j]; };
  // weight, and -b * weight, in strips: [strip][channel][width]
  const int64_t width = strip_width<float>(kernels.vector), strips = ceil_divide(in, width), strip = channels * width;
  float *right = reserve<float>(weight_strips, 2 * strips * strip), *left = right + strips * strip;
  times_matrix<float, Shape::any>(
      linear, products, kernels, parallel, [&](int64_t c, const float* weight, const float* product) {
        const ChannelBackward& of = back(c);
        kernels.rows->combine(of.a, t + c * in, of.b, product, of.mean, sum_x, in, out.weight + c * in);
        const float b = static_cast<float>(of.b);
        for (int64_t at = 0; at < strips; ++at) {
          float *w = right + at * strip + c * width, *bw = left + at * strip + c * width;
          const int64_t given = std::min(width, in - at * width);
          for (int64_t i = 0; i < width; ++i) w[i] = i < given ? weight[at * width + i] : 0;
          for (int64_t i = 0; i < width; ++i) bw[i] = -b * w[i];
        }
      });
  // m = -weight^T diag(b) weight, symmetric: from the diagonal on, and the rest copied. fp32 in runs of channels.
  for_rows(strips, 1, strips * width * strip / 2, parallel, [&](int64_t begin, int64_t end) {
    constexpr int64_t kRun = 48;
    double* sums = reserve<double>(thread_scratch(), 2 * width * width);
    float* tile = reinterpret_cast<float*>(sums + width * width);
    for (int64_t turn = begin; turn < end; ++turn) {
      // Long and short rows in turns: each thread gets a run of them, and as much to do.
      const int64_t down = turn % 2 ? strips - 1 - turn / 2 : turn / 2;
      for (int64_t across = down; across < strips; ++across) {
        std::fill(sums, sums + width * width, 0.0);
        for (int64_t c = 0; c < channels; c += kRun) {
          multiply(kernels,
                   StripProduct<float>{left + down * strip + c * width, 1, width, right + across * strip + c * width,
                                       width, std::min(kRun, channels - c), tile, width});
          kernels.rows->add_scaled(1, tile, width * width, sums);
        }
        for (int64_t i = down * width; i < std::min((down + 1) * width, in); ++i)
          for (int64_t j = std::max(across * width, i); j < std::min((across + 1) * width, in); ++j)
            out.m[i * in + j] = out.m[j * in + i] = static_cast<float>(sums[i % width * width + j % width]);
      }
    }
  });
  // weight^T c is what lets gx sum up to zero over all pixels: computed as that, from the m and w1 that the sweep has.
  std::vector<double> c0(static_cast<size_t>(in));
  for (int64_t c = 0; c < channels; ++c) {
    const double mean_g = sums.all_g[c] / Channel(linear.norm, c).pixels;
    kernels.rows->add_scaled(mean_g, w1 + c * in, in, c0.data());
  }
  for (int64_t i = 0; i < in; ++i)
    put(out.c0, i, c0[static_cast<size_t>(i)] - kernels.rows->dot_mixed(out.m + i * in, mean_x, in));
}

}  // namespace mbv2
