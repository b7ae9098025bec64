// The contract between the torch-facing code (ops.cpp) and the kernels: pointers, sizes and nothing of torch.
//
// The block, with BatchNorm already folded into weights and biases, for one pixel p of one image:
//
//   e[c]    = act( b1[c] + sum_i  w1[c][i] * x[p][i] )                      expand     1x1      Cin -> C
//   d[q][c] = act( b2[c] + sum_t  wd[c][t] * e[stride*q + dilation*t - pad][c] )   depthwise  k x k    C   (zero
//   outside the image) y[q][o] = final( b3[o] + sum_c w2[o][c] * d[q][c] ) (+ x[q][o])         project    1x1      C ->
//   Cout
//
// Without expand (MobileNetV1, and t = 1 in MobileNetV2) e is x itself. The padding is zeros in e, not act(b1): it is
// applied after the activation.
//
// Arithmetic is fp32, and x and y may be stored in fp32, bf16 or fp16; but for two tiers whose x and y have one type.
// The fp16 tier's arithmetic is fp16. The bf16 tier multiplies bf16 numbers, to which it rounds w1, w2, e and d, and
// adds up in fp32; its depthwise pass is fp32 but for what it reads and writes.
//
// Layout: x and y are channels_last, [N][H][W][channels], channels contiguous; x may have gaps between pixels and rows
// (a channel slice), y is dense.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arch.h"

namespace mbv2 {

enum class DType : int { f32, bf16, f16 };

// Every activation offered is a clamp: none (-inf, inf), relu (0, inf), relu6 (0, 6). NaN passes through all of them.
struct Clamp {
  float lo, hi;
};

// What the weights alone determine.
struct BlockDims {
  int64_t in_channels, hidden_channels, out_channels;
  int kernel;
  bool expand;
};

struct BlockArgs {
  BlockDims dims;
  int64_t batch, height, width, out_height, out_width;
  int64_t stride, dilation, pad_top, pad_left;
  Clamp activation, final_activation;
  bool residual;
  DType dtype;
  const void* x;
  int64_t x_stride_image, x_stride_row, x_stride_pixel;  // in elements
  void* y;
  const float* packed;  // from pack(), for the same tier
};

// ---- Packed weights -------------------------------------------------------------------------------------------------
// One array a block: a header, then sections of the numbers that the tier computes with (fp32, or fp16 for the fp16
// tier), each aligned to 64 bytes. A "panel" is the width of a register tile in vectors; the last panel of a matrix may
// be narrower. Channels are padded with zeros to whole vectors. Those of the bf16 tier: amx.h.
//
//   w1  [hidden panels][Cin][panel]        b1 [hidden padded]
//   wd  [hidden vectors][k*k][vector]      b2 [hidden padded]
//   w2  [out panels][C][panel]             b3 [out padded]
//   w2, paired: [C / 2][panel], the one panel of vectors that hold half as many output channels for two hidden channels
//
// So a chunk of hidden channels is a run of whole panels of w1, and a run of rows in each panel of w2: the chunk's
// width is free to be chosen at run time, per image size.
struct PackedLayout {
  int vector, real_bytes;       // numbers a vector, and the size of one
  int hidden_panel, out_panel;  // vectors a panel
  int out_pairs;                // vectors of w2's panel if it is paired, else 0
  int64_t hidden_padded, out_padded;
  int64_t w1, b1, wd, b2, w2, b3;  // offsets in numbers
  int64_t size;                    // of the whole, header included, in floats
  int parts = 0;                   // of a number in tiles, as amx.h has them; 0: no tiles
};

struct RawWeights {  // torch's shapes, fp32, contiguous; biases may be null
  const float *w_expand, *b_expand, *w_depthwise, *b_depthwise, *w_project, *b_project;
};

PackedLayout packed_layout(const BlockDims& dims, Tier tier);
// False if the tier computes in fp16 and a weight is too large for that: then nothing may run `packed`.
bool pack(const BlockDims& dims, const RawWeights& raw, Tier tier, float* packed);
// The tier an array was packed for. False when `packed` is not an array that pack() made for exactly these dims.
bool packed_tier(const float* packed, int64_t size, const BlockDims& dims, Tier* tier);

// ---- Running --------------------------------------------------------------------------------------------------------
// parallel_for(n, context, body): calls body(context, begin, end) over disjoint ranges that cover [0, n).
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
struct Parallel {
  void (*parallel_for)(int64_t n, void* context, ParallelBody body);
  int threads;
};

// GFLOP/s of one thread doing nothing but this tier's fused multiply-adds (2 FLOP each a lane).
double fma_peak(Tier tier, double seconds);

// ---- How a call is cut into work ------------------------------------------------------------------------------------
struct Plan {
  int64_t chunk;       // hidden channels a pass: whole panels, so that a chunk's rows of e stay in L1
  int64_t band_rows;   // output rows accumulated before the next band begins
  int64_t group_rows;  // output rows that go through expand, depthwise and project together
  int64_t row_parts;   // an image's output rows, shared out over this many work items
  int64_t splits;      // its hidden channels, shared out: partial sums, added in fixed order by the last to finish
  int64_t images = 1;  // that go through all this together, at most; if several, whole ones in one group of rows
};

Plan make_plan(const BlockArgs& args, const PackedLayout& layout, int threads);
void run_block(const BlockArgs& args, Tier tier, const Plan& plan, const Parallel& parallel);

// One work item: rows [row_begin, row_end) of `images` images from the `image`-th on, hidden channels [hidden_begin,
// hidden_end).
struct WorkItem {
  int64_t image, images, row_begin, row_end, hidden_begin, hidden_end;
  float* partial;  // null: write y. Else: leave the sums here, [rows * out_width][out_padded]
};

struct ConvArgs;  // conv.h
struct ConvLayout;
struct ConvItem;
struct LinearArgs;  // linear.h
struct PoolArgs;
struct TrainArgs;  // train.h
struct TrainLayout;
struct TrainPlan;
struct TrainItem;
template <class T>
struct StripProduct;  // train_norm.h
struct RowKernels;    // rows.h
struct WindowArgs;    // train_window.h
struct WindowItem;

struct TierKernels {
  int vector;        // numbers a vector
  int max_panel;     // widest register tile, in vectors
  int paired_panel;  // widest one that sums up two steps of the depth in each vector; 0: none does
  size_t (*scratch_floats)(const BlockArgs&, const PackedLayout&, const Plan&);
  void (*work)(const BlockArgs&, const PackedLayout&, const Plan&, const WorkItem&, float* scratch);
  // y rows of one image from `splits` partial sums that lie `stride` floats apart
  void (*finish)(const BlockArgs&, const PackedLayout&, const WorkItem&, const float* partial, int64_t splits,
                 int64_t stride);
  size_t (*conv_scratch_floats)(const ConvArgs&, const ConvLayout&);
  void (*conv_work)(const ConvArgs&, const ConvLayout&, const ConvItem&, float* scratch);
  void (*linear_work)(const LinearArgs&, int64_t output_begin, int64_t output_end);
  void (*pool_work)(const PoolArgs&);
  size_t (*train_scratch_floats)(const TrainArgs&, const TrainLayout&, const TrainPlan&);
  void (*train_work)(const TrainArgs&, const TrainLayout&, const TrainPlan&, const TrainItem&, const float* packed,
                     float* scratch);
  size_t (*window_scratch_floats)(const WindowArgs&, const ConvLayout&);
  void (*window_work)(const WindowArgs&, const ConvLayout&, const WindowItem&, float* scratch);
  void (*multiply_doubles)(const StripProduct<double>&);
  void (*multiply_floats)(const StripProduct<float>&);
  const RowKernels* rows;
  // `iterations` times kFmaChains independent multiply-adds a lane; the value returned only keeps them alive
  float (*fma_chains)(int64_t iterations);
  // Of the tier that computes in fp16: weights as such; false if one becomes infinite.
  bool (*narrow)(const float* from, int64_t count, void* to) = nullptr;

  int parts = 0;  // not 0: weights and calls are as amx.h says, each factor of a product as a sum of so many bf16

  int real_bytes() const { return narrow ? 2 : 4; }  // of a number that the tier computes with
};
constexpr int kFmaChains = 12;  // more than latency x ports of any CPU we know, fewer than AVX2's registers
constexpr int kMaxKernel = 31;

const TierKernels* tier_kernels(Tier tier);  // null when this build lacks the tier
// Those that a tier runs on such a block: not its own where another tier's are faster.
const TierKernels& block_kernels(const BlockDims& dims, Tier tier);

}  // namespace mbv2
