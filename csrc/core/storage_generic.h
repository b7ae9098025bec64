// Storage of other types than Real, for the tiers that compute in fp32.
//
// Included after tile_generic.h, which says what may not be done here. V offers Halves (a register of 16-bit numbers)
// besides, with loads and stores of all and of the first few, and what they are as bf16 and as fp16.
//
// No #pragma once: included once a tier.

using F32 = Own;

template <V::T (*From)(V::Halves), V::Halves (*To)(V::T)>
struct Half {
  static constexpr bool kOwn = false;
  using Element = uint16_t;
  static ALWAYS_INLINE V::T load(const uint16_t* p) { return From(V::load_halves(p)); }
  static ALWAYS_INLINE V::T load(const uint16_t* p, int n) { return From(V::load_halves(p, n)); }
  static ALWAYS_INLINE float load_one(const uint16_t* p) {
    float lanes[V::width];
    V::store(lanes, load(p, 1));
    return lanes[0];
  }
  static ALWAYS_INLINE void store(uint16_t* p, V::T v) { V::store_halves(p, To(v)); }
  static ALWAYS_INLINE void store(uint16_t* p, V::T v, int n) { V::store_halves(p, To(v), n); }
};
using BF16 = Half<V::from_bf16, V::to_bf16>;
using F16 = Half<V::from_f16, V::to_f16>;

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
