// BatchNorm's arithmetic between the phases. The one part that costs are two products of the expand layer's weight in
// fp64, which the tiers multiply.
#include "train_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pack.h"
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
    c = -per_pixel * sums.all_g[at] - b * channel.centre;
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

// In several parts: one sum alone would wait for its last addition.
template <class A, class B>
double dot(const A* a, const B* b, int64_t n) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int64_t j = 0; j < 4; ++j) sums[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
  for (; i < n; ++i) sums[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sums[0] + sums[1] + (sums[2] + sums[3]);
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

// A thread's memory of doubles.
double* reserve(Arena& arena, int64_t size) {
  return reinterpret_cast<double*>(arena.reserve(static_cast<size_t>(2 * size)));
}
thread_local Arena symmetric_matrix;  // of the calling thread
thread_local Arena weight_strips;

// body(channel, its row of weight in fp64, that row times a symmetric matrix [in_channels][in_channels], element(i, j))
template <class Element, class Body>
void times_symmetric(const LinearNorm& linear, const Element& element, const TierKernels& kernels,
                     const Parallel& parallel, const Body& body) {
  const int64_t in = linear.in_channels, vector = kernels.vector, pitch = round_up(in, vector);
  double* matrix = reserve(symmetric_matrix, in * pitch);  // in strips
  for (int64_t i = 0; i < in; ++i)
    for (int64_t j = 0; j < pitch; ++j)
      matrix[j / vector * in * vector + i * vector + j % vector] = j < in ? element(i, j) : 0;
  for_rows(linear.norm.channels, 4, in * in, parallel, [&](int64_t begin, int64_t end) {
    double *rows = reserve(thread_scratch(), (end - begin) * (in + pitch)), *products = rows + (end - begin) * in;
    const float* weight = linear.weight + begin * in;
    for (int64_t i = 0; i < (end - begin) * in; ++i) rows[i] = static_cast<double>(weight[i]);
    for (int64_t j = 0; j < pitch; j += vector)
      kernels.multiply({rows, in, 1, matrix + j * in, end - begin, in, products + j, pitch});
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
  const auto covariance = [&](int64_t i, int64_t j) { return gram[i * in + j] / count - mean_x[i] * mean_x[j]; };
  times_symmetric(linear, covariance, kernels, parallel, [&](int64_t c, const double* weight, const double* product) {
    const double var = dot(weight, product, in);
    out[c] = dot(weight, mean_x, in);
    out[channels + c] = var < 0 ? 0 : var;
    out[2 * channels + c] = pixels;
  });
}

void fold(const LinearNorm& linear, const double* mean_x, float* w1, float* b1) {
  const int64_t in = linear.in_channels;
  for (int64_t c = 0; c < linear.norm.channels; ++c, w1 += in) {
    const Channel channel(linear.norm, c);
    for (int64_t i = 0; i < in; ++i)
      w1[i] = static_cast<float>(static_cast<double>(linear.weight[c * in + i]) * channel.scale);
    double shift = channel.shift(linear.norm, c);
    if (!linear.norm.fixed) shift += channel.scale * channel.centre - dot(w1, mean_x, in);
    b1[c] = static_cast<float>(shift);
  }
}

void linear_sums(const LinearNorm& linear, const float* t, double* sums) {
  const int64_t in = linear.in_channels;
  for (int64_t c = 0; c < linear.norm.channels; ++c) sums[c] = dot(linear.weight + c * in, t + c * in, in);
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
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = c * in; i < (c + 1) * in; ++i)
        out.weight[i] = static_cast<float>(back(c).a * static_cast<double>(t[i]));
    return;
  }
  // weight, and -b * weight, in strips: [strip][channel][vector]
  const int64_t vector = kernels.vector, strips = ceil_divide(in, vector), strip = channels * vector;
  double *right = reserve(weight_strips, 2 * strips * strip), *left = right + strips * strip;
  const auto products = [&](int64_t i, int64_t j) { return gram[i * in + j]; };
  times_symmetric(linear, products, kernels, parallel, [&](int64_t c, const double* weight, const double* product) {
    const ChannelBackward& of = back(c);
    const float* from = t + c * in;
    float* to = out.weight + c * in;
    for (int64_t i = 0; i < in; ++i)
      to[i] = static_cast<float>(of.a * static_cast<double>(from[i]) + (of.b * product[i] + of.c * sum_x[i]));
    for (int64_t i = 0; i < strips * vector; ++i) {
      const int64_t at = i / vector * strip + c * vector + i % vector;
      right[at] = i < in ? weight[i] : 0;
      left[at] = -of.b * right[at];
    }
  });
  // m = -weight^T diag(b) weight, symmetric: from the diagonal on, and the rest copied
  for_rows(strips, 1, strips * vector * strip / 2, parallel, [&](int64_t begin, int64_t end) {
    double* tile = reserve(thread_scratch(), vector * vector);
    for (int64_t turn = begin; turn < end; ++turn) {
      // Long and short rows in turns: each thread gets a run of them, and as much to do.
      const int64_t down = turn % 2 ? strips - 1 - turn / 2 : turn / 2;
      for (int64_t across = down; across < strips; ++across) {
        kernels.multiply({left + down * strip, 1, vector, right + across * strip, vector, channels, tile, vector});
        for (int64_t i = down * vector; i < std::min((down + 1) * vector, in); ++i)
          for (int64_t j = std::max(across * vector, i); j < std::min((across + 1) * vector, in); ++j)
            out.m[i * in + j] = out.m[j * in + i] = static_cast<float>(tile[i % vector * vector + j % vector]);
      }
    }
  });
  // weight^T c is what lets gx sum up to zero over all pixels: computed as that, from the m and w1 that the sweep has.
  std::vector<double> c0(static_cast<size_t>(in));
  for (int64_t c = 0; c < channels; ++c) {
    const double mean_g = sums.all_g[c] / Channel(linear.norm, c).pixels;
    for (int64_t i = 0; i < in; ++i) c0[static_cast<size_t>(i)] += mean_g * static_cast<double>(w1[c * in + i]);
  }
  for (int64_t i = 0; i < in; ++i) put(out.c0, i, c0[static_cast<size_t>(i)] - dot(out.m + i * in, mean_x, in));
}

}  // namespace mbv2
