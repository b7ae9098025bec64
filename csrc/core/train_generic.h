// A training step's phases over the register tiles of tile_generic.h, which says what may not be done here.
//
// Data flow of one item of the phases with hidden channels:
//
//   for each part of an image
//     gz = a3 * g3 + b3 * z + c3                          backward; all of the part, [pixel][out padded], L2
//     for each chunk of hidden channels
//       for each group of rows
//         for each panel of the chunk
//           expand     x rows -> ring of e                [pixel][panel], L1
//           depthwise  ring of e -> d                     or d is read
//           project             d -> h
//           project_backward    d -> h, g2;  gw2 += gz h^T
//           depthwise_backward  d -> ring of gd;  ring of gd, e -> g1, gwd;  t += g1 (x - shift)^T
//         project             z += w2 h                   over the chunk's panels
//         depthwise_backward  g += w1^T g1
//
// A panel's pixels adjoin, whatever the chunk's width: the depthwise passes read each row several times, and a few rows
// of one panel fit in L1.
//
// No #pragma once: included once a tier.

// ---- Outer products -------------------------------------------------------------------------------------------------

// sums[i][j] += sum_p a[p][i] * b[p][j]: a tile of a product whose depth are pixels; `first`: nothing is there to be
// added to. Pixels are lda and ldb floats apart. One pixel a turn: unrolled, GCC 12 runs out of registers.
template <int Height, int Panel>
NOINLINE void outer_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t pixels, float* sums,
                         int64_t pitch, bool first) {
  V::T acc[Height][Panel];
  UNROLL for (int i = 0; i < Height; ++i) UNROLL for (int j = 0; j < Panel; ++j) acc[i][j] = V::set(0);
  for (; pixels > 0; --pixels, a += lda, b += ldb) {
    V::T w[Panel];
    UNROLL for (int j = 0; j < Panel; ++j) w[j] = V::load(b + j * V::width);
    UNROLL for (int i = 0; i < Height; ++i) {
      const V::T p = V::broadcast(a + i);
      UNROLL for (int j = 0; j < Panel; ++j) acc[i][j] = V::fma(p, w[j], acc[i][j]);
    }
  }
  UNROLL for (int i = 0; i < Height; ++i) UNROLL for (int j = 0; j < Panel; ++j) {
    float* to = sums + i * pitch + j * V::width;
    V::store(to, first ? acc[i][j] : V::add(V::load(to), acc[i][j]));
  }
}

template <int Panel, int Height>
ALWAYS_INLINE void outer_tile_of_height(int64_t height, const float* a, int64_t lda, const float* b, int64_t ldb,
                                        int64_t pixels, float* sums, int64_t pitch, bool first) {
  if constexpr (Height >= 1) {
    if (height == Height)
      outer_tile<Height, Panel>(a, lda, b, ldb, pixels, sums, pitch, first);
    else
      outer_tile_of_height<Panel, Height - 1>(height, a, lda, b, ldb, pixels, sums, pitch, first);
  }
}

// `rows` channels of a against `width` vectors of b, in tiles as equal as can be.
template <int Panel>
ALWAYS_INLINE void outer_product_of_width(int64_t width, const float* a, int64_t lda, int64_t rows, const float* b,
                                          int64_t ldb, int64_t pixels, float* sums, int64_t pitch, bool first) {
  if constexpr (Panel >= 1) {
    if (width != Panel)
      return outer_product_of_width<Panel - 1>(width, a, lda, rows, b, ldb, pixels, sums, pitch, first);
    const int64_t count = ceil_div(rows, V::kMaxRows[Panel]);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = rows * i / count, end = rows * (i + 1) / count;
      outer_tile_of_height<Panel, V::kMaxRows[Panel]>(end - begin, a + begin, lda, b, ldb, pixels, sums + begin * pitch,
                                                      pitch, first);
    }
  }
}
NOINLINE void outer_product(int64_t width, const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb,
                            int64_t pixels, float* sums, int64_t pitch, bool first = false) {
  outer_product_of_width<V::kMaxPanel>(width, a, lda, rows, b, ldb, pixels, sums, pitch, first);
}

// ---- The products that train_norm.cpp takes -------------------------------------------------------------------------

template <int Height, class T>
ALWAYS_INLINE void strip_tile(const StripProduct<T>& m, int64_t row) {
  using R = typename Register<T>::Type;
  R acc[Height][2] = {};
  const T* a = m.a + row * m.a_row;
  const R* b = reinterpret_cast<const R*>(m.b);
  for (int64_t k = m.depth; k > 0; --k, a += m.a_step, b += 2)
    UNROLL for (int i = 0; i < Height; ++i) UNROLL for (int j = 0; j < 2; ++j) acc[i][j] += a[i * m.a_row] * b[j];
  UNROLL for (int i = 0; i < Height; ++i)
      UNROLL for (int j = 0; j < 2; ++j) reinterpret_cast<R*>(m.out + (row + i) * m.out_row)[j] = acc[i][j];
}

template <class T>
static void multiply(const StripProduct<T>& m) {
  constexpr int kHeight = V::kMaxRows[2];
  int64_t row = 0;
  for (; row + kHeight <= m.rows; row += kHeight) strip_tile<kHeight>(m, row);
  for (; row + 2 <= m.rows; row += 2) strip_tile<2>(m, row);
  if (row < m.rows) strip_tile<1>(m, row);
}

// ---- Depthwise, backward --------------------------------------------------------------------------------------------

// The values between which an activation lets gradients through. An open side is NaN: no comparison with it is true,
// so that a gradient also gets through at infinity.
struct Open {
  V::T lo, hi;
  explicit Open(Clamp c)
      : lo(V::set(c.lo > -kInfinity ? c.lo : __builtin_nanf(""))),
        hi(V::set(c.hi < kInfinity ? c.hi : __builtin_nanf(""))) {}
  ALWAYS_INLINE V::T keep(V::T gradient, V::T value) const { return V::keep(gradient, value, lo, hi); }
};

// A tap of the kernel that some columns of e have a part in: gd's pixel under the first of these columns.
struct Tap {
  const float* g;
  int64_t weight;  // offset of its weight within a vector's k * k
};

// Columns of a row of e that are `stride` apart, so that all have the same taps, and gd's pixels under them adjoin.
struct DepthwiseBackward {
  const Tap* taps;
  int64_t tap_count;
  int64_t g_pitch;
  const float* e;
  int64_t e_pitch;
  float* out;  // g1
  int64_t out_pitch;
  int64_t vectors, window;    // of channels; floats of a vector's k * k weights
  const float* weights;       // [vector][k*k][V::width]
  float *weight_sums, *sums;  // the same, [vector][V::width]: gwd, sum g1
  Open open;
};

// A run's pixels, `pitch` floats apart; three share a pointer, as in tile().
template <int Count>
struct Run {
  static constexpr int kBases = (Count + 2) / 3;
  const float* base[kBases];
  int64_t pitch;
  ALWAYS_INLINE Run(const float* first, int64_t pitch_) : pitch(pitch_) {
    base[0] = first;
    UNROLL for (int i = 1; i < kBases; ++i) {
      KEEP(base[i - 1]);  // as in depthwise_patch()
      base[i] = base[i - 1] + 3 * pitch;
    }
  }
  ALWAYS_INLINE V::T load(int u) const { return V::load(base[u / 3] + (u % 3) * pitch); }
};

template <int Count>
ALWAYS_INLINE void depthwise_backward_run(const DepthwiseBackward& r, const Open& open, int64_t column,
                                          int64_t vector) {
  V::T acc[Count], e[Count];
  const Run<Count> values(r.e + column * r.e_pitch + vector * V::width, r.e_pitch);
  UNROLL for (int u = 0; u < Count; ++u) {
    e[u] = values.load(u);
    acc[u] = V::set(0);
  }
  const float* weights = r.weights + vector * r.window;
  float* weight_sums = r.weight_sums + vector * r.window;
  const int64_t at = column * r.g_pitch + vector * V::width, pitch = r.g_pitch;
  const Tap* const end = r.taps + r.tap_count;
  for (const Tap* tap = r.taps; tap < end; ++tap) {
    const V::T w = V::load(weights + tap->weight);
    // Two sums: the multiply-adds into one would wait for each other.
    V::T sum = V::load(weight_sums + tap->weight), odd = V::set(0);
    const Run<Count> gradients(tap->g + at, pitch);
    UNROLL for (int u = 0; u < Count; ++u) {
      const V::T g = gradients.load(u);
      acc[u] = V::fma(g, w, acc[u]);
      if (u % 2)
        odd = V::fma(g, e[u], odd);
      else
        sum = V::fma(g, e[u], sum);
    }
    V::store(weight_sums + tap->weight, V::add(sum, odd));
  }
  V::T sum = V::load(r.sums + vector * V::width);
  float* out = r.out + column * r.out_pitch + vector * V::width;
  UNROLL for (int u = 0; u < Count; ++u) {
    const V::T g = open.keep(acc[u], e[u]);
    sum = V::add(sum, g);
    V::store(out + u * r.out_pitch, g);
  }
  V::store(r.sums + vector * V::width, sum);
}

template <int Count>
ALWAYS_INLINE void depthwise_backward_runs_of(int64_t run, const DepthwiseBackward& r, const Open& open, int64_t column,
                                              int64_t count) {
  if constexpr (Count >= 1) {
    if (run == Count) {
      for (; count > 0; --count, column += Count)
        for (int64_t v = 0; v < r.vectors; ++v) depthwise_backward_run<Count>(r, open, column, v);
    } else {
      depthwise_backward_runs_of<Count - 1>(run, r, open, column, count);
    }
  }
}

// All `columns`, in runs as equal as can be.
NOINLINE void depthwise_backward_columns(const DepthwiseBackward& r, int64_t columns) {
  const int64_t count = ceil_div(columns, V::kMaxBackwardRun);
  if (count == 0) return;
  const int64_t low = columns / count, longer = columns % count;
  const Open open = r.open;
  if (longer) depthwise_backward_runs_of<V::kMaxBackwardRun>(low + 1, r, open, 0, longer);
  depthwise_backward_runs_of<V::kMaxBackwardRun>(low, r, open, longer * (low + 1), count - longer);
}

// A row of e below a 3x3 kernel of stride 1 or 2, the cases that count: the taps are known when this is compiled, a
// pixel of gd is loaded once for all of them, for g1 and gwd alike, and the sums of gwd stay in registers for the
// length of the row as far as there are registers.
struct DepthwiseBackward3x3 {
  const float* g[3];   // rows of gd: the pixel that the first column's last tap reads
  int weights_row[3];  // the kernel's row that each is under
  const float* e;
  int64_t e_pitch;
  float* out;     // g1
  int64_t pitch;  // of g and out
  int64_t vectors;
  const float* weights;       // [vector][9][V::width]
  float *weight_sums, *sums;  // the same, [vector][V::width]: gwd, sum g1
  Open open;
};

// Sums of a vector of channels over a row.
template <int Rows>
struct Sums3x3 {
  V::T gwd[Rows][3], g1;
  ALWAYS_INLINE Sums3x3() : g1(V::set(0)) {
    UNROLL for (int y = 0; y < Rows; ++y) UNROLL for (int dx = 0; dx < 3; ++dx) gwd[y][dx] = V::set(0);
  }
};

// `count` runs of Count columns, from the `column`-th on, of one vector of channels.
//
// Of stride 1 a column is under the kernel's three, that is gd's pixels 0, 1, 2 after its first. Of stride 2 columns
// come in pairs: the first is under the middle of the kernel, at gd's pixel 0, the second under both its sides, at 0
// and 1.
template <int Stride, int Rows, int Count>
ALWAYS_INLINE void backward_3x3_runs(const DepthwiseBackward3x3& r, const Open& open, int64_t column, int64_t count,
                                     int64_t vector, Sums3x3<Rows>& sums) {
  constexpr int kPixels = Stride == 1 ? Count + 2 : Count / 2 + 1;
  const int64_t pitch = r.pitch, e_pitch = r.e_pitch, at = vector * V::width;
  const float *g[Rows], *w[Rows], *e = r.e + column * e_pitch + at;
  float* out = r.out + column * pitch + at;
  UNROLL for (int y = 0; y < Rows; ++y) {
    g[y] = r.g[y] + column / Stride * pitch + at;
    w[y] = r.weights + (vector * 9 + r.weights_row[y] * 3) * V::width;
  }
  for (; count > 0; --count, e += Count * e_pitch, out += Count * pitch) {
    V::T acc[Count], values[Count];
    UNROLL for (int c = 0; c < Count; ++c) {
      values[c] = V::load(e + c * e_pitch);
      acc[c] = V::set(0);
    }
    UNROLL for (int y = 0; y < Rows; ++y) {
      V::T weights[3];
      UNROLL for (int dx = 0; dx < 3; ++dx) weights[dx] = V::load(w[y] + dx * V::width);
      // every third pixel in turn, as in depthwise_patch(): the next addition to a sum does not wait for the last
      UNROLL for (int first = 0; first < 3; ++first) UNROLL for (int p = first; p < kPixels; p += 3) {
        const V::T pixel = V::load(g[y] + p * pitch);
        UNROLL for (int dx = 2; dx >= 0; --dx) {
          // the column that this pixel is under tap dx of
          const int c = Stride == 1 ? p - (2 - dx) : 2 * p + dx - 1;
          if (c < 0 || c >= Count) continue;
          acc[c] = V::fma(pixel, weights[dx], acc[c]);
          sums.gwd[y][dx] = V::fma(pixel, values[c], sums.gwd[y][dx]);
        }
      }
      g[y] += Count / Stride * pitch;
    }
    UNROLL for (int c = 0; c < Count; ++c) {
      acc[c] = open.keep(acc[c], values[c]);
      V::store(out + c * pitch, acc[c]);
    }
    UNROLL for (int half = 1; half < Count; half *= 2) UNROLL for (int c = 0; c + half < Count; c += 2 * half) acc[c] =
        V::add(acc[c], acc[c + half]);
    sums.g1 = V::add(sums.g1, acc[0]);
  }
}

// Columns of a run: besides the nine sums of gwd each takes one of g1 and one of e. AVX-512 has registers to spare then
// (6 columns were no faster); AVX2 keeps some of gwd's sums in L1, and is as fast as with a pass for gwd alone.
constexpr int kBackwardRun = 4;

template <int Stride, int Rows, int Count>
ALWAYS_INLINE void backward_3x3_runs_of(int64_t run, const DepthwiseBackward3x3& r, const Open& open, int64_t column,
                                        int64_t count, int64_t vector, Sums3x3<Rows>& sums) {
  if constexpr (Count >= 1) {
    if (run == Count)
      backward_3x3_runs<Stride, Rows, Count>(r, open, column, count, vector, sums);
    else
      backward_3x3_runs_of<Stride, Rows, Count - Stride>(run, r, open, column, count, vector, sums);
  }
}

// `columns` of them, pairs if Stride is 2.
template <int Stride, int Rows>
NOINLINE void backward_3x3(const DepthwiseBackward3x3& r, int64_t columns) {
  const int64_t units = columns / Stride, count = ceil_div(columns, kBackwardRun), low = units / count * Stride;
  const int64_t longer = units % count;
  const Open open = r.open;
  for (int64_t v = 0; v < r.vectors; ++v) {
    Sums3x3<Rows> sums;
    if (longer) backward_3x3_runs_of<Stride, Rows, kBackwardRun>(low + Stride, r, open, 0, longer, v, sums);
    backward_3x3_runs_of<Stride, Rows, kBackwardRun>(low, r, open, longer * (low + Stride), count - longer, v, sums);
    float* to = r.sums + v * V::width;
    V::store(to, V::add(V::load(to), sums.g1));
    UNROLL for (int y = 0; y < Rows; ++y) UNROLL for (int dx = 0; dx < 3; ++dx) {
      float* tap = r.weight_sums + (v * 9 + r.weights_row[y] * 3 + dx) * V::width;
      V::store(tap, V::add(V::load(tap), sums.gwd[y][dx]));
    }
  }
}

// ---- Passes over pixels ---------------------------------------------------------------------------------------------

// One vector of a pixel's channels, of which `count` exist.
template <class Storage>
struct Lanes {
  using Element = typename Storage::Element;
  int count;
  explicit Lanes(int64_t channels) : count(static_cast<int>(min64(channels, V::width))) {}
  ALWAYS_INLINE V::T load(const Element* p) const {
    return count == V::width ? Storage::load(p) : Storage::load(p, count);
  }
  ALWAYS_INLINE void store(Element* p, V::T v) const {
    count == V::width ? Storage::store(p, v) : Storage::store(p, v, count);
  }
};

// In halves, as many lanes as a register has doubles. GCC 12 would convert and add them one by one.
static ALWAYS_INLINE void add_lanes(double* sums, V::T v) {
  float lanes[V::width];
  V::store(lanes, v);
  UNROLL for (int half = 0; half < 2; ++half, sums += kDoubles)
      put_row(sums, widened(sums) + widened(lanes + half * kDoubles));
}

// A pass takes a pixel's neighbouring vectors of channels together, up to a panel of them: memory is read and written
// in runs of whole cache lines. Vector by vector it gave half the bandwidth where the lines come from memory.
template <int Count>
struct Vectors {
  static constexpr int count = Count;
};
// Calls body(Vectors<vectors>()).
template <int Most = V::kMaxPanel, class Body>
ALWAYS_INLINE void with_vectors(int64_t vectors, const Body& body) {
  if constexpr (Most >= 1) {
    if (vectors == Most)
      body(Vectors<Most>());
    else
      with_vectors<Most - 1>(vectors, body);
  }
}
// Calls body(Vectors<n>(), the first channel) for all of a pixel's channels, panel by panel.
template <class Body>
ALWAYS_INLINE void for_panels(int64_t channels, const Body& body) {
  constexpr int64_t kPanel = V::kMaxPanel * V::width;
  for (int64_t c = 0; c < channels; c += kPanel)
    with_vectors(ceil_div(min64(kPanel, channels - c), V::width),
                 [&](auto vectors) __attribute__((always_inline)) { body(vectors, c); });
}

// The same for a panel's vectors: none but the last can be partly there.
template <class Storage, int Count>
struct PanelLanes {
  using Element = typename Storage::Element;
  const Lanes<Storage> last;
  explicit PanelLanes(int64_t channels) : last(channels - (Count - 1) * V::width) {}
  ALWAYS_INLINE V::T load(const Element* p, int v) const {
    return v + 1 < Count ? Storage::load(p + v * V::width) : last.load(p + v * V::width);
  }
  ALWAYS_INLINE void store(Element* p, int v, V::T value) const {
    v + 1 < Count ? Storage::store(p + v * V::width, value) : last.store(p + v * V::width, value);
  }
};

// A panel's values from a section of vectors [channels padded].
template <int Count>
struct Values {
  V::T of[Count];
  explicit ALWAYS_INLINE Values(const float* from) {
    UNROLL for (int v = 0; v < Count; ++v) of[v] = V::load(from + v * V::width);
  }
  ALWAYS_INLINE V::T operator[](int v) const { return of[v]; }
};

// Sums over pixels, of a panel's vectors, in several parts: one alone would wait for its last addition at every pixel.
template <int Count>
struct PixelSums {
  static constexpr int kParts = Count == 1 ? 4 : 2;
  V::T parts[kParts][Count];
  ALWAYS_INLINE PixelSums() {
    UNROLL for (int i = 0; i < kParts; ++i) UNROLL for (int v = 0; v < Count; ++v) parts[i][v] = V::set(0);
  }
  ALWAYS_INLINE void add(int part, int v, V::T value) { parts[part][v] = V::add(parts[part][v], value); }
  ALWAYS_INLINE void add_product(int part, int v, V::T a, V::T b) { parts[part][v] = V::fma(a, b, parts[part][v]); }
  ALWAYS_INLINE void add_to(double* sums) const {
    UNROLL for (int v = 0; v < Count; ++v) {
      V::T total = V::add(parts[0][v], parts[1][v]);
      UNROLL for (int i = 2; i < kParts; i += 2) total = V::add(total, V::add(parts[i][v], parts[i + 1][v]));
      add_lanes(sums + v * V::width, total);
    }
  }
};

// Calls body(pixel, part of its sums) for all pixels.
template <int Count, class Body>
ALWAYS_INLINE void for_pixels(Vectors<Count>, int64_t pixels, const Body& body) {
  constexpr int kParts = PixelSums<Count>::kParts;
  int64_t p = 0;
  for (; p + kParts <= pixels; p += kParts) UNROLL for (int i = 0; i < kParts; ++i) body(p + i, i);
  for (; p < pixels; ++p) body(p, 0);
}

// Calls body(first pixel, pixels) for runs of pixels, short enough for sums in fp32 that gradients are differences of.
template <class Body>
ALWAYS_INLINE void for_runs(int64_t pixels, const Body& body) {
  constexpr int64_t kRun = 16;
  for (int64_t p = 0; p < pixels; p += kRun) body(p, min64(kRun, pixels - p));
}

// The mean of some pixels' values, pitch floats apart: close enough to the mean of all to count from.
NOINLINE V::T mean_of(const float* from, int64_t pitch, int64_t pixels) {
  V::T sum = V::set(0);
  for (int64_t p = 0; p < pixels; ++p) sum = V::add(sum, V::load(from + p * pitch));
  return V::fma(sum, V::set(1.0f / static_cast<float>(pixels)), V::set(0));
}

// Sums of values and of their squares, counted from `shift`, near their mean: so the squares' sum, and the variance
// that is computed from it, stay accurate where the mean is large against the deviation.
template <int Count>
struct Moments {
  const Values<Count> shift;
  PixelSums<Count> sum, squares;
  explicit ALWAYS_INLINE Moments(const float* shift_) : shift(shift_) {}
  ALWAYS_INLINE void add(int part, int v, V::T value) {
    const V::T shifted = V::sub(value, shift[v]);
    sum.add(part, v, shifted);
    squares.add_product(part, v, shifted, shifted);
  }
};

// What sums of `pixels` shifted values would have been.
static void unshift_moments(const float* shift, int64_t channels, double pixels, double* sum, double* squares) {
  for (int64_t c = 0; c < channels; ++c) {
    const double s = static_cast<double>(shift[c]);
    squares[c] += s * (2 * sum[c] + pixels * s);
    sum[c] += pixels * s;
  }
}

// ExpandEpilogue begins with the bias. As that takes the mean away, a sum may be several times as large on its way as
// it is in the end, and each step rounds off accordingly. In training the bias comes last: e is half as far off, and so
// is all that follows from it, down to the gradients.
struct TrainExpandEpilogue {
  ExpandEpilogue to;
  struct Done {
    ExpandEpilogue::Done to;
    const float* bias;
    ALWAYS_INLINE void store(int64_t row, int j, V::T v) const {
      to.store(row, j, V::add(v, V::load(bias + j * V::width)));
    }
  };
  ALWAYS_INLINE V::T start(int) const { return V::set(0); }
  ALWAYS_INLINE Done when_done() const { return {to.when_done(), to.bias}; }
  ALWAYS_INLINE void skip(int64_t rows) { to.skip(rows); }
};

// Rows of a product added to rows of `channels` floats that lie `stride` apart.
struct AddRows {
  float* out;
  int64_t stride;
  int channels;  // from this panel on
  bool first;    // nothing is there to be added to
  ALWAYS_INLINE V::T start(int) const { return V::set(0); }
  ALWAYS_INLINE void store(int64_t row, int j, V::T v) const {
    float* to = out + row * stride + j * V::width;
    const int rest = channels - j * V::width;
    if (rest >= V::width) {
      V::store(to, first ? v : V::add(v, V::load(to)));
    } else if (rest > 0) {
      V::store(to, first ? v : V::add(v, V::load(to, rest)), rest);
    }
  }
  ALWAYS_INLINE void skip(int64_t rows) { out += rows * stride; }
};

// Stores sums, and fetches into L2 what will be read after the product: beside each row `bytes` of d, `next_stride`
// bytes apart. Among multiplications that costs nothing.
struct KeepSumAndFetch : KeepSum {
  const char* next;
  int64_t next_stride, bytes;
  ALWAYS_INLINE void store(int64_t row, int j, V::T v) const {
    KeepSum::store(row, j, v);
    const char* from = next + row * next_stride;
    if (j == 0)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
  ALWAYS_INLINE void skip(int64_t rows) {
    KeepSum::skip(rows);
    next += rows * next_stride;
  }
};

// Brings into L2 what the same pass will read or write of d for the next panel: a panel's channels lie in pieces, one a
// pixel, which no prefetcher foresees.
static ALWAYS_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

constexpr int64_t kStreamBytes = 4 << 20;
constexpr int64_t kPixelBlock = 128;  // pixels that one pass over the channels' vectors takes: they stay in L1

// ---- How an item's buffers lie in its scratch -----------------------------------------------------------------------

struct TrainBuffers {
  bool keeps_d;   // d is read, not computed again
  bool backward;  // parts and groups are rows of x
  bool widen;     // x is copied to fp32 first
  int64_t reach;
  int64_t part_rows, out_rows;  // most rows that a part has, and of d that it needs
  int64_t new_rows;             // most rows of d that a group adds
  int64_t ring_rows, columns;   // of e, with its padding
  int64_t g_rows, g_left, g_columns;
  int64_t wide_rows, wide_pitch;
  int64_t d, h, gh, g1, gz, z, ring, g_ring, wide, run_sums, shift, shifted, gram, rows, offsets,
      size;  // offsets in floats
};

static TrainBuffers train_buffers(const TrainArgs& a, const TrainLayout& l, const TrainPlan& p) {
  TrainBuffers b = {};
  int64_t at = 0;
  const auto section = [&at](int64_t floats) __attribute__((always_inline)) {
    const int64_t begin = at;
    at += ceil_div(floats, 16) * 16;
    return begin;
  };
  const int64_t vector_of_in = ceil_div(a.dims.in_channels, V::width) * V::width;
  b.wide_pitch = vector_of_in;
  switch (a.phase) {
    case TrainPhase::gram:
      b.wide = section(kPixelBlock * b.wide_pitch);
      b.gram = section(a.dims.in_channels * l.in_padded);
      b.shift = section(l.in_padded);
      b.size = at;
      return b;
    case TrainPhase::finish:
    case TrainPhase::finish_backward:
      return b;
    case TrainPhase::input_backward:
      b.wide = section(kPixelBlock * b.wide_pitch);
      b.gz = section(kPixelBlock * l.in_padded);
      b.size = at;
      return b;
    default:
      break;
  }
  b.keeps_d = a.d != nullptr;
  b.backward = a.phase == TrainPhase::depthwise_backward;
  b.widen = a.dtype != DType::f32 || (!a.dims.expand && a.dims.hidden_channels % V::width != 0);
  b.reach = (a.dims.kernel - 1) * a.dilation + 1;
  b.part_rows = ceil_div(b.backward ? a.height : a.out_height, p.row_parts);
  const auto out_rows_over = [&](int64_t rows) __attribute__((always_inline)) {
    return min64((rows + b.reach - 2) / a.stride + 1, a.out_height);
  };
  b.out_rows = b.backward ? out_rows_over(b.part_rows) : b.part_rows;
  b.new_rows = b.backward ? out_rows_over(p.group_rows) : p.group_rows;
  // Backward a group needs the e of its own rows, and to compute d again that under all rows of d over them.
  const auto rows_under = [&](int64_t rows) __attribute__((always_inline)) {
    if (!b.backward) return min64((rows - 1) * a.stride + b.reach, a.height);
    return min64(b.keeps_d ? rows : rows + 2 * (b.reach - 1), a.height);
  };
  const bool needs_e = b.backward || !b.keeps_d;
  b.columns = max64(a.pad_left + a.width, (a.out_width - 1) * a.stride + b.reach);
  b.ring_rows = needs_e && a.dims.expand && !a.e ? rows_under(p.group_rows) : 0;
  b.wide_rows = needs_e && b.widen ? rows_under(b.part_rows) : 0;
  if (b.backward) {
    b.g_rows = out_rows_over(p.group_rows);
    b.g_left = max64(ceil_div(b.reach - 1 - a.pad_left, a.stride), 0);
    b.g_columns = b.g_left + max64(a.out_width, (a.width - 1 + a.pad_left) / a.stride + 1);
  }
  const int64_t pixels = b.new_rows * a.out_width * p.pitch, panels = p.chunk / p.pitch;
  const bool is_project = a.phase == TrainPhase::project, is_depthwise = a.phase == TrainPhase::depthwise;
  b.d = section(b.keeps_d ? 0 : pixels);
  b.h = section(is_depthwise || b.backward ? 0 : (is_project ? panels : 1) * pixels);
  const bool needs_gh = !is_depthwise && !is_project && !a.g2;
  b.gh = section(needs_gh ? pixels : 0);
  b.g1 = section(b.backward ? p.group_rows * a.width * p.chunk : 0);
  b.gz = section(needs_gh ? b.out_rows * a.out_width * l.out_padded : 0);
  b.z = section(is_project ? b.out_rows * a.out_width * l.out_padded : 0);
  b.ring = section(b.ring_rows * b.columns * p.chunk);
  b.g_ring = section(b.g_rows * b.g_columns * p.chunk);
  b.wide = section(b.wide_rows * a.width * b.wide_pitch);
  b.run_sums = section(b.backward ? (a.dims.kernel * a.dims.kernel + 1) * p.chunk : 0);
  const bool has_t = b.backward && a.t;
  b.shift = section(is_depthwise ? l.hidden_padded : is_project ? l.out_padded : has_t ? l.in_padded : 0);
  b.shifted = section(has_t ? b.part_rows * a.width * b.wide_pitch : 0);
  b.rows = section(b.keeps_d ? 0 : b.new_rows * a.dims.kernel * static_cast<int64_t>(sizeof(float*)) / 4);
  b.offsets = section(b.ring_rows * a.width);
  b.size = at;
  return b;
}

static size_t train_scratch_floats(const TrainArgs& a, const TrainLayout& l, const TrainPlan& plan) {
  return static_cast<size_t>(train_buffers(a, l, plan).size);
}

// ---- One work item --------------------------------------------------------------------------------------------------

template <class Storage>
struct TrainWork {
  using Element = typename Storage::Element;
  const TrainArgs& a;
  const TrainLayout& l;
  const TrainPlan& plan;
  const TrainItem& item;
  const float* packed;
  float* scratch;
  const TrainBuffers b;
  const int64_t hidden_channels, out_channels, in_channels;
  const V::T lo, hi;
  const Open open, final_open;
  int64_t image = 0, wide_first = 0;

  TrainWork(const TrainArgs& a_, const TrainLayout& l_, const TrainPlan& plan_, const TrainItem& item_,
            const float* packed_, float* scratch_)
      : a(a_),
        l(l_),
        plan(plan_),
        item(item_),
        packed(packed_),
        scratch(scratch_),
        b(train_buffers(a_, l_, plan_)),
        hidden_channels(a_.dims.hidden_channels),
        out_channels(a_.dims.out_channels),
        in_channels(a_.dims.in_channels),
        lo(V::set(a_.activation.lo)),
        hi(V::set(a_.activation.hi)),
        open(a_.activation),
        final_open(a_.final_activation) {}

  // ---- Rows of x and e ----

  ALWAYS_INLINE int64_t pixels_of_d() const { return a.batch * a.out_height * a.out_width; }
  // the rows of d that have a tap on input rows [begin, end)
  ALWAYS_INLINE int64_t first_out_row(int64_t begin) const {
    return max64(ceil_div(max64(begin + a.pad_top - (b.reach - 1), 0), a.stride), 0);
  }
  ALWAYS_INLINE int64_t end_out_row(int64_t end) const {
    return min64((end - 1 + a.pad_top) / a.stride + 1, a.out_height);
  }

  ALWAYS_INLINE const float* input_row(int64_t row) const {
    if (b.widen) return scratch + b.wide + (row - wide_first) * a.width * b.wide_pitch;
    return static_cast<const float*>(a.x) + (image * a.height + row) * a.width * in_channels;
  }
  ALWAYS_INLINE int64_t input_pitch() const { return b.widen ? b.wide_pitch : in_channels; }

  void widen_rows(int64_t begin, int64_t end) {
    wide_first = begin;
    if (!b.widen || end <= begin) return;
    const Element* x = static_cast<const Element*>(a.x) + (image * a.height + begin) * a.width * in_channels;
    widen_row<Storage>(x, in_channels, (end - begin) * a.width, in_channels, b.wide_pitch, scratch + b.wide);
  }

  // A panel of the chunk: hidden channels from `hidden` on. Its pixels lie plan.pitch floats apart in all of scratch.
  struct Panel {
    int64_t hidden, vectors;
    int64_t index;  // in the chunk
    int64_t next;   // elements of d from this panel to the one to be fetched meanwhile
  };

  ALWAYS_INLINE float* e_ring(const Panel& panel) const {
    return scratch + b.ring + panel.index * b.ring_rows * b.columns * plan.pitch;
  }
  ALWAYS_INLINE int64_t e_row(int64_t row) const { return row % b.ring_rows * b.columns * plan.pitch; }
  ALWAYS_INLINE float* gradient_row(const Panel& panel, int64_t row) const {
    return scratch + b.g_ring + (panel.index * b.g_rows + row % b.g_rows) * b.g_columns * plan.pitch;
  }
  // g1 and, in project, h: of all panels, a group's pixels each
  ALWAYS_INLINE int64_t panel_size() const {
    return (b.backward ? plan.group_rows * a.width : b.new_rows * a.out_width) * plan.pitch;
  }

  void expand_rows(int64_t begin, int64_t end, const Panel& panel) {
    if (!a.dims.expand || a.e || end <= begin) return;
    int32_t* offsets = reinterpret_cast<int32_t*>(scratch + b.offsets);
    int32_t* to = offsets;
    for (int64_t row = begin; row < end; ++row) {
      int32_t at = static_cast<int32_t>(e_row(row) + a.pad_left * plan.pitch);
      for (int64_t c = 0; c < a.width; ++c, at += static_cast<int32_t>(plan.pitch)) *to++ = at;
    }
    product(panel.vectors, {input_row(begin), input_pitch(), in_channels}, (end - begin) * a.width,
            packed + l.expand + panel.hidden * in_channels,
            TrainExpandEpilogue{{packed + l.expand_bias + panel.hidden, e_ring(panel), offsets, &a.activation}});
  }

  // A panel's part of a row of x, which the depthwise passes read without an expand layer, or of a kept e.
  void fetch_row(const float* row, int64_t pitch, int64_t vectors = 1) const {
    for (int64_t c = 0; c < a.width; ++c)
      for (int64_t v = 0; v < vectors; ++v) fetch(row + c * pitch + v * V::width);
  }

  // Rows [begin, end) of e from their ring into a.e_out, of those that belong to the part with rows [part_begin,
  // part_end) of d: rows at a seam are computed for both parts.
  void keep_e(int64_t begin, int64_t end, int64_t part_begin, int64_t part_end, const Panel& panel) {
    begin = max64(begin, part_begin * a.stride);
    end = min64(end, part_end == a.out_height ? a.height : part_end * a.stride);
    for (int64_t row = begin; row < end; ++row)
      keep_rows<F32>(e_ring(panel) + e_row(row) + a.pad_left * plan.pitch, (image * a.height + row) * a.width, a.width,
                     panel, a.e_out, kStreamBytes);  // read in the backward, when nothing of it is in a cache
  }

  // Rows [begin, end) of d into scratch.
  void depthwise(int64_t begin, int64_t end, const Panel& panel) {
    const int64_t k = a.dims.kernel;
    const bool expand = a.dims.expand;
    const float** rows = reinterpret_cast<const float**>(scratch + b.rows);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t dy = 0; dy < k; ++dy) {
        const int64_t in = row * a.stride - a.pad_top + dy * a.dilation;
        const float*& e = rows[(row - begin) * k + dy];
        if (in < 0 || in >= a.height)
          e = nullptr;
        else
          e = expand ? e_ring(panel) + e_row(in) : input_row(in) + panel.hidden;
      }
    if (!expand)
      for (int64_t row = end_input_row(a, end), last = end_input_row(a, end + 1); row < last; ++row)
        fetch_row(input_row(row) + panel.hidden, input_pitch());
    Depthwise<ToReal<Own>> d;
    d.rows = rows;
    d.group = end - begin;
    d.kernel = k;
    d.stride = a.stride;
    d.dilation = a.dilation;
    d.out_pitch = plan.pitch;
    d.out_width = a.out_width;
    d.runs = panel.vectors;
    d.weights = packed + l.depthwise + panel.hidden * k * k;
    d.bias = kZeros;
    d.clamp = {-kInfinity, kInfinity};
    d.out = scratch + b.d;
    d.pitch = expand ? plan.pitch : input_pitch();
    d.first_column = expand ? 0 : -a.pad_left;  // the ring has its padding columns
    d.width = expand ? b.columns : a.width;
    depthwise_rows(d);
  }

  // The padding columns of a ring's rows, to which nothing else ever writes.
  static void zero_columns(float* ring, int64_t rows, int64_t columns, int64_t begin, int64_t end, int64_t pitch) {
    for (int64_t row = 0; row < rows; ++row, ring += columns * pitch) {
      for (int64_t i = 0; i < begin * pitch; ++i) ring[i] = 0;
      for (int64_t i = end * pitch; i < columns * pitch; ++i) ring[i] = 0;
    }
  }
  void zero_e_columns() {
    zero_columns(scratch + b.ring, plan.chunk / plan.pitch * b.ring_rows, b.columns, a.pad_left, a.pad_left + a.width,
                 plan.pitch);
  }

  // ---- Passes over a group's pixels, a panel of channels at a time ----

  // Calls pass(store), where store(lanes, pixel's place, v, value, next) writes a vector of an image with `pixels`
  // pixels of `channels` channels: past the caches if nothing of it will be there anyway when it is read, which saves
  // reading each line before it is written; else `next` elements on a line is fetched that will be written.
  template <class To, class Pass>
  static ALWAYS_INLINE void write_pixels(To* out, int64_t channels, int64_t pixels, const Pass& pass) {
    if constexpr (V::kStreams && sizeof(To) == sizeof(float)) {
      if (channels % V::width == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0 &&
          pixels * channels * 4 >= kStreamBytes) {
        return pass([](const auto&, To* to, int v, V::T value, int64_t)
                        __attribute__((always_inline)) { V::stream(to + v * V::width, value); });
      }
    }
    pass([](const auto& lanes, To* to, int v, V::T value, int64_t next) __attribute__((always_inline)) {
      if (next) fetch(to + v * V::width + next);
      lanes.store(to, v, value);
    });
  }

  // d -> a.d_out, and its moments.
  void finish_depthwise(int64_t pixel, int64_t pixels, const Panel& panel, bool first) {
    const float* d = scratch + b.d;
    float* shift = scratch + b.shift + panel.hidden;
    if (first)
      for (int64_t c = 0; c < panel.vectors * V::width; c += V::width)
        V::store(shift + c, mean_of(d + c, plan.pitch, pixels));
    with_vectors(panel.vectors, [&](auto vectors) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::count;
      Moments<kVectors> moments(shift);
      if (a.d_out) {
        const PanelLanes<Storage, kVectors> lanes(hidden_channels - panel.hidden);
        Element* out = static_cast<Element*>(a.d_out) + pixel * hidden_channels + panel.hidden;
        write_pixels(out, hidden_channels, pixels_of_d(), [&](auto store) __attribute__((always_inline)) {
          for_pixels(vectors, pixels, [&](int64_t p, int part) __attribute__((always_inline)) {
            UNROLL for (int v = 0; v < kVectors; ++v) {
              const V::T value = V::load(d + p * plan.pitch + v * V::width);
              moments.add(part, v, value);
              store(lanes, out + p * hidden_channels, v, value, panel.next);
            }
          });
        });
      } else {
        for_pixels(vectors, pixels, [&](int64_t p, int part) __attribute__((always_inline)) {
          UNROLL for (int v = 0; v < kVectors; ++v) moments.add(part, v, V::load(d + p * plan.pitch + v * V::width));
        });
      }
      moments.sum.add_to(item.sums + panel.hidden);
      moments.squares.add_to(item.sums + plan.sum_width + panel.hidden);
    });
  }

  // Calls pass(Vectors, where the d of a group lies, its pitch, lanes of the panel, panel.next): `at` pixels into
  // scratch, or in a.d.
  template <class Pass>
  ALWAYS_INLINE void with_d(int64_t pixel, int64_t at, const Panel& panel, const Pass& pass) {
    with_vectors(panel.vectors, [&](auto vectors) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::count;
      if (b.keeps_d)
        pass(vectors, static_cast<const Element*>(a.d) + pixel * hidden_channels + panel.hidden, hidden_channels,
             PanelLanes<Storage, kVectors>(hidden_channels - panel.hidden), panel.next);
      else
        pass(vectors, static_cast<const float*>(scratch + b.d + at * plan.pitch), plan.pitch,
             PanelLanes<F32, kVectors>(kVectors * V::width), int64_t{0});
    });
  }

  // d -> h
  void activate(int64_t pixel, int64_t pixels, const Panel& panel) {
    float* h = scratch + b.h + panel.index * panel_size();
    const int64_t h_pitch = plan.pitch;
    const V::T lowest = lo, highest = hi;
    with_d(pixel, 0, panel,
           [&](auto vectors, auto d, int64_t pitch, auto lanes, int64_t) __attribute__((always_inline)) {
             constexpr int kVectors = decltype(vectors)::count;
             const Values<kVectors> scale(packed + l.scale2 + panel.hidden), shift(packed + l.shift2 + panel.hidden);
             for (int64_t p = 0; p < pixels; ++p) UNROLL for (int v = 0; v < kVectors; ++v) {
                 const V::T value = V::fma(lanes.load(d + p * pitch, v), scale[v], shift[v]);
                 V::store(h + p * h_pitch + v * V::width, V::clamp(value, lowest, highest));
               }
           });
  }

  // d and gh -> h, the sums of g2 and g2 d, and g2 if it is kept.
  void project_backward_sums(int64_t pixel, int64_t pixels, const Panel& panel) {
    if (!a.g2_out)
      return project_backward_pass(pixel, pixels, panel,
                                   [](const auto&, int64_t, int, V::T) __attribute__((always_inline)) {});
    float* to = a.g2_out + pixel * hidden_channels + panel.hidden;
    write_pixels(to, hidden_channels, pixels_of_d(), [&](auto store) __attribute__((always_inline)) {
      project_backward_pass(pixel, pixels, panel,
                            [&](const auto& lanes, int64_t p, int v, V::T g) __attribute__((always_inline)) {
                              store(lanes, to + p * hidden_channels, v, g, panel.next);
                            });
    });
  }
  // keep(lanes of the panel, pixel, vector, g2)
  template <class Keep>
  ALWAYS_INLINE void project_backward_pass(int64_t pixel, int64_t pixels, const Panel& panel, const Keep& keep) {
    const float* gh = scratch + b.gh;
    float* h = scratch + b.h;
    const int64_t h_pitch = plan.pitch;
    const V::T lowest = lo, highest = hi;
    const Open through = open;
    with_d(pixel, 0, panel,
           [&](auto vectors, auto d, int64_t pitch, auto lanes, int64_t next) __attribute__((always_inline)) {
             constexpr int kVectors = decltype(vectors)::count;
             const Values<kVectors> scale(packed + l.scale2 + panel.hidden), shift(packed + l.shift2 + panel.hidden);
             const PanelLanes<F32, kVectors> lanes_of_g(hidden_channels - panel.hidden);
             for_runs(pixels, [&](int64_t first, int64_t run) __attribute__((always_inline)) {
               PixelSums<kVectors> sum, product;
               for_pixels(vectors, run, [&](int64_t at, int part) __attribute__((always_inline)) {
                 const int64_t p = first + at;
                 UNROLL for (int v = 0; v < kVectors; ++v) {
                   fetch(d + p * pitch + v * V::width + next);
                   const V::T value = lanes.load(d + p * pitch, v), before = V::fma(value, scale[v], shift[v]);
                   const V::T g = through.keep(V::load(gh + p * h_pitch + v * V::width), before);
                   V::store(h + p * h_pitch + v * V::width, V::clamp(before, lowest, highest));
                   sum.add(part, v, g);
                   product.add_product(part, v, g, value);
                   keep(lanes_of_g, p, v, g);
                 }
               });
               sum.add_to(item.sums + panel.hidden);
               product.add_to(item.sums + plan.sum_width + panel.hidden);
             });
           });
  }

  // d and gh, or g2 -> gd: a row of it, into its ring; `at`: the row's first pixel in scratch.
  void normalise_backward(int64_t pixel, int64_t at, const Panel& panel, float* gd) {
    const float* gh = scratch + b.gh + at * plan.pitch;
    const int64_t pixels = a.out_width, h_pitch = plan.pitch;
    const Open through = open;
    with_d(pixel, at, panel,
           [&](auto vectors, auto d, int64_t pitch, auto lanes, int64_t next) __attribute__((always_inline)) {
             constexpr int kVectors = decltype(vectors)::count;
             const Values<kVectors> wg(packed + l.a2 + panel.hidden), wd(packed + l.b2 + panel.hidden);
             const Values<kVectors> w(packed + l.c2 + panel.hidden);
             const auto pass = [&](const auto& gradient) __attribute__((always_inline)) {
               for (int64_t p = 0; p < pixels; ++p) UNROLL for (int v = 0; v < kVectors; ++v) {
                   fetch(d + p * pitch + v * V::width + next);
                   const V::T value = lanes.load(d + p * pitch, v);
                   const V::T g = gradient(p, v, value);
                   V::store(gd + p * h_pitch + v * V::width, V::fma(wg[v], g, V::fma(wd[v], value, w[v])));
                 }
             };
             if (a.g2) {
               const float* g2 = a.g2 + pixel * hidden_channels + panel.hidden;
               const PanelLanes<F32, kVectors> lanes_of_g(hidden_channels - panel.hidden);
               return pass([&](int64_t p, int v, V::T) __attribute__((always_inline)) {
                 fetch(g2 + p * hidden_channels + v * V::width + next);
                 return lanes_of_g.load(g2 + p * hidden_channels, v);
               });
             }
             const Values<kVectors> scale(packed + l.scale2 + panel.hidden), shift(packed + l.shift2 + panel.hidden);
             pass([&](int64_t p, int v, V::T value) __attribute__((always_inline)) {
               return through.keep(V::load(gh + p * h_pitch + v * V::width), V::fma(value, scale[v], shift[v]));
             });
           });
  }

  // gy and z -> gz, of `pixels` pixels from the `pixel`-th on.
  void gradient_of_z(int64_t pixel, int64_t pixels) {
    const int64_t z_pitch = out_channels, gz_pitch = l.out_padded;
    const Open through = final_open;
    for_panels(out_channels, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::count;
      const PanelLanes<Storage, kVectors> lanes(out_channels - c);
      const int64_t from = pixel * out_channels + c;
      const Element *gy = static_cast<const Element*>(a.gy) + from, *z = static_cast<const Element*>(a.z) + from;
      float* gz = scratch + b.gz + c;
      const Values<kVectors> scale(packed + l.scale3 + c), shift(packed + l.shift3 + c);
      const Values<kVectors> wg(packed + l.a3 + c), wz(packed + l.b3 + c), w(packed + l.c3 + c);
      for (int64_t p = 0; p < pixels; ++p) UNROLL for (int v = 0; v < kVectors; ++v) {
          const V::T value = lanes.load(z + p * z_pitch, v);
          const V::T g = through.keep(lanes.load(gy + p * z_pitch, v), V::fma(value, scale[v], shift[v]));
          V::store(gz + p * gz_pitch + v * V::width, V::fma(wg[v], g, V::fma(wz[v], value, w[v])));
        }
    });
  }

  // ---- Products of a group ----

  // Calls product(rows of all the chunk's panels, the first channel, whether nothing was summed yet): at most twice, as
  // a last panel with fewer channels cannot follow the others as a segment. `first` is the first panel's first row.
  template <class Product>
  ALWAYS_INLINE void for_segments(const float* first, int64_t hidden, int64_t channels, const Product& multiply) {
    const int64_t whole = channels / plan.pitch, rest = channels % plan.pitch;
    const bool fresh = hidden == item.hidden_begin;
    if (whole) multiply(Rows{first, plan.pitch, plan.pitch, whole, panel_size()}, hidden, fresh);
    if (rest)
      multiply(Rows{first + whole * panel_size(), plan.pitch, rest}, hidden + whole * plan.pitch, fresh && !whole);
  }

  // z += w2 h over a chunk; `to` is the group's first pixel in scratch, `next` that of d where the next group begins.
  void project(int64_t pixels, int64_t hidden, int64_t channels, float* to, const Element* next) {
    const int64_t vectors = l.out_padded / V::width;
    for (int64_t v = 0; v < vectors; v += l.out_panel) {
      const int64_t width = min64(l.out_panel, vectors - v);
      float* out = to + v * V::width;
      for_segments(scratch + b.h, hidden, channels, [&](const Rows& rows, int64_t channel, bool fresh) {
        const int64_t weights = l.out_pairs ? channel / 2 * l.out_pairs : v * hidden_channels + channel * width;
        const float* w = packed + l.project + weights * V::width;
        const KeepSum keep{{kZeros, fresh ? nullptr : out, l.out_padded}, out};
        if (!next || channel != hidden) return product_or_paired(l.out_pairs, width, rows, pixels, w, keep);
        // Beside each row that is stored a pixel of d; each panel fetches a share of the channels.
        constexpr int64_t kSize = sizeof(Element);
        const int64_t begin = channels * v / vectors, end = channels * (v + width) / vectors;
        product_or_paired(l.out_pairs, width, rows, pixels, w,
                          KeepSumAndFetch{keep, reinterpret_cast<const char*>(next + begin), hidden_channels * kSize,
                                          (end - begin) * kSize});
      });
    }
  }

  // gh = w2^T gz; `from` is the group's first pixel of gz. In runs of the depth whose weights stay in L1.
  void project_transposed(const float* from, int64_t pixels, const Panel& panel) {
    constexpr int64_t kDepth = 160;
    const int64_t count = ceil_div(out_channels, kDepth), width = panel.vectors * V::width;
    float* gh = scratch + b.gh;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = out_channels * i / count, end = out_channels * (i + 1) / count;
      product(panel.vectors, {from + begin, l.out_padded, end - begin}, pixels,
              packed + l.project_backward + panel.hidden * out_channels + begin * width,
              KeepSum{{kZeros, i ? gh : nullptr, plan.pitch}, gh});
    }
  }

  // matrix[i][c] += sum over pixels of from[i] * of[c]; `first`: of the item's first group
  void add_outer(const float* from, int64_t from_pitch, int64_t rows, const float* of, int64_t pixels,
                 const Panel& panel, bool first) {
    outer_product(panel.vectors, from, from_pitch, rows, of, plan.pitch, pixels, item.matrix + panel.hidden,
                  l.hidden_padded, first);
  }

  // x - shift of `pixels` pixels from a row's first one on. t is made of these: the gradient of gamma is the difference
  // of products w t and mean * sum(g), which the mean of x is in both of. Counted from near the mean, t rounds off half
  // as much, and what sum(g) is off by cancels.
  void shift_rows(int64_t row, int64_t pixels) {
    const float* x = input_row(row);
    const int64_t pitch = input_pitch();
    for_panels(in_channels, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::count;
      const PanelLanes<F32, kVectors> lanes(in_channels - c);
      const Values<kVectors> shift(scratch + b.shift + c);
      float* out = scratch + b.shifted + c;
      for (int64_t p = 0; p < pixels; ++p)
        UNROLL for (int v = 0; v < kVectors; ++v)
            V::store(out + p * b.wide_pitch + v * V::width, V::sub(lanes.load(x + c + p * pitch, v), shift[v]));
    });
  }
  // Such a shift: the mean of an item's first pixels.
  void set_shift(int64_t row, int64_t pixels) {
    float* shift = scratch + b.shift;
    for (int64_t c = 0; c < l.in_padded; ++c) shift[c] = 0;
    shift_rows(row, pixels);
    for (int64_t c = 0; c < l.in_padded; c += V::width)
      V::store(shift + c, mean_of(scratch + b.shifted + c, b.wide_pitch, pixels));
  }

  // What t would have been of values that were not counted from `shift`.
  void unshift_t() {
    for (int64_t c = item.hidden_begin; c < item.hidden_end; c += V::width) {
      float lanes[V::width];
      for (int64_t i = 0; i < V::width; ++i) lanes[i] = static_cast<float>(item.sums[c + i]);
      const V::T sum = V::load(lanes);
      float* t = item.matrix + c;
      for (int64_t i = 0; i < in_channels; ++i, t += l.hidden_padded)
        V::store(t, V::fma(V::broadcast(scratch + b.shift + i), sum, V::load(t)));
    }
  }

  // g += w1^T g1 over a chunk; `to` is the group's first pixel.
  void expand_transposed(int64_t pixels, int64_t hidden, int64_t channels, float* to) {
    const int64_t vectors = l.in_padded / V::width;
    for (int64_t v = 0; v < vectors; v += l.in_panel) {
      const int64_t width = min64(l.in_panel, vectors - v), count = in_channels - v * V::width;
      for_segments(scratch + b.g1, hidden, channels, [&](const Rows& rows, int64_t channel, bool fresh) {
        const int64_t weights = l.in_pairs ? channel / 2 * l.in_pairs : v * hidden_channels + channel * width;
        const float* w = packed + l.expand_backward + weights * V::width;
        product_or_paired(l.in_pairs, width, rows, pixels, w,
                          AddRows{to + v * V::width, in_channels, static_cast<int>(count), fresh});
      });
    }
  }

  // ---- The phases with hidden channels ----

  template <class Body>
  ALWAYS_INLINE void for_each_part(int64_t rows, const Body& body) {
    for (int64_t part = item.begin; part < item.end; ++part) {
      image = part / plan.row_parts;
      const int64_t index = part % plan.row_parts;
      const int64_t begin = rows * index / plan.row_parts, end = rows * (index + 1) / plan.row_parts;
      if (begin < end) body(begin, end);
    }
  }

  // body(first hidden channel, one past the last, padding included)
  template <class Body>
  ALWAYS_INLINE void for_each_chunk(const Body& body) {
    for (int64_t hidden = item.hidden_begin; hidden < item.hidden_end; hidden += plan.chunk)
      body(hidden, min64(hidden + plan.chunk, item.hidden_end));
  }

  // The panels of a chunk, for a group of rows of d that begins `done` pixels after its part and has `pixels` pixels.
  template <class Body>
  ALWAYS_INLINE void for_each_panel(int64_t hidden, int64_t end, int64_t done, int64_t pixels, int64_t part_pixels,
                                    const Body& body) {
    const bool last_group = done + pixels >= part_pixels;
    const int64_t next_chunk = last_group ? end - hidden - done * hidden_channels : pixels * hidden_channels;
    for (Panel panel{hidden, 0, 0, 0}; panel.hidden < end; panel.hidden += plan.pitch, ++panel.index) {
      panel.vectors = min64(plan.pitch, end - panel.hidden) / V::width;
      panel.next = panel.hidden + plan.pitch < end ? plan.pitch : next_chunk - (panel.hidden - hidden);
      body(panel);
    }
  }

  void forward_phases() {
    const bool is_depthwise = a.phase == TrainPhase::depthwise, is_project = a.phase == TrainPhase::project;
    zero_e_columns();
    bool first_part = true;
    int64_t item_pixels = 0;
    for_each_part(a.out_height, [&](int64_t part_begin, int64_t part_end) {
      const int64_t part_pixel = (image * a.out_height + part_begin) * a.out_width;
      const int64_t part_pixels = (part_end - part_begin) * a.out_width;
      if (!b.keeps_d) widen_rows(first_input_row(a, part_begin), end_input_row(a, part_end));
      if (!is_depthwise && !is_project) gradient_of_z(part_pixel, part_pixels);
      for_each_chunk([&](int64_t hidden, int64_t hidden_end) {
        int64_t expanded = first_input_row(a, part_begin);
        for (int64_t row = part_begin; row < part_end; row += plan.group_rows) {
          const int64_t row_end = min64(row + plan.group_rows, part_end), pixels = (row_end - row) * a.out_width;
          const int64_t pixel = (image * a.out_height + row) * a.out_width;
          const int64_t at = (pixel - part_pixel) * l.out_padded;
          const int64_t expand_begin = max64(expanded, first_input_row(a, row)), expand_end = end_input_row(a, row_end);
          expanded = max64(expanded, expand_end);
          for_each_panel(hidden, hidden_end, pixel - part_pixel, pixels, part_pixels, [&](const Panel& panel) {
            if (!b.keeps_d) {
              expand_rows(expand_begin, expand_end, panel);
              if (a.e_out) keep_e(expand_begin, expand_end, part_begin, part_end, panel);
              depthwise(row, row_end, panel);
            }
            if (is_depthwise) {
              finish_depthwise(pixel, pixels, panel, first_part && row == part_begin);
            } else if (is_project) {
              activate(pixel, pixels, panel);
            } else {
              const float* gz = scratch + b.gz + at;
              project_transposed(gz, pixels, panel);
              if (a.gh)
                keep_rows<Storage>(scratch + b.gh, pixel, pixels, panel, static_cast<Element*>(a.gh), pixels_of_d());
              project_backward_sums(pixel, pixels, panel);
              if (item.matrix)
                add_outer(gz, l.out_padded, out_channels, scratch + b.h, pixels, panel,
                          first_part && row == part_begin);
            }
          });
          if (is_project) {
            const Element* next = static_cast<const Element*>(a.d);
            if (next && row_end < part_end)
              next += (pixel + pixels) * hidden_channels + hidden;
            else if (next && hidden_end < item.hidden_end)
              next += part_pixel * hidden_channels + hidden_end;
            else if (next)
              next += (pixel + pixels) * hidden_channels;
            project(pixels, hidden, min64(hidden_end, hidden_channels) - hidden, scratch + b.z + at, next);
          }
        }
      });
      if (is_project) finish_project(part_pixel, part_pixels, first_part);
      first_part = false;
      item_pixels += part_pixels;
    });
    if (first_part || !(is_depthwise || is_project)) return;
    const int64_t begin = is_depthwise ? item.hidden_begin : 0, end = is_depthwise ? item.hidden_end : l.out_padded;
    unshift_moments(scratch + b.shift + begin, end - begin, static_cast<double>(item_pixels), item.sums + begin,
                    item.sums + plan.sum_width + begin);
  }

  // A part's z -> a.z_out, and its moments.
  void finish_project(int64_t pixel, int64_t pixels, bool first) {
    for (int64_t begin = 0; begin < pixels; begin += kPixelBlock) {
      const int64_t count = min64(kPixelBlock, pixels - begin);
      for_panels(out_channels, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
        constexpr int kVectors = decltype(vectors)::count;
        const PanelLanes<Storage, kVectors> lanes(out_channels - c);
        const float* z = scratch + b.z + begin * l.out_padded + c;
        float* shift = scratch + b.shift + c;
        if (first && begin == 0)
          for (int64_t v = 0; v < kVectors * V::width; v += V::width)
            V::store(shift + v, mean_of(z + v, l.out_padded, count));
        Moments<kVectors> moments(shift);
        Element* out = static_cast<Element*>(a.z_out) + (pixel + begin) * out_channels + c;
        write_pixels(out, out_channels, pixels_of_d(), [&](auto store) __attribute__((always_inline)) {
          for_pixels(vectors, count, [&](int64_t p, int part) __attribute__((always_inline)) {
            UNROLL for (int v = 0; v < kVectors; ++v) {
              const V::T value = V::load(z + p * l.out_padded + v * V::width);
              moments.add(part, v, value);
              store(lanes, out + p * out_channels, v, value, 0);
            }
          });
        });
        moments.sum.add_to(item.sums + c);
        moments.squares.add_to(item.sums + plan.sum_width + c);
      });
    }
  }

  // Rows [begin, end) of gd into their ring; gz in scratch begins at row `gz_begin`.
  void gradient_rows(int64_t begin, int64_t end, int64_t gz_begin, const Panel& panel) {
    if (end <= begin) return;
    if (!b.keeps_d) depthwise(begin, end, panel);
    if (!a.g2) {
      const float* gz = scratch + b.gz + (begin - gz_begin) * a.out_width * l.out_padded;
      project_transposed(gz, (end - begin) * a.out_width, panel);
    }
    for (int64_t row = begin; row < end; ++row)
      normalise_backward((image * a.out_height + row) * a.out_width, (row - begin) * a.out_width, panel,
                         gradient_row(panel, row) + b.g_left * plan.pitch);
  }

  // A row of g1 from the ring of gd, with its share of gwd and of the sum of g1, which run on in the chunk's sums.
  void depthwise_transposed(int64_t row, const Panel& panel, float* out) {
    const int64_t k = a.dims.kernel;
    const bool expand = a.dims.expand;
    const int64_t e_pitch = a.e ? hidden_channels : expand ? plan.pitch : input_pitch();
    const float* e = a.e      ? a.e + (image * a.height + row) * a.width * hidden_channels + panel.hidden
                     : expand ? e_ring(panel) + e_row(row) + a.pad_left * plan.pitch
                              : input_row(row) + panel.hidden;
    if (a.e)
      fetch_row(e + a.width * e_pitch, e_pitch, panel.vectors);
    else if (!expand)
      fetch_row(e + a.width * e_pitch, e_pitch);
    const float* weights = packed + l.depthwise + panel.hidden * k * k;
    float* weight_sums = scratch + b.run_sums + panel.index * plan.pitch * k * k;
    float* sums = scratch + b.run_sums + plan.chunk * k * k + panel.index * plan.pitch;
    const Open through = expand ? open : Open({-kInfinity, kInfinity});
    // gd's row under tap dy, its first column; null where there is none
    const auto gradient = [&](int64_t dy) __attribute__((always_inline)) -> const float* {
      const int64_t y = row + a.pad_top - dy * a.dilation;
      if (y < 0 || y % a.stride != 0 || y / a.stride >= a.out_height) return nullptr;
      return gradient_row(panel, y / a.stride) + b.g_left * plan.pitch;
    };
    // `count` columns, `stride` apart
    const auto columns = [&](int64_t first, int64_t count) {
      Tap taps[kMaxKernel * kMaxKernel];
      int64_t tap_count = 0;
      for (int64_t dy = 0; dy < k; ++dy) {
        const float* pixels = gradient(dy);
        for (int64_t dx = 0; pixels && dx < k; ++dx) {
          const int64_t x = first + a.pad_left - dx * a.dilation;
          if (x % a.stride == 0) taps[tap_count++] = {pixels + x / a.stride * plan.pitch, (dy * k + dx) * V::width};
        }
      }
      depthwise_backward_columns(
          {taps, tap_count, plan.pitch, e + first * e_pitch, a.stride * e_pitch, out + first * plan.pitch,
           a.stride * plan.pitch, panel.vectors, k * k * V::width, weights, weight_sums, sums, through},
          count);
    };
    // Of stride 2 pairs begin with a column under the middle of the kernel.
    const int64_t first = a.stride == 2 && a.pad_left % 2 == 0, paired = (a.width - first) / a.stride * a.stride;
    const int64_t x = a.stride == 1 ? a.pad_left - 2 : (first + a.pad_left - 1) / 2;
    DepthwiseBackward3x3 r = {{},
                              {},
                              e + first * e_pitch,
                              e_pitch,
                              out + first * plan.pitch,
                              plan.pitch,
                              panel.vectors,
                              weights,
                              weight_sums,
                              sums,
                              through};
    const bool is_3x3 = k == 3 && a.dilation == 1 && a.stride <= 2;
    int rows = 0;
    for (int dy = 0; is_3x3 && dy < 3; ++dy)
      if (const float* pixels = gradient(dy)) {
        r.g[rows] = pixels + x * plan.pitch;
        r.weights_row[rows++] = dy;
      }
    if (rows == 0) {
      for (int64_t c = 0; c < min64(a.stride, a.width); ++c) columns(c, ceil_div(a.width - c, a.stride));
      return;
    }
    constexpr decltype(&backward_3x3<1, 1>) kOfRows[2][3] = {
        {backward_3x3<1, 1>, backward_3x3<1, 2>, backward_3x3<1, 3>},
        {backward_3x3<2, 1>, backward_3x3<2, 2>, nullptr}};
    if (paired) kOfRows[a.stride - 1][rows - 1](r, paired);
    if (first) columns(0, 1);
    if (first + paired < a.width) columns(a.width - 1, 1);
  }

  // The sums of a part and chunk, to the item's.
  void flush_sums(int64_t hidden, int64_t end) {
    const int64_t taps = a.dims.kernel * a.dims.kernel;
    const float *products = scratch + b.run_sums, *sums = products + plan.chunk * taps;
    for (int64_t c = 0; c < end - hidden; c += V::width) {
      double* to = item.sums + hidden + c;
      add_lanes(to, V::load(sums + c));
      for (int64_t t = 0; t < taps; ++t)
        add_lanes(to + (1 + t) * plan.sum_width, V::load(products + c * taps + t * V::width));
    }
  }

  // A panel's pixels from scratch into an image of all hidden channels, which has `all` pixels.
  template <class To>
  void keep_rows(const float* from, int64_t pixel, int64_t pixels, const Panel& panel, typename To::Element* image_of,
                 int64_t all) {
    with_vectors(panel.vectors, [&](auto vectors) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::count;
      const PanelLanes<To, kVectors> lanes(hidden_channels - panel.hidden);
      typename To::Element* to = image_of + pixel * hidden_channels + panel.hidden;
      write_pixels(to, hidden_channels, all, [&](auto store) __attribute__((always_inline)) {
        for (int64_t p = 0; p < pixels; ++p)
          UNROLL for (int v = 0; v < kVectors; ++v)
              store(lanes, to + p * hidden_channels, v, V::load(from + p * plan.pitch + v * V::width), 0);
      });
    });
  }

  void depthwise_backward() {
    const int64_t run_sums = (a.dims.kernel * a.dims.kernel + 1) * plan.chunk;
    zero_e_columns();
    zero_columns(scratch + b.g_ring, plan.chunk / plan.pitch * b.g_rows, b.g_columns, b.g_left, b.g_left + a.out_width,
                 plan.pitch);
    bool first_part = true;
    for_each_part(a.height, [&](int64_t part_begin, int64_t part_end) {
      const int64_t out_begin = first_out_row(part_begin), out_end = max64(end_out_row(part_end), out_begin);
      int64_t first = part_begin, end = part_end;
      if (!b.keeps_d && out_begin < out_end) {
        first = min64(first, first_input_row(a, out_begin));
        end = max64(end, end_input_row(a, out_end));
      }
      widen_rows(first, end);
      if (item.matrix) {
        const int64_t pixels = (part_end - part_begin) * a.width;
        if (first_part) set_shift(part_begin, min64(pixels, kPixelBlock));
        shift_rows(part_begin, pixels);
      }
      if (!a.g2) gradient_of_z((image * a.out_height + out_begin) * a.out_width, (out_end - out_begin) * a.out_width);
      for_each_chunk([&](int64_t hidden, int64_t hidden_end) {
        for (int64_t i = 0; i < run_sums; ++i) scratch[b.run_sums + i] = 0;
        int64_t expanded = first, made = out_begin;
        for (int64_t row = part_begin; row < part_end; row += plan.group_rows) {
          const int64_t row_end = min64(row + plan.group_rows, part_end), pixels = (row_end - row) * a.width;
          const int64_t pixel = (image * a.height + row) * a.width;
          const int64_t make = max64(min64(end_out_row(row_end), out_end), made);
          const int64_t expand_end = b.keeps_d || make == made ? row_end : max64(row_end, end_input_row(a, make));
          const int64_t done = (made - out_begin) * a.out_width, new_pixels = (make - made) * a.out_width;
          const int64_t part_pixels = (out_end - out_begin) * a.out_width;
          for_each_panel(hidden, hidden_end, done, new_pixels, part_pixels, [&](const Panel& panel) {
            expand_rows(expanded, expand_end, panel);
            gradient_rows(made, make, out_begin, panel);
            float* g1 = scratch + b.g1 + panel.index * panel_size();
            for (int64_t r = row; r < row_end; ++r)
              depthwise_transposed(r, panel, g1 + (r - row) * a.width * plan.pitch);
            if (item.matrix)
              add_outer(scratch + b.shifted + (row - part_begin) * a.width * b.wide_pitch, b.wide_pitch, in_channels,
                        g1, pixels, panel, first_part && row == part_begin);
            // g1 itself is the result where there is no expand layer
            if (a.g_out && !a.dims.expand) keep_rows<F32>(g1, pixel, pixels, panel, a.g_out, pixels_of_d());
          });
          expanded = max64(expanded, expand_end);
          made = make;
          if (a.g_out && a.dims.expand)
            expand_transposed(pixels, hidden, min64(hidden_end, hidden_channels) - hidden,
                              item.g_out + pixel * in_channels);
        }
        flush_sums(hidden, hidden_end);
      });
      first_part = false;
    });
    if (item.matrix && !first_part) unshift_t();
  }

  // ---- The phases without hidden channels: runs of pixels ----

  template <class Body>
  ALWAYS_INLINE void for_each_block(const Body& body) {
    for (int64_t pixel = item.begin; pixel < item.end; pixel += kPixelBlock)
      body(pixel, min64(kPixelBlock, item.end - pixel));
  }

  void gram() {
    constexpr int64_t kFlush = 8 * kPixelBlock;
    float *rows = scratch + b.wide, *sums = scratch + b.gram, *shift = scratch + b.shift;
    const Element* x = static_cast<const Element*>(a.x);
    for (int64_t i = 0; i < in_channels * l.in_padded; ++i) sums[i] = 0;
    for_each_block([&](int64_t pixel, int64_t pixels) {
      widen_row<Storage>(x + pixel * in_channels, in_channels, pixels, in_channels, b.wide_pitch, rows);
      for (int64_t c = 0; pixel == item.begin && c < l.in_padded; c += V::width)
        V::store(shift + c, mean_of(rows + c, b.wide_pitch, pixels));
      for_panels(in_channels, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
        constexpr int kVectors = decltype(vectors)::count;
        const Values<kVectors> from(shift + c);
        PixelSums<kVectors> sum;
        for_pixels(vectors, pixels, [&](int64_t p, int part) __attribute__((always_inline)) {
          UNROLL for (int v = 0; v < kVectors; ++v) {
            float* at = rows + p * b.wide_pitch + c + v * V::width;
            const V::T value = V::sub(V::load(at), from[v]);
            V::store(at, value);
            sum.add(part, v, value);
          }
        });
        sum.add_to(item.sums + c);
      });
      // the panels on and above the diagonal
      const int64_t vectors = l.in_padded / V::width;
      for (int64_t v = 0; v < vectors; v += l.in_panel) {
        const int64_t width = min64(l.in_panel, vectors - v), end = min64((v + width) * V::width, in_channels);
        outer_product(width, rows, b.wide_pitch, end, rows + v * V::width, b.wide_pitch, pixels, sums + v * V::width,
                      l.in_padded);
      }
      if ((pixel - item.begin) % kFlush == kFlush - kPixelBlock || pixel + pixels == item.end) {
        for (int64_t i = 0; i < in_channels * l.in_padded; i += V::width) {
          add_lanes(item.sums + plan.sum_width + i, V::load(sums + i));
          V::store(sums + i, V::set(0));
        }
      }
    });
    unshift_gram(shift);
  }

  // What the sums would have been of values that were not counted from `shift`.
  void unshift_gram(const float* shift) {
    const double pixels = static_cast<double>(item.end - item.begin);
    double *sum = item.sums, *product = item.sums + plan.sum_width;
    for (int64_t i = 0; i < in_channels; ++i, product += plan.sum_width)
      for (int64_t j = i; j < in_channels; ++j) {
        const double si = static_cast<double>(shift[i]), sj = static_cast<double>(shift[j]);
        product[j] += si * sum[j] + sj * sum[i] + pixels * si * sj;
      }
    for (int64_t i = 0; i < in_channels; ++i) sum[i] += pixels * static_cast<double>(shift[i]);
  }

  void finish() {
    const V::T lowest = V::set(a.final_activation.lo), highest = V::set(a.final_activation.hi);
    for_each_block([&](int64_t pixel, int64_t pixels) {
      for_panels(out_channels, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
        constexpr int kVectors = decltype(vectors)::count;
        const PanelLanes<Storage, kVectors> lanes(out_channels - c);
        const int64_t at = pixel * out_channels + c;
        const Element *z = static_cast<const Element*>(a.z) + at, *x = static_cast<const Element*>(a.x) + at;
        Element* y = static_cast<Element*>(a.y) + at;
        const Values<kVectors> scale(packed + l.scale3 + c), shift(packed + l.shift3 + c);
        write_pixels(y, out_channels, pixels_of_d(), [&](auto store) __attribute__((always_inline)) {
          for (int64_t p = 0; p < pixels; ++p) UNROLL for (int v = 0; v < kVectors; ++v) {
              const int64_t i = p * out_channels;
              V::T value = V::clamp(V::fma(lanes.load(z + i, v), scale[v], shift[v]), lowest, highest);
              if (a.x) value = V::add(value, lanes.load(x + i, v));
              store(lanes, y + i, v, value, 0);
            }
        });
      });
    });
  }

  void finish_backward() {
    const Open through = final_open;
    for_each_block([&](int64_t pixel, int64_t pixels) {
      for_panels(out_channels, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
        constexpr int kVectors = decltype(vectors)::count;
        const PanelLanes<Storage, kVectors> lanes(out_channels - c);
        const int64_t at = pixel * out_channels + c;
        const Element *gy = static_cast<const Element*>(a.gy) + at, *z = static_cast<const Element*>(a.z) + at;
        const Values<kVectors> scale(packed + l.scale3 + c), shift(packed + l.shift3 + c);
        for_runs(pixels, [&](int64_t first, int64_t run) __attribute__((always_inline)) {
          PixelSums<kVectors> sum, product;
          for_pixels(vectors, run, [&](int64_t p, int part) __attribute__((always_inline)) {
            UNROLL for (int v = 0; v < kVectors; ++v) {
              const int64_t i = (first + p) * out_channels;
              const V::T value = lanes.load(z + i, v);
              const V::T g = through.keep(lanes.load(gy + i, v), V::fma(value, scale[v], shift[v]));
              sum.add(part, v, g);
              product.add_product(part, v, g, value);
            }
          });
          sum.add_to(item.sums + c);
          product.add_to(item.sums + plan.sum_width + c);
        });
      });
    });
  }

  void input_backward() {
    const int64_t vectors = l.in_padded / V::width;
    float *rows = scratch + b.wide, *mx = scratch + b.gz;  // m x + c0
    for_each_block([&](int64_t pixel, int64_t pixels) {
      if (a.m) {
        const Element* x = static_cast<const Element*>(a.x) + pixel * in_channels;
        widen_row<Storage>(x, in_channels, pixels, in_channels, b.wide_pitch, rows);
        for (int64_t v = 0; v < vectors; v += l.in_panel) {
          const Sums start{packed + l.c0 + v * V::width, nullptr, l.in_padded};
          product(min64(l.in_panel, vectors - v), {rows, b.wide_pitch, in_channels}, pixels,
                  packed + l.input + v * V::width * in_channels, KeepSum{start, mx + v * V::width});
        }
      }
      for_panels(in_channels, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
        constexpr int kVectors = decltype(vectors)::count;
        const PanelLanes<F32, kVectors> wide(in_channels - c);
        const PanelLanes<Storage, kVectors> lanes(in_channels - c);
        const int64_t at = pixel * in_channels + c;
        const Element* gy = static_cast<const Element*>(a.gy) + at;
        Element* gx = static_cast<Element*>(a.gx) + at;
        const int64_t fresh = a.gx == a.g ? 0 : a.batch * a.height * a.width;  // what was just read is in the caches
        write_pixels(gx, in_channels, fresh, [&](auto store) __attribute__((always_inline)) {
          for (int64_t p = 0; p < pixels; ++p) UNROLL for (int v = 0; v < kVectors; ++v) {
              const int64_t i = p * in_channels;
              V::T value = wide.load(a.g + at + i, v);
              if (a.m) value = V::sub(value, V::load(mx + p * l.in_padded + c + v * V::width));
              if (a.gy) value = V::add(value, lanes.load(gy + i, v));
              store(lanes, gx + i, v, value, 0);
            }
        });
      });
    });
  }

  void run() {
    run_phase();
    V::fence();  // what was streamed is there before another thread is told so
  }
  void run_phase() {
    switch (a.phase) {
      case TrainPhase::gram:
        return gram();
      case TrainPhase::depthwise:
      case TrainPhase::project:
      case TrainPhase::project_backward:
        return forward_phases();
      case TrainPhase::finish:
        return finish();
      case TrainPhase::finish_backward:
        return finish_backward();
      case TrainPhase::depthwise_backward:
        return depthwise_backward();
      case TrainPhase::input_backward:
        return input_backward();
    }
  }
};

static void train_work(const TrainArgs& a, const TrainLayout& l, const TrainPlan& plan, const TrainItem& item,
                       const float* packed, float* scratch) {
  switch (a.dtype) {
    case DType::f32:
      return TrainWork<F32>(a, l, plan, item, packed, scratch).run();
    case DType::bf16:
      return TrainWork<BF16>(a, l, plan, item, packed, scratch).run();
    case DType::f16:
      return TrainWork<F16>(a, l, plan, item, packed, scratch).run();
  }
}
