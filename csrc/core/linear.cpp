// Shares a classifier's outputs out over threads.
#include "linear.h"

#include "pack.h"

namespace mbv2 {

void run_linear(const LinearArgs& args, Tier tier, const Parallel& parallel) {
  constexpr int64_t kWorthwhile = 1 << 16;  // multiply-adds that take about as long as waking a thread
  struct Call {
    const LinearArgs& args;
    const TierKernels& kernels;
    int64_t groups, parts;
  } call{args, *tier_kernels(tier), ceil_divide(args.out_features, kLinearOutputs), 1};
  if (args.rows * args.in_features * args.out_features >= 2 * kWorthwhile)
    call.parts = call.groups < parallel.threads ? call.groups : parallel.threads;
  const auto body = [](void* context, int64_t begin, int64_t end) {
    const Call& c = *static_cast<const Call*>(context);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = c.groups * (i + 1) / c.parts * kLinearOutputs;
      c.kernels.linear_work(c.args, c.groups * i / c.parts * kLinearOutputs,
                            last < c.args.out_features ? last : c.args.out_features);
    }
  };
  if (call.parts <= 1)
    body(&call, 0, 1);
  else
    parallel.parallel_for(call.parts, &call, body);
}

}  // namespace mbv2
