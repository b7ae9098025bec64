// A training step's phases (csrc/core/train.h) on MobileNetV2's 17 blocks, 224x224, fp32, AVX2: the versions that
// core_ab takes for that. Forward block by block, then back, as a step runs them; what stands between the phases is
// left out. To be built as core_ab.cpp says of a version, with this file in its place.
#include <omp.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "pages.h"
#include "train.h"
#include "train_norm.h"
#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace mbv2;

namespace {

const Tier kTier = active_tier();  // as in core_ab.cpp
constexpr const char* kNames[] = {
    "gram",          "depthwise", "project", "finish", "finish_backward", "project_backward", "depthwise_backward",
    "input_backward"};

struct Layer {
  TrainArgs args;
  double flop;
  std::string name;
};
std::vector<Layer> layers;
Parallel parallel;

void serial(int64_t n, void* context, ParallelBody body) { body(context, 0, n); }

void shared(int64_t n, void* context, ParallelBody body) {
#pragma omp parallel num_threads(parallel.threads)
  {
    const int64_t of = omp_get_num_threads(), at = omp_get_thread_num();
    if (n * at / of < n * (at + 1) / of) body(context, n * at / of, n * (at + 1) / of);
  }
}

// Never freed: the phases read it as long as the program runs.
float* memory(int64_t floats) { return allocate(static_cast<size_t>(floats)); }
double* doubles(int64_t count) { return reinterpret_cast<double*>(memory(2 * count)); }
float* numbers(int64_t count) {
  float* to = memory(count);
  for (int64_t i = 0; i < count; ++i)
    to[i] = static_cast<float>(static_cast<uint64_t>(i) * 2654435761u % 1000) * 2e-3f - 1;
  return to;
}
float* filled(int64_t count, float value) {
  float* to = memory(count);
  for (int64_t i = 0; i < count; ++i) to[i] = value;
  return to;
}

// A phase that has just run gave the sums behind the BatchNorm after it.
void batch_norm(const TrainArgs& a, int64_t channels, double pixels, const float** scale, const float** shift) {
  double* found = doubles(3 * channels);
  statistics(channels, a.sum, a.sum_product, pixels, found);
  float *to_scale = memory(channels), *to_shift = memory(channels);
  norm({channels, found, false, filled(channels, 1), filled(channels, 1), 1e-5}, to_scale, to_shift);
  *scale = to_scale;
  *shift = to_shift;
}

struct Block {
  TrainArgs all = {};  // what any of its phases takes
  double expand, depthwise, project;
  const float* kept_e = nullptr;
  std::string label;

  Block(int64_t batch, int64_t in, int64_t expansion, int64_t out, int64_t stride, int64_t size, const float* x)
      : label("block " + std::to_string(layers.empty() ? 1 : std::stoi(layers.back().name.substr(6)) + 1) + " ") {
    const int64_t hidden = in * expansion, out_size = (size - 1) / stride + 1;
    TrainArgs& a = all;
    a.dims = {in, hidden, out, 3, expansion != 1};
    a.batch = batch;
    a.height = a.width = size;
    a.out_height = a.out_width = out_size;
    a.stride = stride;
    a.dilation = a.pad_top = a.pad_left = 1;
    a.activation = {0, 6};
    a.final_activation = {-__builtin_inff(), __builtin_inff()};
    a.x = x;
    if (a.dims.expand) {
      a.w1 = numbers(hidden * in);
      a.b1 = filled(hidden, 1);
      a.m = numbers(in * in);
      a.c0 = filled(in, 0.1f);
    }
    a.wd = numbers(hidden * 9);
    a.w2 = numbers(hidden * out);
    const double pixels = static_cast<double>(batch * out_size * out_size), channels = static_cast<double>(hidden);
    expand = 2.0 * static_cast<double>(a.dims.expand ? batch * size * size * in : 0) * channels;
    depthwise = 2.0 * pixels * channels * 9;
    project = 2.0 * pixels * channels * static_cast<double>(out);

    const int64_t widest = hidden > in * in ? hidden : in * in;
    double *sum = doubles(widest), *product = doubles(widest);
    float* d = memory(batch * out_size * out_size * hidden);
    float* e = keeps_e(a) ? memory(batch * size * size * hidden) : nullptr;
    if (a.dims.expand) {
      const double flop = static_cast<double>(batch * size * size * in * in);
      add(TrainPhase::gram, flop, [&](TrainArgs& p) { p.sum = sum, p.gram = product; });
    }
    const TrainArgs& of_d = add(TrainPhase::depthwise, expand + depthwise,
                                [&](TrainArgs& p) { p.d_out = d, p.e_out = e, p.sum = sum, p.sum_product = product; });
    kept_e = e;
    batch_norm(of_d, hidden, pixels, &a.scale2, &a.shift2);
    a.d = d;
    float* z = memory(batch * out_size * out_size * out);
    const TrainArgs& of_z =
        add(TrainPhase::project, project, [&](TrainArgs& p) { p.z_out = z, p.sum = sum, p.sum_product = product; });
    batch_norm(of_z, out, pixels, &a.scale3, &a.shift3);
    a.z = z;
    float* y = memory(batch * out_size * out_size * out);
    add(TrainPhase::finish, 0, [&](TrainArgs& p) {
      p.y = y;
      if (stride != 1 || in != out) p.x = nullptr;
    });
    a.y = y;
  }

  // From the gradient of y to that of x, which it returns.
  float* backward(const float* gy) {
    TrainArgs& a = all;
    const int64_t in = a.dims.in_channels, hidden = a.dims.hidden_channels, out = a.dims.out_channels;
    a.y = nullptr;
    a.gy = gy;
    a.a2 = a.scale2;
    a.b2 = filled(hidden, 0.1f);
    a.c2 = filled(hidden, 0.1f);
    a.a3 = a.scale3;
    a.b3 = filled(out, 0.1f);
    a.c3 = filled(out, 0.1f);
    double *sum = doubles(hidden), *product = doubles(hidden);
    add(TrainPhase::finish_backward, 0, [&](TrainArgs& p) { p.sum = sum, p.sum_product = product; });
    float *gw2 = memory(hidden * out), *g2 = nullptr;
    if (keeps_g2(a.dims)) g2 = memory(a.batch * a.out_height * a.out_width * hidden);
    add(TrainPhase::project_backward, 2 * project,
        [&](TrainArgs& p) { p.gw2 = gw2, p.g2_out = g2, p.sum = sum, p.sum_product = product; });
    a.g2 = g2;
    a.e = kept_e;
    const int64_t size = a.batch * a.height * a.width * in;
    float *g = memory(size), *t = memory(hidden * in), *gwd = memory(hidden * 9);
    add(TrainPhase::depthwise_backward, (a.e ? 2 : 3) * expand + 2 * depthwise + (g2 ? 0 : project), [&](TrainArgs& p) {
      p.g_out = g, p.gwd = gwd;
      if (a.dims.expand) p.t = t, p.sum = sum;
    });
    const bool residual = a.stride == 1 && in == out;
    if (!a.m && !residual) return g;
    float* gx = g;
    add(TrainPhase::input_backward, 2.0 * static_cast<double>(a.m ? size * in : 0), [&](TrainArgs& p) {
      p.g = g, p.gx = gx;
      if (!residual) p.gy = nullptr;
    });
    return gx;
  }

  template <class Set>
  const TrainArgs& add(TrainPhase phase, double flop, const Set& set) {
    TrainArgs a = all;
    a.phase = phase;
    set(a);
    run_train(a, kTier, parallel);
    layers.push_back({a, flop, label + kNames[static_cast<int>(phase)]});
    return layers.back().args;
  }
};

}  // namespace

EXPORT int prepare(const char* network, int batch, int threads) {
  if (std::strcmp(network, "v2") != 0) return 0;
  parallel = {threads > 1 ? shared : serial, threads};
  const float* x = numbers(int64_t{batch} * 32 * 112 * 112);
  std::vector<Block> blocks;
  int64_t in = 32, size = 112;
  constexpr std::array<std::array<int64_t, 4>, 7> kStages = {
      {{1, 16, 1, 1}, {6, 24, 2, 2}, {6, 32, 3, 2}, {6, 64, 4, 2}, {6, 96, 3, 1}, {6, 160, 3, 2}, {6, 320, 1, 1}}};
  for (const auto& [expansion, out, count, first_stride] : kStages)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t stride = i ? 1 : first_stride;
      blocks.emplace_back(batch, in, expansion, out, stride, size, x);
      x = static_cast<const float*>(blocks.back().all.y);
      in = out;
      size = (size - 1) / stride + 1;
    }
  const float* g = numbers(batch * in * size * size);
  for (size_t i = blocks.size(); i-- > 0;) g = blocks[i].backward(g);
  return static_cast<int>(layers.size());
}
EXPORT double flop(int layer) { return layers[static_cast<size_t>(layer)].flop; }
EXPORT const char* name(int layer) { return layers[static_cast<size_t>(layer)].name.c_str(); }
EXPORT void run(int layer) { run_train(layers[static_cast<size_t>(layer)].args, kTier, parallel); }
// FLOP of a run of nothing but multiply-adds, of one thread.
EXPORT double run_peak() {
  constexpr int64_t kIterations = 4000;
  const TierKernels& kernels = *tier_kernels(kTier);
  volatile float sink = kernels.fma_chains(kIterations);
  (void)sink;
  return 2.0 * kFmaChains * kernels.vector * kIterations;
}
