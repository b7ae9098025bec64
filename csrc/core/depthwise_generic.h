// The depthwise pass over a group of rows, and which rows it reads. Included after tile_generic.h, which says what may
// not be done here.
//
// How e is read and d is written is `Taps`' affair: Element, Result (types in memory), kParts, load<Part>(element*),
// store<Part>(result*, V::T), and kAnyKernel, or kernel 3 only. kParts vectors lie in one run of e, say the even
// channels and the odd of 16-bit numbers, and of each patch part 0 is stored before part 1.
//
// No #pragma once: included once a tier.

// ---- Rows of e, of a block's or a training phase's arguments `a` ----------------------------------------------------

template <class Args>
ALWAYS_INLINE int64_t first_input_row(const Args& a, int64_t out_row) {
  return max64(out_row * a.stride - a.pad_top, 0);
}
// One past the last input row that output rows below `out_end` need.
template <class Args>
ALWAYS_INLINE int64_t end_input_row(const Args& a, int64_t out_end) {
  const int64_t end = (out_end - 1) * a.stride - a.pad_top + (a.dims.kernel - 1) * a.dilation + 1;
  return max64(min64(end, a.height), 0);
}
// rows[(oy - begin) * kernel + dy]: row_at(input row) for output rows [begin, end), null in the padding.
template <class Args, class Element, class RowAt>
ALWAYS_INLINE void find_rows(const Args& a, int64_t begin, int64_t end, const Element** rows, const RowAt& row_at) {
  for (int64_t oy = begin; oy < end; ++oy)
    for (int64_t dy = 0; dy < a.dims.kernel; ++dy) {
      const int64_t row = oy * a.stride - a.pad_top + dy * a.dilation;
      *rows++ = row < 0 || row >= a.height ? nullptr : row_at(row);
    }
}
// A ring's row has the image's `width` columns, and others around them that no expand ever writes: they are zero.
template <class Element>
static void clear_padding(Element* ring, int64_t rows, int64_t columns, int64_t left, int64_t width, int64_t pitch) {
  for (int64_t row = 0; row < rows; ++row, ring += columns * pitch) {
    for (int64_t i = 0; i < left * pitch; ++i) ring[i] = 0;
    for (int64_t i = (left + width) * pitch; i < columns * pitch; ++i) ring[i] = 0;
  }
}

// ---- The pass -------------------------------------------------------------------------------------------------------

// e as x is stored, d as Real.
template <class Storage>
struct ToReal {
  using Element = typename Storage::Element;
  using Result = Real;
  static constexpr int kParts = 1;
  static constexpr bool kAnyKernel = Storage::kOwn;  // other kernels, rare without expand, are not worth the code
  template <int>
  static ALWAYS_INLINE V::T load(const Element* p) {
    return Storage::load(p);
  }
  template <int>
  static ALWAYS_INLINE void store(Real* p, V::T v) {
    V::store(p, v);
  }
};

// A group of output rows.
template <class Taps>
struct Depthwise {
  using Element = typename Taps::Element;
  const Element* const* rows;  // [group][kernel]: rows of e under the kernel's rows; null where one lies in the padding
  int64_t group;
  int64_t pitch;         // from a pixel of e to the next, in numbers
  int64_t first_column;  // column of e under output column 0's first tap; negative: in the padding
  int64_t width;         // columns that exist
  int64_t out_pitch, out_width;
  int64_t kernel, stride, dilation;
  int64_t runs;         // of kParts vectors of channels
  const Real* weights;  // [run][part][k*k][V::width]
  const Real* bias;
  typename Taps::Result* out;  // [group][out_width][out_pitch]
  Clamp clamp;
};

// Height x Width neighbouring outputs, one vector of channels. Each loaded pixel serves all the taps that it takes part
// in. Every Kernel-th column in turn: that is one multiply-add for each output, so that none waits for its last.
template <class Taps, int Part, int Kernel, int Stride, int Height, int Width>
ALWAYS_INLINE void depthwise_patch(const typename Taps::Element* const* rows, int64_t at, int64_t pitch,
                                   const Real* weights, const Real* bias, const Clamp& clamp,
                                   typename Taps::Result* out, int64_t out_row, int64_t out_pitch) {
  V::T acc[Height][Width], w[Kernel][Kernel];
  const V::T start = V::load(bias);
  UNROLL for (int y = 0; y < Height; ++y) UNROLL for (int x = 0; x < Width; ++x) acc[y][x] = start;
  UNROLL for (int r = 0; r < (Height - 1) * Stride + Kernel; ++r) {
    if (r < Kernel) {
      UNROLL for (int t = 0; t < Kernel; ++t) w[r][t] = V::load(weights + (r * Kernel + t) * V::width);
    }
    if (!rows[r]) continue;
    constexpr int kColumns = (Width - 1) * Stride + Kernel, kBases = (kColumns + 2) / 3;  // as in tile()
    const typename Taps::Element* base[kBases] = {rows[r] + at};
    UNROLL for (int i = 1; i < kBases; ++i) {
      KEEP(base[i - 1]);  // else a register for each column's offset is computed ahead, and does not stay in one
      base[i] = base[i - 1] + 3 * pitch;
    }
    UNROLL for (int first = 0; first < Kernel; ++first) {
      UNROLL for (int c = first; c < kColumns; c += Kernel) {
        const V::T pixel = Taps::template load<Part>(base[c / 3] + (c % 3) * pitch);
        UNROLL for (int y = 0; y < Height; ++y) UNROLL for (int x = 0; x < Width; ++x) {
          const int dy = r - y * Stride, dx = c - x * Stride;
          if (dy >= 0 && dy < Kernel && dx >= 0 && dx < Kernel) acc[y][x] = V::fma(pixel, w[dy][dx], acc[y][x]);
        }
      }
    }
  }
  const V::T lo = V::set(clamp.lo), hi = V::set(clamp.hi);
  UNROLL for (int y = 0; y < Height; ++y) {
    UNROLL for (int x = 0; x < Width; ++x)
        Taps::template store<Part>(out + y * out_row + x * out_pitch, V::clamp(acc[y][x], lo, hi));
  }
}

// Any stride, dilation, and columns in the padding: one output at a time. Kernel 0: any, too.
template <class Taps, int Part, int Kernel>
ALWAYS_INLINE void depthwise_output(const Depthwise<Taps>& d, const typename Taps::Element* const* rows, int64_t column,
                                    int64_t run, typename Taps::Result* out) {
  const int64_t kernel = Kernel ? Kernel : d.kernel, v = run * Taps::kParts + Part;
  V::T acc = V::load(d.bias + v * V::width);
  const Real* w = d.weights + v * kernel * kernel * V::width;
  UNROLL for (int64_t dy = 0; dy < kernel; ++dy) {
    if (!rows[dy]) continue;
    UNROLL for (int64_t dx = 0; dx < kernel; ++dx) {
      const int64_t c = column + dx * d.dilation;
      if (c < 0 || c >= d.width) continue;
      const V::T pixel = Taps::template load<Part>(rows[dy] + c * d.pitch + run * Taps::kParts * V::width);
      acc = V::fma(pixel, V::load(w + (dy * kernel + dx) * V::width), acc);
    }
  }
  Taps::template store<Part>(out + v * V::width, V::clamp(acc, V::set(d.clamp.lo), V::set(d.clamp.hi)));
}
template <int Kernel, class Taps>
NOINLINE void depthwise_edge(const Depthwise<Taps>& d, int64_t begin, int64_t end) {
  const int64_t kernel = Kernel ? Kernel : d.kernel;
  for (int64_t oy = 0; oy < d.group; ++oy) {
    const auto* rows = d.rows + oy * kernel;
    for (int64_t ox = begin; ox < end; ++ox) {
      const int64_t column = d.first_column + ox * d.stride;
      typename Taps::Result* out = d.out + (oy * d.out_width + ox) * d.out_pitch;
      for (int64_t run = 0; run < d.runs; ++run) {
        depthwise_output<Taps, 0, Kernel>(d, rows, column, run, out);
        if constexpr (Taps::kParts == 2) depthwise_output<Taps, 1, Kernel>(d, rows, column, run, out);
      }
    }
  }
}

// `count` patches side by side, from output row `oy` and column `ox` on.
template <int Kernel, int Stride, int Height, int Width, class Taps>
NOINLINE void depthwise_patches(const Depthwise<Taps>& d, int64_t oy, int64_t ox, int64_t count) {
  const typename Taps::Element* rows[(Height - 1) * Stride + Kernel];
  UNROLL for (int y = 0; y < Height; ++y) UNROLL for (int dy = 0; dy < Kernel; ++dy) {
    rows[y * Stride + dy] = d.rows[(oy + y) * Kernel + dy];
  }
  const int64_t pitch = d.pitch, out_pitch = d.out_pitch, out_row = d.out_width * out_pitch;
  typename Taps::Result* out = d.out + oy * out_row + ox * out_pitch;
  int64_t at = (d.first_column + ox * Stride) * pitch;
  constexpr int64_t kRun = Taps::kParts * V::width, kTaps = Kernel * Kernel;
  for (int64_t i = count; i > 0; --i, at += Width * Stride * pitch, out += Width * out_pitch)
    for (int64_t c = 0; c < d.runs * kRun; c += kRun) {
      depthwise_patch<Taps, 0, Kernel, Stride, Height, Width>(rows, at + c, pitch, d.weights + c * kTaps, d.bias + c,
                                                              d.clamp, out + c, out_row, out_pitch);
      if constexpr (Taps::kParts == 2)
        depthwise_patch<Taps, 1, Kernel, Stride, Height, Width>(rows, at + c, pitch, d.weights + (c + V::width) * kTaps,
                                                                d.bias + c + V::width, d.clamp, out + c + V::width,
                                                                out_row, out_pitch);
    }
}

template <int Kernel, int Stride, int Height, int Width, class Taps>
ALWAYS_INLINE void depthwise_patches_of_width(int64_t width, const Depthwise<Taps>& d, int64_t oy, int64_t ox,
                                              int64_t count) {
  if constexpr (Width >= 1) {
    if (width == Width)
      depthwise_patches<Kernel, Stride, Height, Width>(d, oy, ox, count);
    else
      depthwise_patches_of_width<Kernel, Stride, Height, Width - 1>(width, d, oy, ox, count);
  }
}

// Columns [begin, end), whose taps all exist, in patches as equally wide as can be.
template <int Kernel, int Stride, int Height, class Taps>
ALWAYS_INLINE void depthwise_patches_of_height(int64_t height, const Depthwise<Taps>& d, int64_t oy, int64_t begin,
                                               int64_t end) {
  if constexpr (Height >= 1) {
    if (height != Height) return depthwise_patches_of_height<Kernel, Stride, Height - 1>(height, d, oy, begin, end);
    constexpr int kMax = V::kMaxPatch[Height];
    const int64_t width = end - begin, count = ceil_div(width, kMax);
    const int64_t low = width / count, longer = width % count;
    if (longer) depthwise_patches_of_width<Kernel, Stride, Height, kMax>(low + 1, d, oy, begin, longer);
    depthwise_patches_of_width<Kernel, Stride, Height, kMax>(low, d, oy, begin + longer * (low + 1), count - longer);
  }
}

template <int Kernel, int Stride, class Taps>
static void depthwise_inner(const Depthwise<Taps>& d, int64_t begin, int64_t end) {
  constexpr int kMax = Kernel == 3 ? V::kMaxPatchHeight : 1;  // the weights of a larger kernel do not stay in registers
  const int64_t count = ceil_div(d.group, kMax);
  for (int64_t i = 0, oy = 0; i < count; ++i) {
    const int64_t height = (d.group - oy) / (count - i);
    depthwise_patches_of_height<Kernel, Stride, kMax>(height, d, oy, begin, end);
    oy += height;
  }
}

template <class Taps>
static void depthwise_rows(const Depthwise<Taps>& d) {
  // outputs whose first tap is at column >= 0 and whose last tap is at column < width
  const int64_t reach = (d.kernel - 1) * d.dilation;
  int64_t begin = d.first_column >= 0 ? 0 : ceil_div(-d.first_column, d.stride);
  const int64_t last = d.width - 1 - reach - d.first_column;
  int64_t end = last < 0 ? 0 : last / d.stride + 1;
  begin = min64(begin, d.out_width);
  end = max64(begin, min64(end, d.out_width));
  const bool fast = d.dilation == 1 && (d.stride == 1 || d.stride == 2) && (d.kernel == 3 || d.kernel == 5);
  if (!fast) begin = end = d.out_width;
  const auto run = [&](auto edge, auto stride_1, auto stride_2) {
    edge(d, 0, begin);
    edge(d, end, d.out_width);
    if (begin != end) d.stride == 1 ? stride_1(d, begin, end) : stride_2(d, begin, end);
  };
  if (!Taps::kAnyKernel || d.kernel == 3)
    return run(depthwise_edge<3, Taps>, depthwise_inner<3, 1, Taps>, depthwise_inner<3, 2, Taps>);
  if constexpr (Taps::kAnyKernel) {
    const auto edge = d.kernel == 5 ? depthwise_edge<5, Taps> : depthwise_edge<0, Taps>;
    run(edge, depthwise_inner<5, 1, Taps>, depthwise_inner<5, 2, Taps>);
  }
}
