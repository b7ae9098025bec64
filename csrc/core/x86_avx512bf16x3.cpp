// The bf16x3 tier: fp32 on AMX.
#include <immintrin.h>

#include "amx.h"
#include "block.h"
#include "conv.h"

namespace mbv2 {
namespace {

#include "avx512_vector.h"

#include "tile_generic.h"

#include "storage_generic.h"

#include "depthwise_generic.h"

#define V_INLINE static inline __attribute__((always_inline))

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

V_INLINE void load_config(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
V_INLINE void release_tiles() { asm volatile("tilerelease"); }
template <int Tile>
V_INLINE void load_tile(const void* first, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(first), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
V_INLINE void store_tile(void* first, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(first), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
V_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Sums, int Pixels, int Weights>
V_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Pixels), "i"(Weights));
}

class TileShapes {
 public:
  void set(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    TileConfig config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);
    }
    load_config(config);
  }
  void release() {
    if (rows_) release_tiles();
    rows_ = 0;
  }

 private:
  int64_t rows_ = 0;
};

constexpr int64_t kTile = kTileRows * 32;  // numbers
constexpr int kParts = 3;
constexpr int64_t kRowBytes = kParts * 64;
template <int N>
struct Int {
  static constexpr int value = N;
};
#ifndef V_STRIP
#define V_STRIP 4
#endif

struct Depth {
  int64_t steps;  // of 32
  bool half;      // and one of 16
  ALWAYS_INLINE int64_t all() const { return steps + half; }
  ALWAYS_INLINE int64_t padded() const { return steps * 32 + half * 16; }
};
static ALWAYS_INLINE Depth depth_of(int64_t depth) {
  const int64_t halves = ceil_div(depth, kTileRows);
  return {halves / 2, halves % 2 != 0};
}

// Pixels cut into tiles of `rows`: [tile][step][part][16][32]
struct Pixels {
  uint16_t* first;
  int64_t count, rows;
  Depth depth;
  ALWAYS_INLINE int64_t tile() const { return depth.all() * kParts * kTile; }
  ALWAYS_INLINE int64_t tiles() const { return ceil_div(count, rows); }
};
static Pixels pixels_for(uint16_t* memory, int64_t count, int64_t depth) {
  const int64_t tiles = ceil_div(count, kTileRows);
  return {memory, count, tiles ? ceil_div(count, tiles) : 0, depth_of(depth)};
}
// Bytes
static int64_t pixels_size(int64_t count, int64_t depth) {
  return ceil_div(count, kTileRows) * depth_of(depth).all() * kParts * kTile * 2;
}

// Steps of the depth of 1 or 2 tiles of pixels by 1 or 2 of channels, on top of `start`. The vector units have nothing to
// do meanwhile: meanwhile() is called after every few multiplications. Small products first.
template <int Rows, int Columns, class Meanwhile>
ALWAYS_INLINE void sum_up(const uint16_t* a, int64_t second, const uint16_t* w, Depth depth, Meanwhile& meanwhile) {
  zero_tile<0>();
  if constexpr (Columns == 2) zero_tile<1>();
  if constexpr (Rows == 2) zero_tile<2>();
  if constexpr (Rows == 2 && Columns == 2) zero_tile<3>();
  const auto pixels = [&](int part) __attribute__((always_inline)) {
    load_tile<4>(a + part * 32, kRowBytes);
    if constexpr (Rows == 2) load_tile<5>(a + second + part * 32, kRowBytes);
  };
  const auto weights = [&](int part) __attribute__((always_inline)) {
    load_tile<6>(w + part * 32, kRowBytes);
    if constexpr (Columns == 2) load_tile<7>(w + kParts * kTile + part * 32, kRowBytes);
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
  for (int64_t s = depth.steps; s > 0; --s, a += kParts * kTile, w += 2 * kParts * kTile) {
    pixels(2);
    weights(0);
    multiply();
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
  if (depth.half) {
    pixels(1);
    weights(2);
    multiply();
    pixels(0);
    weights(1);
    multiply();
    weights(0);
    multiply();
  }
}
template <int Rows, int Columns>
ALWAYS_INLINE void store_sums(float* sums, int64_t rows) {
  constexpr int kRow = 2 * 64;
  store_tile<0>(sums, kRow);
  if constexpr (Columns == 2) store_tile<1>(sums + kTileRows, kRow);
  float* second = sums + rows * kTileRows * 2;
  if constexpr (Rows == 2) store_tile<2>(second, kRow);
  if constexpr (Rows == 2 && Columns == 2) store_tile<3>(second + kTileRows, kRow);
}

// ---- Splitting --------------------------------------------------------------------

ALWAYS_INLINE V::T rest_of(V::T v) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return V::sub(v, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), upper)));
}
ALWAYS_INLINE void pack(V::T low, V::T high, uint16_t* to) {
  const __m512i shifted = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
  _mm512_store_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, shifted, _mm512_castps_si512(high)));
}
// 32 numbers
ALWAYS_INLINE void split(V::T low, V::T high, uint16_t* to) {
  pack(low, high, to);
  low = rest_of(low), high = rest_of(high);
  pack(low, high, to + 32);
  pack(rest_of(low), rest_of(high), to + 64);
}
// 16
ALWAYS_INLINE void split_pixels_half(V::T v, uint16_t* to) {
  const V::T second = rest_of(v);
  pack(v, second, to);
  pack(rest_of(second), v, to + 32);
}
ALWAYS_INLINE void split_weights_half(V::T v, uint16_t* to) {
  const V::T second = rest_of(v);
  pack(v, v, to);
  pack(second, second, to + 32);
  pack(v, rest_of(second), to + 64);
}

// ---- Products -------------------------------------------------------------------------------------------------------

constexpr int64_t kStrip = V_STRIP, kPanel = 2 * kTileRows;  // steps of the depth; channels
constexpr int64_t kStripTiles = kStrip * 2 * kParts * kTile;

struct Memory {
  uint16_t* strips;  // two
  float* totals;
};
static int64_t memory_size(int64_t pixels) {  // in bytes
  return 2 * kStripTiles * 2 + (pixels + 2 * kTileRows) * kPanel * 4;
}

// The right matrix: fp32, [panel][step][column of two][16][2][16]
struct Weights {
  const float* first;
  const float* bias;
  int64_t columns;
};

// Sums of a strip that are to be finished: those of pixels [pixel, end).
struct Sums32 {
  const float* sums = nullptr;
  float* totals = nullptr;
  const float* bias = nullptr;
  int64_t panel = 0, pixel = 0, end = 0;
  bool last = false;
};

// What the vector units do while tiles are multiplied.
template <class Done, bool Parts>
struct Meanwhile : Sums32 {
  const Done done;
  int64_t rows = 0;
  // weights of the next strip
  const float* weights = nullptr;
  uint16_t* split_to = nullptr;
  int64_t splits = 0, each = 0;

  ALWAYS_INLINE explicit Meanwhile(const Done& d) : done(d) {}
  ALWAYS_INLINE void finish(int64_t count) {
    for (; count > 0; --count, ++pixel, sums += kPanel) {
      if (!Parts) {
        done(panel, pixel, bias, sums, sums);
        continue;
      }
      if (last) {
        done(panel, pixel, bias, sums, totals);
      } else {
        V::store(totals, V::add(V::load(totals), V::load(sums)));
        V::store(totals + V::width, V::add(V::load(totals + V::width), V::load(sums + V::width)));
      }
      totals += kPanel;
    }
  }
  ALWAYS_INLINE void split_rows(int64_t count) {
    splits -= count;
    for (; count > 0; --count, split_to += kParts * 32, weights += 2 * V::width) {
      __builtin_prefetch(weights + 2 * kStrip * kPanel * 32, 0, 2);
      __builtin_prefetch(weights + 2 * kStrip * kPanel * 32 + 16, 0, 2);
      split(V::load(weights), V::load(weights + V::width), split_to);
    }
  }
  void split_halves(int64_t count) {
    for (; count > 0; --count, split_to += kParts * 32, weights += V::width)
      split_weights_half(V::load(weights), split_to);
  }
  ALWAYS_INLINE void operator()() {
    finish(min64(rows, end - pixel));
    split_rows(min64(each, splits));
  }
};

template <bool Parts, class Done>
NOINLINE void product(TileShapes& shapes, const Pixels& a, const Weights& w, const Memory& memory, Done done) {
  alignas(64) float sums[2][2 * kTileRows * kPanel];
  const int64_t tiles = a.tiles(), size = a.tile(), pair = 2 * a.rows, pairs = ceil_div(tiles, 2);
  const int64_t strips = ceil_div(a.depth.all(), kStrip);
  shapes.set(a.rows);
  Meanwhile<Done, Parts> meanwhile(done);

  meanwhile.weights = w.first;
  uint16_t *now = memory.strips, *next = now + kStripTiles;
  const auto depth_of = [&](int64_t strip) {
    const int64_t all = a.depth.all(), steps = all * (strip + 1) / strips - all * strip / strips;
    const bool half = a.depth.half && strip + 1 == strips;
    return Depth{steps - half, half};
  };
  const auto split_next = [&](Depth depth, uint16_t* to, int64_t times) {
    meanwhile.split_to = to;
    meanwhile.splits = depth.steps * kPanel;
    meanwhile.each = ceil_div(meanwhile.splits, times);
  };
  split_next(depth_of(0), now, 1);
  meanwhile.split_rows(meanwhile.splits);
  meanwhile.split_halves(depth_of(0).half * kPanel);
  int turn = 0;
  for (int64_t column = 0; column < w.columns; column += 2) {
    const bool two_columns = column + 1 < w.columns;
    for (int64_t strip = 0, step = 0; strip < strips; ++strip) {
      const Depth depth = depth_of(strip);
      const int64_t slices = depth.steps * 6 + depth.half * 3;
      const bool more = column + 2 < w.columns || strip + 1 < strips;
      const Depth after = more ? depth_of(strip + 1 < strips ? strip + 1 : 0) : Depth{};
      split_next(after, next, pairs * slices);
      for (int64_t p = 0; p < pairs; ++p) {
        meanwhile.rows = ceil_div(meanwhile.end - meanwhile.pixel, slices);
        const bool two = 2 * p + 1 < tiles;
        const uint16_t* left = a.first + 2 * p * size + step * kParts * kTile;
        float* totals = memory.totals + p * pair * kPanel;
        float* to = strip + 1 < strips && strip == 0 ? totals : sums[turn];
        const auto run = [&](auto rows, auto columns) __attribute__((always_inline)) {
          sum_up<decltype(rows)::value, decltype(columns)::value>(left, size, now, depth, meanwhile);
          store_sums<decltype(rows)::value, decltype(columns)::value>(to, a.rows);
        };
        if (two_columns)
          two ? run(Int<2>{}, Int<2>{}) : run(Int<1>{}, Int<2>{});
        else
          two ? run(Int<2>{}, Int<1>{}) : run(Int<1>{}, Int<1>{});
        meanwhile.finish(meanwhile.end - meanwhile.pixel);  // what the slices left
        const int64_t first = p * pair, end = min64(first + pair, a.count);
        if (to == totals)
          static_cast<Sums32&>(meanwhile) = {};
        else
          static_cast<Sums32&>(meanwhile) = {to, totals, w.bias + column * kTileRows, column, first, end, strip + 1 == strips};
        turn = 1 - turn;
      }
      meanwhile.split_rows(meanwhile.splits);
      meanwhile.split_halves(after.half * kPanel);
      uint16_t* t = now;
      now = next;
      next = t;
      step += depth.all();
    }
  }
  meanwhile.finish(meanwhile.end - meanwhile.pixel);
}

// Rows of fp32 pixels -> tiles, steps [step, step + channels / 32)
template <class Storage>
static void split_pixels(const typename Storage::Element* x, int64_t pitch, int64_t first, int64_t count,
                         int64_t channels, int64_t step, const Pixels& a) {
  const int64_t rest = channels % 32;
  int64_t tile = first / a.rows, row = first % a.rows;
  for (int64_t p = 0; p < count; ++p, x += pitch) {
    uint16_t* to = a.first + (tile * a.depth.all() + step) * kParts * kTile + row * kParts * 32;
    const typename Storage::Element* from = x;
    for (int64_t s = channels / 32; s > 0; --s, from += 32, to += kParts * kTile)
      split(Storage::load(from), Storage::load(from + 16), to);
    if (rest > 16)
      split(Storage::load(from), Storage::load(from + 16, static_cast<int>(rest - 16)), to);
    else if (rest)
      split_pixels_half(Storage::load(from, static_cast<int>(rest)), to);
    if (++row == a.rows) row = 0, ++tile;
  }
}

// ---- Outputs --------------------------------------------------------------------------------------------------------

// Finished sums of 32 channels of a pixel, from `column` on.
template <bool Parts>
ALWAYS_INLINE V::T total(const float* bias, const float* sums, const float* totals) {
  const V::T v = V::add(V::load(bias), V::load(sums));
  return Parts ? V::add(v, V::load(totals)) : v;
}

template <class Storage, bool Parts>
struct WriteY {
  Output<Storage> output;
  ALWAYS_INLINE void operator()(int64_t column, int64_t pixel, const float* bias, const float* sums, const float* totals) const {
    Output<Storage> to = output;
    to.y += column * kTileRows;
    if (to.x) to.x += column * kTileRows;
    to.channels -= static_cast<int>(column * kTileRows);
    to.write(pixel, 0, total<Parts>(bias, sums, totals));
    if (to.channels > V::width) to.write(pixel, 1, total<Parts>(bias + V::width, sums + V::width, totals + V::width));
  }
};

template <class Storage>
static void multiply_into_y(TileShapes& shapes, const Pixels& a, const Weights& w, const Memory& memory,
                            const Output<Storage>& output) {
  if (a.depth.all() > kStrip)
    product<true>(shapes, a, w, memory, WriteY<Storage, true>{output});
  else
    product<false>(shapes, a, w, memory, WriteY<Storage, false>{output});
}

// ---- The block ------------------------------------------------------------------------------------------------------

struct Buffers {
  bool rings;
  int64_t ring_rows, ring_columns, ring_size;  // of a chunk, in numbers
  int64_t ring_count;
  int64_t ring, d, d_tiles, x_tiles, offsets, rows, memory, size;  // in bytes
};

static Buffers buffers_of(const BlockArgs& a, const PackedLayout& l, const Plan& plan) {
  Buffers b = {};
  const int64_t reach = (a.dims.kernel - 1) * a.dilation + 1;
  b.rings = a.dims.expand || a.dims.hidden_channels != l.hidden_padded || a.dtype != DType::f32;
  b.ring_rows = b.rings ? min64((plan.group_rows - 1) * a.stride + reach, a.height) : 0;
  b.ring_columns = max64(a.pad_left + a.width, (a.out_width - 1) * a.stride + reach);
  b.ring_size = b.ring_rows * b.ring_columns * kPanel;
  // A ring for each 32 channels: of a chunk if no group follows that needs its rows, else of all.
  b.ring_count = !b.rings ? 0 : plan.group_rows * plan.row_parts >= a.out_height ? ceil_div(plan.chunk, kPanel) : ceil_div(l.hidden_padded, kPanel);
  int64_t at = 0;
  const auto section = [&](int64_t bytes) {
    const int64_t begin = at;
    at += ceil_div(bytes, 64) * 64;
    return begin;
  };
  const int64_t pixels = plan.group_rows * a.out_width;
  b.ring = section(b.ring_count * b.ring_size * 4);
  b.d = section(pixels * kPanel * 4);
  b.d_tiles = section(pixels_size(pixels, l.hidden_padded));
  b.x_tiles = section(a.dims.expand ? pixels_size(b.ring_rows * a.width, a.dims.in_channels) : 0);
  b.offsets = section(b.ring_rows * a.width * static_cast<int64_t>(sizeof(int32_t)));
  b.rows = section(plan.group_rows * a.dims.kernel * static_cast<int64_t>(sizeof(void*)));
  b.memory = section(memory_size(max64(pixels, b.ring_rows * a.width)));
  b.size = at;
  return b;
}

static size_t scratch_floats(const BlockArgs& a, const PackedLayout& l, const Plan& plan) {
  return static_cast<size_t>(buffers_of(a, l, plan).size / 4);
}

struct OneVector {
  using Element = float;
  using Result = float;
  static constexpr int kParts = 1;
  static constexpr bool kAnyKernel = true;
  template <int>
  V_INLINE V::T load(const float* p) {
    return V::load(p);
  }
  V_INLINE void store(float* p, V::T v) { V::store(p, v); }
};

template <class Storage>
struct Item {
  using Element = typename Storage::Element;
  const BlockArgs& a;
  const PackedLayout& l;
  const Plan& plan;
  const WorkItem& item;
  const Buffers b;
  float *ring, *d;
  uint16_t *d_tiles, *x_tiles;
  int32_t* offsets;
  const float** rows;
  Memory memory;
  const Element* x;  // this image
  TileShapes shapes;

  Item(const BlockArgs& a_, const PackedLayout& l_, const Plan& plan_, const WorkItem& item_, float* scratch)
      : a(a_), l(l_), plan(plan_), item(item_), b(buffers_of(a_, l_, plan_)) {
    char* first = reinterpret_cast<char*>(scratch);
    ring = reinterpret_cast<float*>(first + b.ring);
    d = reinterpret_cast<float*>(first + b.d);
    d_tiles = reinterpret_cast<uint16_t*>(first + b.d_tiles);
    x_tiles = reinterpret_cast<uint16_t*>(first + b.x_tiles);
    offsets = reinterpret_cast<int32_t*>(first + b.offsets);
    rows = reinterpret_cast<const float**>(first + b.rows);
    memory.strips = reinterpret_cast<uint16_t*>(first + b.memory);
    memory.totals = reinterpret_cast<float*>(memory.strips + 2 * kStripTiles);
    x = static_cast<const Element*>(a.x) + item.image * a.x_stride_image;
  }

  ALWAYS_INLINE int64_t first_input_row(int64_t out_row) const { return max64(out_row * a.stride - a.pad_top, 0); }
  ALWAYS_INLINE int64_t end_input_row(int64_t out_end) const {
    const int64_t end = (out_end - 1) * a.stride - a.pad_top + (a.dims.kernel - 1) * a.dilation + 1;
    return max64(min64(end, a.height), 0);
  }
  ALWAYS_INLINE int64_t ring_row(int64_t row) const { return row % b.ring_rows * b.ring_columns * kPanel; }

  Pixels prepare_rows(int64_t begin, int64_t end) {
    int32_t* to = offsets;
    for (int64_t row = begin; row < end; ++row) {
      int64_t at = ring_row(row) + a.pad_left * kPanel;
      for (int64_t c = 0; c < a.width; ++c, at += kPanel) *to++ = static_cast<int32_t>(at);
    }
    const Pixels pixels = pixels_for(x_tiles, (end - begin) * a.width, a.dims.in_channels);
    for (int64_t row = begin; row < end; ++row)
      split_pixels<Storage>(x + row * a.x_stride_row, a.x_stride_pixel, (row - begin) * a.width, a.width,
                            a.dims.in_channels, 0, pixels);
    return pixels;
  }

  template <bool Parts>
  struct WriteRing {
    float* out;
    int64_t ring_size, columns;
    const int32_t* offset;
    V::T lo, hi;
    ALWAYS_INLINE void operator()(int64_t column, int64_t pixel, const float* bias, const float* sums, const float* totals) const {
      float* at = out + column / 2 * ring_size + offset[pixel];
      V::store(at, V::clamp(total<Parts>(bias, sums, totals), lo, hi));
      if (column + 1 < columns) V::store(at + V::width, V::clamp(total<Parts>(bias + V::width, sums + V::width, totals + V::width), lo, hi));
    }
  };

  void expand(const Pixels& pixels, int64_t hidden, int64_t end, float* chunk_ring) {
    const V::T lo = V::set(a.activation.lo), hi = V::set(a.activation.hi);
    const Weights w = {a.packed + l.w1 + hidden * pixels.depth.padded(), a.packed + l.b1 + hidden, (end - hidden) / kTileRows};
    if (pixels.depth.all() > kStrip)
      product<true>(shapes, pixels, w, memory, WriteRing<true>{chunk_ring, b.ring_size, w.columns, offsets, lo, hi});
    else
      product<false>(shapes, pixels, w, memory, WriteRing<false>{chunk_ring, b.ring_size, w.columns, offsets, lo, hi});
  }

  void copy_to_ring(int64_t begin, int64_t end, int64_t hidden, int64_t hidden_end, float* chunk_ring) {
    const int64_t channels = max64(min64(hidden_end, a.dims.hidden_channels) - hidden, 0);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = 0; c < a.width; ++c) {
        const Element* from = x + row * a.x_stride_row + c * a.x_stride_pixel + hidden;
        float* to = chunk_ring + ring_row(row) + (a.pad_left + c) * kPanel;
        for (int64_t i = 0; i < hidden_end - hidden; i += V::width)
          V::store(to + i, Storage::load(from + i, static_cast<int>(max64(min64(channels - i, V::width), 0))));
      }
  }

  void depthwise(int64_t begin, int64_t end, int64_t hidden, int64_t hidden_end, float* chunk_ring) {
    const int64_t k = a.dims.kernel;
    for (int64_t oy = begin; oy < end; ++oy) {
      for (int64_t dy = 0; dy < k; ++dy) {
        const int64_t row = oy * a.stride - a.pad_top + dy * a.dilation;
        const float*& to = rows[(oy - begin) * k + dy];
        if (row < 0 || row >= a.height)
          to = nullptr;
        else
          to = b.rings ? chunk_ring + ring_row(row) : reinterpret_cast<const float*>(x) + row * a.x_stride_row + hidden;
      }
    }
    Depthwise<OneVector> p;
    p.rows = rows;
    p.group = end - begin;
    p.pitch = b.rings ? kPanel : a.x_stride_pixel;
    p.first_column = b.rings ? 0 : -a.pad_left;  // a ring has its padding columns
    p.width = b.rings ? b.ring_columns : a.width;
    p.out_pitch = kPanel;
    p.out_width = a.out_width;
    p.kernel = k;
    p.stride = a.stride;
    p.dilation = a.dilation;
    p.runs = (hidden_end - hidden) / V::width;
    p.weights = a.packed + l.wd + hidden * k * k;
    p.bias = a.packed + l.b2 + hidden;
    p.out = d;
    p.clamp = a.activation;
    depthwise_rows(p);
  }

  void project(int64_t begin, int64_t end, const Pixels& pixels) {
    Output<Storage> output;
    output.y = static_cast<Element*>(a.y) + (item.image * a.out_height + begin) * a.out_width * a.dims.out_channels;
    output.y_stride = a.dims.out_channels;
    output.x = a.residual ? x + begin * a.x_stride_row : nullptr;  // TODO rows that do not adjoin
    output.x_stride = a.x_stride_pixel;
    output.channels = static_cast<int>(a.dims.out_channels);
    output.bounded = bounds(a.final_activation);
    output.lo = V::set(a.final_activation.lo);
    output.hi = V::set(a.final_activation.hi);
    multiply_into_y<Storage>(shapes, pixels, {a.packed + l.w2, a.packed + l.b3, l.out_padded / kTileRows}, memory, output);
    (void)end;
  }

  void clear_padding() {
    const int64_t left = a.pad_left * kPanel, right = (a.pad_left + a.width) * kPanel;
    const int64_t row_size = b.ring_columns * kPanel;
    const int64_t count = b.ring_count * b.ring_rows;
    for (int64_t row = 0; row < count; ++row) {
      float* start = ring + row * row_size;
      for (int64_t i = 0; i < left; ++i) start[i] = 0;
      for (int64_t i = right; i < row_size; ++i) start[i] = 0;
    }
  }

  void run() {
    if (b.rings) clear_padding();
    int64_t held = first_input_row(item.row_begin);  // input rows below are in the ring
    for (int64_t row = item.row_begin; row < item.row_end; row += plan.group_rows) {
      const int64_t row_end = min64(row + plan.group_rows, item.row_end);
      const int64_t begin = max64(held, first_input_row(row)), end = max64(end_input_row(row_end), begin);
      held = end;
      Pixels pixels = {};
      if (a.dims.expand && end > begin) pixels = prepare_rows(begin, end);
      float* chunk_ring = ring;
      const Pixels of_d = pixels_for(d_tiles, (row_end - row) * a.out_width, l.hidden_padded);
      for (int64_t hidden = 0; hidden < l.hidden_padded; hidden += plan.chunk) {
        const int64_t hidden_end = min64(hidden + plan.chunk, l.hidden_padded);
        if (pixels.count) expand(pixels, hidden, hidden_end, chunk_ring);
        float* panel_ring = chunk_ring;
        for (int64_t c = hidden; c < hidden_end; c += kPanel, panel_ring += b.ring_size) {
          const int64_t c_end = min64(c + kPanel, hidden_end);
          if (b.rings && !a.dims.expand) copy_to_ring(begin, end, c, c_end, panel_ring);
          depthwise(row, row_end, c, c_end, panel_ring);
          split_pixels<Own>(d, kPanel, 0, of_d.count, c_end - c, c / kPanel, of_d);
        }
        if (b.ring_count * kPanel > plan.chunk) chunk_ring = panel_ring;
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

static size_t conv_scratch_floats(const ConvArgs& a, const ConvLayout&) {
  return static_cast<size_t>((pixels_size(kRun, a.dims.in_channels) + memory_size(kRun)) / 4);
}

template <class Storage>
static void pointwise(const ConvArgs& a, const ConvLayout& l, const ConvItem& item, float* scratch) {
  using Element = typename Storage::Element;
  TileShapes shapes;
  char* memory_at = reinterpret_cast<char*>(scratch) + pixels_size(kRun, a.dims.in_channels);
  const Memory memory = {reinterpret_cast<uint16_t*>(memory_at), reinterpret_cast<float*>(memory_at + 2 * kStripTiles * 2)};
  const int64_t all = a.batch * a.out_height * a.out_width, end = min64(item.line_end * kPointwiseLine, all);
  for (int64_t pixel = item.line_begin * kPointwiseLine; pixel < end; pixel += kRun) {
    const int64_t count = min64(kRun, end - pixel);
    const Pixels pixels = pixels_for(reinterpret_cast<uint16_t*>(scratch), count, a.dims.in_channels);
    split_pixels<Storage>(static_cast<const Element*>(a.x) + pixel * a.x_stride_pixel, a.x_stride_pixel, 0, count,
                          a.dims.in_channels, 0, pixels);
    Output<Storage> output;
    output.y = static_cast<Element*>(a.y) + pixel * a.dims.out_channels;
    output.y_stride = a.dims.out_channels;
    output.x = nullptr;
    output.x_stride = 0;
    output.channels = static_cast<int>(a.dims.out_channels);
    output.bounded = bounds(a.activation);
    output.lo = V::set(a.activation.lo);
    output.hi = V::set(a.activation.hi);
    const int64_t column = item.panel_begin * l.panel;
    output.y += column * kTileRows;
    output.channels -= static_cast<int>(column * kTileRows);
    multiply_into_y<Storage>(shapes, pixels,
                             {a.packed + l.w + column * kTileRows * pixels.depth.padded(), a.packed + l.b + column * kTileRows,
                              min64(item.panel_end * l.panel, l.out_padded / kTileRows) - column},
                             memory, output);
  }
  shapes.release();
}

static void conv_work(const ConvArgs& a, const ConvLayout& l, const ConvItem& item, float* scratch) {
  with_storage(a.dtype, [&](auto storage) { pointwise<decltype(storage)>(a, l, item, scratch); });
}

}  // namespace

extern const TierKernels kernels_avx512bf16x3;
const TierKernels kernels_avx512bf16x3 = {
    V::width, V::kMaxPanel, 0,       scratch_floats, work,    nullptr, conv_scratch_floats, conv_work, nullptr, nullptr,
    nullptr,  nullptr,      nullptr, nullptr,        nullptr, nullptr, fma_chains,          nullptr,   3};

}  // namespace mbv2
