// Cuts a phase into work items, packs its parameters, runs it and adds up what the items leave.
#include "train.h"

#include <algorithm>

#include "pack.h"
#include "rows.h"
#include "scratch.h"

namespace mbv2 {
namespace {

thread_local Arena parameters;  // of the calling thread; arenas of their own because all are in use at once
thread_local Arena slot_sums;
thread_local Arena split_rows;

bool has_hidden(TrainPhase phase) {
  return phase == TrainPhase::depthwise || phase == TrainPhase::project || phase == TrainPhase::project_backward ||
         phase == TrainPhase::depthwise_backward;
}

bool is_backward(TrainPhase phase) {
  return phase == TrainPhase::project_backward || phase == TrainPhase::depthwise_backward;
}

int64_t floor_power_of_two(int64_t v) {
  int64_t power = 1;
  while (2 * power <= v) power *= 2;
  return power;
}

int64_t pixels_of(const TrainArgs& a) {
  const bool of_x =
      a.phase == TrainPhase::gram || a.phase == TrainPhase::input_backward || a.phase == TrainPhase::depthwise_backward;
  return a.batch * (of_x ? a.height * a.width : a.out_height * a.out_width);
}

template <class Body>
void parallel_for(const Parallel& parallel, int64_t n, Body body) {
  if (n <= 1 || parallel.threads == 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  parallel.parallel_for(n, &body, [](void* context, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<Body*>(context))(i);
  });
}

// ---- Parameters -----------------------------------------------------------------------------------------------------

struct Packing {
  TrainLayout layout = {};
  PanelMatrix sections[24];
  int64_t offsets[24];
  int count = 0;

  Packing(const TrainArgs& a, const TierKernels& kernels) {
    const int64_t in = a.dims.in_channels, hidden = a.dims.hidden_channels, out = a.dims.out_channels;
    const int64_t taps = a.dims.kernel * a.dims.kernel;
    TrainLayout& l = layout;
    const int64_t vector = l.vector = kernels.vector;
    l.in_padded = round_up(in, vector);
    l.hidden_padded = round_up(hidden, vector);
    l.out_padded = round_up(out, vector);
    l.in_panel = panel_width(l.in_padded / vector, kernels.max_panel);
    l.hidden_panel = panel_width(l.hidden_padded / vector, kernels.max_panel);
    l.out_panel = panel_width(l.out_padded / vector, kernels.max_panel);
    const int64_t in_panel = l.in_panel * vector, hidden_panel = l.hidden_panel * vector;
    const bool needs_e = a.phase == TrainPhase::depthwise_backward || !a.d;
    l.expand = add({needs_e && !a.e ? a.w1 : nullptr, hidden, in, in, 1, l.hidden_padded, hidden_panel, nullptr});
    l.in_pairs = paired_vectors(kernels, in, hidden);
    l.out_pairs = paired_vectors(kernels, out, hidden);
    l.expand_backward =
        add({a.g_out ? a.w1 : nullptr, in, hidden, 1, in, l.in_padded, in_panel, nullptr, l.in_pairs, l.vector});
    l.depthwise = add({needs_e ? a.wd : nullptr, hidden, taps, taps, 1, l.hidden_padded, vector, nullptr});
    if (is_backward(a.phase))
      l.project_backward = add({a.g2 ? nullptr : a.w2, hidden, out, 1, hidden, l.hidden_padded, hidden_panel, nullptr});
    else
      l.project =
          add({a.w2, out, hidden, hidden, 1, l.out_padded, l.out_panel * vector, nullptr, l.out_pairs, l.vector});
    l.input = add({a.m, in, in, in, 1, l.in_padded, in_panel, nullptr});
    l.expand_bias = add_vector(a.b1, hidden, l.hidden_padded);
    l.scale2 = add_vector(a.scale2, hidden, l.hidden_padded);
    l.shift2 = add_vector(a.shift2, hidden, l.hidden_padded);
    l.a2 = add_vector(a.a2, hidden, l.hidden_padded);
    l.b2 = add_vector(a.b2, hidden, l.hidden_padded);
    l.c2 = add_vector(a.c2, hidden, l.hidden_padded);
    l.scale3 = add_vector(a.scale3, out, l.out_padded);
    l.shift3 = add_vector(a.shift3, out, l.out_padded);
    l.a3 = add_vector(a.a3, out, l.out_padded);
    l.b3 = add_vector(a.b3, out, l.out_padded);
    l.c3 = add_vector(a.c3, out, l.out_padded);
    l.c0 = add_vector(a.c0, in, l.in_padded);
  }

  int64_t add(const PanelMatrix& matrix) {
    if (!matrix.src) return 0;
    sections[count] = matrix;
    offsets[count] = layout.size;
    layout.size = round_up(layout.size + matrix.depth * matrix.padded, kPackedHeader);
    return offsets[count++];
  }
  int64_t add_vector(const float* src, int64_t channels, int64_t padded) {
    return add({src, channels, 1, 1, 0, padded, padded, nullptr});
  }

  void write(float* packed, const Parallel& parallel) {
    int64_t panels = 0;
    for (int i = 0; i < count; ++i) {
      sections[i].dst = packed + offsets[i];
      panels += panel_count(sections[i]);
    }
    // Each thread gets panels of all matrices: neighbours are as large as each other.
    const int64_t shares = parallel.threads, most = ceil_divide(panels, shares);
    parallel_for(parallel, shares * most, [&](int64_t i) {
      int64_t panel = i % most * shares + i / most;
      if (panel >= panels) return;
      const PanelMatrix* matrix = sections;
      for (; panel >= panel_count(*matrix); ++matrix) panel -= panel_count(*matrix);
      pack_panels(*matrix, panel, panel + 1);
    });
  }
};

// ---- Cutting --------------------------------------------------------------------------------------------------------

constexpr int64_t kMostSlots = 64;

TrainPlan make_train_plan(const TrainArgs& a, const TrainLayout& l, int threads) {
  // Sums of all slots together, and rows of w1^T g1 of all splits together, in floats.
  constexpr int64_t kMostSums = 4 << 20, kMostSplitRows = 4 << 20;
  const int64_t taps = a.dims.kernel * a.dims.kernel, pixels = pixels_of(a);
  TrainPlan p = {};
  p.chunk = p.group_rows = p.row_parts = p.splits = 1;
  int64_t pixels_per_slot = a.phase == TrainPhase::gram ? 512 : 128;  // gram leaves a matrix in each
  switch (a.phase) {
    case TrainPhase::gram:
      p.sum_rows = 1 + a.dims.in_channels;
      p.sum_width = l.in_padded;
      break;
    case TrainPhase::project:
    case TrainPhase::finish_backward:
      p.sum_rows = 2;
      p.sum_width = l.out_padded;
      break;
    case TrainPhase::project_backward:
      p.matrix_rows = a.gw2 ? a.dims.out_channels : 0;
      [[fallthrough]];
    case TrainPhase::depthwise:
      p.sum_rows = 2;
      p.sum_width = l.hidden_padded;
      break;
    case TrainPhase::depthwise_backward:
      p.matrix_rows = a.t ? a.dims.in_channels : 0;
      p.sum_rows = 1 + taps;
      p.sum_width = l.hidden_padded;
      break;
    case TrainPhase::finish:
    case TrainPhase::input_backward:
      break;
  }
  const bool hidden = has_hidden(a.phase);
  if (hidden) pixels_per_slot = is_backward(a.phase) ? 196 : 98;
  const int64_t sums = 2 * p.sum_rows * p.sum_width + p.matrix_rows * l.hidden_padded;
  int64_t slots = std::min(kMostSlots, pixels / pixels_per_slot);
  if (sums) slots = std::min(slots, kMostSums / sums);
  p.slots = floor_power_of_two(std::max<int64_t>(slots, 1));
  p.pitch = l.vector * l.hidden_panel;
  if (!hidden || pixels == 0) return p;

  // Parts: enough for all slots, and small enough that what is held for all of a part stays in L2.
  const int64_t part_bytes = 32 * 1024 * std::max(l.vector, 8);  // wider registers come with larger L2 caches
  const bool of_x = a.phase == TrainPhase::depthwise_backward;
  const int64_t rows = of_x ? a.height : a.out_height, width = of_x ? a.width : a.out_width;
  const int64_t reach = (a.dims.kernel - 1) * a.dilation + 1;
  const int64_t held = a.out_height * a.out_width * l.out_padded * 4;
  p.row_parts = std::max(ceil_divide(p.slots, a.batch), ceil_divide(held, part_bytes));
  // Rows at the seam of two parts are computed for both: an eighth of all at most.
  const int64_t seam = of_x ? reach - 1 : a.d ? 0 : ceil_divide(std::max<int64_t>(reach - a.stride, 0), a.stride);
  p.row_parts = std::max<int64_t>(std::min(p.row_parts, rows / std::max<int64_t>(4, 7 * seam)), 1);
  const int64_t parts = a.batch * p.row_parts;
  p.slots = ceil_divide(parts, ceil_divide(parts, p.slots));

  const int64_t panel = l.vector * l.hidden_panel, panels = ceil_divide(l.hidden_padded, panel);
  if (a.phase != TrainPhase::project) {
    // How often w1^T g1 is cut shows in its rounding; the other phases treat each channel alike in whatever company,
    // and compute less twice with fewer splits.
    constexpr int64_t kItems = 32, kItemsPerThread = 4, kLeastChannels = 64;
    const int64_t items = of_x ? kItems : std::min<int64_t>(kItems, kItemsPerThread * threads);
    p.splits = std::min({ceil_divide(items, p.slots), panels, std::max<int64_t>(l.hidden_padded / kLeastChannels, 1)});
    if (a.g_out && a.dims.expand) p.splits = std::min(p.splits, 1 + kMostSplitRows / (pixels * a.dims.in_channels));
  }

  // As in make_plan(): full tiles, and rows of a chunk that stay close.
  constexpr int64_t kPixels = 98, kChunk = 168;
  const int64_t ring = 16 * 1024 * l.vector;  // bytes, as above
  const int64_t group = std::max(of_x ? a.stride : 1, std::min(kPixels / std::max<int64_t>(width, 1), rows));
  p.group_rows = ceil_divide(rows, ceil_divide(rows, group));
  const bool needs_e = (of_x || !a.d) && a.dims.expand;
  int64_t pixels_held = p.group_rows * width;
  if (needs_e) pixels_held += std::min(of_x ? p.group_rows : (p.group_rows - 1) * a.stride + reach, a.height) * a.width;
  if (of_x) pixels_held += std::min((p.group_rows + reach - 2) / a.stride + 1, a.out_height) * a.out_width;
  const int64_t panels_each = ceil_divide(panels, p.splits);
  const int64_t most = std::max<int64_t>(std::min(kChunk, ring / (4 * pixels_held)) / panel, 1);
  p.chunk = ceil_divide(panels_each, ceil_divide(panels_each, most)) * panel;
  return p;
}

// ---- What the items leave -------------------------------------------------------------------------------------------

struct Slots {
  const TrainPlan& plan;
  const double* sums;
  const float* matrices;
  int64_t hidden_padded;
  const RowKernels& kernels;

  // Columns [begin, end) of a row of all slots' sums; 0 without a slot.
  void sum(int64_t row, int64_t begin, int64_t end, double* to) const {
    if (plan.slots == 0) return std::fill(to, to + (end - begin), 0.0);
    kernels.sum_doubles(sums + row * plan.sum_width + begin, plan.sum_rows * plan.sum_width, plan.slots, end - begin,
                        to);
  }
  // The same of their matrices.
  void sum(int64_t row, int64_t begin, int64_t end, float* to) const {
    if (plan.slots == 0) return std::fill(to, to + (end - begin), 0.0f);
    kernels.sum_floats(matrices + row * hidden_padded + begin, plan.matrix_rows * hidden_padded, plan.slots,
                       end - begin, to);
  }
};

void add_sums(const Slots& slots, int64_t row, int64_t channels, double* out) {
  if (out) slots.sum(row, 0, channels, out);
}

void add_gram(const Slots& slots, int64_t channels, double* gram, const Parallel& parallel) {
  parallel_for(parallel, channels, [&](int64_t i) { slots.sum(1 + i, i, channels, gram + i * channels + i); });
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t j = 0; j < i; ++j) gram[i * channels + j] = gram[j * channels + i];
}

// gwd [channel][tap]
void add_taps(const Slots& slots, int64_t channels, int64_t taps, float* gwd) {
  constexpr int64_t kColumns = 256;
  double sums[kColumns];
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t begin = 0; begin < channels; begin += kColumns) {
      const int64_t end = std::min(begin + kColumns, channels);
      slots.sum(1 + tap, begin, end, sums);
      for (int64_t c = begin; c < end; ++c) gwd[c * taps + tap] = static_cast<float>(sums[c - begin]);
    }
}

void add_matrices(const Slots& slots, int64_t channels, float* out, const Parallel& parallel) {
  parallel_for(parallel, slots.plan.matrix_rows,
               [&](int64_t row) { slots.sum(row, 0, channels, out + row * channels); });
}

// out [channel][row], in tiles so that it is written by whole cache lines.
void add_matrices_transposed(const Slots& slots, int64_t channels, float* out, const Parallel& parallel) {
  constexpr int64_t kRows = 16, kColumns = 128;
  const int64_t rows = slots.plan.matrix_rows;
  const int64_t down = ceil_divide(rows, kRows), across = ceil_divide(channels, kColumns);
  parallel_for(parallel, down * across, [&](int64_t tile) {
    const int64_t row = tile / across * kRows, column = tile % across * kColumns;
    const int64_t height = std::min(kRows, rows - row), width = std::min(kColumns, channels - column);
    float sums[kRows][kColumns];
    for (int64_t r = 0; r < height; ++r) slots.sum(row + r, column, column + width, sums[r]);
    for (int64_t c = 0; c < width; ++c)
      for (int64_t r = 0; r < height; ++r) out[(column + c) * rows + row + r] = sums[r][c];
  });
}

void add_up(const TrainArgs& a, const Slots& slots, const Parallel& parallel) {
  const int64_t in = a.dims.in_channels, hidden = a.dims.hidden_channels, out = a.dims.out_channels;
  const int64_t taps = a.dims.kernel * a.dims.kernel;
  switch (a.phase) {
    case TrainPhase::gram:
      add_sums(slots, 0, in, a.sum);
      return add_gram(slots, in, a.gram, parallel);
    case TrainPhase::project:
    case TrainPhase::finish_backward:
      add_sums(slots, 0, out, a.sum);
      return add_sums(slots, 1, out, a.sum_product);
    case TrainPhase::depthwise:
    case TrainPhase::project_backward:
      add_sums(slots, 0, hidden, a.sum);
      add_sums(slots, 1, hidden, a.sum_product);
      if (a.gw2) add_matrices(slots, hidden, a.gw2, parallel);
      return;
    case TrainPhase::depthwise_backward:
      add_sums(slots, 0, hidden, a.sum);
      if (a.gwd) add_taps(slots, hidden, taps, a.gwd);
      if (a.t) add_matrices_transposed(slots, hidden, a.t, parallel);
      return;
    case TrainPhase::finish:
    case TrainPhase::input_backward:
      return;
  }
}

}  // namespace

bool keeps_e(const TrainArgs& a) {
  constexpr int64_t kChannels = 96, kWidest = 16;
  const int64_t reach = (a.dims.kernel - 1) * a.dilation + 1;
  return a.dims.expand && a.dims.in_channels >= kChannels && a.dims.hidden_channels % kWidest == 0 &&
         a.dtype == DType::f32 && reach >= a.stride + a.pad_top &&
         (a.out_height - 1) * a.stride - a.pad_top + reach >= a.height;
}

void run_train(const TrainArgs& given, Tier tier, const Parallel& parallel) {
  TrainArgs a = given;
  if (a.d && (a.phase == TrainPhase::project || a.phase == TrainPhase::project_backward)) {
    // Nothing but pixels, whatever image they are of: so groups are whole where an image has few.
    a.out_height *= a.batch;
    a.batch = 1;
  }
  const TierKernels& kernels = *tier_kernels(tier);
  Packing packing(a, kernels);
  const TrainLayout& l = packing.layout;
  TrainPlan plan = make_train_plan(a, l, parallel.threads);
  if (pixels_of(a) == 0) {
    plan.slots = 0;
    return add_up(a, {plan, nullptr, nullptr, l.hidden_padded, *kernels.rows}, parallel);
  }
  float* packed = parameters.reserve(static_cast<size_t>(l.size));
  packing.write(packed, parallel);

  const int64_t slot_sums_size = plan.sum_rows * plan.sum_width, slot_matrix_size = plan.matrix_rows * l.hidden_padded;
  double* sums = reinterpret_cast<double*>(
      slot_sums.reserve(static_cast<size_t>(plan.slots * (2 * slot_sums_size + slot_matrix_size))));
  float* matrices = reinterpret_cast<float*>(sums + plan.slots * slot_sums_size);
  const int64_t rows_size = pixels_of(a) * a.dims.in_channels;
  float* rows = plan.splits > 1 && a.g_out && a.dims.expand
                    ? split_rows.reserve(static_cast<size_t>((plan.splits - 1) * rows_size))
                    : nullptr;

  const bool hidden = has_hidden(a.phase);
  const int64_t units = hidden ? a.batch * plan.row_parts : pixels_of(a);
  const int64_t panel = l.vector * l.hidden_panel, panels = hidden ? ceil_divide(l.hidden_padded, panel) : 0;
  parallel_for(parallel, plan.slots * plan.splits, [&](int64_t index) {
    const int64_t slot = index / plan.splits, split = index % plan.splits;
    TrainItem item;
    item.begin = units * slot / plan.slots;
    item.end = units * (slot + 1) / plan.slots;
    item.hidden_begin = panels * split / plan.splits * panel;
    item.hidden_end = std::min(panels * (split + 1) / plan.splits * panel, l.hidden_padded);
    item.sums = sums + slot * slot_sums_size;
    item.matrix = plan.matrix_rows ? matrices + slot * slot_matrix_size : nullptr;
    item.g_out = split == 0 || !rows ? a.g_out : rows + (split - 1) * rows_size;
    // Splits share a slot's sums, each in columns of its own.
    const bool columns = plan.splits > 1;
    const int64_t first = columns ? item.hidden_begin : 0, end = columns ? item.hidden_end : plan.sum_width;
    for (int64_t row = 0; row < plan.sum_rows; ++row)
      std::fill(item.sums + row * plan.sum_width + first, item.sums + row * plan.sum_width + end, 0.0);
    kernels.train_work(a, l, plan, item, packed, thread_scratch().reserve(kernels.train_scratch_floats(a, l, plan)));
  });
  add_up(a, {plan, sums, matrices, l.hidden_padded, *kernels.rows}, parallel);
  if (rows) {
    constexpr int64_t kBlock = 4096;
    parallel_for(parallel, ceil_divide(rows_size, kBlock), [&](int64_t block) {
      const int64_t end = std::min((block + 1) * kBlock, rows_size);
      for (int64_t split = 0; split + 1 < plan.splits; ++split)
        for (int64_t i = block * kBlock; i < end; ++i) a.g_out[i] += rows[split * rows_size + i];
    });
  }
}

}  // namespace mbv2
