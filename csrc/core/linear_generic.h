// The classifier's product; tile_generic.h says what may not be done here.
//
// No #pragma once: included once a tier.

constexpr int kLinearStep = 2;

// `Count` outputs from `output` on, for one row of x.
template <class Storage, int Count>
ALWAYS_INLINE void dot_products(const LinearArgs& a, int64_t row, int64_t output) {
  using Element = typename Storage::Element;
  const Element* x = static_cast<const Element*>(a.x) + row * a.in_features;
  const Element* w[Count];
  UNROLL for (int j = 0; j < Count; ++j) w[j] = static_cast<const Element*>(a.weight) + (output + j) * a.in_features;
  V::T acc[Count];
  UNROLL for (int j = 0; j < Count; ++j) acc[j] = V::set(0);
  int64_t rest = a.in_features;
  // Several vectors a step: the more loads of weights are under way, the less each waits.
  for (; rest >= kLinearStep * V::width; rest -= kLinearStep * V::width, x += kLinearStep * V::width) {
    UNROLL for (int u = 0; u < kLinearStep; ++u) {
      const V::T xi = Storage::load(x + u * V::width);
      UNROLL for (int j = 0; j < Count; ++j) acc[j] = V::fma(xi, Storage::load(w[j] + u * V::width), acc[j]);
    }
    UNROLL for (int j = 0; j < Count; ++j) w[j] += kLinearStep * V::width;
  }
  for (; rest > 0; rest -= V::width, x += V::width) {
    const int n = rest < V::width ? static_cast<int>(rest) : V::width;
    const V::T xi = Storage::load(x, n);
    UNROLL for (int j = 0; j < Count; ++j) {
      acc[j] = V::fma(xi, Storage::load(w[j], n), acc[j]);
      w[j] += V::width;
    }
  }
  Element* y = static_cast<Element*>(a.y) + row * a.out_features + output;
  UNROLL for (int j = 0; j < Count; ++j) {
    float lanes[V::width], sum = 0;
    V::store(lanes, acc[j]);
    for (float lane : lanes) sum += lane;
    if (a.bias) sum += Storage::load_one(static_cast<const Element*>(a.bias) + output + j);
    Storage::store(y + j, V::set(sum), 1);
  }
}

template <class Storage>
static void linear_outputs(const LinearArgs& a, int64_t begin, int64_t end) {
  int64_t output = begin;
  // Rows innermost: they share the weights while these are in L1.
  for (; output + kLinearOutputs <= end; output += kLinearOutputs)
    for (int64_t row = 0; row < a.rows; ++row) dot_products<Storage, kLinearOutputs>(a, row, output);
  for (; output < end; ++output)
    for (int64_t row = 0; row < a.rows; ++row) dot_products<Storage, 1>(a, row, output);
}

static void linear_work(const LinearArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32:
      return linear_outputs<F32>(a, begin, end);
    case DType::bf16:
      return linear_outputs<BF16>(a, begin, end);
    case DType::f16:
      return linear_outputs<F16>(a, begin, end);
  }
}

// `Count` vectors of channels: whole cache lines of a pixel.
template <class Storage, int Count>
ALWAYS_INLINE void pool_vectors(const PoolArgs& a, const typename Storage::Element* x, int width,
                                typename Storage::Element* y) {
  V::T sum[Count];
  UNROLL for (int j = 0; j < Count; ++j) sum[j] = V::set(0);
  for (int64_t p = 0; p < a.pixels; ++p, x += a.channels)
    UNROLL for (int j = 0; j < Count; ++j) sum[j] =
        V::add(sum[j], width == V::width ? Storage::load(x + j * V::width) : Storage::load(x, width));
  const V::T scale = V::set(1.0f / static_cast<float>(a.pixels));
  UNROLL for (int j = 0; j < Count; ++j) Storage::store(y + j * V::width, V::fma(sum[j], scale, V::set(0)), width);
}

template <class Storage>
static void pool_channels(const PoolArgs& a) {
  using Element = typename Storage::Element;
  constexpr int kTogether = 4;
  for (int64_t n = 0; n < a.batch; ++n) {
    const Element* x = static_cast<const Element*>(a.x) + n * a.pixels * a.channels;
    Element* y = static_cast<Element*>(a.y) + n * a.channels;
    int64_t c = 0;
    for (; c + kTogether * V::width <= a.channels; c += kTogether * V::width)
      pool_vectors<Storage, kTogether>(a, x + c, V::width, y + c);
    for (; c < a.channels; c += V::width)
      pool_vectors<Storage, 1>(a, x + c, static_cast<int>(min64(a.channels - c, V::width)), y + c);
  }
}

static void pool_work(const PoolArgs& a) {
  switch (a.dtype) {
    case DType::f32:
      return pool_channels<F32>(a);
    case DType::bf16:
      return pool_channels<BF16>(a);
    case DType::f16:
      return pool_channels<F16>(a);
  }
}
