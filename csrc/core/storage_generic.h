// Storage of other types than Real, for the tiers that compute in fp32.
//
// Included after tile_generic.h, which says what may not be done here. V offers loads and stores of bf16 and fp16
// besides.
//
// No #pragma once: included once a tier.

using F32 = Own;

// 16-bit storage. Part of a vector goes through a buffer: the masked forms of these loads are not worth their code.
template <V::T (*Load)(const uint16_t*), void (*Store)(uint16_t*, V::T)>
struct Half {
  static constexpr bool kOwn = false;
  using Element = uint16_t;
  static ALWAYS_INLINE V::T load(const uint16_t* p) { return Load(p); }
  static ALWAYS_INLINE float load_one(const uint16_t* p) {
    float lanes[V::width];
    V::store(lanes, load(p, 1));
    return lanes[0];
  }
  static ALWAYS_INLINE V::T load(const uint16_t* p, int n) {
    uint16_t buffer[V::width] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
    return Load(buffer);
  }
  static ALWAYS_INLINE void store(uint16_t* p, V::T v) { Store(p, v); }
  static ALWAYS_INLINE void store(uint16_t* p, V::T v, int n) {
    uint16_t buffer[V::width];
    Store(buffer, v);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
};
using BF16 = Half<V::load_bf16, V::store_bf16>;
using F16 = Half<V::load_f16, V::store_f16>;

// run(storage), for the storage type of that name.
template <class Run>
ALWAYS_INLINE void with_storage(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f32:
      return run(F32{});
    case DType::bf16:
      return run(BF16{});
    case DType::f16:
      return run(F16{});
  }
}
