// Register tiles: the one matrix product under every kernel here, and the ways it reads and writes.
//
// Included by each tier file inside its own anonymous namespace, after it has defined the vector type V. Nothing here
// may have external linkage and nothing here may call an inline function of the standard library: such a function would
// be one weak symbol shared with files compiled for lesser CPUs, and the linker may keep our copy.
//
// V offers: Real (what is computed in), dtype (Real's name as storage), T (a register of them), width, the height
// limits of its register tiles (kMaxRows[panel]), load/store, broadcast, fma, clamp. The order of operands in V::clamp
// decides whether NaN survives: it must. Where V::kPairedPanel is not 0, also what Steps below takes for pairs.
//
// No #pragma once: included once a tier.

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 64")        // accumulators stay in registers only if every index is a constant
#define KEEP(pointer) asm("" : "+r"(pointer))  // where it is computed: the compiler sees no more how

using Real = V::Real;
constexpr int64_t kLine = 64 / sizeof(Real);  // numbers a cache line

static const float kInfinity = __builtin_inff();
static ALWAYS_INLINE bool bounds(Clamp c) { return c.lo > -kInfinity || c.hi < kInfinity; }
alignas(64) static const Real kZeros[V::kMaxPanel * V::width] = {};

static ALWAYS_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static ALWAYS_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static ALWAYS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Register tiles: rows x panel of accumulators -------------------------------------------------------------------

// The left matrix: rows `stride` numbers apart; a row is `segments` runs of `depth` numbers, `step` numbers apart (the
// rows of a k x k window; a plain matrix has one segment).
struct Rows {
  const Real* first;
  int64_t stride, depth;
  int64_t segments = 1, step = 0;
};

// What stores a tile's sums: epilogue.when_done() if there is one, else the epilogue. For what would take a register
// from the accumulators if it were held from the beginning, and be loaded again after each store if it were not.
template <class Epilogue>
ALWAYS_INLINE auto when_done(const Epilogue& epilogue, int) -> decltype(epilogue.when_done()) {
  return epilogue.when_done();
}
template <class Epilogue>
ALWAYS_INLINE const Epilogue& when_done(const Epilogue& epilogue, long) {
  return epilogue;
}
template <class Epilogue>
ALWAYS_INLINE auto done_of(const Epilogue& epilogue) {
  return when_done(epilogue, 0);
}

// A vector of weights: as many output channels as it has lanes, for one step of the depth; or, paired, half as many for
// two steps, so that 24 channels are three whole vectors. Pixels are broadcast in twos then, lanes 2s and 2s + 1 sum up
// one channel's even and odd steps, and the two come together when the tile is done. Which lanes a channel has is
// pack's and V's affair (`pack_pairs`): the results come in order.
template <bool Paired, class W = V>
struct Steps {
  static constexpr int kDepth = 1;
  static constexpr int results(int panel) { return panel; }  // vectors of results
  static ALWAYS_INLINE V::T broadcast(const Real* p) { return V::broadcast(p); }
  template <int Panel, class Epilogue>
  static ALWAYS_INLINE void start(const Epilogue& epilogue, V::T* acc) {
    UNROLL for (int j = 0; j < Panel; ++j) acc[j] = epilogue.start(j);
  }
  template <int Panel>
  static ALWAYS_INLINE V::T result(const V::T* acc, int j) {
    return acc[j];
  }
};
template <class W>
struct Steps<true, W> {
  static constexpr int kDepth = 2;
  static constexpr int results(int panel) { return (panel + 1) / 2; }
  static ALWAYS_INLINE V::T broadcast(const Real* p) { return W::broadcast_pair(p); }
  template <int Panel, class Epilogue>
  static ALWAYS_INLINE void start(const Epilogue& epilogue, V::T* acc) {
    UNROLL for (int j = 0; j < Panel; j += 2) {
      const V::T sums = epilogue.start(j / 2);
      if (j + 1 == Panel) {
        acc[j] = W::pairs(sums);
      } else {
        acc[j] = W::first_pairs(sums);
        acc[j + 1] = W::second_pairs(sums);
      }
    }
  }
  template <int Panel>
  static ALWAYS_INLINE V::T result(const V::T* acc, int j) {
    return 2 * j + 1 == Panel ? W::pair_sums(acc[2 * j]) : W::pair_sums(acc[2 * j], acc[2 * j + 1]);
  }
};

// Memory that will be wanted after a product, brought into L2 meanwhile. At batch 1 every weight is used once a call
// and comes from L3 or from memory.
struct Fetch {
  const void* next;
  int64_t bytes;
};
// A few cache lines of it at a time: more at once than a core can wait for hold up all else. So where arithmetic is
// fast (V::kFetchOften) some in each round of a tile's loop, elsewhere, where asking would cost more, in each tile.
struct FetchLines {
  const char *next, *end;
  int64_t lines;  // at a time
  ALWAYS_INLINE FetchLines(const Fetch& fetch, int64_t times)
      : next(static_cast<const char*>(fetch.next)), end(next + fetch.bytes), lines(ceil_div(fetch.bytes, 64 * times)) {}
  ALWAYS_INLINE void operator()() {
    if (next >= end) return;
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// b: [segments * depth][ldb], or paired [depth / 2][ldb] in one segment. epilogue: start(j), store(row, j, value), and
// skip(rows) to go on to the next tile.
template <bool Paired, int Height, int Panel, class Epilogue>
ALWAYS_INLINE void tile(const Rows& a, const Real* b, int64_t ldb, FetchLines& fetch, const Epilogue& epilogue) {
  using Step = Steps<Paired>;
  V::T acc[Height][Panel];
  Step::template start<Panel>(epilogue, acc[0]);
  UNROLL for (int i = 1; i < Height; ++i) UNROLL for (int j = 0; j < Panel; ++j) acc[i][j] = acc[0][j];
  const int64_t lda = a.stride, depth = a.depth / Step::kDepth, to_next = a.step - a.depth;
  // One pointer for every three rows: x86 addresses the other two as base + lda and base + 2 * lda, which keeps a tall
  // tile's row addresses within the general registers.
  constexpr int kBases = (Height + 2) / 3;
  const Real* base[kBases];
  UNROLL for (int i = 0; i < kBases; ++i) base[i] = a.first + 3 * i * lda;
  for (int64_t segment = a.segments; segment > 0; --segment) {
    int64_t k = depth;
    for (; k >= 4; k -= 4) {
      if constexpr (V::kFetchOften) fetch();
      UNROLL for (int u = 0; u < 4; ++u) {
        V::T w[Panel];
        UNROLL for (int j = 0; j < Panel; ++j) w[j] = V::load(b + u * ldb + j * V::width);
        UNROLL for (int i = 0; i < Height; ++i) {
          const V::T p = Step::broadcast(base[i / 3] + (i % 3) * lda + u * Step::kDepth);
          UNROLL for (int j = 0; j < Panel; ++j) acc[i][j] = V::fma(p, w[j], acc[i][j]);
        }
      }
      b += 4 * ldb;
      UNROLL for (int i = 0; i < kBases; ++i) base[i] += 4 * Step::kDepth;
    }
    for (; k > 0; --k) {
      V::T w[Panel];
      UNROLL for (int j = 0; j < Panel; ++j) w[j] = V::load(b + j * V::width);
      UNROLL for (int i = 0; i < Height; ++i) {
        const V::T p = Step::broadcast(base[i / 3] + (i % 3) * lda);
        UNROLL for (int j = 0; j < Panel; ++j) acc[i][j] = V::fma(p, w[j], acc[i][j]);
      }
      b += ldb;
      UNROLL for (int i = 0; i < kBases; ++i) base[i] += Step::kDepth;
    }
    UNROLL for (int i = 0; i < kBases; ++i) base[i] += to_next;
  }
  const auto& done = when_done(epilogue, 0);
  constexpr int kResults = Step::results(Panel);
  UNROLL for (int i = 0; i < Height; ++i) UNROLL for (int j = 0; j < kResults; ++j) {
    done.store(i, j, Step::template result<Panel>(acc[i], j));
  }
}

// The epilogues of a tile's parts, where V::kPart bounds how many products are added up in one go: short sums round off
// less. The parts are added up in turn, in memory: all registers are the accumulators'.
template <int Panel, class Epilogue>
struct Part {
  const Epilogue& epilogue;
  bool first;
  Real* totals;
  ALWAYS_INLINE V::T start(int j) const { return first ? epilogue.start(j) : V::set(0); }
  ALWAYS_INLINE void store(int i, int j, V::T v) const {
    Real* total = totals + (i * Panel + j) * V::width;
    V::store(total, first ? v : V::add(v, V::load(total)));
  }
};
template <int Panel, class Epilogue>
struct LastPart {
  const Epilogue& epilogue;
  const Real* totals;
  template <class Wrapped>
  struct Done {
    Wrapped done;
    const Real* totals;
    ALWAYS_INLINE void store(int i, int j, V::T v) const {
      done.store(i, j, V::add(v, V::load(totals + (i * Panel + j) * V::width)));
    }
  };
  ALWAYS_INLINE V::T start(int) const { return V::set(0); }
  ALWAYS_INLINE auto when_done() const { return with_totals(done_of(epilogue)); }
  template <class Wrapped>
  ALWAYS_INLINE Done<Wrapped> with_totals(const Wrapped& done) const {
    return {done, totals};
  }
};

// tile(), in parts of whole rounds of its loop, as equal as can be.
template <bool Paired, int Height, int Panel, class Epilogue>
ALWAYS_INLINE void tile_in_parts(const Rows& a, const Real* b, int64_t ldb, FetchLines& fetch,
                                 const Epilogue& epilogue) {
  if (V::kPart == 0 || (a.segments == 1 && a.depth <= V::kPart))
    return tile<Paired, Height, Panel>(a, b, ldb, fetch, epilogue);
  if constexpr (V::kPart > 0) {
    constexpr int kDepth = Steps<Paired>::kDepth;
    alignas(64) Real totals[Height * Panel * V::width];
    const int64_t round = 4 * kDepth, most = ceil_div(ceil_div(a.depth, ceil_div(a.depth, V::kPart)), round) * round;
    Rows part = a;
    part.segments = 1;
    bool first = true;
    for (int64_t segment = 1;; ++segment) {
      part.first = a.first + (segment - 1) * a.step;
      for (int64_t rest = a.depth; rest > 0;
           rest -= most, part.first += most, b += part.depth / kDepth * ldb, first = false) {
        part.depth = min64(rest, most);
        if (segment == a.segments && rest <= most) {
          return tile<Paired, Height, Panel>(part, b, ldb, fetch, LastPart<Panel, Epilogue>{epilogue, totals});
        }
        tile<Paired, Height, Panel>(part, b, ldb, fetch, Part<Panel, Epilogue>{epilogue, first, totals});
      }
    }
  }
}

// `count` tiles of the same height below each other, from row `row` on. Where the depth is short (16 in MobileNetV2's
// second block) what a tile does besides multiplying counts: few calls, and pointers that step instead of being
// computed anew.
template <bool Paired, int Height, int Panel, class Epilogue>
NOINLINE void tiles(Rows a, int64_t row, int64_t count, const Real* b, int64_t ldb, FetchLines& fetch_lines,
                    Epilogue epilogue) {
  FetchLines fetch = fetch_lines;
  a.first += row * a.stride;
  epilogue.skip(row);
  for (; count > 0; --count) {
    if constexpr (!V::kFetchOften) fetch();
    tile_in_parts<Paired, Height, Panel>(a, b, ldb, fetch, epilogue);
    a.first += Height * a.stride;
    epilogue.skip(Height);
  }
  fetch_lines = fetch;
}

template <bool Paired, int Panel, int Height, class Epilogue>
ALWAYS_INLINE void tiles_of_height(int64_t height, const Rows& a, int64_t row, int64_t count, const Real* b,
                                   int64_t ldb, FetchLines& fetch, const Epilogue& epilogue) {
  if constexpr (Height >= 1) {
    if (height == Height)
      tiles<Paired, Height, Panel, Epilogue>(a, row, count, b, ldb, fetch, epilogue);
    else
      tiles_of_height<Paired, Panel, Height - 1, Epilogue>(height, a, row, count, b, ldb, fetch, epilogue);
  }
}

// All `rows` rows against one panel, in tiles as equal as can be: 14 rows are 5 + 5 + 4, not 6 + 6 + 2.
template <bool Paired, int Panel, class Epilogue>
ALWAYS_INLINE void panel_product(const Rows& a, int64_t rows, const Real* b, int64_t ldb, const Fetch& fetch,
                                 const Epilogue& epilogue) {
  const int64_t count = (rows + V::kMaxRows[Panel] - 1) / V::kMaxRows[Panel];
  if (count == 0) return;
  const int64_t low = rows / count, tall = rows % count;
  constexpr int64_t kRound = 4 * Steps<Paired>::kDepth;
  const int64_t rounds = V::kFetchOften ? max64(a.segments * (a.depth / kRound), 1) : 1;
  FetchLines lines(fetch, count * rounds);
  if (tall) tiles_of_height<Paired, Panel, V::kMaxRows[Panel]>(low + 1, a, 0, tall, b, ldb, lines, epilogue);
  tiles_of_height<Paired, Panel, V::kMaxRows[Panel]>(low, a, tall * (low + 1), count - tall, b, ldb, lines, epilogue);
}

// The product with a panel of `width` vectors: b is [segments * depth][width][V::width], or paired [depth / 2].
template <bool Paired, int Panel, class Epilogue>
ALWAYS_INLINE void product_of_width(int64_t width, const Rows& a, int64_t rows, const Real* b, const Fetch& fetch,
                                    const Epilogue& epilogue) {
  if constexpr (Panel >= 1) {
    if (width == Panel)
      panel_product<Paired, Panel, Epilogue>(a, rows, b, Panel * V::width, fetch, epilogue);
    else
      product_of_width<Paired, Panel - 1, Epilogue>(width, a, rows, b, fetch, epilogue);
  }
}
template <class Epilogue>
NOINLINE void product(int64_t width, const Rows& a, int64_t rows, const Real* b, const Epilogue& epilogue,
                      const Fetch& fetch = {}) {
  product_of_width<false, V::kMaxPanel, Epilogue>(width, a, rows, b, fetch, epilogue);
}
template <class Epilogue>
NOINLINE void paired_product(int64_t width, const Rows& a, int64_t rows, const Real* b, const Epilogue& epilogue,
                             const Fetch& fetch = {}) {
  product_of_width<true, V::kPairedPanel, Epilogue>(width, a, rows, b, fetch, epilogue);
}
// Whichever of the two b is packed for: `pairs` vectors, or 0.
template <class Epilogue>
ALWAYS_INLINE void product_or_paired(int64_t pairs, int64_t width, const Rows& a, int64_t rows, const Real* b,
                                     const Epilogue& epilogue, const Fetch& fetch = {}) {
  if (pairs)
    paired_product(pairs, a, rows, b, epilogue, fetch);
  else
    product(width, a, rows, b, epilogue, fetch);
}

// As many floats as hold so many numbers.
static ALWAYS_INLINE size_t floats_for(int64_t numbers) {
  return static_cast<size_t>(ceil_div(numbers * static_cast<int64_t>(sizeof(Real)), sizeof(float)));
}

// ---- Storage types --------------------------------------------------------------------------------------------------

// What is stored as it is computed with.
struct Own {
  static constexpr bool kOwn = true;
  using Element = Real;
  static ALWAYS_INLINE V::T load(const Real* p) { return V::load(p); }
  static ALWAYS_INLINE Real load_one(const Real* p) { return *p; }
  static ALWAYS_INLINE V::T load(const Real* p, int n) { return V::load(p, n); }
  static ALWAYS_INLINE void store(Real* p, V::T v) { V::store(p, v); }
  static ALWAYS_INLINE void store(Real* p, V::T v, int n) { V::store(p, v, n); }
};

// ---- Epilogues ----------------------------------------------------------------------------------

// What a product's sums begin with (the bias, or zeros), and what is added to them in the end: the sums of the parts of
// the depth that came before. Adding whole parts, not going on from them, keeps the rounding error of long sums down.
struct Sums {
  const Real* start_;
  const Real* before;  // null: this is the first part
  int64_t stride;
  ALWAYS_INLINE V::T start(int j) const { return V::load(start_ + j * V::width); }
  ALWAYS_INLINE V::T total(int64_t row, int j, V::T v) const {
    return before ? V::add(v, V::load(before + row * stride + j * V::width)) : v;
  }
  ALWAYS_INLINE void skip(int64_t rows) {
    if (before) before += rows * stride;
  }
};

struct KeepSum : Sums {
  Real* out;
  ALWAYS_INLINE void store(int64_t row, int j, V::T v) const {
    V::store(out + row * stride + j * V::width, total(row, j, v));
  }
  ALWAYS_INLINE void skip(int64_t rows) {
    Sums::skip(rows);
    out += rows * stride;
  }
};

// Where and how finished sums go to y: `channels` of them are real, the rest of the panel is padding.
template <class Storage>
struct Output {
  typename Storage::Element* y;
  int64_t y_stride;
  const typename Storage::Element* x;  // the residual, or null
  int64_t x_stride;
  int channels;
  bool bounded;  // by a final activation
  V::T lo, hi;
  ALWAYS_INLINE void write(int64_t row, int j, V::T v) const {
    if (bounded) v = V::clamp(v, lo, hi);
    const int rest = channels - j * V::width;
    typename Storage::Element* to = y + row * y_stride + j * V::width;
    if (rest >= V::width) {
      if (x) v = V::add(v, Storage::load(x + row * x_stride + j * V::width));
      Storage::store(to, v);
    } else {
      if (x) v = V::add(v, Storage::load(x + row * x_stride + j * V::width, rest));
      Storage::store(to, v, rest);
    }
  }
};

template <class Storage>
struct WriteOutput : Sums {
  Output<Storage> output;
  ALWAYS_INLINE void store(int64_t row, int j, V::T v) const { output.write(row, j, total(row, j, v)); }
  ALWAYS_INLINE void skip(int64_t rows) {
    Sums::skip(rows);
    output.y += rows * output.y_stride;
    if (output.x) output.x += rows * output.x_stride;
  }
};

// Pixels of x as Real, each padded with zeros to `pitch` numbers; pitch 0: not padded, nothing is written behind the
// last.
template <class Storage>
static void widen_row(const typename Storage::Element* x, int64_t pixel_stride, int64_t pixels, int64_t channels,
                      int64_t pitch, Real* out) {
  for (int64_t p = 0; p < pixels; ++p, x += pixel_stride, out += pitch) {
    int64_t c = 0;
    for (; c + V::width <= channels; c += V::width) V::store(out + c, Storage::load(x + c));
    const int rest = static_cast<int>(channels - c);
    if (rest == 0) continue;
    if (pitch)
      V::store(out + c, Storage::load(x + c, rest));
    else
      V::store(out + c, Storage::load(x + c, rest), rest);
  }
}

// kFmaChains independent accumulators: enough to hide the latency of fused multiply-adds on any port count so far. The
// scale is so small that the values stay what they are: neither denormals nor infinities, which cost extra somewhere.
static float fma_chains(int64_t iterations) {
  V::T acc[kFmaChains];
  volatile float small =
      1e-9f;  // a compiler that knows both factors sees that nothing changes, and leaves the loop out
  const V::T scale = V::set(small);
  UNROLL for (int i = 0; i < kFmaChains; ++i) acc[i] = V::set(static_cast<float>(i + 1));
  for (int64_t n = 0; n < iterations; ++n) {
    UNROLL for (int i = 0; i < kFmaChains; ++i) acc[i] = V::fma(scale, acc[i], acc[i]);
  }
  V::T sum = acc[0];
  for (int i = 1; i < kFmaChains; ++i) sum = V::add(sum, acc[i]);
  Real lanes[V::width];
  V::store(lanes, sum);
  return static_cast<float>(lanes[0]);
}
