// The bf16 tier (AMX): for bf16 images in inference. Products multiply bf16 tiles and add up in fp32; what they read, e
// and d, is rounded to bf16, as PyTorch's unfused bf16 rounds it. The depthwise pass multiplies and adds in fp32.
//
//   for each group of output rows
//     for each chunk of hidden channels
//       expand     x rows  -> ring   (only rows the ring does not hold yet)      [pixel][chunk]           bf16
//       depthwise  ring    -> d                                                  [pixel][hidden padded]   bf16
//     project      d       -> y
//
// A product is so cheap here that there are no partial sums: it goes through the whole depth of d at once. amx.h has
// the tiles and how weights are packed.
#include <immintrin.h>

#include "amx.h"
#include "block.h"
#include "conv.h"

namespace mbv2 {
namespace {

#include "avx512_vector.h"

#include "tile_generic.h"

#include "depthwise_generic.h"

// ---- bf16 in memory -------------------------------------------------------------------------------------------------

#define V_INLINE static inline __attribute__((always_inline))
V_INLINE V::T widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
V_INLINE __m256i narrow(V::T v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }

struct BF16 {
  static constexpr bool kOwn = false;
  using Element = uint16_t;
  V_INLINE V::T load(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  V_INLINE V::T load(const uint16_t* p, int n) { return widen(_mm256_maskz_loadu_epi16(V::first(n), p)); }
  V_INLINE void store(uint16_t* p, V::T v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
  V_INLINE void store(uint16_t* p, V::T v, int n) { _mm256_mask_storeu_epi16(p, V::first(n), narrow(v)); }
};

// 32 channels of e, the even ones and the odd ones: a bf16 number is the upper half of the fp32 number it stands for.
struct EvenAndOdd {
  using Element = uint16_t;
  using Result = uint16_t;
  static constexpr int kParts = 2;
  static constexpr bool kAnyKernel = true;
  template <int Part>
  V_INLINE V::T load(const uint16_t* p) {
    const __m512i both = _mm512_loadu_si512(p);
    return _mm512_castsi512_ps(Part == 0 ? _mm512_slli_epi32(both, 16)
                                         : _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  template <int>
  V_INLINE void store(uint16_t* p, V::T v) {
    BF16::store(p, v);
  }
};
#undef V_INLINE

// ---- Tiles ----------------------------------------------------------------------------------------------------------

#include "amx_tiles.h"

// The left matrix of a product: rows of TileDepth::padded() numbers, `pitch` apart.
struct Pixels {
  const uint16_t* first;
  int64_t pitch, rows;
};

// Sums of 16 * Rows pixels by 16 * Columns channels. second: numbers from the first tile's pixels to the second's.
template <int Rows, int Columns>
ALWAYS_INLINE void sum_up(const uint16_t* pixels, int64_t second, int64_t pitch, const uint16_t* weights,
                          TileDepth depth, const float* bias, FetchLines& fetch) {
  load_tile<0>(bias, 0);
  if constexpr (Columns == 2) load_tile<1>(bias + kTileRows, 0);
  if constexpr (Rows == 2) load_tile<2>(bias, 0);
  if constexpr (Rows == 2 && Columns == 2) load_tile<3>(bias + kTileRows, 0);
  const int64_t tile = depth.step * kTileRows, column = depth.column();
  for (const uint16_t* end = weights + column; weights != end; pixels += depth.step, weights += tile) {
    fetch();
    load_tile<6>(weights, 64);
    load_tile<4>(pixels, pitch * 2);
    multiply_tiles<0, 4, 6>();
    if constexpr (Columns == 2) {
      load_tile<7>(weights + column, 64);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (Rows == 2) {
      load_tile<5>(pixels + second, pitch * 2);
      multiply_tiles<2, 5, 6>();
      if constexpr (Columns == 2) multiply_tiles<3, 5, 7>();
    }
  }
}
template <int Rows, int Columns>
ALWAYS_INLINE void store_sums(float* sums) {
  constexpr int kRow = Columns * 64;
  store_tile<0>(sums, kRow);
  if constexpr (Columns == 2) store_tile<1>(sums + kTileRows, kRow);
  if constexpr (Rows == 2) store_tile<2>(sums + kTileRows * kTileRows * Columns, kRow);
  if constexpr (Rows == 2 && Columns == 2) store_tile<3>(sums + kTileRows * kTileRows * Columns + kTileRows, kRow);
}

// All pixels by 16 * Columns channels. done(first, count, sums): sums of pixels [first, first + count) as
// [count][16 * Columns], count at most 16; of some pixels twice, where a tile lies over its neighbour's pixels. Two
// tiles of pixels are multiplied while the sums of the two before go where they belong. fetch: bytes behind the weights
// that will be wanted next.
template <int Columns, class Done>
NOINLINE void columns(TileShapes& shapes, Pixels a, TileDepth depth, const uint16_t* weights, const float* bias,
                      int64_t fetch, Done done) {
  constexpr int kTile = kTileRows * kTileRows * Columns;
  constexpr int64_t kPair = 2 * kTileRows;
  alignas(64) float sums[2][2 * kTile];
  const int64_t rows = min64(kTileRows, a.rows), pairs = a.rows / kPair;
  // A few cache lines with each step of the depth.
  FetchLines fetch_lines({weights + Columns * depth.column(), fetch}, depth.steps * ceil_div(a.rows, kPair));
  shapes.set(rows, depth.step);
  const auto finish_pair = [&](int64_t pair, const float* from) {
    done(pair * kPair, kTileRows, from);
    done(pair * kPair + kTileRows, kTileRows, from + kTile);
  };
  for (int64_t pair = 0; pair < pairs; ++pair) {
    sum_up<2, Columns>(a.first + pair * kPair * a.pitch, kTileRows * a.pitch, a.pitch, weights, depth, bias,
                       fetch_lines);
    if (pair) finish_pair(pair - 1, sums[1 - pair % 2]);
    store_sums<2, Columns>(sums[pair % 2]);
  }
  // The rest is one tile or two.
  float* last = sums[pairs % 2];
  const int64_t first = min64(pairs * kPair, a.rows - rows), second = min64(first + kTileRows, a.rows - rows);
  const bool rest = pairs * kPair < a.rows, two = second != first;
  if (rest) {
    const uint16_t* pixels = a.first + first * a.pitch;
    if (two)
      sum_up<2, Columns>(pixels, (second - first) * a.pitch, a.pitch, weights, depth, bias, fetch_lines);
    else
      sum_up<1, Columns>(pixels, 0, a.pitch, weights, depth, bias, fetch_lines);
  }
  if (pairs) finish_pair(pairs - 1, sums[1 - pairs % 2]);
  if (rest) {
    if (two)
      store_sums<2, Columns>(last);
    else
      store_sums<1, Columns>(last);
    done(first, rows, last);
    if (two) done(second, rows, last + kTile);
  }
}

// ---- Outputs --------------------------------------------------------------------------------------------------------

// each(i) for i < count, unrolled for whole tiles.
template <class Each>
ALWAYS_INLINE void each_row(int64_t count, const Each& each) {
  if (count == kTileRows) {
    UNROLL for (int64_t i = 0; i < kTileRows; ++i) each(i);
  } else {
    for (int64_t i = 0; i < count; ++i) each(i);
  }
}

// Finished sums of 16 * Columns channels -> y.
template <int Columns>
struct WriteY {
  Output<BF16> output;
  ALWAYS_INLINE void operator()(int64_t first, int64_t count, const float* sums) const {
    const Output<BF16> to = output;  // in registers: what is stored might be a part of *this
    // The common case, without a question for each pixel.
    if (to.channels >= Columns * V::width && !to.x)
      return each_row(count, [&](int64_t i) {
        UNROLL for (int j = 0; j < Columns; ++j) {
          const V::T v = V::load(sums + (i * Columns + j) * V::width);
          BF16::store(to.y + (first + i) * to.y_stride + j * V::width, V::clamp(v, to.lo, to.hi));
        }
      });
    for (int64_t i = 0; i < count; ++i)
      UNROLL for (int j = 0; j < Columns; ++j) to.write(first + i, j, V::load(sums + (i * Columns + j) * V::width));
  }
};

// Pixels times columns [begin, end) of 16 channels -> y. output: column 0's.
static void multiply_into_y(TileShapes& shapes, const Pixels& a, const TileDepth& depth, const float* tiles,
                            const float* bias, int64_t begin, int64_t end, Output<BF16> output) {
  const auto* weights = reinterpret_cast<const uint16_t*>(tiles) + begin * depth.column();
  output.y += begin * kTileRows;
  if (output.x) output.x += begin * kTileRows;
  output.channels -= static_cast<int>(begin * kTileRows);
  for (int64_t left = end - begin; left > 0; left -= 2) {
    const float* b = bias + (end - left) * kTileRows;
    const int64_t fetch = min64(left - 2, 2) * depth.column() * 2;
    if (left > 1)
      columns<2>(shapes, a, depth, weights, b, max64(fetch, 0), WriteY<2>{output});
    else
      columns<1>(shapes, a, depth, weights, b, 0, WriteY<1>{output});
    weights += 2 * depth.column();
    output.y += 2 * kTileRows;
    if (output.x) output.x += 2 * kTileRows;
    output.channels -= static_cast<int>(2 * kTileRows);
  }
}

// ---- Copies ---------------------------------------------------------------------------------------------------------

// The first n of 32 numbers, for n of any size.
static ALWAYS_INLINE __mmask32 first_32(int64_t n) {
  return static_cast<__mmask32>((uint64_t{1} << max64(min64(n, 32), 0)) - 1);
}

// `count` numbers, then zeros: as many as fill up whole vectors, and `padded` at least.
static ALWAYS_INLINE void copy_run(const uint16_t* from, int64_t count, int64_t padded, uint16_t* to) {
  for (int64_t i = 0; i < padded; i += 32) {
    _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(first_32(count - i), from + i));
  }
}

// ---- The block ------------------------------------------------------------------------------------------------------

struct Buffers {
  bool rings;                                  // e is written to rows of our own; if not, x is read as e where it lies
  bool copy;                                   // x is copied before it is multiplied
  int64_t ring_rows, ring_columns, ring_size;  // of a chunk, in numbers
  int64_t d_pitch;
  int64_t ring, d, x, offsets, rows, size;  // in bytes
};

static Buffers buffers_of(const BlockArgs& a, const PackedLayout& l, const Plan& plan) {
  Buffers b = {};
  const int64_t reach = (a.dims.kernel - 1) * a.dilation + 1;
  const TileDepth depth = tile_depth(a.dims.in_channels);
  const bool adjoin = a.x_stride_row == a.width * a.x_stride_pixel;
  b.rings = a.dims.expand || a.dims.hidden_channels != l.hidden_padded;
  b.copy = a.dims.expand && !(adjoin && depth.padded() == a.dims.in_channels);
  b.ring_rows = b.rings ? min64((plan.group_rows - 1) * a.stride + reach, a.height) : 0;
  b.ring_columns = max64(a.pad_left + a.width, (a.out_width - 1) * a.stride + reach);
  b.ring_size = b.ring_rows * b.ring_columns * plan.chunk;
  // A power of two between pixels would put a tile's rows into few sets of the cache.
  b.d_pitch = l.hidden_padded + (l.hidden_padded % 256 == 0 ? 32 : 0);
  int64_t at = 0;
  const auto section = [&](int64_t bytes) {
    const int64_t begin = at;
    at += ceil_div(bytes, 64) * 64;
    return begin;
  };
  b.ring = section(ceil_div(l.hidden_padded, plan.chunk) * b.ring_size * 2);
  b.d = section(plan.group_rows * a.out_width * b.d_pitch * 2);
  b.x = section(b.copy ? b.ring_rows * a.width * depth.padded() * 2 + 64 : 0);
  b.offsets = section(b.ring_rows * a.width * static_cast<int64_t>(sizeof(int32_t)));
  b.rows = section(plan.group_rows * a.dims.kernel * static_cast<int64_t>(sizeof(void*)));
  b.size = at;
  return b;
}

static size_t scratch_floats(const BlockArgs& a, const PackedLayout& l, const Plan& plan) {
  return static_cast<size_t>(buffers_of(a, l, plan).size / 4);
}

struct Item {
  const BlockArgs& a;
  const PackedLayout& l;
  const Plan& plan;
  const WorkItem& item;
  const Buffers b;
  const TileDepth depth;
  uint16_t *ring, *d, *x_copy;
  int32_t* offsets;
  const uint16_t** rows;
  const uint16_t* x;  // this image
  TileShapes shapes;

  Item(const BlockArgs& a_, const PackedLayout& l_, const Plan& plan_, const WorkItem& item_, float* scratch)
      : a(a_), l(l_), plan(plan_), item(item_), b(buffers_of(a_, l_, plan_)), depth(tile_depth(a_.dims.in_channels)) {
    char* memory = reinterpret_cast<char*>(scratch);
    ring = reinterpret_cast<uint16_t*>(memory + b.ring);
    d = reinterpret_cast<uint16_t*>(memory + b.d);
    x_copy = reinterpret_cast<uint16_t*>(memory + b.x);
    offsets = reinterpret_cast<int32_t*>(memory + b.offsets);
    rows = reinterpret_cast<const uint16_t**>(memory + b.rows);
    x = static_cast<const uint16_t*>(a.x) + item.image * a.x_stride_image;
  }

  // In a chunk's ring.
  ALWAYS_INLINE int64_t ring_row(int64_t row) const { return row % b.ring_rows * b.ring_columns * plan.chunk; }

  // Input rows [begin, end): where each pixel lies in a chunk's ring, and x as a product reads it.
  Pixels prepare_rows(int64_t begin, int64_t end) {
    int32_t* to = offsets;
    for (int64_t row = begin; row < end; ++row) {
      int64_t at = ring_row(row) + a.pad_left * plan.chunk;
      for (int64_t c = 0; c < a.width; ++c, at += plan.chunk) *to++ = static_cast<int32_t>(at);
    }
    const int64_t pixels = (end - begin) * a.width;
    if (!b.copy) return {x + begin * a.x_stride_row, a.x_stride_pixel, pixels};
    uint16_t* copy = x_copy;
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = 0; c < a.width; ++c, copy += depth.padded())
        copy_run(x + row * a.x_stride_row + c * a.x_stride_pixel, a.dims.in_channels, depth.padded(), copy);
    return {x_copy, depth.padded(), pixels};
  }

  // Sums of 32 channels -> the ring. exist: which of them do; the others are zero, also where an infinite x has made
  // NaN of their zero weights.
  struct WriteRing {
    uint16_t* out;
    const int32_t* offset;
    V::T lo, hi;
    __mmask32 exist;
    ALWAYS_INLINE void operator()(int64_t first, int64_t count, const float* sums) const {
      const WriteRing to = *this;  // in registers: what is stored might be a part of *this
      each_row(count, [&](int64_t i) {
        const float* from = sums + i * 2 * V::width;
        const V::T low = V::clamp(V::load(from), to.lo, to.hi), high = V::clamp(V::load(from + V::width), to.lo, to.hi);
        _mm512_storeu_si512(to.out + to.offset[first + i],
                            reinterpret_cast<__m512i>(_mm512_maskz_cvtne2ps_pbh(to.exist, high, low)));
      });
    }
  };

  void expand(const Pixels& pixels, int64_t hidden, int64_t end, uint16_t* chunk_ring) {
    const V::T lo = V::set(a.activation.lo), hi = V::set(a.activation.hi);
    for (int64_t c = hidden; c < end; c += 2 * kTileRows) {
      const auto* w = reinterpret_cast<const uint16_t*>(a.packed + l.w1) + c / kTileRows * depth.column();
      columns<2>(shapes, pixels, depth, w, a.packed + l.b1 + c, 2 * depth.column() * 2,
                 WriteRing{chunk_ring + (c - hidden), offsets, lo, hi, first_32(a.dims.hidden_channels - c)});
    }
  }

  // Without expand, channels that do not fill vectors: x as it is, and zeros.
  void copy_to_ring(int64_t begin, int64_t end, int64_t hidden, int64_t hidden_end, uint16_t* chunk_ring) {
    const int64_t channels = max64(min64(hidden_end, a.dims.hidden_channels) - hidden, 0);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = 0; c < a.width; ++c)
        copy_run(x + row * a.x_stride_row + c * a.x_stride_pixel + hidden, channels, hidden_end - hidden,
                 chunk_ring + ring_row(row) + (a.pad_left + c) * plan.chunk);
  }

  // Output rows [begin, end) of d, hidden channels [hidden, hidden_end).
  void depthwise(int64_t begin, int64_t end, int64_t hidden, int64_t hidden_end, const uint16_t* chunk_ring) {
    const int64_t k = a.dims.kernel;
    find_rows(a, begin, end, rows,
              [&](int64_t row) { return b.rings ? chunk_ring + ring_row(row) : x + row * a.x_stride_row + hidden; });
    Depthwise<EvenAndOdd> p;
    p.rows = rows;
    p.group = end - begin;
    p.pitch = b.rings ? plan.chunk : a.x_stride_pixel;
    p.first_column = b.rings ? 0 : -a.pad_left;  // a ring has its padding columns
    p.width = b.rings ? b.ring_columns : a.width;
    p.out_pitch = b.d_pitch;
    p.out_width = a.out_width;
    p.kernel = k;
    p.stride = a.stride;
    p.dilation = a.dilation;
    p.runs = (hidden_end - hidden) / (2 * V::width);
    p.weights = a.packed + l.wd + hidden * k * k;
    p.bias = a.packed + l.b2 + hidden;
    p.out = d + hidden;
    p.clamp = a.activation;
    depthwise_rows(p);
  }

  void project(int64_t begin, int64_t end) {
    Output<BF16> output;
    output.y = static_cast<uint16_t*>(a.y) + (item.image * a.out_height + begin) * a.out_width * a.dims.out_channels;
    output.y_stride = a.dims.out_channels;
    output.x = nullptr;
    output.x_stride = a.x_stride_pixel;
    output.channels = static_cast<int>(a.dims.out_channels);
    output.bounded = bounds(a.final_activation);
    output.lo = V::set(a.final_activation.lo);
    output.hi = V::set(a.final_activation.hi);
    const int64_t columns = l.out_padded / kTileRows;
    const TileDepth hidden = tile_depth(l.hidden_padded);
    // x's pixels may lie in rows that do not adjoin
    const bool adjoin = !a.residual || a.x_stride_row == a.width * a.x_stride_pixel;
    const int64_t step = adjoin ? end - begin : 1;
    for (int64_t row = begin; row < end; row += step) {
      if (a.residual) output.x = x + row * a.x_stride_row;
      multiply_into_y(shapes, {d + (row - begin) * a.out_width * b.d_pitch, b.d_pitch, step * a.out_width}, hidden,
                      a.packed + l.w2, a.packed + l.b3, 0, columns, output);
      output.y += step * a.out_width * a.dims.out_channels;
    }
  }

  void run() {
    const int64_t rings = ceil_div(l.hidden_padded, plan.chunk);
    if (b.rings) clear_padding(ring, rings * b.ring_rows, b.ring_columns, a.pad_left, a.width, plan.chunk);
    int64_t held = first_input_row(a, item.row_begin);  // input rows below are in the ring
    for (int64_t row = item.row_begin; row < item.row_end; row += plan.group_rows) {
      const int64_t row_end = min64(row + plan.group_rows, item.row_end);
      const int64_t begin = max64(held, first_input_row(a, row)), end = max64(end_input_row(a, row_end), begin);
      held = end;
      Pixels pixels = {};
      if (a.dims.expand && end > begin) pixels = prepare_rows(begin, end);
      uint16_t* chunk_ring = ring;
      for (int64_t hidden = 0; hidden < l.hidden_padded; hidden += plan.chunk, chunk_ring += b.ring_size) {
        const int64_t hidden_end = min64(hidden + plan.chunk, l.hidden_padded);
        if (pixels.rows)
          expand(pixels, hidden, hidden_end, chunk_ring);
        else if (b.rings && !a.dims.expand)
          copy_to_ring(begin, end, hidden, hidden_end, chunk_ring);
        depthwise(row, row_end, hidden, hidden_end, chunk_ring);
      }
      project(row, row_end);
    }
    shapes.release();
  }
};

static void work(const BlockArgs& a, const PackedLayout& l, const Plan& plan, const WorkItem& item, float* scratch) {
  Item(a, l, plan, item, scratch).run();
}

// ---- Dense convolutions ---------------------------------------------------------------------------------------------

constexpr int64_t kRun = 512;  // output pixels that are multiplied at a time

struct ConvBuffers {
  bool windows;           // copied; if not, pixels are read where they lie
  bool planes;            // windows in the order [Cin][k][k], else [k][k][Cin]
  int64_t pitch;          // of windows, in numbers: whole cache lines
  int64_t weights, size;  // in bytes
};

static ConvBuffers conv_buffers_of(const ConvArgs& a, const ConvLayout& l) {
  ConvBuffers b = {};
  const TileDepth depth = tile_depth(a.dims.kernel * a.dims.kernel * a.dims.in_channels);
  const bool adjoin = a.x_stride_row == a.width * a.x_stride_pixel && a.x_stride_image == a.height * a.x_stride_row;
  b.windows = !(is_pointwise(a) && a.x_stride_channel == 1 && adjoin && depth.padded() == a.dims.in_channels);
  b.planes = b.windows && !(a.x_stride_channel == 1 && (a.dims.kernel == 1 || a.x_stride_pixel == a.dims.in_channels));
  b.pitch = ceil_div(depth.padded(), 32) * 32;
  b.weights = b.windows ? (kRun * b.pitch + 32) * 2 : 0;  // copies go in whole vectors
  b.size = b.weights + (b.planes ? l.out_padded * depth.padded() * 2 : 0);
  return b;
}

static size_t conv_scratch_floats(const ConvArgs& a, const ConvLayout& l) {
  return static_cast<size_t>(conv_buffers_of(a, l).size / 4);
}

struct ConvWork {
  const ConvArgs& a;
  const ConvLayout& l;
  const ConvItem& item;
  const ConvBuffers b;
  const TileDepth depth;
  uint16_t *left, *reordered;
  const uint16_t* x;
  TileShapes shapes;

  ConvWork(const ConvArgs& a_, const ConvLayout& l_, const ConvItem& item_, float* scratch)
      : a(a_),
        l(l_),
        item(item_),
        b(conv_buffers_of(a_, l_)),
        depth(tile_depth(a_.dims.kernel * a_.dims.kernel * a_.dims.in_channels)),
        left(reinterpret_cast<uint16_t*>(scratch)),
        reordered(left + b.weights / 2),
        x(static_cast<const uint16_t*>(a_.x)) {}

  // The weights, whose depth has the order [k][k][Cin], with the order [Cin][k][k].
  void reorder_weights() {
    const auto* from = reinterpret_cast<const uint16_t*>(a.packed + l.w);
    const int64_t channels = a.dims.in_channels, taps = a.dims.kernel * a.dims.kernel,
                  size = l.out_padded * depth.padded();
    for (int64_t i = 0; i < size; ++i) reordered[i] = 0;
    for (int64_t column = 0; column < size; column += depth.column())
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t to = c * taps + t, was = t * channels + c;
          for (int64_t o = 0; o < kTileRows; ++o)
            reordered[column + to / 2 * 32 + o * 2 + to % 2] = from[column + was / 2 * 32 + o * 2 + was % 2];
        }
  }

  // The window whose first pixel is at (top, left_column), its part outside the image as zeros.
  void copy_window(const uint16_t* image, int64_t top, int64_t left_column, uint16_t* to) const {
    const int64_t k = a.dims.kernel, channels = a.dims.in_channels;
    const auto inside = [&](int64_t dy, int64_t dx) {
      return top + dy >= 0 && top + dy < a.height && left_column + dx >= 0 && left_column + dx < a.width;
    };
    const uint16_t* first = image + top * a.x_stride_row + left_column * a.x_stride_pixel;
    const auto at = [&](int64_t c, int64_t dy, int64_t dx) {
      return inside(dy, dx) ? first[c * a.x_stride_channel + dy * a.x_stride_row + dx * a.x_stride_pixel] : uint16_t{0};
    };
    if (b.planes) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t dy = 0; dy < k; ++dy)
          for (int64_t dx = 0; dx < k; ++dx) *to++ = at(c, dy, dx);
    } else {
      for (int64_t dy = 0; dy < k; ++dy)
        for (int64_t dx = 0; dx < k; ++dx)
          for (int64_t c = 0; c < channels; ++c) *to++ = at(c, dy, dx);
    }
    clear_padding(to);
  }

  // `count` windows side by side, all of them inside the image. Each run of numbers is stored as a whole vector, over
  // the beginning of what follows. y: their outputs, whose lines are fetched for the first time; stores that miss wait
  // for each other.
  void copy_windows(const uint16_t* first, int64_t count, uint16_t* to, const uint16_t* y) const {
    const int64_t k = a.dims.kernel, channels = a.dims.in_channels, step = a.stride * a.x_stride_pixel;
    if (!b.planes) {
      for (int64_t p = 0; p < count; ++p, first += step, to += b.pitch) {
        __builtin_prefetch(y + p * a.dims.out_channels, 1, 2);
        for (int64_t dy = 0; dy < k; ++dy)
          copy_run(first + dy * a.x_stride_row, k * channels, k * channels, to + dy * k * channels);
        clear_padding(to + k * k * channels, (32 - k * channels % 32) % 32);
      }
      return;
    }
    for (int64_t p = 0; p < count; ++p, first += step, to += b.pitch) {
      __builtin_prefetch(y + p * a.dims.out_channels, 1, 2);
      uint16_t* run = to;
      for (int64_t c = 0; c < channels; ++c) {
        const uint16_t* plane = first + c * a.x_stride_channel;
        UNROLL for (int dy = 0; dy < 3; ++dy, run += 3) {
          const __m128i pixels = _mm_maskz_loadu_epi16(7, plane + dy * a.x_stride_row);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(run), pixels);
        }
      }
      clear_padding(run, 5);
    }
  }

  // The windows of `count` output pixels from the `pixel`-th on.
  void copy_windows_of(int64_t pixel, int64_t count, uint16_t* to) const {
    const int64_t k = a.dims.kernel;
    // Windows whose columns are all in the image: those of output columns [begin, end).
    const bool runs = b.planes ? k == 3 && a.x_stride_pixel == 1 : true;
    const int64_t begin = min64(ceil_div(a.pad_left, a.stride), a.out_width);
    const int64_t last = a.width + a.pad_left - k;
    const int64_t end = runs && last >= 0 ? max64(begin, min64(last / a.stride + 1, a.out_width)) : begin;
    for (const int64_t after = pixel + count; pixel < after;) {
      const int64_t line = pixel / a.out_width, column = pixel % a.out_width;
      const int64_t image = line / a.out_height, top = line % a.out_height * a.stride - a.pad_top;
      const uint16_t* from = x + image * a.x_stride_image;
      int64_t many = 1;
      if (column >= begin && column < end && top >= 0 && top + k <= a.height) {
        many = min64(end - column, after - pixel);
        const int64_t left_column = column * a.stride - a.pad_left;
        copy_windows(from + top * a.x_stride_row + left_column * a.x_stride_pixel, many, to,
                     static_cast<const uint16_t*>(a.y) + pixel * a.dims.out_channels);
      } else {
        copy_window(from, top, column * a.stride - a.pad_left, to);
      }
      pixel += many;
      to += many * b.pitch;
    }
  }
  // What fills up the depth behind a window, but for the first `covered` numbers.
  void clear_padding(uint16_t* to, int64_t covered = 0) const {
    int64_t rest = depth.padded() - a.dims.kernel * a.dims.kernel * a.dims.in_channels - covered;
    for (to += covered; rest > 0; rest -= 32, to += 32)
      _mm512_mask_storeu_epi16(to, first_32(rest), _mm512_setzero_si512());
  }

  void multiply(const Pixels& pixels, int64_t first_pixel) {
    Output<BF16> output;
    output.y = static_cast<uint16_t*>(a.y) + first_pixel * a.dims.out_channels;
    output.y_stride = a.dims.out_channels;
    output.x = nullptr;
    output.x_stride = 0;
    output.channels = static_cast<int>(a.dims.out_channels);
    output.bounded = bounds(a.activation);
    output.lo = V::set(a.activation.lo);
    output.hi = V::set(a.activation.hi);
    const float* weights = b.planes ? reinterpret_cast<const float*>(reordered) : a.packed + l.w;
    multiply_into_y(shapes, pixels, depth, weights, a.packed + l.b, item.panel_begin * l.panel,
                    min64(item.panel_end * l.panel, l.out_padded / kTileRows), output);
  }

  void run() {
    if (b.planes) reorder_weights();
    const int64_t all = a.batch * a.out_height * a.out_width, line = is_pointwise(a) ? kPointwiseLine : a.out_width;
    const int64_t end = min64(item.line_end * line, all);
    for (int64_t pixel = item.line_begin * line; pixel < end; pixel += kRun) {
      const int64_t count = min64(kRun, end - pixel);
      if (!b.windows) {
        multiply({x + pixel * a.x_stride_pixel, a.x_stride_pixel, count}, pixel);
      } else {
        copy_windows_of(pixel, count, left);
        multiply({left, b.pitch, count}, pixel);
      }
    }
    shapes.release();
  }
};

static void conv_work(const ConvArgs& a, const ConvLayout& l, const ConvItem& item, float* scratch) {
  ConvWork(a, l, item, scratch).run();
}

}  // namespace

extern const TierKernels kernels_avx512amx;
const TierKernels kernels_avx512amx = {
    V::width,  V::kMaxPanel, 0,       scratch_floats, work,    nullptr, conv_scratch_floats,
    conv_work, nullptr,      nullptr, nullptr,        nullptr, nullptr, nullptr,
    nullptr,   nullptr,      nullptr, fma_chains,     nullptr, 1};

}  // namespace mbv2
