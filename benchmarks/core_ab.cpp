// Versions of csrc/core against each other on MobileNetV2's convolutions (stem, 17 blocks, head; 224x224, fp32, AVX2),
// network after network in turns, in one process. csrc/TUNING.md has the commands and what they gave.
//
//   a version:   for f in CORE/*.cpp: c++ -std=c++17 -O3 -fno-math-errno -fPIC -fvisibility=hidden -DMBV2_HAVE_AVX2
//                -ICORE (x86_avx2.cpp: with the features that kernels.inc lists; not x86_avx512.cpp), this file with
//                -DVERSION -fopenmp, all with -shared -Wl,-Bsymbolic into NAME.so
//   to compare:  c++ -std=c++17 -O2 benchmarks/core_ab.cpp -ldl -o core_ab
//                ./core_ab BATCH THREADS SECONDS ./BEFORE.so ./AFTER.so
//
// A core of a shared machine runs at half its speed while a neighbor is busy on its other hardware thread. So before
// and after each layer a few microseconds of nothing but multiply-adds are timed: a layer's share of the peak is its
// share of the mean of these two, and times are given as they would be at the best peak seen. Medians.
#ifdef VERSION
#include <omp.h>

#include <cstdint>
#include <string>
#include <vector>

#include "block.h"
#include "conv.h"
#if __has_include("pages.h")
#include "pages.h"
static float* memory_for(int64_t floats) { return mbv2::allocate(static_cast<size_t>(floats)); }
#else  // versions before it
#include <cstdlib>
static float* memory_for(int64_t floats) {
  return static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((floats * 4 + 63) / 64 * 64)));
}
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace mbv2;

namespace {

constexpr Tier kTier = Tier::avx2;

struct Layer {
  std::string name;
  bool is_block;
  BlockArgs block;
  ConvArgs conv;
  double flop;
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

std::vector<float> weights(int64_t count) {
  std::vector<float> w(static_cast<size_t>(count));
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i * 2654435761u % 1000) * 1e-4f - 0.05f;
  return w;
}

void add_conv(int batch, int in, int out, int kernel, int stride, int size, const float* x, bool planes, float* y) {
  ConvArgs a = {};
  a.dims = {in, out, kernel};
  a.batch = batch;
  a.stride = stride;
  a.pad_top = a.pad_left = kernel / 2;
  a.height = a.width = size;
  a.out_height = a.out_width = (size - 1) / stride + 1;
  a.activation = {0, 6};
  a.x = x;
  a.x_stride_channel = planes ? size * size : 1;
  a.x_stride_pixel = planes ? 1 : in;
  a.x_stride_row = a.x_stride_pixel * size;
  a.x_stride_image = in * size * size;
  a.y = y;
  float* packed = memory_for(conv_layout(a.dims, kTier).size);
  pack_conv(a.dims, weights(out * in * kernel * kernel).data(), nullptr, kTier, packed);
  a.packed = packed;
  layers.push_back({layers.empty() ? "stem" : "head",
                    false,
                    {},
                    a,
                    2.0 * batch * a.out_height * a.out_width * out * in * kernel * kernel});
}

void add_block(int batch, int in, int expansion, int out, int stride, int size, const float* x, float* y) {
  const int hidden = in * expansion;
  const bool expand = expansion != 1;
  BlockArgs a = {};
  a.dims = {in, hidden, out, 3, expand};
  a.batch = batch;
  a.dilation = a.pad_top = a.pad_left = 1;
  a.stride = stride;
  a.height = a.width = size;
  a.out_height = a.out_width = (size - 1) / stride + 1;
  a.activation = {0, 6};
  a.final_activation = {-__builtin_inff(), __builtin_inff()};
  a.residual = stride == 1 && in == out;
  a.x = x;
  a.x_stride_pixel = in;
  a.x_stride_row = in * size;
  a.x_stride_image = a.x_stride_row * size;
  a.y = y;
  float* packed = memory_for(packed_layout(a.dims, kTier).size);
  const std::vector<float> w1 = weights(hidden * in), wd = weights(hidden * 9), w2 = weights(hidden * out);
  pack(a.dims, {expand ? w1.data() : nullptr, nullptr, wd.data(), nullptr, w2.data(), nullptr}, kTier, packed);
  a.packed = packed;
  const double pixels = a.out_height * a.out_width;
  layers.push_back({"block " + std::to_string(layers.size()),
                    true,
                    a,
                    {},
                    2.0 * batch * hidden * ((expand ? size * size * in : 0) + pixels * (9 + out))});
}

}  // namespace

EXPORT int prepare(int batch, int threads) {
  parallel = {threads > 1 ? shared : serial, threads};
  float* picture = memory_for(batch * 3 * 224 * 224);
  for (int64_t i = 0; i < batch * 3 * 224 * 224; ++i) picture[i] = static_cast<float>(i % 97) * 0.02f - 1;
  float* buffers[2] = {memory_for(batch * 32 * 112 * 112), memory_for(batch * 32 * 112 * 112)};
  add_conv(batch, 3, 32, 3, 2, 224, picture, true, buffers[0]);
  const int stages[7][4] = {{1, 16, 1, 1}, {6, 24, 2, 2},  {6, 32, 3, 2}, {6, 64, 4, 2},
                            {6, 96, 3, 1}, {6, 160, 3, 2}, {6, 320, 1, 1}};
  int in = 32, size = 112, from = 0;
  for (const auto& stage : stages)
    for (int i = 0; i < stage[2]; ++i, from = 1 - from) {
      const int stride = i ? 1 : stage[3];
      add_block(batch, in, stage[0], stage[1], stride, size, buffers[from], buffers[1 - from]);
      in = stage[1];
      size = (size - 1) / stride + 1;
    }
  add_conv(batch, in, 1280, 1, 1, size, buffers[from], false, buffers[1 - from]);
  return static_cast<int>(layers.size());
}
EXPORT double flop(int layer) { return layers[static_cast<size_t>(layer)].flop; }
EXPORT const char* name(int layer) { return layers[static_cast<size_t>(layer)].name.c_str(); }
EXPORT void run(int layer) {
  const Layer& l = layers[static_cast<size_t>(layer)];
  if (l.is_block)
    run_block(l.block, kTier, make_plan(l.block, packed_layout(l.block.dims, kTier), parallel.threads), parallel);
  else
    run_conv(l.conv, kTier, parallel);
}
// FLOP of a run of nothing but multiply-adds, of one thread.
EXPORT double run_peak() {
  constexpr int64_t kIterations = 4000;
  const TierKernels& kernels = *tier_kernels(kTier);
  volatile float sink = kernels.fma_chains(kIterations);
  (void)sink;
  return 2.0 * kFmaChains * kernels.vector * kIterations;
}

#else
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

struct Version {
  int (*prepare)(int batch, int threads);
  double (*flop)(int);
  const char* (*name)(int);
  void (*run)(int);
  double (*run_peak)();
  std::vector<std::vector<double> > shares, times;  // of each layer, then of all; times in FLOP of the peak
};

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
static double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<long>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

int main(int count, char** words) {
  if (count < 5) return std::fprintf(stderr, "core_ab BATCH THREADS SECONDS ./VERSION.so...\n"), 2;
  const int batch = std::atoi(words[1]), threads = std::atoi(words[2]);
  std::vector<Version> versions;
  int layers = 0;
  for (int i = 4; i < count; ++i) {
    void* object = dlopen(words[i], RTLD_NOW | RTLD_LOCAL);
    if (!object) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    Version v = {reinterpret_cast<decltype(v.prepare)>(dlsym(object, "prepare")),
                 reinterpret_cast<decltype(v.flop)>(dlsym(object, "flop")),
                 reinterpret_cast<decltype(v.name)>(dlsym(object, "name")),
                 reinterpret_cast<decltype(v.run)>(dlsym(object, "run")),
                 reinterpret_cast<decltype(v.run_peak)>(dlsym(object, "run_peak")),
                 {},
                 {}};
    layers = v.prepare(batch, threads);
    v.shares.resize(static_cast<size_t>(layers) + 1);
    v.times = v.shares;
    versions.push_back(v);
  }
  double best_peak = 0;
  const double end = seconds() + std::atof(words[3]);
  while (seconds() < end) {
    for (Version& v : versions) {
      for (int i = 0; i < layers; ++i) v.run(i);  // another version's weights are in the caches
      double ideal = 0, all = 0;
      const auto peak_now = [&] {
        const double begin = seconds(), flop = v.run_peak();
        return flop / (seconds() - begin);
      };
      double before = peak_now();
      for (int i = 0; i < layers; ++i) {
        const double begin = seconds();
        v.run(i);
        const double taken = seconds() - begin, after = peak_now(), peak = (before + after) / 2;
        v.times[static_cast<size_t>(i)].push_back(taken * peak);
        v.shares[static_cast<size_t>(i)].push_back(v.flop(i) / (taken * peak * threads));
        ideal += v.flop(i);
        all += taken * peak;
        before = after;
        best_peak = std::max(best_peak, after);
      }
      v.times.back().push_back(all);
      v.shares.back().push_back(ideal / (all * threads));
    }
  }
  std::printf("FMA peak %.1f GFLOP/s a thread; a layer's microseconds at it, percent of it, times as fast as %s\n",
              best_peak * 1e-9, words[4]);
  int width = 0;
  for (int i = 0; i < layers; ++i) width = std::max(width, static_cast<int>(std::strlen(versions[0].name(i))));
  for (size_t i = 0; i <= static_cast<size_t>(layers); ++i) {
    std::printf("%-*s", width, i < static_cast<size_t>(layers) ? versions[0].name(static_cast<int>(i)) : "all");
    for (const Version& v : versions)
      std::printf("  %8.1f us %3.0f %% x%.2f", median(v.times[i]) / best_peak * 1e6, 100 * median(v.shares[i]),
                  median(versions[0].times[i]) / median(v.times[i]));
    std::printf("\n");
  }
}
#endif
