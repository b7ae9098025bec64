// Versions of csrc/core against each other on a network's convolutions (stem, blocks, head; AVX2), network after
// network in turns, in one process. csrc/TUNING.md has the commands and what they gave.
//
//   a version:   for f in CORE/*.cpp: c++ -std=c++17 -O3 -fno-math-errno -fPIC -fvisibility=hidden -DMBV2_HAVE_AVX2
//                -ICORE (x86_avx2.cpp: with the features that kernels.inc lists; not x86_avx512*.cpp), this file with
//                -DVERSION -fopenmp, all with -shared -Wl,-Bsymbolic into NAME.so
//   to compare:  c++ -std=c++17 -O2 benchmarks/core_ab.cpp -ldl -o core_ab
//                ./core_ab NETWORK BATCH THREADS SECONDS ./BEFORE.so ./AFTER.so
//
// NETWORK: v1 or v2 (MobileNetV1, V2), then, if they are others, size, width and storage: v2,224,1.0,f32. Storage is
// f32, bf16, f16 or fp16: the last computes in fp16 too, in the tier for that; bf16 runs the tier for bf16 images where
// the version was built with it (-DMBV2_HAVE_AVX512AMX) and the machine has it. f32 runs the fastest fp32 tier of the
// version, so avx512bf16x3 (-DMBV2_HAVE_AVX512BF16X3) where there is one. NAME.so:fp16 is a version with a storage
// of its own; to compare two of one version, copy it.
//
// Times are the clock's, medians, and ratios are those of times: versions run in turns, so that all meet the same
// neighbors. The peak is the best of a few microseconds of nothing but multiply-adds before each network. Not between
// layers: tiles of AMX behind such a loop, and the loop behind tiles, are slower than either alone.
#ifdef VERSION
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
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

const Tier kActive = active_tier();  // the fastest that this version was built with and this machine has
Tier tier = kActive;

struct Layer {
  std::string name;
  bool is_block;
  BlockArgs block;
  ConvArgs conv;
  double flop;
};
std::vector<Layer> layers;
Parallel parallel;
DType storage;

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

void add_conv(int batch, int in, int out, int kernel, int stride, int size, const void* x, bool planes, void* y) {
  ConvArgs a = {};
  a.dims = {in, out, kernel};
  a.batch = batch;
  a.stride = stride;
  a.pad_top = a.pad_left = kernel / 2;
  a.height = a.width = size;
  a.out_height = a.out_width = (size - 1) / stride + 1;
  a.activation = {0, 6};
  a.dtype = storage;
  a.x = x;
  a.x_stride_channel = planes ? size * size : 1;
  a.x_stride_pixel = planes ? 1 : in;
  a.x_stride_row = a.x_stride_pixel * size;
  a.x_stride_image = in * size * size;
  a.y = y;
  float* packed = memory_for(conv_layout(a.dims, tier).size);
  pack_conv(a.dims, weights(out * in * kernel * kernel).data(), nullptr, tier, packed);
  a.packed = packed;
  layers.push_back({layers.empty() ? "stem" : "head",
                    false,
                    {},
                    a,
                    2.0 * batch * a.out_height * a.out_width * out * in * kernel * kernel});
}

void add_block(int batch, int in, int expansion, int out, int stride, int size, Clamp final, const void* x, void* y) {
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
  a.final_activation = final;
  a.dtype = storage;
  a.residual = stride == 1 && in == out;
  a.x = x;
  a.x_stride_pixel = in;
  a.x_stride_row = in * size;
  a.x_stride_image = a.x_stride_row * size;
  a.y = y;
  float* packed = memory_for(packed_layout(a.dims, tier).size);
  const std::vector<float> w1 = weights(hidden * in), wd = weights(hidden * 9), w2 = weights(hidden * out);
  pack(a.dims, {expand ? w1.data() : nullptr, nullptr, wd.data(), nullptr, w2.data(), nullptr}, tier, packed);
  a.packed = packed;
  const double pixels = a.out_height * a.out_width;
  layers.push_back({"block " + std::to_string(layers.size()),
                    true,
                    a,
                    {},
                    2.0 * batch * hidden * ((expand ? size * size * in : 0) + pixels * (9 + out))});
}

}  // namespace

// Channels of a network of another width, as MobileNets round them.
static int scaled(int channels, double width) {
  const int rounded = std::max(8, static_cast<int>(channels * width + 4) / 8 * 8);
  return rounded < 0.9 * channels * width ? rounded + 8 : rounded;
}

EXPORT int prepare(const char* network, int batch, int threads) {
  char name[8] = "", type[8] = "f32";
  int size = 224;
  double width = 1;
  std::sscanf(network, "%7[^,],%d,%lf,%7s", name, &size, &width, type);
  const bool v1 = std::strcmp(name, "v1") == 0;
  if (!v1 && std::strcmp(name, "v2") != 0) return 0;
  storage = std::strcmp(type, "bf16") == 0 ? DType::bf16 : std::strcmp(type, "f32") == 0 ? DType::f32 : DType::f16;
#ifdef MBV2_HAVE_AVX512FP16
  if (std::strcmp(type, "fp16") == 0) tier = fp16_tier().tier;
#endif
#ifdef MBV2_HAVE_AVX512AMX
  if (storage == DType::bf16) tier = active_bf16_tier();
#endif
  parallel = {threads > 1 ? shared : serial, threads};
  const int64_t values = int64_t{3} * batch * size * size;
  float* picture = memory_for(values);
  for (int64_t i = 0; i < values; ++i) {
    const float value = static_cast<float>(i % 97) * 0.02f - 1;
    if (storage == DType::f32)
      picture[i] = value;
    else if (storage == DType::bf16)
      std::memcpy(reinterpret_cast<uint16_t*>(picture) + i, reinterpret_cast<const char*>(&value) + 2, 2);
    else
      reinterpret_cast<uint16_t*>(picture)[i] = static_cast<uint16_t>(0x3800 + i % 97 * 8 + i % 2 * 0x8000);
  }
  const int64_t most = int64_t{1} * batch * size * size * scaled(64, width) / 4;
  float* buffers[2] = {memory_for(most), memory_for(most)};
  int in = scaled(32, width), from = 0;
  add_conv(batch, 3, in, 3, 2, size, picture, true, buffers[0]);
  size = (size - 1) / 2 + 1;
  const Clamp final = v1 ? Clamp{0, 6} : Clamp{-__builtin_inff(), __builtin_inff()};
  const auto add = [&](int expansion, int out, int stride) {
    add_block(batch, in, expansion, scaled(out, width), stride, size, final, buffers[from], buffers[1 - from]);
    in = scaled(out, width);
    size = (size - 1) / stride + 1;
    from = 1 - from;
  };
  if (v1) {
    const int blocks[13][2] = {{64, 1},  {128, 2}, {128, 1}, {256, 2}, {256, 1},  {512, 2}, {512, 1},
                               {512, 1}, {512, 1}, {512, 1}, {512, 1}, {1024, 2}, {1024, 1}};
    for (const auto& block : blocks) add(1, block[0], block[1]);
    return static_cast<int>(layers.size());
  }
  const int stages[7][4] = {{1, 16, 1, 1}, {6, 24, 2, 2},  {6, 32, 3, 2}, {6, 64, 4, 2},
                            {6, 96, 3, 1}, {6, 160, 3, 2}, {6, 320, 1, 1}};
  for (const auto& stage : stages)
    for (int i = 0; i < stage[2]; ++i) add(stage[0], stage[1], i ? 1 : stage[3]);
  add_conv(batch, in, scaled(1280, std::max(width, 1.0)), 1, 1, size, buffers[from], false, buffers[1 - from]);
  return static_cast<int>(layers.size());
}
EXPORT double flop(int layer) { return layers[static_cast<size_t>(layer)].flop; }
EXPORT const char* name(int layer) { return layers[static_cast<size_t>(layer)].name.c_str(); }
EXPORT void run(int layer) {
  const Layer& l = layers[static_cast<size_t>(layer)];
  if (l.is_block)
    run_block(l.block, tier, make_plan(l.block, packed_layout(l.block.dims, tier), parallel.threads), parallel);
  else
    run_conv(l.conv, tier, parallel);
}
// FLOP of a run of nothing but multiply-adds, of one thread.
EXPORT double run_peak() {
  constexpr int64_t kIterations = 4000;
  const TierKernels& kernels = *tier_kernels(kActive);
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
#include <string>
#include <vector>

struct Version {
  int (*prepare)(const char* network, int batch, int threads);
  double (*flop)(int);
  const char* (*name)(int);
  void (*run)(int);
  double (*run_peak)();
  std::vector<std::vector<double> > times;  // of each layer, then of all; in seconds
};

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
static double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<long>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

int main(int count, char** words) {
  if (count < 6) return std::fprintf(stderr, "core_ab NETWORK BATCH THREADS SECONDS ./VERSION.so...\n"), 2;
  const int batch = std::atoi(words[2]), threads = std::atoi(words[3]);
  std::vector<Version> versions;
  int layers = 0;
  for (int i = 5; i < count; ++i) {
    std::string path = words[i], network = words[1];
    const size_t colon = path.find(':');
    if (colon != std::string::npos) {
      network += std::string(network.find(',') == std::string::npos ? ",224,1.0," : ",") + path.substr(colon + 1);
      path.resize(colon);
    }
    void* object = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!object) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    Version v = {reinterpret_cast<decltype(v.prepare)>(dlsym(object, "prepare")),
                 reinterpret_cast<decltype(v.flop)>(dlsym(object, "flop")),
                 reinterpret_cast<decltype(v.name)>(dlsym(object, "name")),
                 reinterpret_cast<decltype(v.run)>(dlsym(object, "run")),
                 reinterpret_cast<decltype(v.run_peak)>(dlsym(object, "run_peak")),
                 {}};
    layers = v.prepare(network.c_str(), batch, threads);
    if (layers == 0) return std::fprintf(stderr, "%s knows no network %s\n", words[i], words[1]), 1;
    v.times.resize(static_cast<size_t>(layers) + 1);
    versions.push_back(v);
  }
  double best_peak = 0;
  const double end = seconds() + std::atof(words[4]);
  while (seconds() < end) {
    for (Version& v : versions) {
      for (int i = 0; i < layers; ++i) v.run(i);  // another version's weights are in the caches
      v.run_peak();                               // the first microseconds after other work can be half as fast
      const double before = seconds(), flop = v.run_peak(), first = seconds();
      best_peak = std::max(best_peak, flop / (first - before));
      double begin = first;
      for (size_t i = 0; i < static_cast<size_t>(layers); ++i) {
        v.run(static_cast<int>(i));
        const double end_of_layer = seconds();
        v.times[i].push_back(end_of_layer - begin);
        begin = end_of_layer;
      }
      v.times.back().push_back(begin - first);
    }
  }
  double all = 0;
  int width = 0;
  for (int i = 0; i < layers; ++i) {
    all += versions[0].flop(i);
    width = std::max(width, static_cast<int>(std::strlen(versions[0].name(i))));
  }
  std::printf("FMA peak %.1f GFLOP/s a thread; microseconds, percent of it, times as fast as %s\n", best_peak * 1e-9,
              words[5]);
  for (size_t i = 0; i <= static_cast<size_t>(layers); ++i) {
    const bool layer = i < static_cast<size_t>(layers);
    const double flop = layer ? versions[0].flop(static_cast<int>(i)) : all;
    std::printf("%-*s", width, layer ? versions[0].name(static_cast<int>(i)) : "all");
    for (const Version& v : versions) {
      const double time = median(v.times[i]);
      std::printf("  %8.1f us %3.0f %% x%.2f", time * 1e6, 100 * flop / (time * best_peak * threads),
                  median(versions[0].times[i]) / time);
    }
    std::printf("\n");
  }
}
#endif
