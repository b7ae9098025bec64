// The contract of a training step's phases for a dense convolution of few input channels, a stem, that looks at k x k
// pixels (conv.h). They see nothing but its input and the gradient of its output.
//
//   p[q] = x under the window of output pixel q        Cin * k * k values; 0 outside the image
//   y = act( e ),  e = w1 p + b1                       w1 and b1: with the BatchNorm folded in; run_conv() computes it
//
//   phase      reads    gives, as sums over all output pixels
//   gram       x        sum p, p p^T
//   backward   gy, x    sum g, t = g p^T               g = gy where act does not clamp e, else 0
//
// The convolution is linear in its windows. So, as for a block's expand layer, its batch statistics and all gradients
// but that of x follow from these sums (mbv2_kernels/training.py), and nothing is kept for the backward: e is computed
// again, which takes less time than reading it.
//
// The Gram matrix is summed in fp64. Neighbouring pixels of a picture are so alike, and so are its colours, that the
// variance of what an edge filter sees is a small difference of large elements.
//
// Results do not depend on the number of threads, as those of train.h.
#pragma once

#include "conv.h"

namespace mbv2 {

enum class WindowPhase { gram, backward };

// Pointers that a phase does not use are null. Windows have torch's order: w1 and t [Cout][Cin][k][k], sum of p
// [Cin][k][k].
struct WindowArgs {
  WindowPhase phase;
  ConvArgs conv;   // its y is not used, its `packed` is run_window()'s own
  const void* gy;  // dense channels_last, in the storage type
  const float *w1, *b1;
  double *sum, *gram;  // sum: of p, or of g
  float* t;
};

void run_window(const WindowArgs& args, Tier tier, const Parallel& parallel);

// One work item: rows [line_begin, line_end) of all images' outputs, and sums of its own, fp64 [1 + Cin*k*k][pitch]:
// the vector, then the matrix. The kernels have windows as they lie in the rows of an image, [k][k][Cin]. Columns are
// those as well, in gram, whole vectors for each row of the window, and only where the column's row is not above the
// row's; or the output channels.
struct WindowItem {
  int64_t line_begin, line_end;
  double* sums;
  int64_t pitch;
};

}  // namespace mbv2
