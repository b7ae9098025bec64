// Cuts the phases of a dense convolution's training step into work items and adds up what the items leave.
#include "train_window.h"

#include <algorithm>

#include "pack.h"
#include "scratch.h"

namespace mbv2 {
namespace {

thread_local Arena parameters;  // of the calling thread; arenas of their own because all are in use at once
thread_local Arena slot_sums;

struct Call {
  WindowArgs args;
  ConvLayout layout;
  const TierKernels& kernels;
  int64_t lines, slots, pitch;
  double* sums;

  int64_t rows() const { return 1 + args.conv.dims.in_channels * args.conv.dims.kernel * args.conv.dims.kernel; }

  void run(int64_t slot) const {
    const WindowItem item{lines * slot / slots, lines * (slot + 1) / slots, sums + slot * rows() * pitch, pitch};
    std::fill(item.sums, item.sums + rows() * pitch, 0.0);
    kernels.window_work(args, layout, item, thread_scratch().reserve(kernels.window_scratch_floats(args, layout)));
  }

  double sum(int64_t row, int64_t column) const {
    double total = 0;
    for (int64_t slot = 0; slot < slots; ++slot) total += sums[(slot * rows() + row) * pitch + column];
    return total;
  }

  // body(torch's place of a value of the window, its row of the window, its place in that)
  template <class Body>
  void for_each_value(const Body& body) const {
    const int64_t channels = args.conv.dims.in_channels, kernel = args.conv.dims.kernel;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t dy = 0; dy < kernel; ++dy)
        for (int64_t dx = 0; dx < kernel; ++dx) body((c * kernel + dy) * kernel + dx, dy, dx * channels + c);
  }

  void add_up() const {
    const int64_t kernel = args.conv.dims.kernel, run = kernel * args.conv.dims.in_channels;
    const int64_t out_channels = args.conv.dims.out_channels, depth = kernel * run;
    if (args.phase == WindowPhase::backward) {
      for (int64_t o = 0; o < out_channels; ++o) {
        args.sum[o] = sum(0, o);
        for_each_value([&](int64_t to, int64_t dy, int64_t at) {
          args.t[o * depth + to] = static_cast<float>(sum(1 + dy * run + at, o));
        });
      }
      return;
    }
    const int64_t run_pitch = pitch / kernel;
    for_each_value([&](int64_t to, int64_t dy, int64_t at) {
      args.sum[to] = sum(0, dy * run_pitch + at);
      for_each_value([&](int64_t to2, int64_t dy2, int64_t at2) {
        args.gram[to * depth + to2] =
            dy <= dy2 ? sum(1 + dy * run + at, dy2 * run_pitch + at2) : sum(1 + dy2 * run + at2, dy * run_pitch + at);
      });
    });
  }
};

}  // namespace

void run_window(const WindowArgs& args, Tier tier, const Parallel& parallel) {
  constexpr int64_t kMostSlots = 32, kMostSums = 4 << 20, kPixels = 1024;  // pixels: a slot's at least
  const ConvArgs& a = args.conv;
  const int64_t pixels = a.batch * a.out_height * a.out_width;
  Call call{args, conv_layout(a.dims, tier), *tier_kernels(tier), a.batch * a.out_height, 0, 0, nullptr};
  if (args.phase == WindowPhase::gram)
    call.pitch = a.dims.kernel * round_up(a.dims.kernel * a.dims.in_channels, call.layout.vector);
  else
    call.pitch = call.layout.out_padded;
  if (pixels == 0) return call.add_up();
  const int64_t size = call.rows() * call.pitch;
  call.slots = std::max<int64_t>(std::min({kMostSlots, kMostSums / size, pixels / kPixels, call.lines}), 1);
  call.sums = reinterpret_cast<double*>(slot_sums.reserve(static_cast<size_t>(2 * call.slots * size)));
  if (args.phase == WindowPhase::backward) {
    float* packed = parameters.reserve(static_cast<size_t>(call.layout.size));
    pack_conv(a.dims, args.w1, args.b1, tier, packed);
    call.args.conv.packed = packed;
  }
  const auto body = [](void* context, int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) static_cast<const Call*>(context)->run(slot);
  };
  if (call.slots == 1 || parallel.threads == 1)
    body(&call, 0, call.slots);
  else
    parallel.parallel_for(call.slots, &call, body);
  call.add_up();
}

}  // namespace mbv2
