// The portable tier: plain C++ on four floats at a time, which any compiler turns into what its baseline offers (SSE2,
// NEON) or into scalar code. It is the fallback of every machine and the reference of the other tiers' tests.
#include <cstring>

#include "block.h"
#include "conv.h"
#include "linear.h"
#include "rows.h"
#include "train.h"
#include "train_norm.h"
#include "train_window.h"

namespace mbv2 {
namespace {

struct V {
  using Real = float;
  static constexpr DType dtype = DType::f32;
  typedef float T __attribute__((vector_size(16)));  // GCC's and Clang's: any target, in what registers it has
  static constexpr int width = 4;
  static constexpr int kPart = 0;
  static constexpr bool kStreams = false;  // a register is part of a cache line
  static constexpr int kMaxPanel = 2;
  static constexpr int kMaxRows[kMaxPanel + 1] = {0, 4, 4};
  static constexpr bool kFetchOften = false;
  static constexpr int kPairedPanel = 0;
  static constexpr int kMaxPatchHeight = 1, kMaxPatch[kMaxPatchHeight + 1] = {0, 4};
  static constexpr int kMaxBackwardRun = 4;

#define V_INLINE static inline __attribute__((always_inline))
#define LANES for (int i = 0; i < width; ++i)
  V_INLINE T set(float v) { return T{v, v, v, v}; }
  V_INLINE T load(const float* p) { return T{p[0], p[1], p[2], p[3]}; }
  V_INLINE void store(float* p, T v) { LANES p[i] = v[i]; }
  V_INLINE void stream(float* p, T v) { store(p, v); }
  V_INLINE void fence() {}
  V_INLINE T broadcast(const float* p) { return set(*p); }
  V_INLINE T fma(T a, T b, T c) { return c + a * b; }
  V_INLINE T add(T a, T b) { return a + b; }
  V_INLINE T sub(T a, T b) { return a - b; }
  // Comparisons with NaN are false, so NaN stays.
  V_INLINE T clamp(T v, T lo, T hi) {
    v = v < lo ? lo : v;
    return v > hi ? hi : v;
  }
  // Zero where v <= lo or v >= hi, else g; g where v, lo or hi is NaN.
  V_INLINE T keep(T g, T v, T lo, T hi) {
    const T zero = {};
    g = v <= lo ? zero : g;
    return v >= hi ? zero : g;
  }
  V_INLINE T load(const float* p, int n) {
    T v = {};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  V_INLINE void store(float* p, T v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }

  // 16-bit numbers.
  struct Halves {
    uint16_t of[width];
  };
  V_INLINE Halves load_halves(const uint16_t* p, int n = width) {
    Halves v = {};
    for (int i = 0; i < n; ++i) v.of[i] = p[i];
    return v;
  }
  V_INLINE void store_halves(uint16_t* p, Halves v, int n = width) {
    for (int i = 0; i < n; ++i) p[i] = v.of[i];
  }
  V_INLINE float from_bits(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  V_INLINE uint32_t to_bits(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
  }
  V_INLINE T from_bf16(Halves halves) {
    T v;
    LANES v[i] = from_bits(static_cast<uint32_t>(halves.of[i]) << 16);
    return v;
  }
  // Round to nearest, ties to even; a NaN keeps its sign and becomes quiet (rounding could carry it into infinity).
  V_INLINE Halves to_bf16(T v) {
    Halves halves;
    LANES {
      const uint32_t bits = to_bits(v[i]);
      const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
      halves.of[i] = static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
    return halves;
  }
  // fp16 has 5 exponent bits (bias 15) and 10 of mantissa. Shifting its bits into fp32's place and multiplying by 2^112
  // rebiases the exponent, and turns subnormals into what they mean; infinity and NaN need fp32's top exponent.
  V_INLINE T from_f16(Halves halves) {
    T v;
    LANES {
      const uint32_t bits = halves.of[i], sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
      const float magnitude = rest >= 0x7c00u ? from_bits(0x7f800000u | (rest & 0x3ffu) << 13)
                                              : from_bits(rest << 13) * from_bits(239u << 23);
      v[i] = from_bits(to_bits(magnitude) | sign);
    }
    return v;
  }
  V_INLINE Halves to_f16(T v) {
    Halves halves;
    LANES {
      const uint32_t bits = to_bits(v[i]), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
      uint32_t half;
      if (magnitude > 0x7f800000u) {
        half = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // quiet NaN
      } else if (magnitude >= 0x47800000u) {
        half = 0x7c00u;  // 2^16 and above
      } else if (magnitude < 0x38800000u) {
        // Below 2^-14: adding 0.5 leaves the subnormal's bits, correctly rounded, at the bottom of the sum.
        half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
      } else {
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;  // may round up into infinity
      }
      halves.of[i] = static_cast<uint16_t>(half | sign);
    }
    return halves;
  }
#undef LANES
#undef V_INLINE
};

#include "fp32_generic.h"

}  // namespace

extern const TierKernels kernels_portable;
const TierKernels kernels_portable = kKernels;

}  // namespace mbv2
