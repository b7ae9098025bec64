// The dense convolution over the register tiles of tile_generic.h, which says what may not be done here.
//
// A window's rows are runs of kernel * Cin neighbouring floats of a channels_last image, so the convolution is a
// product whose left rows have `kernel` segments: no im2col. The image's rows are copied once, to fp32 with zeros
// around them.
//
// No #pragma once: included once a tier.

template <class Storage>
struct ConvWork {
  using Element = typename Storage::Element;
  const ConvArgs& a;
  const ConvLayout& l;
  const ConvItem& item;
  float* scratch;
  V::T lo, hi;

  ConvWork(const ConvArgs& a_, const ConvLayout& l_, const ConvItem& item_, float* scratch_)
      : a(a_), l(l_), item(item_), scratch(scratch_), lo(V::set(a_.activation.lo)), hi(V::set(a_.activation.hi)) {}

  // `rows` output pixels from the `pixel`-th on; their windows are `left`'s rows.
  void products(const Rows& left, int64_t pixel, int64_t rows, float* sums) {
    const int64_t vectors = l.out_padded / V::width, depth = left.segments * left.depth;
    for (int64_t panel = item.panel_begin; panel < item.panel_end; ++panel) {
      const int64_t v = panel * l.panel, width = min64(l.panel, vectors - v);
      const float* w = a.packed + l.w + v * V::width * depth;
      const Sums start{a.packed + l.b + v * V::width, nullptr, width * V::width};
      Output<Storage> out;
      out.y = static_cast<Element*>(a.y) + pixel * a.dims.out_channels + v * V::width;
      out.y_stride = a.dims.out_channels;
      out.x = nullptr;
      out.x_stride = 0;
      out.channels = static_cast<int>(a.dims.out_channels - v * V::width);
      out.bounded = bounds(a.activation);
      out.lo = lo;
      out.hi = hi;
      if constexpr (sizeof(Element) == sizeof(float)) {
        product(width, left, rows, w, WriteOutput{start, out});
      } else {
        product(width, left, rows, w, KeepSum{start, sums});
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < width; ++j)
            out.write(r, static_cast<int>(j), V::load(sums + (r * width + j) * V::width));
      }
    }
  }

  // Pixels [0, count) of a row of x, as fp32, channels next to each other.
  void copy_pixels(const Element* x, int64_t pixel_stride, int64_t count, float* out) const {
    const int64_t channels = a.dims.in_channels;
    if (a.x_stride_channel == 1 && (count == 1 || pixel_stride == channels))
      return widen_row<Storage>(x, 0, 1, count * channels, 0, out);
    for (int64_t p = 0; p < count; ++p, x += pixel_stride)
      for (int64_t c = 0; c < channels; ++c) *out++ = Storage::load_one(x + c * a.x_stride_channel);
  }

  void window() {
    const int64_t channels = a.dims.in_channels, kernel = a.dims.kernel;
    const int64_t columns = max64(a.pad_left + a.width, (a.out_width - 1) * a.stride + kernel);
    const int64_t pitch = columns * channels;
    float* sums = scratch + kernel * pitch;
    int64_t held_image = -1, held_end = 0;  // rows of which image, up to which one, the buffer holds
    for (int64_t line = item.line_begin; line < item.line_end; ++line) {
      const int64_t image = line / a.out_height, top = line % a.out_height * a.stride - a.pad_top;
      // The rows that this window shares with the one above move up; only the others are copied.
      int64_t dy = 0;
      if (image == held_image && held_end > top) {
        dy = held_end - top;
        const float* from = scratch + (kernel - dy) * pitch;
        for (int64_t i = 0; i < dy * pitch; ++i) scratch[i] = from[i];
      }
      for (; dy < kernel; ++dy) {
        float* to = scratch + dy * pitch;
        const int64_t row = top + dy;
        if (row < 0 || row >= a.height) {
          for (int64_t i = 0; i < pitch; ++i) to[i] = 0;
          continue;
        }
        for (int64_t i = 0; i < a.pad_left * channels; ++i) to[i] = 0;
        copy_pixels(static_cast<const Element*>(a.x) + image * a.x_stride_image + row * a.x_stride_row,
                    a.x_stride_pixel, a.width, to + a.pad_left * channels);
        for (int64_t i = (a.pad_left + a.width) * channels; i < pitch; ++i) to[i] = 0;
      }
      held_image = image;
      held_end = top + kernel;
      products({scratch, a.stride * channels, kernel * channels, kernel, pitch}, line * a.out_width, a.out_width, sums);
    }
  }

  void pointwise() {
    const int64_t pixels = a.batch * a.height * a.width, image_pixels = a.height * a.width;
    const int64_t channels = a.dims.in_channels;
    const bool direct = sizeof(Element) == sizeof(float) && a.x_stride_channel == 1 &&
                        a.x_stride_row == a.width * a.x_stride_pixel && a.x_stride_image == a.height * a.x_stride_row;
    float* sums = scratch + kPointwiseLine * channels;
    const int64_t end = min64(item.line_end * kPointwiseLine, pixels);
    for (int64_t pixel = item.line_begin * kPointwiseLine; pixel < end; pixel += kPointwiseLine) {
      const int64_t rows = min64(kPointwiseLine, end - pixel);
      if (direct) {
        products({reinterpret_cast<const float*>(a.x) + pixel * a.x_stride_pixel, a.x_stride_pixel, channels}, pixel,
                 rows, sums);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t image = (pixel + r) / image_pixels, at = (pixel + r) % image_pixels;
        copy_pixels(static_cast<const Element*>(a.x) + image * a.x_stride_image + at / a.width * a.x_stride_row +
                        at % a.width * a.x_stride_pixel,
                    0, 1, scratch + r * channels);
      }
      products({scratch, channels, channels}, pixel, rows, sums);
    }
  }

  void run() { is_pointwise(a) ? pointwise() : window(); }
};

static size_t conv_scratch_floats(const ConvArgs& a, const ConvLayout& l) {
  const int64_t panel = l.panel * V::width;
  if (is_pointwise(a)) return static_cast<size_t>(kPointwiseLine * (a.dims.in_channels + panel));
  const int64_t columns = max64(a.pad_left + a.width, (a.out_width - 1) * a.stride + a.dims.kernel);
  return static_cast<size_t>(a.dims.kernel * columns * a.dims.in_channels + a.out_width * panel);
}

static void conv_work(const ConvArgs& a, const ConvLayout& l, const ConvItem& item, float* scratch) {
  switch (a.dtype) {
    case DType::f32:
      return ConvWork<F32>(a, l, item, scratch).run();
    case DType::bf16:
      return ConvWork<BF16>(a, l, item, scratch).run();
    case DType::f16:
      return ConvWork<F16>(a, l, item, scratch).run();
  }
}
