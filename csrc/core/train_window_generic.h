// The phases of train_window.h over the tiles of tile_generic.h, which says what may not be done here, conv_generic.h
// and train_generic.h.
//
// A window is read where it lies: `kernel` runs of kernel * Cin neighbouring values, in copies of the image's rows with
// zeros around them and the channels of a pixel next to each other.
//
// No #pragma once: included once a tier.

// ---- Outer products in double precision -----------------------------------------------------------------------------

// sums[i][j] += sum_p a[p][i] * b[p][j], a tile of it; pixels are a_step and b_step values apart.
template <int Height, int Width>
NOINLINE void double_outer_tile(const double* a, int64_t a_step, const double* b, int64_t b_step, int64_t pixels,
                                double* sums, int64_t pitch) {
  Doubles acc[Height][Width] = {};
  for (; pixels > 0; --pixels, a += a_step, b += b_step) {
    const Doubles* w = reinterpret_cast<const Doubles*>(b);
    UNROLL for (int i = 0; i < Height; ++i) UNROLL for (int j = 0; j < Width; ++j) acc[i][j] += a[i] * w[j];
  }
  UNROLL for (int i = 0; i < Height; ++i)
      UNROLL for (int j = 0; j < Width; ++j) reinterpret_cast<Doubles*>(sums + i * pitch)[j] += acc[i][j];
}

// The sums of b alone, in several parts: one would wait for its last addition at every pixel.
template <int Width>
NOINLINE void double_sums(const double* b, int64_t b_step, int64_t pixels, double* sums) {
  constexpr int kParts = 4;
  Doubles parts[kParts][Width] = {};
  for (; pixels >= kParts; pixels -= kParts)
    UNROLL for (int part = 0; part < kParts; ++part, b += b_step) UNROLL for (int j = 0; j < Width; ++j)
        parts[part][j] += widened(b + j * kDoubles);
  for (; pixels > 0; --pixels, b += b_step)
    UNROLL for (int j = 0; j < Width; ++j) parts[0][j] += widened(b + j * kDoubles);
  UNROLL for (int j = 0; j < Width; ++j) put_row(
      sums + j * kDoubles, widened(sums + j * kDoubles) + ((parts[0][j] + parts[1][j]) + (parts[2][j] + parts[3][j])));
}

template <int Height, int Width>
ALWAYS_INLINE void double_outer_rows(const double* a, int64_t a_step, int64_t rows, const double* b, int64_t b_step,
                                     int64_t pixels, double* sums, int64_t pitch) {
  for (; rows >= Height; rows -= Height, a += Height, sums += Height * pitch)
    double_outer_tile<Height, Width>(a, a_step, b, b_step, pixels, sums, pitch);
  if constexpr (Height > 1) double_outer_rows<Height - 1, Width>(a, a_step, rows, b, b_step, pixels, sums, pitch);
}

// `rows` values of a against `vectors` registers of b, and the sums of b if `totals`. A tile has nine rows, those of
// three pixels in three colours, or three: 3 x 3 is as large as AVX2's registers allow.
template <int Width = 3>
ALWAYS_INLINE void double_outer_product(const double* a, int64_t a_step, int64_t rows, const double* b, int64_t b_step,
                                        int64_t vectors, int64_t pixels, double* sums, int64_t pitch, double* totals) {
  constexpr int kHeight = V::kMaxRows[2] >= 8 ? 9 : 3;
  for (; vectors >= Width; vectors -= Width, b += Width * kDoubles, sums += Width * kDoubles) {
    double_outer_rows<kHeight, Width>(a, a_step, rows, b, b_step, pixels, sums, pitch);
    if (totals) {
      double_sums<Width>(b, b_step, pixels, totals);
      totals += Width * kDoubles;
    }
  }
  if constexpr (Width > 1)
    double_outer_product<Width - 1>(a, a_step, rows, b, b_step, vectors, pixels, sums, pitch, totals);
}

// ---- One work item --------------------------------------------------------------------------------------------------

struct WindowBuffers {
  int64_t columns, pitch;               // of a copied row: pixels, and values, with a register's more
  int64_t rows, row, e, sums, t, size;  // offsets in floats
};

static WindowBuffers window_buffers(const WindowArgs& w, const ConvLayout& l) {
  const ConvArgs& a = w.conv;
  WindowBuffers b = {};
  int64_t at = 0;
  const auto section = [&at](int64_t floats) __attribute__((always_inline)) {
    const int64_t begin = at;
    at += ceil_div(floats, 16) * 16;
    return begin;
  };
  b.columns = window_columns(a);
  b.pitch = b.columns * a.dims.in_channels + V::width;
  const bool backward = w.phase == WindowPhase::backward;
  b.rows = section(a.dims.kernel * b.pitch * (backward ? 1 : 2));
  b.row = section(b.pitch);
  if (backward) {
    b.e = section(a.out_width * l.out_padded);
    b.sums = section(a.out_width * l.panel * V::width);
    b.t = section(a.dims.kernel * a.dims.kernel * a.dims.in_channels * l.out_padded);
  }
  b.size = at;
  return b;
}

static size_t window_scratch_floats(const WindowArgs& w, const ConvLayout& l) {
  return static_cast<size_t>(window_buffers(w, l).size);
}

template <class Storage>
struct WindowWork {
  using Element = typename Storage::Element;
  const WindowArgs& w;
  const ConvArgs& a;
  const ConvLayout& l;
  const WindowItem& item;
  float* scratch;
  const WindowBuffers b;
  const int64_t channels, kernel, run, step;  // run: values of a window in one row; step: from a window to the next
  const ConvItem panels;                      // all
  const ConvWork<Storage> conv;

  WindowWork(const WindowArgs& w_, const ConvLayout& l_, const WindowItem& item_, float* scratch_)
      : w(w_),
        a(w_.conv),
        l(l_),
        item(item_),
        scratch(scratch_),
        b(window_buffers(w_, l_)),
        channels(a.dims.in_channels),
        kernel(a.dims.kernel),
        run(kernel * channels),
        step(a.stride * channels),
        panels{0, 0, 0, ceil_div(l_.out_padded / V::width, l_.panel)},
        conv(a, l_, panels, scratch_) {}

  // A row's planes -> pixels. Of a picture: twice as fast as with a number of channels that is not known here.
  template <int Channels, class Value>
  void interleave(const float* planes, Value* out) const {
    for (int64_t p = 0; p < b.columns; ++p)
      UNROLL for (int c = 0; c < Channels; ++c)* out++ = static_cast<Value>(planes[c * b.columns + p]);
  }

  template <class Value>
  void copy_row(int64_t image, int64_t row, Value* out) const {
    const int64_t size = b.columns * channels;
    if (row < 0 || row >= a.height) {
      for (int64_t i = 0; i < size; ++i) out[i] = 0;
      return;
    }
    const bool planes = a.x_stride_pixel == 1 && a.x_stride_channel != 1 && channels > 1;
    float* copy = scratch + b.row;
    conv.copy_row(static_cast<const Element*>(a.x) + image * a.x_stride_image + row * a.x_stride_row, planes, b.columns,
                  copy);
    if (!planes) {
      for (int64_t i = 0; i < size; ++i) out[i] = static_cast<Value>(copy[i]);
      return;
    }
    if (channels == 3) return interleave<3>(copy, out);
    for (int64_t c = 0; c < channels; ++c, copy += b.columns)
      for (int64_t p = 0; p < b.columns; ++p) out[p * channels + c] = static_cast<Value>(copy[p]);
  }

  // Calls body(line, the rows under its windows) for each of the item's lines. The rows that a window shares with the
  // one above move up; only the others are copied.
  template <class Value, class Body>
  ALWAYS_INLINE void for_each_line(const Body& body) const {
    Value* rows = reinterpret_cast<Value*>(scratch + b.rows);
    for (int64_t i = 0; i < kernel * b.pitch; ++i) rows[i] = 0;
    int64_t held_image = -1, held_end = 0;  // rows of which image, up to which one, are there
    for (int64_t line = item.line_begin; line < item.line_end; ++line) {
      const int64_t image = line / a.out_height, top = line % a.out_height * a.stride - a.pad_top;
      int64_t dy = 0;
      if (image == held_image && held_end > top) {
        dy = held_end - top;
        const Value* from = rows + (kernel - dy) * b.pitch;
        for (int64_t i = 0; i < dy * b.pitch; ++i) rows[i] = from[i];
      }
      for (; dy < kernel; ++dy) copy_row(image, top + dy, rows + dy * b.pitch);
      held_image = image;
      held_end = top + kernel;
      body(line, static_cast<const Value*>(rows));
    }
  }

  void gram() const {
    const int64_t run_pitch = item.pitch / kernel, vectors = ceil_div(run, kDoubles);
    for_each_line<double>([&](int64_t, const double* rows) __attribute__((always_inline)) {
      for (int64_t right = 0; right < kernel; ++right) {
        const double* of = rows + right * b.pitch;
        double* sums = item.sums + right * run_pitch;
        for (int64_t left = 0; left <= right; ++left)
          double_outer_product(rows + left * b.pitch, step, run, of, step, vectors, a.out_width,
                               sums + (1 + left * run) * item.pitch, item.pitch, left == 0 ? sums : nullptr);
      }
    });
  }

  // A line of gy and e -> g in e's place, and its sums.
  void through_activation(int64_t pixel, float* e) const {
    const int64_t out_channels = a.dims.out_channels, pitch = l.out_padded;
    const Open open(a.activation);
    for_panels(out_channels, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::count;
      const PanelLanes<Storage, kVectors> lanes(out_channels - c);
      const Element* gy = static_cast<const Element*>(w.gy) + pixel * out_channels + c;
      PixelSums<kVectors> sum;
      for_pixels(vectors, a.out_width, [&](int64_t p, int part) __attribute__((always_inline)) {
        UNROLL for (int v = 0; v < kVectors; ++v) {
          float* at = e + p * pitch + c + v * V::width;
          const V::T kept = open.keep(lanes.load(gy + p * out_channels, v), V::load(at));
          V::store(at, kept);
          sum.add(part, v, kept);
        }
      });
      sum.add_to(item.sums + c);
    });
  }

  void backward() const {
    constexpr int64_t kFlush = 1024;  // pixels whose products are summed in fp32
    const int64_t depth = kernel * run, vectors = l.out_padded / V::width;
    float *g = scratch + b.e, *t = scratch + b.t;
    ConvArgs to_e = a;
    to_e.y = g;
    to_e.dims.out_channels = l.out_padded;
    to_e.activation = {-kInfinity, kInfinity};
    const ConvWork<F32> forward(to_e, l, panels, nullptr);
    for (int64_t i = 0; i < depth * l.out_padded; ++i) t[i] = 0;
    int64_t summed = 0;
    for_each_line<float>([&](int64_t line, const float* rows) __attribute__((always_inline)) {
      forward.products({rows, step, run, kernel, b.pitch}, a.packed + l.w, 0, a.out_width, scratch + b.sums);
      through_activation(line * a.out_width, g);
      for (int64_t v = 0; v < vectors; v += l.panel)
        for (int64_t dy = 0; dy < kernel; ++dy)
          outer_product(min64(l.panel, vectors - v), rows + dy * b.pitch, step, run, g + v * V::width, l.out_padded,
                        a.out_width, t + dy * run * l.out_padded + v * V::width, l.out_padded);
      summed += a.out_width;
      if (summed < kFlush && line + 1 < item.line_end) return;
      summed = 0;
      for (int64_t i = 0; i < depth * l.out_padded; i += V::width) {
        add_lanes(item.sums + item.pitch + i, V::load(t + i));
        V::store(t + i, V::set(0));
      }
    });
  }

  void run_phase() const { w.phase == WindowPhase::gram ? gram() : backward(); }
};

static void window_work(const WindowArgs& w, const ConvLayout& l, const WindowItem& item, float* scratch) {
  switch (w.conv.dtype) {
    case DType::f32:
      return WindowWork<F32>(w, l, item, scratch).run_phase();
    case DType::bf16:
      return WindowWork<BF16>(w, l, item, scratch).run_phase();
    case DType::f16:
      return WindowWork<F16>(w, l, item, scratch).run_phase();
  }
}
