// The vector type of the tiers that compute in fp32 with AVX-512 (F, BW, DQ, VL): 32 registers of 16 floats. Register
// tiles of 6 x 4 or 8 x 3 vectors: 24 accumulators; the rest holds a row of weights and a broadcast pixel.
//
// Included by their files inside their own anonymous namespaces, as tile_generic.h is. No #pragma once.

struct V {
  using Real = float;
  static constexpr DType dtype = DType::f32;
  using T = __m512;
  static constexpr int width = 16;
  static constexpr int kPart = 0;
  static constexpr bool kStreams = true;  // a register is a cache line: stream() writes whole ones
  static constexpr int kMaxPanel = 4;
  static constexpr int kMaxRows[kMaxPanel + 1] = {0, 8, 8, 8, 6};
  static constexpr bool kFetchOften = true;
  static constexpr int kPairedPanel = 3;
  // Depthwise, patches of outputs: up to 16 accumulators, 9 weights, pixels.
  static constexpr int kMaxPatchHeight = 4, kMaxPatch[kMaxPatchHeight + 1] = {0, 8, 7, 5, 4};
  static constexpr int kMaxBackwardRun = 8;  // 8 accumulators, 8 pixels of e, a weight and its sum, a pixel of gd

#define V_INLINE static inline __attribute__((always_inline))
  V_INLINE T set(float v) { return _mm512_set1_ps(v); }
  V_INLINE T load(const float* p) { return _mm512_loadu_ps(p); }
  V_INLINE void store(float* p, T v) { _mm512_storeu_ps(p, v); }
  V_INLINE void stream(float* p, T v) { _mm512_stream_ps(p, v); }
  V_INLINE void fence() { _mm_sfence(); }
  V_INLINE T broadcast(const float* p) { return _mm512_set1_ps(*p); }
#ifdef __AVX512F__
  // The form that adds to its accumulator in place, for the reason that x86_avx2.cpp gives.
  V_INLINE T fma(T a, T b, T c) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
#else  // emulated, by tests on lesser CPUs
  V_INLINE T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
#endif
  // Two neighbours, again and again.
  V_INLINE T broadcast_pair(const float* p) {
    double both;
    __builtin_memcpy(&both, p, sizeof both);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
  }
  // Paired sums (Steps in tile_generic.h) of 16 channels in two vectors: in each 128 bits of the first 2 channels'
  // pairs, of the second the next 2's. One shuffle each takes the 4 channels' even and odd halves, in the channels'
  // order.
  V_INLINE T first_pairs(T v) { return _mm512_unpacklo_ps(v, _mm512_setzero_ps()); }
  V_INLINE T second_pairs(T v) { return _mm512_unpackhi_ps(v, _mm512_setzero_ps()); }
  V_INLINE T pair_sums(T a, T b) { return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)); }
  // Of 8 channels in one vector, pairs in the channels' order.
  V_INLINE T pairs(T v) { return _mm512_maskz_expand_ps(0x5555, v); }
  V_INLINE T pair_sums(T v) { return _mm512_maskz_compress_ps(0x5555, add(v, _mm512_movehdup_ps(v))); }
  V_INLINE T add(T a, T b) { return _mm512_add_ps(a, b); }
  V_INLINE T sub(T a, T b) { return _mm512_sub_ps(a, b); }
  // maxps and minps return their second operand when one is NaN: v stands second so that its NaN survives.
  V_INLINE T clamp(T v, T lo, T hi) { return _mm512_min_ps(hi, _mm512_max_ps(lo, v)); }
  // Zero where v <= lo or v >= hi, else g; g where v, lo or hi is NaN.
  V_INLINE T keep(T g, T v, T lo, T hi) {
    const __mmask16 closed = _mm512_cmp_ps_mask(v, lo, _CMP_LE_OQ) | _mm512_cmp_ps_mask(v, hi, _CMP_GE_OQ);
    return _mm512_mask_mov_ps(g, closed, _mm512_set1_ps(0));
  }

  V_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }  // the first n lanes, 0 <= n <= 16
  V_INLINE T load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  V_INLINE void store(float* p, T v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }

  // 16-bit numbers. A mask, not a buffer: what was just stored in part is not read again without waiting.
  using Halves = __m256i;
  V_INLINE Halves load_halves(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  V_INLINE Halves load_halves(const uint16_t* p, int n) { return _mm256_maskz_loadu_epi16(first(n), p); }
  V_INLINE void store_halves(uint16_t* p, Halves v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  V_INLINE void store_halves(uint16_t* p, Halves v, int n) { _mm256_mask_storeu_epi16(p, first(n), v); }
  V_INLINE T from_f16(Halves v) { return _mm512_cvtph_ps(v); }
  V_INLINE Halves to_f16(T v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  V_INLINE T from_bf16(Halves v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
  // Round to nearest, ties to even; a NaN keeps its sign and becomes quiet (rounding could carry it into infinity).
  V_INLINE Halves to_bf16(T v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
#undef V_INLINE
};
