// C entries to the core for tests/test_avx512_emulated.py: run a block or a convolution by an emulated tier, or a phase
// of a training step by the AVX-512 tier.
#include <cstring>
#include <vector>

#include "conv.h"
#include "tiles.h"
#include "train.h"
#include "train_norm.h"
#include "train_window.h"

namespace {

const mbv2::Clamp kClamps[] = {{-__builtin_inff(), __builtin_inff()}, {0, __builtin_inff()}, {0, 6}};

mbv2::Parallel serial(int threads) {
  return {[](int64_t items, void* context, mbv2::ParallelBody body) { body(context, 0, items); }, threads};
}

// Whether it can run here or not.
mbv2::Tier tier_called(const char* name) {
  for (const mbv2::TierStatus* status : mbv2::all_tiers())
    if (std::strcmp(status->name, name) == 0) return status->tier;
  std::abort();
}

void require_released_tiles() { emulated::require(!emulated::tiles.configured, "tiles that are not released"); }

}  // namespace

extern "C" void run(const char* name, const int64_t* n, const float* const* w, const void* x, void* y, int threads) {
  using namespace mbv2;
  BlockArgs a = {};
  a.dims = {n[0], n[1], n[2], static_cast<int>(n[3]), w[0] != nullptr};
  a.batch = n[4];
  a.height = n[5];
  a.width = n[6];
  a.stride = n[7];
  a.dilation = n[8];
  a.pad_top = a.pad_left = n[9];
  a.residual = n[10];
  a.dtype = static_cast<DType>(n[11]);
  a.out_height = n[12];
  a.out_width = n[13];
  a.activation = kClamps[2];
  a.final_activation = kClamps[n[14]];
  a.x = x;
  a.x_stride_pixel = a.dims.in_channels;
  a.x_stride_row = a.width * a.x_stride_pixel;
  a.x_stride_image = a.height * a.x_stride_row;
  a.y = y;
  const Tier tier = tier_called(name);
  const PackedLayout layout = packed_layout(a.dims, tier);
  std::vector<float> packed(static_cast<size_t>(layout.size));
  pack(a.dims, {w[0], w[1], w[2], w[3], w[4], w[5]}, tier, packed.data());
  a.packed = packed.data();
  run_block(a, tier, make_plan(a, layout, threads), serial(threads));
  require_released_tiles();
}

// n: as the test lists them.
extern "C" void convolve(const char* name, const int64_t* n, const float* weight, const float* bias, const void* x,
                         void* y, int threads) {
  using namespace mbv2;
  ConvArgs a = {};
  a.dims = {n[0], n[1], static_cast<int>(n[2])};
  a.batch = n[3];
  a.height = n[4];
  a.width = n[5];
  a.out_height = n[6];
  a.out_width = n[7];
  a.stride = n[8];
  a.pad_top = a.pad_left = n[9];
  a.dtype = static_cast<DType>(n[10]);
  a.activation = kClamps[n[11]];
  a.x_stride_image = n[12];
  a.x_stride_channel = n[13];
  a.x_stride_row = n[14];
  a.x_stride_pixel = n[15];
  a.x = x;
  a.y = y;
  const Tier tier = tier_called(name);
  std::vector<float> packed(static_cast<size_t>(conv_layout(a.dims, tier).size));
  pack_conv(a.dims, weight, bias, tier, packed.data());
  a.packed = packed.data();
  run_conv(a, tier, serial(threads));
  require_released_tiles();
}

// n: as the test lists them. in, out: the tensors in the order of the members of TrainArgs.
extern "C" void train(const int64_t* n, const void* const* in, void* const* out) {
  using namespace mbv2;
  TrainArgs a = {};
  a.phase = static_cast<TrainPhase>(n[0]);
  a.dims = {n[1], n[2], n[3], static_cast<int>(n[4]), n[5] != 0};
  a.batch = n[6];
  a.height = n[7];
  a.width = n[8];
  a.out_height = n[9];
  a.out_width = n[10];
  a.stride = n[11];
  a.dilation = n[12];
  a.pad_top = a.pad_left = n[13];
  a.dtype = static_cast<DType>(n[14]);
  a.activation = kClamps[n[15]];
  a.final_activation = kClamps[n[16]];
  const void** storage[] = {&a.x, &a.d, &a.z, &a.gy};
  const float** floats[] = {&a.g,  &a.w1, &a.b1, &a.wd,     &a.w2,     &a.m,  &a.c0, &a.scale2, &a.shift2,
                            &a.a2, &a.b2, &a.c2, &a.scale3, &a.shift3, &a.a3, &a.b3, &a.c3};
  for (const void** member : storage) *member = *in++;
  for (const float** member : floats) *member = static_cast<const float*>(*in++);
  a.d_out = *out++;
  a.z_out = *out++;
  a.y = *out++;
  a.gh = *out++;
  a.gx = *out++;
  a.g_out = static_cast<float*>(*out++);
  for (double** member : {&a.sum, &a.sum_product, &a.gram}) *member = static_cast<double*>(*out++);
  for (float** member : {&a.gw2, &a.gwd, &a.t}) *member = static_cast<float*>(*out++);
  run_train(a, Tier::avx512, serial(1));
}

// A phase of a stem's training step. n: as the test lists them. gy, w1, b1, t may be null.
extern "C" void window(const int64_t* n, const void* x, const void* gy, const float* w1, const float* b1, double* sum,
                       double* gram, float* t) {
  using namespace mbv2;
  WindowArgs w = {};
  w.phase = static_cast<WindowPhase>(n[0]);
  ConvArgs& a = w.conv;
  a.dims = {n[1], n[2], static_cast<int>(n[3])};
  a.batch = n[4];
  a.height = n[5];
  a.width = n[6];
  a.out_height = n[7];
  a.out_width = n[8];
  a.stride = n[9];
  a.pad_top = a.pad_left = n[10];
  a.dtype = static_cast<DType>(n[11]);
  a.activation = kClamps[n[12]];
  a.x = x;
  a.x_stride_image = n[13];
  a.x_stride_channel = n[14];
  a.x_stride_row = n[15];
  a.x_stride_pixel = n[16];
  w.gy = gy;
  w.w1 = w1;
  w.b1 = b1;
  w.sum = sum;
  w.gram = gram;
  w.t = t;
  run_window(w, Tier::avx512, serial(1));
}

extern "C" void multiply_doubles(const double* a, const double* b, double* out, int64_t rows, int64_t depth) {
  const mbv2::TierKernels& kernels = *mbv2::tier_kernels(mbv2::Tier::avx512);
  kernels.multiply_doubles({a, depth, 1, b, rows, depth, out, mbv2::strip_width<double>(kernels.vector)});
}

extern "C" void multiply_floats(const float* a, const float* b, float* out, int64_t rows, int64_t depth) {
  const mbv2::TierKernels& kernels = *mbv2::tier_kernels(mbv2::Tier::avx512);
  kernels.multiply_floats({a, depth, 1, b, rows, depth, out, mbv2::strip_width<float>(kernels.vector)});
}
