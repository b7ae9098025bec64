// A block's training step in one process: forward() and backward() of mbv2_kernels/training.py, the same phases
// (train.h) in the same order with the same arithmetic between them (train_norm.h), but none of the tensors, calls and
// checks that lie between the phases' ops: those cost as much as the phases of a small image.
#pragma once

#include <functional>

#include "train.h"
#include "train_norm.h"

namespace mbv2 {

struct TrainBlock {
  TrainArgs shape;                  // what all phases share: dims and sizes, geometry, clamps, dtype, x
  const float *w1, *wd, *w2;        // w1 is not read without an expand layer
  Norm expand, depthwise, project;  // forward: statistics null are those of the batch
  bool residual;
};

// `Saved` of training.py. Statistics are written of those layers that use the batch's; mean_x, sum_x and gram if expand
// does; e where it is not null, which keeps_e() has to allow.
struct TrainForward {
  void *y, *d, *z;
  float* e;
  double *expand, *depthwise, *project;  // statistics
  double *mean_x, *sum_x, *gram;
};

void train_forward(const TrainBlock& block, const TrainForward& out, Tier tier, const Parallel& parallel);

struct TrainSaved {
  const void *d, *z;  // d null: to be computed again
  const float* e;     // null: the same
  const double *mean_x, *sum_x, *gram;
  bool rounded;  // the forward had d in the storage type
};

// Null: not asked for.
struct LayerGradients {
  float *weight, *bias, *gamma, *beta;
  bool any() const { return weight || bias || gamma || beta; }
};
struct TrainGradients {
  void* x;
  LayerGradients expand, depthwise, project;
};

// image(bytes): memory, aligned to 64 bytes, that stays until the call returns.
void train_backward(const TrainBlock& block, const void* gy, const TrainSaved& saved, const TrainGradients& out,
                    const std::function<void*(int64_t)>& image, Tier tier, const Parallel& parallel);

}  // namespace mbv2
