// The core's parallel_for on torch's own intra-op pool: obeys torch.set_num_threads, adds no threads of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "core/block.h"

namespace mbv2 {

inline Parallel torch_parallel() {
  const auto run = [](int64_t n, void* context, ParallelBody body) {
    torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, static_cast<int>(torch::stable::get_num_threads())};
}

}  // namespace mbv2
