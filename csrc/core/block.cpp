// Cuts a call into work items and runs them; chooses the sizes of the passes.
#include "block.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>

#include "amx.h"
#include "pack.h"
#include "scratch.h"

namespace mbv2 {

#define MBV2_TIER(tier, ...) extern const TierKernels kernels_##tier;
#define MBV2_BF16_TIER MBV2_TIER
#define MBV2_FP16_TIER MBV2_TIER
#include "kernels.inc"
#undef MBV2_TIER
#undef MBV2_BF16_TIER
#undef MBV2_FP16_TIER

namespace {

thread_local Arena scratch;
thread_local Arena partial_sums;  // of the calling thread; its own arena because `scratch` is in use meanwhile

int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

int64_t clamp(int64_t v, int64_t lo, int64_t hi) { return v < lo ? lo : v > hi ? hi : v; }

struct Call {
  const BlockArgs& args;
  const PackedLayout layout;
  const Plan plan;
  const TierKernels& kernels;
  float* partial;
  int64_t partial_stride;             // floats between the partial sums of two splits
  std::atomic<int64_t>* outstanding;  // splits still at work, for each image and row part

  int64_t image_groups() const { return ceil_divide(args.batch, plan.images); }
  void run(int64_t index) const {
    const int64_t split = index % plan.splits, part = index / plan.splits % plan.row_parts;
    const int64_t group = index / plan.splits, images = group / plan.row_parts, groups = image_groups();
    WorkItem item;
    item.image = args.batch * images / groups;
    item.images = args.batch * (images + 1) / groups - item.image;
    item.row_begin = args.out_height * part / plan.row_parts;
    item.row_end = args.out_height * (part + 1) / plan.row_parts;
    const int64_t panel = layout.vector * layout.hidden_panel;
    const int64_t panels = ceil_divide(layout.hidden_padded, panel);
    item.hidden_begin = panels * split / plan.splits * panel;
    const int64_t hidden_end = panels * (split + 1) / plan.splits * panel;
    item.hidden_end = hidden_end < layout.hidden_padded ? hidden_end : layout.hidden_padded;
    float* sums = partial ? partial + group * plan.splits * partial_stride : nullptr;
    item.partial = sums ? sums + split * partial_stride : nullptr;
    if (item.row_begin < item.row_end)
      kernels.work(args, layout, plan, item, scratch.reserve(kernels.scratch_floats(args, layout, plan)));
    if (sums && outstanding[group].fetch_sub(1, std::memory_order_acq_rel) == 1)
      kernels.finish(args, layout, item, sums, plan.splits, partial_stride);
  }
};

#ifdef MBV2_HAVE_AVX512BF16X3
// A tier's kernels with another's of blocks and 1x1 convolutions; `finish` adds up what both write alike.
TierKernels with_products(TierKernels kernels, const TierKernels& products) {
  kernels.scratch_floats = products.scratch_floats;
  kernels.work = products.work;
  kernels.conv_scratch_floats = products.conv_scratch_floats;
  kernels.conv_work = products.conv_work;
  kernels.parts = products.parts;
  return kernels;
}
#endif

}  // namespace

Arena& thread_scratch() { return scratch; }

const TierKernels* tier_kernels(Tier tier) {
  switch (tier) {
    case Tier::portable:
      return &kernels_portable;
#ifdef MBV2_HAVE_AVX2
    case Tier::avx2:
      return &kernels_avx2;
#endif
#ifdef MBV2_HAVE_AVX512
    case Tier::avx512:
      return &kernels_avx512;
#endif
#ifdef MBV2_HAVE_AVX512BF16X3
    case Tier::avx512bf16x3: {
      static const TierKernels kernels = with_products(kernels_avx512, kernels_avx512bf16x3);
      return &kernels;
    }
#endif
#ifdef MBV2_HAVE_AVX512AMX
    case Tier::avx512amx:
      return &kernels_avx512amx;
#endif
#ifdef MBV2_HAVE_AVX512FP16
    case Tier::avx512fp16:
      return &kernels_avx512fp16;
#endif
    default:
      return nullptr;
  }
}

const TierKernels& block_kernels(const BlockDims& d, Tier tier) {
  // Each hidden number is split, written and read in parts. Few multiplications for each do not make up for it:
  // measured (csrc/TUNING.md) below 32 input and 32 output channels.
  const bool few = (d.expand ? d.in_channels : 0) + d.out_channels < 64;
  return *tier_kernels(tier == Tier::avx512bf16x3 && few ? Tier::avx512 : tier);
}

void share_out(const BlockArgs& a, const PackedLayout& l, int threads, Plan* plan) {
  plan->row_parts = plan->splits = 1;
  if (whole_images(a, threads)) return;
  // Else images are cut by rows (the rows around a cut are expanded twice) or by hidden channels (the partial sums are
  // written and added up by one thread), whichever costs less.
  const int64_t parts = threads / greatest_common_divisor(a.batch, threads);
  const int64_t reach = (a.dims.kernel - 1) * a.dilation + 1, rows_twice = reach > a.stride ? reach - a.stride : 0;
  const int64_t row_cost = a.dims.expand ? rows_twice * a.width * a.dims.in_channels * a.dims.hidden_channels : 0;
  // A partial sum costs as much as 48 multiply-adds (csrc/TUNING.md): one thread adds up what others' caches hold.
  const int64_t split_cost = 48 * parts * a.out_height * a.out_width * l.out_padded;
  if (ceil_divide(l.hidden_padded, l.vector * l.hidden_panel) >= parts && split_cost < row_cost)
    plan->splits = parts;
  else
    plan->row_parts = clamp(parts, 1, a.out_height ? a.out_height : 1);
}

Plan make_plan(const BlockArgs& a, const PackedLayout& l, int threads) {
  if (l.parts) return tile_plan(a, l, threads);
  const BlockDims& d = a.dims;
  const int64_t reach = (d.kernel - 1) * a.dilation + 1;
  // Measured (csrc/TUNING.md), and flat around these values. CPUs with AVX-512 have twice to four times the L2 of
  // others, and a row that is expanded with it is gone through in half the time.
  const bool wide = l.vector >= 16;
  const int64_t kPixels = wide ? 196 : 98, kRing = (wide ? 300 : 136) * 1024, kSums = 512 * 1024;
  const int64_t kChunk = !d.expand ? 192 : wide ? 64 : 168, kWhole = d.expand ? 192 : 320;  // channels
  Plan p;

  // Rows a group: enough pixels to make full register tiles, and to use a panel of weights often once it is in L1, but
  // not so many that the rows of e they need leave no room for a chunk of fair width.
  const int64_t row_of_e = d.expand ? (a.width + 2 * a.pad_left) * l.real_bytes : 0;  // bytes a channel
  const auto rows_of_e = [&](int64_t rows) { return std::min((rows - 1) * a.stride + reach, a.height); };
  // Without expand several rows always: the depthwise pass reads what they share from L1.
  const int64_t least = d.expand ? 1 : 4;
  int64_t group = std::max(kPixels / std::max<int64_t>(a.out_width, 1), least);
  group = clamp(group, 1, std::max<int64_t>(a.out_height, 1));
  // x in 16 bits is copied as fp32: rows few enough for a block of few channels to need no second chunk, which would
  // read all of that copy again.
  const bool copied = wide && a.dtype != DType::f32 && l.real_bytes == 4;
  const int64_t fair = copied && l.hidden_padded <= kWhole ? l.hidden_padded : 96;
  while (group > 1 && rows_of_e(group) * row_of_e * fair > kRing) --group;
  p.group_rows = ceil_divide(a.out_height, ceil_divide(a.out_height, group));

  // Channels a chunk: as equal as panels allow. Wide ones write and read the partial sums less often; from a point on
  // the rows of e that wait for the depthwise pass fall too far out of L1.
  const int64_t panel = l.vector * l.hidden_panel, panels = ceil_divide(l.hidden_padded, panel);
  const int64_t channel_of_e = rows_of_e(p.group_rows) * row_of_e;
  const int64_t fits = channel_of_e ? kRing / channel_of_e : l.hidden_padded;
  const int64_t most = std::max<int64_t>(std::min(fits, l.hidden_padded <= kWhole ? kWhole : kChunk) / panel, 1);
  p.chunk = ceil_divide(panels, ceil_divide(panels, most)) * panel;

  // Rows a band: all of them if the sums stay in L2, so that weights are read once.
  const int64_t row_bytes = a.out_width * l.out_padded * l.real_bytes;
  p.band_rows = a.out_height * row_bytes <= kSums ? a.out_height : clamp(kSums / 4 / row_bytes, 1, a.out_height);

  share_out(a, l, threads, &p);
  return p;
}

void run_block(const BlockArgs& args, Tier tier, const Plan& plan, const Parallel& parallel) {
  if (args.batch == 0 || args.out_height == 0 || args.out_width == 0) return;
  const TierKernels& kernels = block_kernels(args.dims, tier);
  Call call{args, packed_layout(args.dims, tier), plan, kernels, nullptr, 0, nullptr};
  const int64_t groups = call.image_groups() * plan.row_parts;
  std::unique_ptr<std::atomic<int64_t>[]> outstanding;
  if (plan.splits > 1) {
    call.partial_stride =
        round_up(ceil_divide(args.out_height, plan.row_parts) * args.out_width * call.layout.out_padded, 16);
    call.partial = partial_sums.reserve(static_cast<size_t>(groups * plan.splits * call.partial_stride));
    outstanding.reset(new std::atomic<int64_t>[static_cast<size_t>(groups)]);
    for (int64_t i = 0; i < groups; ++i) outstanding[i].store(plan.splits, std::memory_order_relaxed);
    call.outstanding = outstanding.get();
  }
  const auto body = [](void* context, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) static_cast<const Call*>(context)->run(i);
  };
  const int64_t items = groups * plan.splits;
  if (items == 1 || parallel.threads == 1)
    body(&call, 0, items);
  else
    parallel.parallel_for(items, &call, body);
}

double fma_peak(Tier tier, double seconds) {
  const TierKernels& kernels = *tier_kernels(tier);
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kIterations = 20000;
  volatile float sink = kernels.fma_chains(kIterations);
  double best = 0, total = 0;
  do {
    const auto begin = Clock::now();
    sink = kernels.fma_chains(kIterations);
    const double taken = std::chrono::duration<double>(Clock::now() - begin).count();
    const double rate = 2.0 * kFmaChains * kernels.vector * kIterations / taken * 1e-9;
    if (rate > best) best = rate;
    total += taken;
  } while (total < seconds);
  (void)sink;
  return best;
}

}  // namespace mbv2
