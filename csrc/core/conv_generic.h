// The dense convolution over the register tiles of tile_generic.h, which says what may not be done here.
//
// No im2col: a window is read where it lies, as the segments of a left row. Of a channels_last image it is `kernel`
// runs of kernel * Cin neighbouring numbers, of an NCHW image kernel * Cin runs of `kernel`. The image's rows are
// copied once, as Real with zeros around them, in whichever of the two orders they come: reordering a picture's pixels
// one by one costs as much as a quarter of the stem's arithmetic. The weights are few, so it is they that are brought
// into order.
//
// No #pragma once: included once a tier.

// Numbers of a padded input row, a channel.
static int64_t window_columns(const ConvArgs& a) {
  return max64(a.pad_left + a.width, (a.out_width - 1) * a.stride + a.dims.kernel);
}

// A line of output pixels whose windows are `segments` runs of Depth numbers in `left`, Step numbers from one pixel to
// the next. With both known to the compiler a tile needs one pointer for all its rows, and its loads step by constants:
// a depth of 27 is too short to pay for less. Tiles of one height only, the last one over its neighbour's pixels.
template <int Panel, int Depth, int Step>
NOINLINE void window_tiles(const Rows& left, int64_t pixels, const Real* weights, const Real* bias,
                           const Output<Own>& out) {
  constexpr int kHeight = V::kMaxRows[Panel], kWidth = Panel * V::width;
  for (int64_t pixel = 0; pixel < pixels; pixel += kHeight) {
    const int64_t first = min64(pixel, pixels - kHeight);
    V::T acc[kHeight][Panel];
    UNROLL for (int i = 0; i < kHeight; ++i) UNROLL for (int j = 0; j < Panel; ++j) acc[i][j] = V::set(0);
    // The lines that the tile after next writes, ahead: stores that miss wait for each other.
    UNROLL for (int i = 0; i < kHeight; ++i) __builtin_prefetch(out.y + (pixel + 2 * kHeight + i) * out.y_stride, 1, 3);
    const Real *a = left.first + first * Step, *b = weights;
    for (int64_t segment = left.segments; segment > 0; segment -= 3) {
      UNROLL for (int k = 0; k < Depth * 3; ++k) {
        if (k && k % Depth == 0) a += left.step - Depth;
        // Windows overlap: a compiler that knows would keep pixels for the next k, in registers that there are not.
        __asm__("" : "+r"(a));
        V::T w[Panel];
        UNROLL for (int j = 0; j < Panel; ++j) w[j] = V::load(b + k * kWidth + j * V::width);
        UNROLL for (int i = 0; i < kHeight; ++i) {
          const V::T p = V::broadcast(a + i * Step + k);
          UNROLL for (int j = 0; j < Panel; ++j) acc[i][j] = V::fma(p, w[j], acc[i][j]);
        }
      }
      a += left.step + 2 * Depth;
      b += 3 * Depth * kWidth;
    }
    // Last, because every sum on the way rounds the more, the larger it is.
    UNROLL for (int j = 0; j < Panel; ++j) {
      const V::T b_j = V::load(bias + j * V::width);
      UNROLL for (int i = 0; i < kHeight; ++i) acc[i][j] = V::add(acc[i][j], b_j);
    }
    Real* y = out.y + first * out.y_stride;
    if (out.channels >= kWidth) {
      UNROLL for (int i = 0; i < kHeight; ++i) UNROLL for (int j = 0; j < Panel; ++j) {
        V::store(y + i * out.y_stride + j * V::width, V::clamp(acc[i][j], out.lo, out.hi));
      }
    } else {
      UNROLL for (int i = 0; i < kHeight; ++i) UNROLL for (int j = 0; j < Panel; ++j)
          out.write(first + i, j, acc[i][j]);
    }
  }
}

template <int Panel, int Depth, int Step>
ALWAYS_INLINE bool window_tiles_of_width(int64_t width, const Rows& left, int64_t pixels, const Real* weights,
                                         const Real* bias, const Output<Own>& out) {
  if constexpr (Panel >= 1) {
    if (width != Panel) return window_tiles_of_width<Panel - 1, Depth, Step>(width, left, pixels, weights, bias, out);
    if (pixels < V::kMaxRows[Panel]) return false;
    window_tiles<Panel, Depth, Step>(left, pixels, weights, bias, out);
    return true;
  }
  return false;
}

// The windows that stems have: 3 x 3, stride 2, of planes or of pixels with 3 channels. False for others: each kind
// here is compiled for every panel, and is long code.
static bool stem_tiles(int64_t width, const Rows& left, int64_t pixels, const Real* weights, const Real* bias,
                       const Output<Own>& out) {
  constexpr int P = V::kMaxPanel;
  if (left.segments == 1) return false;
  if (left.depth == 3 && left.stride == 2)
    return window_tiles_of_width<P, 3, 2>(width, left, pixels, weights, bias, out);
  if (left.depth == 9 && left.stride == 6)
    return window_tiles_of_width<P, 9, 6>(width, left, pixels, weights, bias, out);
  return false;
}

template <class Storage>
struct ConvWork {
  using Element = typename Storage::Element;
  const ConvArgs& a;
  const ConvLayout& l;
  const ConvItem& item;
  Real* scratch;
  const Real* packed;
  V::T lo, hi;

  ConvWork(const ConvArgs& a_, const ConvLayout& l_, const ConvItem& item_, float* scratch_)
      : a(a_),
        l(l_),
        item(item_),
        scratch(reinterpret_cast<Real*>(scratch_)),
        packed(reinterpret_cast<const Real*>(a_.packed)),
        lo(V::set(a_.activation.lo)),
        hi(V::set(a_.activation.hi)) {}

  // `rows` output pixels from the `pixel`-th on; their windows are `left`'s rows. weights: all panels, in `left`'s
  // order.
  void products(const Rows& left, const Real* weights, int64_t pixel, int64_t rows, Real* sums) const {
    const int64_t vectors = l.out_padded / V::width, depth = left.segments * left.depth;
    for (int64_t panel = item.panel_begin; panel < item.panel_end; ++panel) {
      const int64_t v = panel * l.panel, width = min64(l.panel, vectors - v);
      const Real* w = weights + v * V::width * depth;
      Output<Storage> out;
      out.y = static_cast<Element*>(a.y) + pixel * a.dims.out_channels + v * V::width;
      out.y_stride = a.dims.out_channels;
      out.x = nullptr;
      out.x_stride = 0;
      out.channels = static_cast<int>(a.dims.out_channels - v * V::width);
      out.bounded = bounds(a.activation);
      out.lo = lo;
      out.hi = hi;
      const Real* bias = packed + l.b + v * V::width;
      if constexpr (Storage::kOwn) {
        if (!stem_tiles(width, left, rows, w, bias, out)) product_in_parts(width, left, rows, w, bias, sums, out);
      } else {
        const int channels = static_cast<int>(width * V::width);
        const Output<Own> wide = {sums, channels, nullptr, 0, channels, out.bounded, lo, hi};
        if (!stem_tiles(width, left, rows, w, bias, wide))
          product(width, left, rows, w, KeepSum{{bias, nullptr, channels}, sums});
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < width; ++j)
            out.write(r, static_cast<int>(j), V::load(sums + (r * width + j) * V::width));
      }
    }
  }

  // Parts of a long depth are added as wholes, as those of a block's hidden channels are: it keeps rounding errors
  // down.
  static void product_in_parts(int64_t width, Rows left, int64_t rows, const Real* w, const Real* bias, Real* sums,
                               const Output<Own>& out) {
    constexpr int64_t kDepth = 128;
    const int64_t pitch = width * V::width, depth = left.depth;
    const int64_t parts = left.segments == 1 ? ceil_div(depth, kDepth) : 1;
    if (parts == 1) return product(width, left, rows, w, WriteOutput{{kZeros, bias, 0}, out});
    const Real* first = left.first;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = depth * part / parts, end = depth * (part + 1) / parts;
      left.first = first + begin;
      left.depth = end - begin;
      const Sums start = part == 0 ? Sums{bias, nullptr, pitch} : Sums{kZeros, sums, pitch};
      const Fetch behind = {w + end * pitch, (end - begin) * pitch * static_cast<int64_t>(sizeof(Real))};
      if (part + 1 < parts) {
        product(width, left, rows, w + begin * pitch, KeepSum{start, sums}, behind);
        continue;
      }
      // Lines of y that lie far apart, each written for the first time: stores that miss wait for each other.
      for (int64_t row = 0; row < rows; ++row) __builtin_prefetch(out.y + row * out.y_stride, 1, 3);
      product(width, left, rows, w + begin * pitch, WriteOutput{start, out}, behind);
    }
  }

  // Pixels [0, count) of a row of x, as Real, channels next to each other.
  void copy_pixels(const Element* x, int64_t pixel_stride, int64_t count, Real* out) const {
    const int64_t channels = a.dims.in_channels;
    if (a.x_stride_channel == 1 && (count == 1 || pixel_stride == channels))
      return widen_row<Storage>(x, 0, 1, count * channels, 0, out);
    for (int64_t p = 0; p < count; ++p, x += pixel_stride)
      for (int64_t c = 0; c < channels; ++c) *out++ = Storage::load_one(x + c * a.x_stride_channel);
  }

  // The packed weights [panel][k][k][Cin][vectors] as [panel][k][Cin][k][vectors].
  void weights_for_planes(Real* out) const {
    const int64_t channels = a.dims.in_channels, kernel = a.dims.kernel, vectors = l.out_padded / V::width;
    const Real* w = packed + l.w;
    for (int64_t v = 0; v < vectors; v += l.panel) {
      const int64_t width = min64(l.panel, vectors - v) * V::width;
      for (int64_t dy = 0; dy < kernel; ++dy)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t dx = 0; dx < kernel; ++dx, out += width) {
            const Real* from = w + ((dy * kernel + dx) * channels + c) * width;
            for (int64_t i = 0; i < width; i += V::width) V::store(out + i, V::load(from + i));
          }
      w += kernel * kernel * channels * width;
    }
  }

  // One row of x between `pad_left` zeros and as many as `columns` leave: channels next to each other, or plane by
  // plane.
  void copy_row(const Element* x, bool planes, int64_t columns, Real* out) const {
    const int64_t channels = a.dims.in_channels, each = planes ? 1 : channels;
    for (int64_t plane = 0; plane < (planes ? channels : 1); ++plane, out += columns * each) {
      const int64_t begin = a.pad_left * each, end = (a.pad_left + a.width) * each;
      for (int64_t i = 0; i < begin; ++i) out[i] = 0;
      if (planes)
        widen_row<Storage>(x + plane * a.x_stride_channel, 0, 1, a.width, 0, out + begin);
      else
        copy_pixels(x, a.x_stride_pixel, a.width, out + begin);
      for (int64_t i = end; i < columns * each; ++i) out[i] = 0;
    }
  }

  void window() {
    const int64_t channels = a.dims.in_channels, kernel = a.dims.kernel;
    const int64_t columns = window_columns(a), pitch = columns * channels;
    const bool planes = a.x_stride_pixel == 1 && a.x_stride_channel != 1 && channels > 1;
    Real* sums = scratch + kernel * pitch;
    const Real* weights = packed + l.w;
    if (planes) {
      Real* reordered = sums + a.out_width * l.panel * V::width;
      weights_for_planes(reordered);
      weights = reordered;
    }
    const Rows left = planes ? Rows{scratch, a.stride, kernel, kernel * channels, columns}
                             : Rows{scratch, a.stride * channels, kernel * channels, kernel, pitch};
    int64_t held_image = -1, held_end = 0;  // rows of which image, up to which one, the buffer holds
    for (int64_t line = item.line_begin; line < item.line_end; ++line) {
      const int64_t image = line / a.out_height, top = line % a.out_height * a.stride - a.pad_top;
      // The rows that this window shares with the one above move up; only the others are copied.
      int64_t dy = 0;
      if (image == held_image && held_end > top) {
        dy = held_end - top;
        const Real* from = scratch + (kernel - dy) * pitch;
        for (int64_t i = 0; i < dy * pitch; ++i) scratch[i] = from[i];
      }
      for (; dy < kernel; ++dy) {
        Real* to = scratch + dy * pitch;
        const int64_t row = top + dy;
        if (row < 0 || row >= a.height) {
          for (int64_t i = 0; i < pitch; ++i) to[i] = 0;
          continue;
        }
        copy_row(static_cast<const Element*>(a.x) + image * a.x_stride_image + row * a.x_stride_row, planes, columns,
                 to);
      }
      held_image = image;
      held_end = top + kernel;
      products(left, weights, line * a.out_width, a.out_width, sums);
    }
  }

  void pointwise() {
    const int64_t pixels = a.batch * a.height * a.width, image_pixels = a.height * a.width;
    const int64_t channels = a.dims.in_channels;
    const bool direct = Storage::kOwn && a.x_stride_channel == 1 && a.x_stride_row == a.width * a.x_stride_pixel &&
                        a.x_stride_image == a.height * a.x_stride_row;
    Real* sums = scratch + kPointwiseLine * channels;
    const int64_t end = min64(item.line_end * kPointwiseLine, pixels);
    for (int64_t pixel = item.line_begin * kPointwiseLine; pixel < end; pixel += kPointwiseLine) {
      const int64_t rows = min64(kPointwiseLine, end - pixel);
      if (direct) {
        products({reinterpret_cast<const Real*>(a.x) + pixel * a.x_stride_pixel, a.x_stride_pixel, channels},
                 packed + l.w, pixel, rows, sums);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t image = (pixel + r) / image_pixels, at = (pixel + r) % image_pixels;
        copy_pixels(static_cast<const Element*>(a.x) + image * a.x_stride_image + at / a.width * a.x_stride_row +
                        at % a.width * a.x_stride_pixel,
                    0, 1, scratch + r * channels);
      }
      products({scratch, channels, channels}, packed + l.w, pixel, rows, sums);
    }
  }

  void run() { is_pointwise(a) ? pointwise() : window(); }
};

static size_t conv_scratch_floats(const ConvArgs& a, const ConvLayout& l) {
  const int64_t panel = l.panel * V::width;
  if (is_pointwise(a)) return floats_for(kPointwiseLine * (a.dims.in_channels + panel));
  const int64_t weights = a.dims.kernel * a.dims.kernel * a.dims.in_channels * l.out_padded;
  return floats_for(a.dims.kernel * window_columns(a) * a.dims.in_channels + a.out_width * panel + weights);
}

static void conv_work(const ConvArgs& a, const ConvLayout& l, const ConvItem& item, float* scratch) {
  with_storage(a.dtype, [&](auto storage) { ConvWork<decltype(storage)>(a, l, item, scratch).run(); });
}
