// The bf16x3 tier: fp32 blocks and 1x1 convolutions by AMX, which multiplies bf16 and nothing longer.
//
// An fp32 number is the sum of three bf16 numbers: its first 8 bits, what they leave, and the rest. Of the nine
// products of two such sums six count; the other three are below 2^-23 of the whole. (Henry, Tang, Heinecke: Leveraging
// the bfloat16 Artificial Intelligence Datatype for Higher-Precision Computations, ARITH 2019.) Sums are fp32's, over
// runs of at most kStrip * 32 products at a time. Six tiles are multiplied in less time than AVX-512 takes for one.
//
//   for each group of output rows
//     split        x rows  -> tiles                                              [Cin / 32][pixel][part]    bf16
//     for each chunk of hidden channels
//       expand     tiles   -> ring   (only rows the ring does not hold yet)      [32 channels][pixel][32]
//       depthwise    ring  -> tiles  (d, split where it is computed)             [hidden / 32][pixel][part] bf16
//     project      tiles   -> y
//
// Weights are fp32 in memory (amx.h has their order) and split while the tiles before them are multiplied.
//
// What bf16 parts cannot stand for: pixels with infinities or NaN are multiplied as fp32 (`fp32_product`), so are
// numbers so large that a partial product could overflow where the product does not, and weights of either kind. AMX
// takes denormals for zeros: what is below 2^-110 loses bits.
//
// A number of 16 bits is the sum of its first two parts: of x in such storage five products count.
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics of shifts, where they are inlined
#include <immintrin.h>

#include "amx.h"
#include "block.h"
#include "conv.h"
#include "pack.h"

namespace mbv2 {
namespace {

#include "avx512_vector.h"

#include "tile_generic.h"

#include "storage_generic.h"

#include "depthwise_generic.h"

#include "amx_tiles.h"

constexpr int64_t kPart = 32;                // numbers of a row of a tile
constexpr int64_t kRow = 3 * kPart;          // of a row of three tiles, one of each part
constexpr int64_t kStep = kTileRows * kRow;  // of those tiles
constexpr int64_t kPanel = 2 * kTileRows;    // channels that are multiplied together
constexpr int64_t kStrip = 4;                // steps of the depth that they are multiplied by, at most
constexpr int64_t kStripNumbers = kStrip * 2 * kStep;
// Up to so many pairs of tiles of pixels, a strip's weights are split and multiplied a step at a time: two steps of
// them stay in L1, two strips do not, and with few pixels they are most of what is read and written.
constexpr int64_t kFewPairs = 2;
// Pixels that fp32 arithmetic multiplies at a time. Blocks of images with no more are faster by it than by tiles.
constexpr int64_t kFp32Rows = 12;

// ---- Splitting ------------------------------------------------------------------------------------------------------

ALWAYS_INLINE V::T behind_first_8_bits(V::T v) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return V::sub(v, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), upper)));
}
// The upper halves: bf16 numbers in pairs, one of each vector.
ALWAYS_INLINE void store_pairs(uint16_t* to, V::T first, V::T second) {
  const __m512i shifted = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
  _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, shifted, _mm512_castps_si512(second)));
}
// Two vectors -> a row of three tiles.
ALWAYS_INLINE void split(V::T first, V::T second, uint16_t* to) {
  UNROLL for (int part = 0; part < 3; ++part) {
    store_pairs(to + part * kPart, first, second);
    if (part == 2) break;
    first = behind_first_8_bits(first);
    second = behind_first_8_bits(second);
  }
}
// Back from such a line to two vectors.
ALWAYS_INLINE void load_pairs(const uint16_t* from, V::T* first, V::T* second) {
  const __m512i pairs = _mm512_loadu_si512(from), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  *first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  *second = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
}
// Where number k of 32 lies in a row of a tile.
ALWAYS_INLINE int64_t place(int64_t k) { return k % 16 * 2 + k / 16; }

// The left matrix of a product, split: [step][pixel][part][32]. As many pixels a tile as make all of them equal.
// on_tiles: as tiles multiply them; else fp32_product does. third: there is something in the third parts.
struct Pixels {
  uint16_t* first;
  int64_t count, rows, steps;
  bool on_tiles, third;
  ALWAYS_INLINE int64_t tiles() const { return count ? ceil_div(count, rows) : 0; }
  ALWAYS_INLINE int64_t step() const { return ceil_div(count, kTileRows) * kStep; }  // numbers of a step of all pixels
  ALWAYS_INLINE uint16_t* row(int64_t pixel, int64_t step_) const { return first + step_ * step() + pixel * kRow; }
};
static ALWAYS_INLINE bool tame(const float* packed) { return !reinterpret_cast<const PackedHeader*>(packed)->wild; }
static Pixels pixels_in(uint16_t* memory, int64_t count, int64_t depth, bool on_tiles, bool third) {
  const int64_t rows = count ? ceil_div(count, ceil_div(count, kTileRows)) : 1;
  return {memory, count, rows, ceil_div(depth, kPanel), on_tiles, third};
}
static int64_t pixels_size(int64_t count, int64_t depth) {  // in bytes
  return ceil_div(count, kTileRows) * ceil_div(depth, kPanel) * kStep * 2;
}

// Numbers that tiles cannot multiply, as what `fp32_product` reads: infinities and NaN as they are, in one part.
template <class Storage>
static __attribute__((noinline)) void split_wild(const typename Storage::Element* x, int64_t channels, uint16_t* to,
                                                 int64_t step) {
  for (int64_t k = 0; k < channels; ++k) {
    uint32_t bits;
    const float v = Storage::load_one(x + k);
    __builtin_memcpy(&bits, &v, sizeof bits);
    if ((bits & 0x7f800000) != 0x7f800000) continue;
    uint16_t* at = to + k / kPanel * step + place(k % kPanel);
    at[0] = static_cast<uint16_t>(bits & 0x7fffff ? 0x7fc0 : bits >> 16);
    at[kPart] = at[2 * kPart] = 0;
  }
}

// NaN once a vector has held what tiles cannot multiply: from kTooLarge on a number becomes infinite, and an infinity
// times zero NaN.
ALWAYS_INLINE V::T wild(V::T sum, V::T v) {
  return V::fma(_mm512_mul_ps(v, V::set(0x1p128 / kTooLarge)), V::set(0), sum);
}
ALWAYS_INLINE bool is_nan(V::T v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }

// `count` pixels of x from the `first`-th on.
template <class Storage>
static void split_pixels(const typename Storage::Element* x, int64_t pitch, int64_t first, int64_t count,
                         int64_t channels, Pixels& to) {
  const V::T zero = V::set(0);
  const int rest = static_cast<int>(channels % kPanel), low = rest < 16 ? rest : 16, high = rest - low;
  const int64_t step = to.step();
  uint16_t* row = to.row(first, 0);
  for (int64_t p = 0; p < count; ++p, x += pitch, row += kRow) {
    V::T sum = zero;
    uint16_t* at = row;
    const typename Storage::Element* from = x;
    for (int64_t s = channels / kPanel; s > 0; --s, from += kPanel, at += step) {
      const V::T a = Storage::load(from), b = Storage::load(from + V::width);
      sum = wild(wild(sum, a), b);
      split(a, b, at);
    }
    if (rest) {
      const V::T a = Storage::load(from, low), b = high ? Storage::load(from + V::width, high) : zero;
      sum = wild(wild(sum, a), b);
      split(a, b, at);
    }
    if (is_nan(sum)) {
      to.on_tiles = false;
      split_wild<Storage>(x, channels, row, step);
    }
  }
}

// d, split where it is computed: of 32 channels the first 16 wait in the row until the others are there.
struct ToTiles {
  using Element = float;
  using Result = uint16_t;
  static constexpr int kParts = 2;
  static constexpr bool kAnyKernel = true;
  template <int Part>
  static ALWAYS_INLINE V::T load(const float* p) {
    return V::load(p + Part * V::width);
  }
  template <int Part>
  static ALWAYS_INLINE void store(uint16_t* p, V::T v) {
    uint16_t* const row = p - Part * V::width;
    float* const waiting = reinterpret_cast<float*>(row);
    if (Part == 0)
      V::store(waiting, v);
    else
      split(V::load(waiting), v, row);
  }
};

// A step of all pixels, split already. Arithmetic gives no NaN whose first part is not one.
static void find_wild(Pixels& pixels, int64_t step) {
  uint16_t* row = pixels.row(0, step);
  for (int64_t p = 0; p < pixels.count; ++p, row += kRow) {
    V::T first, second;
    load_pairs(row, &first, &second);
    if (!is_nan(wild(wild(V::set(0), first), second))) continue;
    pixels.on_tiles = false;
    for (int64_t k = 0; k < kPart; ++k)
      if ((row[k] & 0x7f80) == 0x7f80) row[k + kPart] = row[k + 2 * kPart] = 0;
  }
}

// ---- Products -------------------------------------------------------------------------------------------------------

// The right matrix: `columns` of 16 channels, of which `channels` exist; bias may be null. panel: numbers from one 32
// channels' to the next's.
struct Weights {
  const float *first, *bias;
  int64_t columns, channels, panel;
  ALWAYS_INLINE const float* at(int64_t column, int64_t step) const {
    return first + column / 2 * panel + step * kPanel * kPanel;
  }
  ALWAYS_INLINE const float* start(int64_t column) const { return bias ? bias + column * kTileRows : kZeros; }
};

// A number that a template can read.
template <int N>
struct Int {
  static constexpr int value = N;
};

// What a product needs besides: weights of two pieces of a strip, split; the sums of strips before, and those of the
// pieces before. Or pixels as fp32.
struct Workspace {
  uint16_t* pieces;
  float *totals, *begun, *joined;
};
static int64_t sums_size(int64_t pixels) { return (pixels + kPanel) * kPanel * 4; }  // in bytes
static int64_t workspace_size(int64_t pixels, int64_t depth) {
  const int64_t joined = kFp32Rows * ceil_div(depth, kPanel) * kPanel * 4;
  return max64(2 * kStripNumbers * 2 + sums_size(pixels) + sums_size(kFewPairs * kPanel), joined);
}
static Workspace workspace_in(char* memory) {
  auto* const begun = reinterpret_cast<float*>(memory + 2 * kStripNumbers * 2);
  auto* const totals = begun + sums_size(kFewPairs * kPanel) / 4;
  return {reinterpret_cast<uint16_t*>(memory), totals, begun, reinterpret_cast<float*>(memory)};
}

// What sums begin with: one row for all pixels, pitch 0; or what was summed up before, [pixel][32]; null: what is in
// the tiles.
struct Start {
  const float* first;
  int64_t pitch;  // in bytes
};

// 1 or 2 tiles of pixels by 1 or 2 of channels, on top of `start`. meanwhile() is called after each few
// multiplications. Small products come first. A tile has `rows` pixels; step: numbers from a step's to the next's.
// third: of `a`, as Pixels has it.
template <int Rows, int Columns, class Meanwhile>
ALWAYS_INLINE void sum_up(const uint16_t* a, int64_t rows, int64_t step, bool third, const uint16_t* w, int64_t steps,
                          const Start& start, Meanwhile& meanwhile) {
  if (start.first) {
    const float* const below = start.first + rows * start.pitch / 4;
    load_tile<0>(start.first, start.pitch);
    if constexpr (Columns == 2) load_tile<1>(start.first + kTileRows, start.pitch);
    if constexpr (Rows == 2) load_tile<2>(below, start.pitch);
    if constexpr (Rows == 2 && Columns == 2) load_tile<3>(below + kTileRows, start.pitch);
  }
  const auto pixels = [&](int part) __attribute__((always_inline)) {
    load_tile<4>(a + part * kPart, kRow * 2);
    if constexpr (Rows == 2) load_tile<5>(a + rows * kRow + part * kPart, kRow * 2);
  };
  const auto weights = [&](int part) __attribute__((always_inline)) {
    load_tile<6>(w + part * kPart, kRow * 2);
    if constexpr (Columns == 2) load_tile<7>(w + kStep + part * kPart, kRow * 2);
  };
  const auto multiply = [&]() __attribute__((always_inline)) {
    multiply_tiles<0, 4, 6>();
    if constexpr (Columns == 2) multiply_tiles<1, 4, 7>();
    if constexpr (Rows == 2) {
      multiply_tiles<2, 5, 6>();
      if constexpr (Columns == 2) multiply_tiles<3, 5, 7>();
    }
    meanwhile();
  };
  for (; steps > 0; --steps, a += step, w += 2 * kStep) {
    weights(0);
    if (third) {
      pixels(2);
      multiply();
    } else {
      meanwhile();
    }
    pixels(1);
    multiply();
    weights(1);
    multiply();
    pixels(0);
    multiply();
    weights(2);
    multiply();
    weights(0);
    multiply();
  }
}
constexpr int64_t kSlices = 6;  // calls of meanwhile() a step

// [pixel][32]
template <int Rows, int Columns>
ALWAYS_INLINE void store_sums(float* sums, int64_t rows) {
  store_tile<0>(sums, kPanel * 4);
  if constexpr (Columns == 2) store_tile<1>(sums + kTileRows, kPanel * 4);
  if constexpr (Rows == 2) store_tile<2>(sums + rows * kPanel, kPanel * 4);
  if constexpr (Rows == 2 && Columns == 2) store_tile<3>(sums + rows * kPanel + kTileRows, kPanel * 4);
}

// What the vector units do while tiles are multiplied, in slices: finished sums go to where they belong, the next
// piece's weights are split, the lines of those behind it fetched. Strips: there are several, whose sums add up.
template <class Target, bool Strips>
struct Meanwhile {
  Target target;
  const float* sums;
  float* totals;
  int64_t pixels = 0, pixels_a_slice = 0;
  bool last;
  const float* weights;
  uint16_t* split_to;
  int64_t rows = 0, rows_a_slice = 0;

  ALWAYS_INLINE void finish(int64_t count) {
    pixels -= count;
    for (; count > 0; --count, sums += kPanel, target.next()) {
      V::T a = V::load(sums), b = V::load(sums + V::width);
      if constexpr (Strips) {
        a = V::add(a, V::load(totals));
        b = V::add(b, V::load(totals + V::width));
        if (!last) {
          V::store(totals, a);
          V::store(totals + V::width, b);
        }
        totals += kPanel;
        if (!last) continue;
      }
      target.write(a, b);
    }
  }
  ALWAYS_INLINE void split_rows(int64_t count) {
    rows -= count;
    for (; count > 0; --count, split_to += kRow, weights += 2 * V::width) {
      constexpr int64_t kAhead = kStrip * kPanel * kPanel;
      __builtin_prefetch(weights + kAhead, 0, 2);
      __builtin_prefetch(weights + kAhead + V::width, 0, 2);
      split(V::load(weights), V::load(weights + V::width), split_to);
    }
  }
  ALWAYS_INLINE void operator()() {
    finish(min64(pixels_a_slice, pixels));
    split_rows(min64(rows_a_slice, rows));
  }
};

// to.target(column, pixel): what the sums of 32 channels go to: write(a, b), next().
template <bool Strips, class To>
NOINLINE void tile_product(TileShapes& shapes, const Pixels& a, const Weights& w, const Workspace& workspace,
                           const To& to) {
  alignas(64) float sums[2][kPanel * kPanel];
  const int64_t tiles = a.tiles(), pairs = ceil_div(tiles, 2), pair = 2 * a.rows;
  const int64_t strips = ceil_div(a.steps, kStrip), piece = pairs <= kFewPairs ? 1 : kStrip;
  const auto first_step = [&](int64_t strip) { return a.steps * strip / strips; };
  shapes.set(a.rows, kPanel);
  Meanwhile<decltype(to.target(0, 0)), Strips> meanwhile;
  meanwhile.target = to.target(0, 0);
  meanwhile.sums = meanwhile.totals = sums[0];
  meanwhile.last = false;
  meanwhile.weights = w.first;
  meanwhile.split_to = workspace.pieces;
  meanwhile.rows = min64(piece, first_step(1)) * kPanel;
  meanwhile.split_rows(meanwhile.rows);
  uint16_t *now = workspace.pieces, *next = now + kStripNumbers;
  float *free = sums[0], *used = sums[1];
  for (int64_t column = 0; column < w.columns; column += 2) {
    const bool two_columns = column + 1 < w.columns;
    for (int64_t strip = 0; strip < strips; ++strip) {
      const bool to_totals = Strips && strip == 0;
      bool forward = true;
      for (int64_t step = first_step(strip), end; step < first_step(strip + 1); step = end, forward = !forward) {
        end = min64(step + piece, first_step(strip + 1));
        const int64_t steps = end - step;
        const bool begun = step > first_step(strip), done = end == first_step(strip + 1), last = end == a.steps;
        const int64_t following = last ? 0 : done ? strip + 1 : strip, next_step = last ? 0 : end;
        const int64_t next_steps = min64(piece, first_step(following + 1) - next_step);
        meanwhile.weights = w.at(last ? column + 2 : column, next_step);
        meanwhile.split_to = next;
        meanwhile.rows = last && column + 2 >= w.columns ? 0 : next_steps * kPanel;
        meanwhile.rows_a_slice = ceil_div(meanwhile.rows, pairs * steps * kSlices);
        for (int64_t i = 0; i < pairs; ++i) {
          // Back and forth: the pair of tiles that ends a piece begins the next, and its sums stay where they are.
          const int64_t p = forward ? i : pairs - 1 - i;
          const bool two = 2 * p + 1 < tiles, stay = !done && i + 1 == pairs;
          const uint16_t* left = a.row(p * pair, step);
          float* const totals = workspace.totals + p * pair * kPanel;
          float* const unfinished = workspace.begun + p * pair * kPanel;
          const Start start = !begun ? Start{strip ? kZeros : w.start(column), 0}
                              : i    ? Start{unfinished, kPanel * 4}
                                     : Start{nullptr, 0};
          float* const out = !done ? unfinished : to_totals ? totals : free;
          meanwhile.pixels_a_slice = ceil_div(meanwhile.pixels, steps * kSlices);
          const auto run = [&](auto rows, auto columns) __attribute__((always_inline)) {
            constexpr int kRows = decltype(rows)::value, kColumns = decltype(columns)::value;
            sum_up<kRows, kColumns>(left, a.rows, a.step(), a.third, now, steps, start, meanwhile);
            if (!stay) store_sums<kRows, kColumns>(out, a.rows);
          };
          if (two_columns)
            two ? run(Int<2>(), Int<2>()) : run(Int<1>(), Int<2>());
          else
            two ? run(Int<2>(), Int<1>()) : run(Int<1>(), Int<1>());
          meanwhile.finish(meanwhile.pixels);
          if (!done || to_totals) continue;
          meanwhile.target = to.target(column, p * pair);
          meanwhile.sums = out;
          meanwhile.totals = totals;
          meanwhile.pixels = min64(pair, a.count - p * pair);
          meanwhile.last = last;
          free = used;
          used = out;
        }
        meanwhile.split_rows(meanwhile.rows);
        uint16_t* const multiplied = now;
        now = next;
        next = multiplied;
      }
    }
  }
  meanwhile.finish(meanwhile.pixels);
}

// ---- The same in fp32 arithmetic ------------------------------------------------------------------------------------

// For what tiles cannot multiply, and for blocks of so few pixels that splitting the weights takes longer than that. By
// the size of an image, not of a group: the same bits in any batch and with any threads.

// A row of three tiles -> the 32 numbers that it was.
ALWAYS_INLINE void join(const uint16_t* from, float* to) {
  V::T first, second;
  load_pairs(from, &first, &second);
  UNROLL for (int part = 1; part < 3; ++part) {
    V::T a, b;
    load_pairs(from + part * kPart, &a, &b);
    first = V::add(first, a);
    second = V::add(second, b);
  }
  V::store(to, first);
  V::store(to + V::width, second);
}

// Rows pixels, of `steps` * 32 numbers each, by 32 channels. Sums are over runs as short as tiles' are. Channels that
// do not exist are zero, also where an infinity has made NaN of their zero weights.
template <int Rows, class Target>
ALWAYS_INLINE void multiply_rows(const float* pixels, int64_t steps, const Weights& w, int64_t column, Target target) {
  const int64_t pitch = steps * kPanel;
  const float* weights = w.at(column, 0);
  V::T totals[Rows][2];
  for (int64_t strip = 0; strip < steps; strip += kStrip) {
    V::T start[2] = {V::set(0), V::set(0)}, sums[Rows][2];
    for (int j = 0; j < 2 && !strip; ++j)
      if (column + j < w.columns) start[j] = V::load(w.start(column + j));
    UNROLL for (int r = 0; r < Rows; ++r) UNROLL for (int j = 0; j < 2; ++j) sums[r][j] = start[j];
    for (int64_t step = strip, end = min64(strip + kStrip, steps); step < end; ++step, weights += kPanel * kPanel)
      for (int64_t i = 0; i < kPanel; ++i, ++pixels) {
        const float* line = weights + i % 16 * 2 * V::width + i / 16 * V::width;
        const V::T a = V::load(line), b = V::load(line + kPanel * kTileRows);
        __builtin_prefetch(line + kStrip * kPanel * kPanel, 0, 2);
        __builtin_prefetch(line + (kStrip * kPanel + kTileRows) * kPanel, 0, 2);
        UNROLL for (int r = 0; r < Rows; ++r) {
          const V::T pixel = V::broadcast(pixels + r * pitch);
          sums[r][0] = V::fma(pixel, a, sums[r][0]);
          sums[r][1] = V::fma(pixel, b, sums[r][1]);
        }
      }
    UNROLL for (int r = 0; r < Rows; ++r) UNROLL for (int j = 0; j < 2; ++j) {
      totals[r][j] = strip ? V::add(totals[r][j], sums[r][j]) : sums[r][j];
    }
  }
  UNROLL for (int j = 0; j < 2; ++j) {
    const int64_t exist = max64(min64(w.channels - (column + j) * kTileRows, V::width), 0);
    const __mmask16 mask = V::first(static_cast<int>(exist));
    UNROLL for (int r = 0; r < Rows; ++r) totals[r][j] = _mm512_mask_mov_ps(V::set(0), mask, totals[r][j]);
  }
  UNROLL for (int r = 0; r < Rows; ++r, target.next()) target.write(totals[r][0], totals[r][1]);
}

template <int Rows, class To>
static void fp32_rows(int64_t rows, const float* pixels, int64_t first, int64_t steps, const Weights& w, const To& to) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return fp32_rows<Rows - 1>(rows, pixels, first, steps, w, to);
  }
  for (int64_t column = 0; column < w.columns; column += 2)
    multiply_rows<Rows>(pixels, steps, w, column, to.target(column, first));
}

template <class To>
NOINLINE void fp32_product(const Pixels& a, const Weights& w, const Workspace& workspace, const To& to) {
  const int64_t passes = ceil_div(a.count, kFp32Rows);
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = a.count * pass / passes, end = a.count * (pass + 1) / passes;
    float* joined = workspace.joined;
    for (int64_t p = first; p < end; ++p)
      for (int64_t step = 0; step < a.steps; ++step, joined += kPanel) join(a.row(p, step), joined);
    fp32_rows<kFp32Rows>(end - first, workspace.joined, first, a.steps, w, to);
  }
}

template <class To>
static void product(TileShapes& shapes, const Pixels& a, const Weights& w, const Workspace& workspace, const To& to) {
  if (!a.on_tiles)
    fp32_product(a, w, workspace, to);
  else if (a.steps > kStrip)
    tile_product<true>(shapes, a, w, workspace, to);
  else
    tile_product<false>(shapes, a, w, workspace, to);
}

// ---- Outputs --------------------------------------------------------------------------------------------------------

// y as fp32, from channel 0 on.
struct ToY {
  float* y;
  const float* x;  // the residual, or null
  int64_t y_stride, x_stride, channels;
  Clamp clamp;
  struct Target {
    float* y;
    const float* x;
    int64_t y_stride, x_stride;
    int rest;
    V::T lo, hi;
    ALWAYS_INLINE void write(V::T a, V::T b) const {
      a = V::clamp(a, lo, hi);
      b = V::clamp(b, lo, hi);
      if (rest >= kPanel) {
        if (x) {
          a = V::add(a, V::load(x));
          b = V::add(b, V::load(x + V::width));
        }
        V::store(y, a);
        V::store(y + V::width, b);
      } else {
        const int low = rest < V::width ? rest : V::width, high = rest - low;
        if (x) {
          a = V::add(a, V::load(x, low));
          b = V::add(b, V::load(x + V::width, high));
        }
        V::store(y, a, low);
        V::store(y + V::width, b, high);
      }
    }
    ALWAYS_INLINE void next() {
      y += y_stride;
      if (x) x += x_stride;
    }
  };
  ALWAYS_INLINE Target target(int64_t column, int64_t pixel) const {
    const int64_t c = column * kTileRows;
    return {y + pixel * y_stride + c,
            x ? x + pixel * x_stride + c : nullptr,
            y_stride,
            x_stride,
            static_cast<int>(channels - c),
            V::set(clamp.lo),
            V::set(clamp.hi)};
  }
};

// A pass of its own over sums that could not go to y at once: [pixel][channels] -> y of another type, or on top of a
// residual whose rows lie apart.
template <class Storage>
static void write_rows(const float* sums, int64_t pixels, Output<Storage> output) {
  const int channels = output.channels;
  for (int64_t p = 0; p < pixels; ++p)
    for (int c = 0; c < channels; c += V::width) {
      const int rest = channels - c;
      const float* from = sums + p * channels + c;
      output.write(p, c / V::width, rest < V::width ? V::load(from, rest) : V::load(from));
    }
}

// ---- The block ------------------------------------------------------------------------------------------------------

struct Buffers {
  bool rings;      // e is written to rows of our own; if not, x is read as e where it lies
  bool direct;     // project writes y
  int64_t images;  // at most
  int64_t ring_rows, ring_columns, image_size, ring_size, ring_count;  // of 32 channels each, in numbers
  int64_t ring, d_tiles, x_tiles, workspace, y, offsets, rows, size;   // in bytes
};

static Buffers buffers_of(const BlockArgs& a, const PackedLayout& l, const Plan& plan) {
  Buffers b = {};
  const int64_t reach = (a.dims.kernel - 1) * a.dilation + 1;
  const bool own = a.dtype == V::dtype;
  const bool adjoin = a.x_stride_row == a.width * a.x_stride_pixel &&
                      (plan.images == 1 || a.x_stride_image == a.height * a.x_stride_row);
  b.rings = a.dims.expand || a.dims.hidden_channels != l.hidden_padded || !own;
  b.direct = own && (!a.residual || adjoin);
  b.ring_rows = b.rings ? min64((plan.group_rows - 1) * a.stride + reach, a.height) : 0;
  b.ring_columns = max64(a.pad_left + a.width, (a.out_width - 1) * a.stride + reach);
  b.images = plan.images;
  b.image_size = b.ring_rows * b.ring_columns * kPanel;
  b.ring_size = b.images * b.image_size;
  // All channels' if a next group needs rows that this one expands, else a chunk's.
  const bool one_group = plan.group_rows * plan.row_parts >= a.out_height;
  b.ring_count = ceil_div(one_group ? min64(plan.chunk, l.hidden_padded) : l.hidden_padded, kPanel);
  int64_t at = 0;
  const auto section = [&](int64_t bytes) {
    const int64_t begin = at;
    at += ceil_div(bytes, 64) * 64;
    return begin;
  };
  const int64_t in_pixels = b.images * b.ring_rows * a.width, out_pixels = b.images * plan.group_rows * a.out_width;
  b.ring = section(b.rings ? b.ring_count * b.ring_size * 4 : 0);
  b.d_tiles = section(pixels_size(out_pixels, l.hidden_padded));
  b.x_tiles = section(a.dims.expand ? pixels_size(in_pixels, a.dims.in_channels) : 0);
  b.workspace = section(workspace_size(max64(in_pixels, out_pixels), max64(a.dims.in_channels, l.hidden_padded)));
  b.y = section(b.direct ? 0 : out_pixels * a.dims.out_channels * 4);
  b.offsets = section(in_pixels * static_cast<int64_t>(sizeof(int32_t)));
  b.rows = section(plan.group_rows * a.dims.kernel * static_cast<int64_t>(sizeof(void*)));
  b.size = at;
  return b;
}

static size_t scratch_floats(const BlockArgs& a, const PackedLayout& l, const Plan& plan) {
  return static_cast<size_t>(buffers_of(a, l, plan).size / 4);
}

// e's rings, from one of 32 channels on.
struct ToRing {
  float* ring;
  int64_t ring_size, columns;
  const int32_t* offset;  // of a pixel in a ring
  Clamp clamp;
  struct Target {
    float* ring;
    const int32_t* offset;
    bool two;
    V::T lo, hi;
    ALWAYS_INLINE void write(V::T a, V::T b) const {
      V::store(ring + *offset, V::clamp(a, lo, hi));
      if (two) V::store(ring + *offset + V::width, V::clamp(b, lo, hi));
    }
    ALWAYS_INLINE void next() { ++offset; }
  };
  ALWAYS_INLINE Target target(int64_t column, int64_t pixel) const {
    return {ring + column / 2 * ring_size, offset + pixel, column + 1 < columns, V::set(clamp.lo), V::set(clamp.hi)};
  }
};

template <class Storage>
struct Item {
  using Element = typename Storage::Element;
  const BlockArgs& a;
  const PackedLayout& l;
  const Plan& plan;
  const WorkItem& item;
  const Buffers b;
  float *ring, *wide_y;
  uint16_t *d_tiles, *x_tiles;
  Workspace workspace;
  int32_t* offsets;
  const float** rows;
  const Element* x;  // the first image
  TileShapes shapes;

  Item(const BlockArgs& a_, const PackedLayout& l_, const Plan& plan_, const WorkItem& item_, float* scratch)
      : a(a_), l(l_), plan(plan_), item(item_), b(buffers_of(a_, l_, plan_)) {
    char* memory = reinterpret_cast<char*>(scratch);
    ring = reinterpret_cast<float*>(memory + b.ring);
    wide_y = reinterpret_cast<float*>(memory + b.y);
    d_tiles = reinterpret_cast<uint16_t*>(memory + b.d_tiles);
    x_tiles = reinterpret_cast<uint16_t*>(memory + b.x_tiles);
    workspace = workspace_in(memory + b.workspace);
    offsets = reinterpret_cast<int32_t*>(memory + b.offsets);
    rows = reinterpret_cast<const float**>(memory + b.rows);
    x = static_cast<const Element*>(a.x) + item.image * a.x_stride_image;
  }

  ALWAYS_INLINE int64_t ring_row(int64_t row) const { return row % b.ring_rows * b.ring_columns * kPanel; }

  // Whether tiles multiply an image of so many pixels by these weights.
  ALWAYS_INLINE bool on_tiles(int64_t pixels) const { return tame(a.packed) && pixels > kFp32Rows; }

  // Input rows [begin, end): where each pixel lies in a ring, and x as a product reads it.
  Pixels prepare_rows(int64_t begin, int64_t end) {
    int32_t* to = offsets;
    int64_t pixel = 0;
    Pixels pixels = pixels_in(x_tiles, item.images * (end - begin) * a.width, a.dims.in_channels,
                              on_tiles(a.height * a.width), Storage::kOwn);
    for (int64_t image = 0; image < item.images; ++image)
      for (int64_t row = begin; row < end; ++row, pixel += a.width) {
        int64_t at = image * b.image_size + ring_row(row) + a.pad_left * kPanel;
        for (int64_t c = 0; c < a.width; ++c, at += kPanel) *to++ = static_cast<int32_t>(at);
        split_pixels<Storage>(x + image * a.x_stride_image + row * a.x_stride_row, a.x_stride_pixel, pixel, a.width,
                              a.dims.in_channels, pixels);
      }
    return pixels;
  }

  void expand(const Pixels& pixels, int64_t hidden, int64_t end, float* rings) {
    const Weights w = {a.packed + l.w1 + hidden * pixels.steps * kPanel, a.packed + l.b1 + hidden,
                       (end - hidden) / kTileRows, a.dims.hidden_channels - hidden, pixels.steps * kPanel * kPanel};
    product(shapes, pixels, w, workspace, ToRing{rings, b.ring_size, w.columns, offsets, a.activation});
  }

  // Without expand, what the depthwise pass cannot read where it lies: x as fp32, and zeros.
  void copy_to_ring(const Element* image, int64_t begin, int64_t end, int64_t hidden, float* to_ring) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = 0; c < a.width; ++c) {
        const Element* from = image + row * a.x_stride_row + c * a.x_stride_pixel;
        float* to = to_ring + ring_row(row) + (a.pad_left + c) * kPanel;
        for (int64_t h = hidden; h < hidden + kPanel; h += V::width, to += V::width)
          V::store(to,
                   Storage::load(from + h, static_cast<int>(max64(min64(a.dims.hidden_channels - h, V::width), 0))));
      }
  }

  // Output rows [begin, end) of an image's d, 32 hidden channels.
  void depthwise(const Element* image, int64_t begin, int64_t end, int64_t hidden, const float* from_ring,
                 uint16_t* to) {
    const int64_t k = a.dims.kernel;
    const auto* own_x = reinterpret_cast<const float*>(image) + hidden;
    find_rows(a, begin, end, rows,
              [&](int64_t row) { return b.rings ? from_ring + ring_row(row) : own_x + row * a.x_stride_row; });
    Depthwise<ToTiles> p;
    p.rows = rows;
    p.group = end - begin;
    p.pitch = b.rings ? kPanel : a.x_stride_pixel;
    p.first_column = b.rings ? 0 : -a.pad_left;  // a ring has its padding columns
    p.width = b.rings ? b.ring_columns : a.width;
    p.out_pitch = kRow;
    p.out_width = a.out_width;
    p.kernel = k;
    p.stride = a.stride;
    p.dilation = a.dilation;
    p.runs = 1;
    p.weights = a.packed + l.wd + hidden * k * k;
    p.bias = a.packed + l.b2 + hidden;
    p.out = to;
    p.clamp = a.activation;
    depthwise_rows(p);
  }

  void project(int64_t begin, int64_t end, const Pixels& pixels) {
    const int64_t channels = a.dims.out_channels;
    Element* y = static_cast<Element*>(a.y) + (item.image * a.out_height + begin) * a.out_width * channels;
    const Element* residual = a.residual ? x + begin * a.x_stride_row : nullptr;
    const Weights w = {a.packed + l.w2 + item.hidden_begin * kPanel, item.hidden_begin ? nullptr : a.packed + l.b3,
                       l.out_padded / kTileRows, channels, ceil_div(l.hidden_padded, kPanel) * kPanel * kPanel};
    constexpr Clamp kNone = {-__builtin_inff(), __builtin_inff()};
    if (item.partial) {
      float* sums = item.partial + (begin - item.row_begin) * a.out_width * l.out_padded;
      return product(shapes, pixels, w, workspace, ToY{sums, nullptr, l.out_padded, 0, l.out_padded, kNone});
    }
    if (b.direct) {
      const auto own_x = reinterpret_cast<const float*>(residual);
      return product(shapes, pixels, w, workspace,
                     ToY{reinterpret_cast<float*>(y), own_x, channels, a.x_stride_pixel, channels, a.final_activation});
    }
    product(shapes, pixels, w, workspace, ToY{wide_y, nullptr, channels, 0, channels, kNone});
    int64_t at = 0;
    for (int64_t image = 0; image < item.images; ++image)
      for (int64_t row = begin; row < end; ++row, at += a.out_width * channels) {
        const Element* add = residual ? residual + image * a.x_stride_image + (row - begin) * a.x_stride_row : nullptr;
        write_rows(
            wide_y + at, a.out_width,
            Output<Storage>{y + at, channels, add, a.x_stride_pixel, static_cast<int>(channels),
                            bounds(a.final_activation), V::set(a.final_activation.lo), V::set(a.final_activation.hi)});
      }
  }

  void run() {
    if (b.rings)
      clear_padding(ring, b.ring_count * b.images * b.ring_rows, b.ring_columns, a.pad_left, a.width, kPanel);
    const bool bounded = a.activation.hi < kInfinity;   // then d is tame, or NaN, which tiles keep
    int64_t held = first_input_row(a, item.row_begin);  // input rows below are in the rings
    for (int64_t row = item.row_begin; row < item.row_end; row += plan.group_rows) {
      const int64_t row_end = min64(row + plan.group_rows, item.row_end);
      const int64_t begin = max64(held, first_input_row(a, row)), end = max64(end_input_row(a, row_end), begin);
      held = end;
      Pixels pixels = {};
      if (a.dims.expand && end > begin) pixels = prepare_rows(begin, end);
      const int64_t out_pixels = (row_end - row) * a.out_width;
      Pixels of_d = pixels_in(d_tiles, item.images * out_pixels, item.hidden_end - item.hidden_begin,
                              on_tiles(a.out_height * a.out_width), true);
      float* chunk_rings = ring;
      for (int64_t hidden = item.hidden_begin; hidden < item.hidden_end; hidden += plan.chunk) {
        const int64_t hidden_end = min64(hidden + plan.chunk, item.hidden_end);
        if (pixels.count) expand(pixels, hidden, hidden_end, chunk_rings);
        float* of_panel = chunk_rings;
        for (int64_t c = hidden; c < hidden_end; c += kPanel, of_panel += b.ring_size) {
          const int64_t step = (c - item.hidden_begin) / kPanel;
          for (int64_t image = 0; image < item.images; ++image) {
            const Element* of_image = x + image * a.x_stride_image;
            float* of_ring = of_panel + image * b.image_size;
            if (b.rings && !a.dims.expand) copy_to_ring(of_image, begin, end, c, of_ring);
            depthwise(of_image, row, row_end, c, of_ring, of_d.row(image * out_pixels, step));
          }
          if (!bounded) find_wild(of_d, step);
        }
        if (b.ring_count * kPanel >= l.hidden_padded) chunk_rings = of_panel;
      }
      project(row, row_end, of_d);
    }
    shapes.release();
  }
};

static void work(const BlockArgs& a, const PackedLayout& l, const Plan& plan, const WorkItem& item, float* scratch) {
  with_storage(a.dtype, [&](auto storage) { Item<decltype(storage)>(a, l, plan, item, scratch).run(); });
}

// ---- 1x1 convolutions -----------------------------------------------------------------------------------------------

constexpr int64_t kRun = 256;  // output pixels that are multiplied at a time

struct ConvBuffers {
  int64_t workspace, y, pixel, size;  // in bytes, behind the split pixels
};
static ConvBuffers conv_buffers_of(const ConvArgs& a) {
  ConvBuffers b = {};
  b.workspace = pixels_size(kRun, a.dims.in_channels);
  b.y = b.workspace + workspace_size(kRun, a.dims.in_channels);
  b.pixel = b.y + (a.dtype == V::dtype ? 0 : kRun * a.dims.out_channels * 4);
  b.size = b.pixel + (a.x_stride_channel == 1 ? 0 : ceil_div(a.dims.in_channels, kLine) * 64);
  return b;
}
static size_t conv_scratch_floats(const ConvArgs& a, const ConvLayout&) {
  return static_cast<size_t>(conv_buffers_of(a).size / 4);
}

template <class Storage>
struct ConvWork {
  using Element = typename Storage::Element;
  const ConvArgs& a;
  const ConvLayout& l;
  const ConvItem& item;
  const ConvBuffers b;
  char* const memory;

  // Pixels of x from the `first`-th output pixel on, split.
  void read(int64_t first, Pixels& to) const {
    const auto* x = static_cast<const Element*>(a.x);
    const int64_t channels = a.dims.in_channels;
    const bool adjoin = a.x_stride_row == a.width * a.x_stride_pixel && a.x_stride_image == a.height * a.x_stride_row;
    if (is_pointwise(a) && adjoin && a.x_stride_channel == 1)
      return split_pixels<Storage>(x + first * a.x_stride_pixel, a.x_stride_pixel, 0, to.count, channels, to);
    auto* gathered = reinterpret_cast<Element*>(memory + b.pixel);
    for (int64_t p = 0; p < to.count; ++p) {
      const int64_t line = (first + p) / a.out_width, row = line % a.out_height * a.stride - a.pad_top;
      const int64_t column = (first + p) % a.out_width * a.stride - a.pad_left;
      const bool inside = row >= 0 && row < a.height && column >= 0 && column < a.width;
      const Element* from =
          x + line / a.out_height * a.x_stride_image + row * a.x_stride_row + column * a.x_stride_pixel;
      if (inside && a.x_stride_channel != 1) {
        for (int64_t c = 0; c < channels; ++c) gathered[c] = from[c * a.x_stride_channel];
        from = gathered;
      }
      if (inside)
        split_pixels<Storage>(from, 0, p, 1, channels, to);
      else
        split_pixels<Own>(kZeros, 0, p, 1, 1, to);
    }
  }

  void run() const {
    TileShapes shapes;
    const int64_t channels = a.dims.out_channels, all = a.batch * a.out_height * a.out_width;
    const int64_t line = is_pointwise(a) ? kPointwiseLine : a.out_width, end = min64(item.line_end * line, all);
    const int64_t column = item.panel_begin * l.panel, from_channel = column * kTileRows;
    const int64_t columns = min64(item.panel_end * l.panel, l.out_padded / kTileRows) - column;
    const int64_t depth = ceil_div(a.dims.in_channels, kPanel) * kPanel;
    const Weights w = {a.packed + l.w + from_channel * depth, a.packed + l.b + from_channel, columns,
                       channels - from_channel, depth * kPanel};
    const Workspace workspace = workspace_in(memory + b.workspace);
    for (int64_t pixel = item.line_begin * line; pixel < end; pixel += kRun) {
      Pixels pixels = pixels_in(reinterpret_cast<uint16_t*>(memory), min64(kRun, end - pixel), a.dims.in_channels,
                                tame(a.packed), Storage::kOwn);
      read(pixel, pixels);
      Element* y = static_cast<Element*>(a.y) + pixel * channels + from_channel;
      if constexpr (Storage::kOwn) {
        product(shapes, pixels, w, workspace, ToY{y, nullptr, channels, 0, channels - from_channel, a.activation});
      } else {
        auto* wide = reinterpret_cast<float*>(memory + b.y);
        const int64_t some = min64(columns * kTileRows, channels - from_channel);
        product(shapes, pixels, w, workspace, ToY{wide, nullptr, some, 0, some, a.activation});
        write_rows(wide, pixels.count,
                   Output<Storage>{y, channels, nullptr, 0, static_cast<int>(some), false, V::set(0), V::set(0)});
      }
    }
    shapes.release();
  }
};

static void conv_work(const ConvArgs& a, const ConvLayout& l, const ConvItem& item, float* scratch) {
  char* memory = reinterpret_cast<char*>(scratch);
  with_storage(a.dtype,
               [&](auto storage) { ConvWork<decltype(storage)>{a, l, item, conv_buffers_of(a), memory}.run(); });
}

}  // namespace

extern const TierKernels kernels_avx512bf16x3;
const TierKernels kernels_avx512bf16x3 = {
    // the rest is avx512's: block.cpp
    V::width,  V::kMaxPanel, 0,       scratch_floats, work,    nullptr, conv_scratch_floats,
    conv_work, nullptr,      nullptr, nullptr,        nullptr, nullptr, nullptr,
    nullptr,   nullptr,      nullptr, fma_chains,     nullptr, 3};

}  // namespace mbv2
