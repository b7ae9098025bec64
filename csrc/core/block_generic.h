// The fused block over the register tiles of tile_generic.h and the depthwise pass of depthwise_generic.h. The former
// says what may not be done here.
//
// Data flow of one work item, for a band of output rows at a time:
//
//   for each chunk of hidden channels
//     for each group of output rows
//       expand     x rows  -> ring   (only rows the ring does not hold yet)      [pixel][chunk], L1
//       depthwise  ring    -> d                                                  [pixel][chunk], L1
//       project    d       -> acc += , or y if this was the last chunk           [pixel][out_padded]
//
// The hidden tensor exists only as a few rows of one chunk. When an item has several bands each chunk keeps a ring of
// its own, so that rows shared by two bands are not computed twice.
//
// No #pragma once: included once a tier.

// ---- Expand: where its rows go --------------------------------------------------------------------------------------

struct ExpandEpilogue {
  const Real* bias;
  Real* out;
  const int32_t* offset;  // where a row of the product lies in the ring
  const Clamp* clamp;
  struct Done {
    Real* out;
    const int32_t* offset;
    V::T lo, hi;
    ALWAYS_INLINE void store(int64_t row, int j, V::T v) const {
      V::store(out + offset[row] + j * V::width, V::clamp(v, lo, hi));
    }
  };
  ALWAYS_INLINE V::T start(int j) const { return V::load(bias + j * V::width); }
  ALWAYS_INLINE Done when_done() const { return {out, offset, V::broadcast(&clamp->lo), V::broadcast(&clamp->hi)}; }
  ALWAYS_INLINE void skip(int64_t rows) { offset += rows; }
};

// Whether the depthwise pass reads 16-bit storage itself: where a patch has several rows, so that a pixel is converted
// little more than once.
constexpr bool kPatchesOfHalves = V::kMaxPatchHeight > 1;

// ---- One work item --------------------------------------------------------------------------------------------------

// How an item's buffers lie in its scratch.
struct Buffers {
  bool widen;  // x is copied as Real first: what the expand product, or without expand the depthwise pass, cannot read
  int64_t bands;
  int64_t ring_rows, ring_pitch, ring_size, rings;
  int64_t wide_rows, wide_pitch;                    // copied x
  int64_t d, acc, ring, wide, rows, offsets, size;  // offsets in numbers (Real)
};

static Buffers buffers_of(const BlockArgs& a, const PackedLayout& l, const Plan& plan) {
  Buffers b = {};
  const int64_t reach = (a.dims.kernel - 1) * a.dilation + 1;
  const bool whole = a.dims.hidden_channels % V::width == 0;
  const bool read_as_stored = a.dtype == V::dtype || (!a.dims.expand && kPatchesOfHalves && a.dims.kernel == 3);
  b.widen = !read_as_stored || (!a.dims.expand && !whole);
  b.bands = ceil_div(ceil_div(a.out_height, plan.row_parts), plan.band_rows);
  b.ring_rows = a.dims.expand ? min64((plan.group_rows - 1) * a.stride + reach, a.height) : 0;
  // a ring's row: the image's columns and the padding that any output's taps can reach
  b.ring_pitch = plan.chunk;
  const int64_t columns = max64(a.pad_left + a.width, (a.out_width - 1) * a.stride + reach);
  b.ring_size = b.ring_rows * columns * plan.chunk;
  b.rings = b.bands > 1 ? ceil_div(l.hidden_padded, plan.chunk) : 1;
  // With one chunk every group copies the rows that are new to it, over those of which nobody is in need any more.
  const int64_t held_rows = l.hidden_padded <= plan.chunk ? plan.group_rows : plan.band_rows;
  b.wide_rows = b.widen ? min64(max64((held_rows - 1) * a.stride + reach, held_rows * a.stride), a.height) : 0;
  // Padded where whole vectors of it are read. Else a row is copied as if it were one pixel.
  b.wide_pitch = a.dims.expand && a.x_stride_pixel == a.dims.in_channels
                     ? a.dims.in_channels
                     : ceil_div(a.dims.in_channels, V::width) * V::width;
  b.d = 0;
  b.acc = b.d + plan.group_rows * a.out_width * plan.chunk;
  b.ring = b.acc + plan.band_rows * a.out_width * l.out_padded;
  b.wide = b.ring + b.rings * b.ring_size;
  constexpr int64_t kReal = sizeof(Real), kPointer = sizeof(Real*), kOffset = sizeof(int32_t);
  b.rows = ceil_div(b.wide + b.wide_rows * a.width * b.wide_pitch, kLine) * kLine;
  b.offsets = b.rows + plan.group_rows * a.dims.kernel * (kPointer / kReal);
  b.size = b.offsets + ceil_div(b.ring_rows * a.width * (kOffset / kReal), kLine) * kLine;
  return b;
}

static size_t scratch_floats(const BlockArgs& a, const PackedLayout& l, const Plan& plan) {
  return floats_for(buffers_of(a, l, plan).size);
}

// The only chunk's sums, as whole vectors of y.
template <class Storage>
struct KeepHalves : Sums {
  typename Storage::Element* y;
  ALWAYS_INLINE void store(int64_t row, int j, V::T v) const { Storage::store(y + row * stride + j * V::width, v); }
  ALWAYS_INLINE void skip(int64_t rows) { y += rows * stride; }
};

template <class Storage>
struct Item {
  using Element = typename Storage::Element;
  static constexpr bool kDirect = Storage::kOwn;  // products write y themselves
  const BlockArgs& a;
  const PackedLayout& l;
  const Plan& plan;
  const WorkItem& item;
  const Buffers b;
  const Real* packed;
  Real* partial;  // item.partial
  Real *d, *acc, *ring, *wide;
  void* rows;  // under the kernel's rows, for the depthwise pass
  int32_t* offsets;
  const Element* x;  // this image
  Element* y;
  V::T lo, hi, final_lo, final_hi;
  int64_t ring_columns;
  int64_t wide_first = 0;  // input row that wide's first row holds

  Item(const BlockArgs& a_, const PackedLayout& l_, const Plan& plan_, const WorkItem& item_, float* memory)
      : a(a_), l(l_), plan(plan_), item(item_), b(buffers_of(a_, l_, plan_)) {
    Real* const scratch = reinterpret_cast<Real*>(memory);
    packed = reinterpret_cast<const Real*>(a.packed);
    partial = reinterpret_cast<Real*>(item.partial);
    d = scratch + b.d;
    acc = scratch + b.acc;
    ring = scratch + b.ring;
    wide = scratch + b.wide;
    rows = scratch + b.rows;
    offsets = reinterpret_cast<int32_t*>(scratch + b.offsets);
    x = static_cast<const Element*>(a.x) + item.image * a.x_stride_image;
    y = static_cast<Element*>(a.y) + item.image * a.out_height * a.out_width * a.dims.out_channels;
    lo = V::set(a.activation.lo);
    hi = V::set(a.activation.hi);
    final_lo = V::set(a.final_activation.lo);
    final_hi = V::set(a.final_activation.hi);
    ring_columns = b.ring_rows ? b.ring_size / (b.ring_rows * plan.chunk) : 0;
  }

  // Where row is copied to.
  ALWAYS_INLINE Real* wide_row(int64_t row) const {
    return wide + (row - wide_first) % b.wide_rows * a.width * b.wide_pitch;
  }
  // Input row as Real: base and numbers between pixels.
  ALWAYS_INLINE const Real* input_row(int64_t row) const {
    if (b.widen) return wide_row(row);
    return reinterpret_cast<const Real*>(x) + row * a.x_stride_row;
  }
  ALWAYS_INLINE int64_t input_pitch() const { return b.widen ? b.wide_pitch : a.x_stride_pixel; }
  // Rows follow each other as pixels do, so several can be one matrix.
  ALWAYS_INLINE bool rows_adjoin() const { return b.widen || a.x_stride_row == a.width * a.x_stride_pixel; }

  // As many weights (in vectors) as a product has, from behind its own: panels follow each other, and so do the hidden
  // channels of a panel of the project's.
  ALWAYS_INLINE Fetch behind(const Real* w, int64_t vectors) const {
    return {w + vectors * V::width, vectors * V::width * static_cast<int64_t>(sizeof(Real))};
  }

  void expand_rows(int64_t begin, int64_t end, int64_t hidden, int64_t vectors, Real* chunk_ring, bool fetch_weights) {
    const int64_t pitch = b.ring_pitch, row_size = ring_columns * pitch;
    int32_t* to = offsets;
    for (int64_t row = begin; row < end; ++row) {
      int32_t at = static_cast<int32_t>((row % b.ring_rows) * row_size + a.pad_left * pitch);
      for (int64_t c = 0; c < a.width; ++c, at += static_cast<int32_t>(pitch)) *to++ = at;
    }
    const int64_t step = rows_adjoin() ? end - begin : 1;
    const int64_t depth = a.dims.in_channels;
    for (int64_t v = 0; v < vectors; v += l.hidden_panel) {
      const int64_t panel_begin = hidden / V::width + v;  // a whole number of panels from the start
      const int64_t width = min64(l.hidden_panel, l.hidden_padded / V::width - panel_begin);
      const Real* w = packed + l.w1 + panel_begin * V::width * depth;
      for (int64_t row = begin; row < end; row += step) {
        const ExpandEpilogue epilogue{packed + l.b1 + hidden + v * V::width, chunk_ring + v * V::width,
                                      offsets + (row - begin) * a.width, &a.activation};
        product(width, {input_row(row), input_pitch(), depth}, step * a.width, w, epilogue,
                fetch_weights && row == begin ? behind(w, depth * width) : Fetch{});
      }
    }
  }

  // Output rows [begin, end) of d. row_at: where an input row begins, stored as From; the rest is as in Depthwise.
  template <class From, class Row>
  void depthwise_from(int64_t begin, int64_t end, int64_t hidden, int64_t vectors, const Row& row_at, int64_t pitch,
                      int64_t first_column, int64_t columns) {
    const int64_t k = a.dims.kernel;
    const auto to = static_cast<const typename From::Element**>(rows);
    find_rows(a, begin, end, to, row_at);
    Depthwise<ToReal<From>> p;
    p.rows = to;
    p.group = end - begin;
    p.pitch = pitch;
    p.first_column = first_column;
    p.width = columns;
    p.kernel = k;
    p.stride = a.stride;
    p.dilation = a.dilation;
    p.out_pitch = plan.chunk;
    p.out_width = a.out_width;
    p.runs = vectors;
    p.weights = packed + l.wd + hidden * k * k;
    p.bias = packed + l.b2 + hidden;
    p.out = d;
    p.clamp = a.activation;
    depthwise_rows(p);
  }

  void depthwise(int64_t begin, int64_t end, int64_t hidden, int64_t vectors, const Real* chunk_ring) {
    if (a.dims.expand) {  // the ring has its padding columns
      const auto row_at = [&](int64_t row) { return chunk_ring + (row % b.ring_rows) * ring_columns * b.ring_pitch; };
      depthwise_from<Own>(begin, end, hidden, vectors, row_at, b.ring_pitch, 0, ring_columns);
    } else if (b.widen) {
      const auto row_at = [&](int64_t row) { return wide_row(row) + hidden; };
      depthwise_from<Own>(begin, end, hidden, vectors, row_at, b.wide_pitch, -a.pad_left, a.width);
    } else if constexpr (Storage::kOwn || kPatchesOfHalves) {
      const auto row_at = [&](int64_t row) { return x + row * a.x_stride_row + hidden; };
      depthwise_from<Storage>(begin, end, hidden, vectors, row_at, a.x_stride_pixel, -a.pad_left, a.width);
    }
  }

  // Vectors of output channels in the panel of w2 that begins at vector v, and numbers in it for a hidden channel.
  ALWAYS_INLINE int64_t project_width(int64_t v) const { return min64(l.out_panel, l.out_padded / V::width - v); }
  ALWAYS_INLINE int64_t project_step(int64_t v) const {
    return l.out_pairs ? l.out_pairs * (V::width / 2) : project_width(v) * V::width;
  }
  // That panel, from channel `hidden` on.
  ALWAYS_INLINE const Real* project_weights(int64_t v, int64_t hidden) const {
    return packed + l.w2 + v * V::width * a.dims.hidden_channels + hidden * project_step(v);
  }

  // A part of d times that part of w2 that begins at output vector v.
  template <class Epilogue>
  void project_product(const Rows& left, int64_t rows, int64_t v, const Real* w, const Epilogue& epilogue,
                       const Fetch& fetch) const {
    product_or_paired(l.out_pairs, project_width(v), left, rows, w, epilogue, fetch);
  }

  // What project() reads after a panel of w2: the panel that begins at output vector v, for the same `depth` hidden
  // channels; behind the last panel the first, for the next chunk's. Not further ahead: all panels' parts for a chunk
  // of 1024 output channels fill L2 twice.
  Fetch next_panel(int64_t v, int64_t hidden, int64_t depth) const {
    if (v * V::width >= l.out_padded) {
      v = 0;
      hidden += depth;
      depth = min64(plan.chunk, min64(item.hidden_end, a.dims.hidden_channels) - hidden);
      if (depth <= 0) return {};
    }
    return {project_weights(v, hidden), depth * project_step(v) * static_cast<int64_t>(sizeof(Real))};
  }

  // Output rows [begin, end), hidden channels [hidden, hidden + depth), all output channels: on top of `sums`, or of
  // the bias if this is the first chunk; into y if `write`, else back into `sums`.
  void project(int64_t begin, int64_t end, int64_t hidden, int64_t depth, bool first, bool write, Real* sums,
               const Fetch& fetch_input, bool fetch_weights) {
    const int64_t vectors = l.out_padded / V::width;
    // The residual's rows may lie apart (a channel slice with gaps): then one row at a time.
    const bool by_row = write && a.residual && a.x_stride_row != a.width * a.x_stride_pixel;
    const int64_t step = by_row ? 1 : end - begin;
    // The only chunk, and nothing but its sums: whole vectors of them go where y wants them.
    const bool only_sums = write && first && !a.residual && !bounds(a.final_activation);
    // In 16 bits only of one vector of outputs, as the block with the largest image of all has, MobileNetV2's first.
    const bool write_halves = !kDirect && only_sums && l.out_pairs == 2 && a.dims.out_channels == V::width;
    for (int64_t v = 0; v < vectors; v += l.out_panel) {
      const Real* w = project_weights(v, hidden);
      const int64_t rest = a.dims.out_channels - v * V::width;
      const Real* bias = item.hidden_begin == 0 ? packed + l.b3 + v * V::width : kZeros;
      for (int64_t row = begin; row < end; row += step) {
        const int64_t at = (row - begin) * a.out_width, rows = step * a.out_width;
        const Rows left{d + at * plan.chunk, plan.chunk, depth};
        Real* to = sums + at * l.out_padded + v * V::width;
        Fetch fetch = {};
        if (v == 0 && row == begin && fetch_input.bytes)
          fetch = fetch_input;
        else if (fetch_weights && row == begin)
          fetch = next_panel(v + l.out_panel, hidden, depth);
        const Sums start{first ? bias : kZeros, first ? nullptr : to, l.out_padded};
        if constexpr (kDirect) {
          if (only_sums && rest >= project_width(v) * V::width) {
            Real* to_y = reinterpret_cast<Real*>(y) + row * a.out_width * a.dims.out_channels + v * V::width;
            project_product(left, rows, v, w, KeepSum{{bias, nullptr, a.dims.out_channels}, to_y}, fetch);
            continue;
          }
          if (write) {
            project_product(left, rows, v, w, WriteOutput<Storage>{start, output_rows(row, v)}, fetch);
            continue;
          }
        }
        if constexpr (!kDirect && V::kPairedPanel >= 2) {
          if (write_halves) {
            panel_product<true, 2>(left, rows, w, 2 * V::width, fetch,
                                   KeepHalves<Storage>{{bias, nullptr, V::width}, y + row * a.out_width * V::width});
            continue;
          }
        }
        project_product(left, rows, v, w, KeepSum{start, to}, fetch);
      }
    }
    if (!kDirect && write && !write_halves) write_rows(begin, end, sums, 1, 0);
  }

  // Finished sums -> y. 16-bit storage comes here from project too, but for one vector of outputs: products of their
  // own for each storage type would triple the code for the sake of one pass over the small tensor.
  void write_rows(int64_t begin, int64_t end, const Real* sums, int64_t splits, int64_t stride) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t v = 0; v < l.out_padded / V::width; ++v) {
        const Output<Storage> output = output_rows(row, v);
        const Real* p = sums + (row - begin) * a.out_width * l.out_padded + v * V::width;
        if (splits == 1)
          write_row(output, [&](int64_t c) __attribute__((always_inline)) { return V::load(p + c * l.out_padded); });
        else
          write_row(output, [&](int64_t c) __attribute__((always_inline)) {
            V::T sum = V::load(p + c * l.out_padded);
            for (int64_t s = 1; s < splits; ++s) sum = V::add(sum, V::load(p + c * l.out_padded + s * stride));
            return sum;
          });
      }
  }
  template <class Sum>
  ALWAYS_INLINE void write_row(const Output<Storage>& output, const Sum& sum) const {
    const int64_t width = a.out_width;
    if (output.channels >= V::width && !output.x && !output.bounded)
      for (int64_t c = 0; c < width; ++c) Storage::store(output.y + c * output.y_stride, sum(c));
    else
      for (int64_t c = 0; c < width; ++c) output.write(c, 0, sum(c));
  }

  ALWAYS_INLINE Output<Storage> output_rows(int64_t row, int64_t v) const {
    Output<Storage> o;
    o.y = y + row * a.out_width * a.dims.out_channels + v * V::width;
    o.y_stride = a.dims.out_channels;
    o.x = a.residual ? x + row * a.x_stride_row + v * V::width : nullptr;
    o.x_stride = a.x_stride_pixel;
    o.channels = static_cast<int>(a.dims.out_channels - v * V::width);
    o.bounded = bounds(a.final_activation);
    o.lo = final_lo;
    o.hi = final_hi;
    return o;
  }

  void widen_rows(int64_t begin, int64_t end) {
    const int64_t channels = a.dims.in_channels;
    const bool dense = b.wide_pitch == channels && a.x_stride_pixel == channels;
    for (int64_t row = begin; row < end; ++row) {
      const Element* from = x + row * a.x_stride_row;
      if (dense)
        widen_row<Storage>(from, 0, 1, a.width * channels, 0, wide_row(row));
      else
        widen_row<Storage>(from, a.x_stride_pixel, a.width, channels, b.wide_pitch, wide_row(row));
    }
  }

  void run() {
    if (a.dims.expand) clear_padding(ring, b.rings * b.ring_rows, ring_columns, a.pad_left, a.width, b.ring_pitch);
    for (int64_t band = item.row_begin; band < item.row_end; band += plan.band_rows) {
      const int64_t band_end = min64(band + plan.band_rows, item.row_end);
      // In a later band the rings already hold the rows that it shares with the band before.
      const int64_t held = band == item.row_begin || !a.dims.expand ? 0 : end_input_row(a, band);
      wide_first = max64(first_input_row(a, band), held);
      int64_t widened = wide_first;
      for (int64_t hidden = item.hidden_begin; hidden < item.hidden_end; hidden += plan.chunk) {
        const int64_t chunk = min64(plan.chunk, item.hidden_end - hidden);
        const int64_t vectors = ceil_div(chunk, V::width);
        Real* chunk_ring = ring + (b.rings > 1 ? hidden / plan.chunk : 0) * b.ring_size;
        int64_t expanded = max64(first_input_row(a, band), held);
        for (int64_t row = band; row < band_end; row += plan.group_rows) {
          const int64_t row_end = min64(row + plan.group_rows, band_end);
          // The first chunk's groups copy what is new to them, right before they read it.
          if (b.widen && hidden == item.hidden_begin) {
            const int64_t end = end_input_row(a, row_end);
            if (a.dims.expand && l.hidden_padded <= plan.chunk) wide_first = widened;  // its rows have to adjoin
            widen_rows(widened, end);
            widened = max64(widened, end);
          }
          if (a.dims.expand) {
            const int64_t begin = max64(expanded, first_input_row(a, row)), end = end_input_row(a, row_end);
            if (end > begin) expand_rows(begin, end, hidden, vectors, chunk_ring, row == band);
            expanded = max64(expanded, end);
          }
          depthwise(row, row_end, hidden, vectors, chunk_ring);
          const bool last = hidden + chunk >= item.hidden_end;
          Real* sums = (partial ? partial + (band - item.row_begin) * a.out_width * l.out_padded : acc) +
                       (row - band) * a.out_width * l.out_padded;
          // Without expand the depthwise pass is the first to read x: what the next group will read besides.
          Fetch input = {};
          if (!a.dims.expand && !b.widen && hidden == item.hidden_begin) {
            const int64_t from = end_input_row(a, row_end);
            const int64_t rows_ahead = min64((row_end - row) * a.stride, a.height - from);
            input = {x + from * a.x_stride_row, rows_ahead * a.x_stride_row * static_cast<int64_t>(sizeof(Element))};
          }
          project(row, row_end, hidden, min64(chunk, a.dims.hidden_channels - hidden), hidden == item.hidden_begin,
                  last && !partial, sums, input, row == band);
        }
      }
    }
  }
};

static void work(const BlockArgs& a, const PackedLayout& l, const Plan& plan, const WorkItem& item, float* scratch) {
  with_storage(a.dtype, [&](auto storage) { Item<decltype(storage)>(a, l, plan, item, scratch).run(); });
}

static void finish(const BlockArgs& a, const PackedLayout& l, const WorkItem& item, const float* partial,
                   int64_t splits, int64_t stride) {
  const Plan plan = {V::width, 1, 1, 1, 1};  // only the item's own fields matter here
  const Real* sums = reinterpret_cast<const Real*>(partial);
  stride *= sizeof(float) / sizeof(Real);
  with_storage(a.dtype, [&](auto storage) {
    Item<decltype(storage)>(a, l, plan, item, nullptr).write_rows(item.row_begin, item.row_end, sums, splits, stride);
  });
}
