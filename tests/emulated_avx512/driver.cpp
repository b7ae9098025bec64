// A C entry to the core for tests/test_avx512_emulated.py: packs a block's weights for the AVX-512 tier and runs it.
#include <vector>

#include "block.h"

extern "C" void run(const int64_t* n, const float* const* w, const void* x, void* y, int threads) {
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
  const float infinity = __builtin_inff();
  a.activation = {0, 6};
  a.final_activation = {-infinity, infinity};
  a.x = x;
  a.x_stride_pixel = a.dims.in_channels;
  a.x_stride_row = a.width * a.x_stride_pixel;
  a.x_stride_image = a.height * a.x_stride_row;
  a.y = y;
  const PackedLayout layout = packed_layout(a.dims, Tier::avx512);
  std::vector<float> packed(static_cast<size_t>(layout.size));
  pack(a.dims, {w[0], w[1], w[2], w[3], w[4], w[5]}, Tier::avx512, packed.data());
  a.packed = packed.data();
  const auto serial = [](int64_t items, void* context, ParallelBody body) { body(context, 0, items); };
  run_block(a, Tier::avx512, make_plan(a, layout, threads), {serial, threads});
}
