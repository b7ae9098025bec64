// The contract of a training step's phases, as block.h is that of inference. With batch statistics the block cannot run
// in one sweep: a BatchNorm's mean and variance must be complete before the layer after it starts. So a step is a chain
// of phases, with arithmetic on a few vectors between them that is the caller's.
//
//   e = act( w1 x + b1 )                         x itself without an expand layer; 0 outside the image
//   d = depthwise( e, wd )
//   h = act( d * scale2 + shift2 )
//   z = w2 h
//   y = final( z * scale3 + shift3 ) (+ x)
//
// and backward, where act' and final' are 1 strictly between the bounds of the clamp and 0 elsewhere:
//
//   gz = a3 * g3 + b3 * z + c3                   g3 = final' gy
//   gd = a2 * g2 + b2 * d + c2                   g2 = act' gh,  gh = w2^T gz
//   g1 = act' depthwise^T( gd, wd )              no act' without an expand layer
//   gx = w1^T g1 - m x - c0 (+ gy)
//
//   phase                reads                   gives, besides sums over all pixels
//   gram                 x                       sum x, x x^T
//   depthwise            x                       d, sum d, d^2;  e
//   project              x or d                  z, sum z, z^2
//   finish               z, x                    y
//   finish_backward      gy, z                   sum g3, g3 z
//   project_backward     gy, z, x or d           sum g2, g2 d;  gw2 = gz h^T;  gh or g2
//   depthwise_backward   gy, z, x, d (, g2, e)   g = w1^T g1 (or g1);  sum g1;  gwd = gd x e;  t = g1 x^T
//   input_backward       g, x, gy                gx, which may be g's memory
//
// The hidden tensors e, h and their gradients exist only as a few rows of one chunk of channels, like in inference; d
// is kept if the caller wants (d not null), else computed again from x. So is g2 between the two backward phases, else
// computed again from gy and z: with few output channels that costs less than to write and read it. And so is e of a
// block with many input channels. A lone 1x1 convolution, a head, is project with d = x, of which gh is the gradient
// then.
//
// x, d, z, y, gy, gh and gx are dense channels_last in the storage type; g, g2 and e are dense channels_last fp32.
// Arithmetic is fp32; sums over pixels are fp32 in short runs and fp64 across them.
//
// Results do not depend on the number of threads: the shapes alone say how pixels are cut into slots, every slot has
// sums of its own, and these are added in fixed order. Into how many shares hidden channels are cut may depend on it
// where each channel is treated alike in any: in all phases but depthwise_backward, which adds up over them.
#pragma once

#include "block.h"

namespace mbv2 {

enum class TrainPhase {
  gram,
  depthwise,
  project,
  finish,
  finish_backward,
  project_backward,
  depthwise_backward,
  input_backward
};

// Pointers that a phase does not use are null. Weights and vectors have torch's shapes: w1 and t [C][Cin], wd and gwd
// [C][k*k], w2 and gw2 [Cout][C], m and gram [Cin][Cin].
struct TrainArgs {
  TrainPhase phase;
  BlockDims dims;
  int64_t batch, height, width, out_height, out_width;
  int64_t stride, dilation, pad_top, pad_left;
  Clamp activation, final_activation;
  DType dtype;

  const void *x, *d, *z, *gy;
  const float *g, *g2, *e;
  const float *w1, *b1, *wd, *w2, *m, *c0;
  const float *scale2, *shift2, *a2, *b2, *c2;
  const float *scale3, *shift3, *a3, *b3, *c3;

  void *d_out, *z_out, *y, *gh, *gx;
  float *g_out, *g2_out, *e_out;
  double *sum, *sum_product;  // of the first and the second quantity that the table names
  double* gram;
  float *gw2, *gwd, *t;
};

void run_train(const TrainArgs& args, Tier tier, const Parallel& parallel);

// Whether g2 is worth being kept where d is, measured (csrc/TUNING.md).
inline bool keeps_g2(const BlockDims& dims) { return dims.out_channels >= 64 || !dims.expand; }
// The same of e, fp32 alike. It is written by whole vectors, and all of it by parts of rows of d.
bool keeps_e(const TrainArgs& args);

// ---- Parameters as the kernels read them ----------------------------------------------------------------------------
// Offsets in floats of matrices in panels (block.h, "Packed weights") and of vectors padded with zeros. Packed anew in
// every call: an optimizer changes the weights between any two.
struct TrainLayout {
  int vector;
  int in_panel, hidden_panel, out_panel;  // vectors a panel
  int in_pairs, out_pairs;                // of expand_backward and project, if they are paired, else 0
  int64_t in_padded, hidden_padded, out_padded;
  int64_t expand;            // w1 [hidden panels][Cin][panel]
  int64_t expand_bias;       // b1 [hidden padded]
  int64_t expand_backward;   // w1 [in panels][C][panel], or paired [C / 2][panel]
  int64_t depthwise;         // wd [hidden vectors][k*k][vector]
  int64_t project;           // w2 [out panels][C][panel], or paired
  int64_t project_backward;  // w2 [hidden panels][Cout][panel]
  int64_t input;             // m [in panels][Cin][panel]
  int64_t scale2, shift2, a2, b2, c2, scale3, shift3, a3, b3, c3, c0;
  int64_t size;
};

// ---- How a call is cut into work ------------------------------------------------------------------------------------
// Images are cut into parts: rows of d, or rows of x in depthwise_backward. A slot is a run of parts that has sums of
// its own; an item is a slot's parts with a share of the hidden channels. The phases that know no hidden channels take
// a run of pixels for a slot.
struct TrainPlan {
  int64_t chunk;       // hidden channels a pass: whole panels
  int64_t pitch;       // floats between pixels of a panel: its width
  int64_t group_rows;  // rows that go through a chunk's layers together
  int64_t row_parts;   // parts an image
  int64_t slots, splits;
  // A slot's sums: fp64 [sum_rows][sum_width], fp32 [matrix_rows][hidden padded].
  //   gram                 sum x; x x^T             [1 + Cin][in padded]
  //   depthwise, project   sum; sum of squares      [2][hidden or out padded]
  //   finish_backward      sum g3; g3 z             [2][out padded]
  //   project_backward     sum g2; g2 d             [2][hidden padded]          matrix gw2 [Cout]
  //   depthwise_backward   sum g1; gwd by tap       [1 + k*k][hidden padded]    matrix t^T [Cin]
  int64_t sum_rows, sum_width, matrix_rows;
};

struct TrainItem {
  int64_t begin, end;  // parts or pixels
  int64_t hidden_begin, hidden_end;
  double* sums;
  float* matrix;
  float* g_out;  // depthwise_backward: where this share of the hidden channels adds up w1^T g1
};

}  // namespace mbv2
