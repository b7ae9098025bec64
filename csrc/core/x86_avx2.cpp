// The AVX2 tier (AVX2, FMA, F16C): 16 registers of 8 floats. Register tiles of 6 x 2 or 4 x 3 vectors: 12 accumulators,
// enough to cover an FMA's latency (4 or 5 cycles) on two ports, and the rest holds the weights and a broadcast pixel.
#include <immintrin.h>

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
  using T = __m256;
  static constexpr int width = 8;
  static constexpr int kPart = 0;
  static constexpr bool kStreams = false;  // a register is part of a cache line
  static constexpr int kMaxPanel = 3;
  static constexpr int kMaxRows[kMaxPanel + 1] = {0, 8, 6, 4};
  static constexpr bool kFetchOften = false;
  static constexpr int kPairedPanel = 0;
  // Depthwise, patches of outputs: 8 accumulators, 3 or 5 weights, 1 pixel.
  static constexpr int kMaxPatchHeight = 1, kMaxPatch[kMaxPatchHeight + 1] = {0, 8};
  static constexpr int kMaxBackwardRun = 6;  // 6 accumulators, 6 pixels of e, a weight and its sum, a pixel of gd

#define V_INLINE static inline __attribute__((always_inline))
  V_INLINE T set(float v) { return _mm256_set1_ps(v); }
  V_INLINE T load(const float* p) { return _mm256_loadu_ps(p); }
  V_INLINE void store(float* p, T v) { _mm256_storeu_ps(p, v); }
  V_INLINE void stream(float* p, T v) { store(p, v); }
  V_INLINE void fence() {}
  V_INLINE T broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  // The form that adds to its accumulator in place. Given the intrinsic, GCC also uses the forms that overwrite a
  // factor, and moves the accumulators of a full tile through other registers and the stack (csrc/TUNING.md).
  V_INLINE T fma(T a, T b, T c) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
    return c;
  }
  V_INLINE T add(T a, T b) { return _mm256_add_ps(a, b); }
  V_INLINE T sub(T a, T b) { return _mm256_sub_ps(a, b); }
  // maxps and minps return their second operand when one is NaN: v stands second so that its NaN survives.
  V_INLINE T clamp(T v, T lo, T hi) { return _mm256_min_ps(hi, _mm256_max_ps(lo, v)); }
  // Zero where v <= lo or v >= hi, else g; g where v, lo or hi is NaN.
  V_INLINE T keep(T g, T v, T lo, T hi) {
    return _mm256_andnot_ps(_mm256_or_ps(_mm256_cmp_ps(v, lo, _CMP_LE_OQ), _mm256_cmp_ps(v, hi, _CMP_GE_OQ)), g);
  }

  V_INLINE __m256i first(int n) {  // all bits set in the first n lanes, 0 <= n <= 8
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  V_INLINE T load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  V_INLINE void store(float* p, T v, int n) { _mm256_maskstore_ps(p, first(n), v); }

  // 16-bit numbers.
  using Halves = __m128i;
  V_INLINE Halves load_halves(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  V_INLINE Halves load_halves(const uint16_t* p, int n) {
    uint16_t buffer[width] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
    return load_halves(buffer);
  }
  V_INLINE void store_halves(uint16_t* p, Halves v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
  V_INLINE void store_halves(uint16_t* p, Halves v, int n) {
    uint16_t buffer[width];
    store_halves(buffer, v);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
  V_INLINE T from_f16(Halves v) { return _mm256_cvtph_ps(v); }
  V_INLINE Halves to_f16(T v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  V_INLINE T from_bf16(Halves v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  // Round to nearest, ties to even; a NaN keeps its sign and becomes quiet (rounding could carry it into infinity).
  V_INLINE Halves to_bf16(T v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    return _mm256_castsi256_si128(packed);
  }
#undef V_INLINE
};

#include "fp32_generic.h"

}  // namespace

extern const TierKernels kernels_avx2;
const TierKernels kernels_avx2 = kKernels;

}  // namespace mbv2
