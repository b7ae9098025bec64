// Versions of csrc/core against each other: MobileNetV2's 17 blocks, each version in turn, in one process, on one
// thread. csrc/TUNING.md has the commands and what they gave.
//
//   a version:   for f in CORE/*.cpp: c++ -std=c++17 -O3 -fno-math-errno -fPIC -fvisibility=hidden -DMBV2_HAVE_AVX2
//                -ICORE (x86_avx2.cpp: with the features that kernels.inc lists), this file with -DVERSION, all with
//                -shared -Wl,-Bsymbolic into NAME.so
//   to compare:  c++ -std=c++17 -O2 benchmarks/core_ab.cpp -ldl -o core_ab && ./core_ab ./BEFORE.so ./AFTER.so
#include <cstdint>

struct Shape {
  int in, hidden, out, size, stride;
};

#ifdef VERSION
#include <vector>

#include "block.h"

extern "C" __attribute__((visibility("default"))) double peak() { return mbv2::fma_peak(mbv2::Tier::avx2, 0.002); }

// Runs the block once; `packed` is empty on the first call.
extern "C" __attribute__((visibility("default"))) void run(const Shape* s, std::vector<float>* packed, const float* x,
                                                           float* y) {
  using namespace mbv2;
  BlockArgs a = {};
  const bool expand = s->hidden != s->in;
  a.dims = {s->in, s->hidden, s->out, 3, expand};
  a.batch = a.dilation = a.pad_top = a.pad_left = 1;
  a.stride = s->stride;
  a.height = a.width = s->size;
  a.out_height = a.out_width = (s->size - 1) / s->stride + 1;
  a.activation = {0, 6};
  a.final_activation = {-__builtin_inff(), __builtin_inff()};
  a.residual = s->stride == 1 && s->in == s->out;
  a.x = x;
  a.x_stride_pixel = s->in;
  a.x_stride_row = s->in * a.width;
  a.x_stride_image = a.x_stride_row * a.height;
  a.y = y;
  const PackedLayout layout = packed_layout(a.dims, Tier::avx2);
  if (packed->empty()) {
    std::vector<float> w(static_cast<size_t>(s->hidden) * (s->in + s->out + 9));
    for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i * 2654435761u % 1000) * 1e-4f - 0.05f;
    packed->resize(static_cast<size_t>(layout.size) + 16);
    const float* p = w.data();
    const RawWeights raw = {expand ? p : nullptr, nullptr, p, nullptr, p, nullptr};
    pack(a.dims, raw, Tier::avx2, packed->data());
  }
  a.packed = packed->data();
  const auto serial = [](int64_t n, void* context, ParallelBody body) { body(context, 0, n); };
  run_block(a, Tier::avx2, make_plan(a, layout, 1), {serial, 1});
}

#else
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <vector>

using Run = void (*)(const Shape*, std::vector<float>*, const float*, float*);

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
static double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<long>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

int main(int count, char** names) {
  std::vector<Shape> shapes;
  const int table[7][4] = {{1, 16, 1, 1}, {6, 24, 2, 2},  {6, 32, 3, 2}, {6, 64, 4, 2},
                           {6, 96, 3, 1}, {6, 160, 3, 2}, {6, 320, 1, 1}};
  int in = 32, size = 112;
  for (const auto& row : table)
    for (int i = 0; i < row[2]; ++i) {
      const int stride = i ? 1 : row[3];
      shapes.push_back({in, in * row[0], row[1], size, stride});
      in = row[1];
      size = (size - 1) / stride + 1;
    }
  std::vector<Run> runs;
  double (*peak)() = nullptr;
  for (int i = 1; i < count; ++i) {
    void* version = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!version) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    runs.push_back(reinterpret_cast<Run>(dlsym(version, "run")));
    peak = reinterpret_cast<double (*)()>(dlsym(version, "peak"));
  }
  const size_t versions = runs.size(), blocks = shapes.size();
  std::vector<std::vector<float> > packed(versions * blocks);
  std::vector<float> buffers[2] = {std::vector<float>(1 << 21, 0.5f), std::vector<float>(1 << 21, 0.5f)};
  std::vector<std::vector<double> > alone(versions * blocks), in_a_row(versions);
  double best_peak = 0;
  for (int round = 0; round < 11; ++round) {
    best_peak = std::max(best_peak, peak());
    for (size_t b = 0; b < blocks; ++b)
      for (size_t v = 0; v < versions; ++v) {
        std::vector<float>& weights = packed[v * blocks + b];
        double best = 1;
        for (int i = 0; i < 12; ++i) {
          const double begin = seconds();
          runs[v](&shapes[b], &weights, buffers[0].data(), buffers[1].data());
          best = std::min(best, seconds() - begin);
        }
        alone[v * blocks + b].push_back(best);
      }
    for (size_t v = 0; v < versions; ++v) {
      double best = 1;
      for (int i = 0; i < 5; ++i) {
        const double begin = seconds();
        for (size_t b = 0; b < blocks; ++b)
          runs[v](&shapes[b], &packed[v * blocks + b], buffers[b % 2].data(), buffers[1 - b % 2].data());
        best = std::min(best, seconds() - begin);
      }
      in_a_row[v].push_back(best);
    }
  }
  std::printf("FMA peak %.1f GFLOP/s; percent of it, and times as fast as %s\n", best_peak, names[1]);
  double all = 0;
  for (size_t b = 0; b < blocks; ++b) {
    const Shape& s = shapes[b];
    const double pixels = std::pow((s.size - 1) / s.stride + 1, 2),
                 before = s.hidden != s.in ? s.size * s.size * s.in : 0;
    const double flop = 2.0 * s.hidden * (before + pixels * (9 + s.out));
    all += flop;
    std::printf("%2zu %3d > %3d > %3d @%d/%d", b + 1, s.in, s.hidden, s.out, s.size, s.stride);
    for (size_t v = 0; v < versions; ++v)
      std::printf("  %3.0f %% x%.2f", flop / median(alone[v * blocks + b]) / best_peak * 1e-7,
                  median(alone[b]) / median(alone[v * blocks + b]));
    std::printf("\n");
  }
  std::printf("in a row");
  for (size_t v = 0; v < versions; ++v)
    std::printf("  %3.0f %% x%.2f", all / median(in_a_row[v]) / best_peak * 1e-7,
                median(in_a_row[0]) / median(in_a_row[v]));
  std::printf("\n");
}
#endif
