// The fp16 tier (AVX512-FP16): the block and the dense convolution on 32 registers of 32 fp16 numbers, which the FMA
// units multiply and add at twice fp32's rate, rounding to fp16 each time. For float16 images in inference, and only
// on demand: csrc/TUNING.md has what it gains and what it costs in accuracy.
#include <immintrin.h>

#include "block.h"
#include "conv.h"

namespace mbv2 {
namespace {

struct V {
  using Real = _Float16;
  static constexpr DType dtype = DType::f16;
  using T = __m512h;
  static constexpr int width = 32;
  static constexpr int kPart = 40;
  static constexpr int kMaxPanel = 4;
  static constexpr int kMaxRows[kMaxPanel + 1] = {0, 8, 8, 8, 6};
  static constexpr bool kFetchOften = true;
  static constexpr int kPairedPanel = 0;
  static constexpr int kMaxPatchHeight = 4, kMaxPatch[kMaxPatchHeight + 1] = {0, 8, 7, 5, 4};  // as avx512 has them

#define V_INLINE static inline __attribute__((always_inline))
  V_INLINE T set(float v) { return _mm512_set1_ph(static_cast<_Float16>(v)); }
  V_INLINE T load(const Real* p) { return _mm512_loadu_ph(p); }
  V_INLINE void store(Real* p, T v) { _mm512_storeu_ph(p, v); }
  V_INLINE T broadcast(const Real* p) { return _mm512_set1_ph(*p); }
  V_INLINE T broadcast(const float* p) { return set(*p); }
  // The form that adds to its accumulator in place, for the reason that x86_avx2.cpp gives.
  V_INLINE T fma(T a, T b, T c) {
    asm("vfmadd231ph %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  V_INLINE T add(T a, T b) { return _mm512_add_ph(a, b); }
  // maxph and minph return their second operand when one is NaN: v stands second so that its NaN survives.
  V_INLINE T clamp(T v, T lo, T hi) { return _mm512_min_ph(hi, _mm512_max_ph(lo, v)); }

  V_INLINE __mmask32 first(int n) { return static_cast<__mmask32>((1ull << n) - 1); }  // 0 <= n <= 32 lanes
  V_INLINE T load(const Real* p, int n) { return _mm512_castsi512_ph(_mm512_maskz_loadu_epi16(first(n), p)); }
  V_INLINE void store(Real* p, T v, int n) { _mm512_mask_storeu_epi16(p, first(n), _mm512_castph_si512(v)); }
#undef V_INLINE
};

#include "tile_generic.h"

// run(storage): images come as fp16 only.
template <class Run>
ALWAYS_INLINE void with_storage(DType, const Run& run) {
  run(Own{});
}

#include "depthwise_generic.h"

#include "block_generic.h"
#include "conv_generic.h"

// Weights as fp16, rounded to nearest. False if a finite one becomes infinite.
static bool narrow(const float* from, int64_t count, void* to) {
  bool fits = true;
  for (int64_t i = 0; i < count; ++i) {
    const Real rounded = static_cast<Real>(from[i]);
    static_cast<Real*>(to)[i] = rounded;
    fits &= __builtin_isinf(from[i]) || !__builtin_isinf(rounded);
  }
  return fits;
}

}  // namespace

extern const TierKernels kernels_avx512fp16;
const TierKernels kernels_avx512fp16 = {
    V::width,  V::kMaxPanel, V::kPairedPanel, scratch_floats, work,    finish,  conv_scratch_floats,
    conv_work, nullptr,      nullptr,         nullptr,        nullptr, nullptr, nullptr,
    nullptr,   nullptr,      nullptr,         fma_chains,     narrow};

}  // namespace mbv2
