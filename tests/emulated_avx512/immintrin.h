// Stands in front of the compiler's <immintrin.h> to run csrc/core/x86_avx512.cpp, x86_avx512bf16x3.cpp and
// x86_avx512amx.cpp on a CPU with AVX2 only: every AVX-512 intrinsic that the files use, on two AVX2 registers or lane by
// lane, as Intel's guide defines it; tiles.h has those of AMX. An intrinsic that is missing here does not compile. It
// shows that the arithmetic is right, and nothing about speed.
#pragma once

#include_next <immintrin.h>

#include "tiles.h"

namespace emulated {

#define EMULATED static inline __attribute__((always_inline))

template <class Half>
struct Pair {
  Half lo, hi;
};
template <class Half, class Whole>
EMULATED Pair<Half> split(Whole v) {
  Pair<Half> p;
  __builtin_memcpy(&p, &v, sizeof p);
  return p;
}
template <class Whole, class Half>
EMULATED Whole join(Half lo, Half hi) {
  const Pair<Half> p = {lo, hi};
  Whole v;
  __builtin_memcpy(&v, &p, sizeof v);
  return v;
}

#define HALVES_2(name, Whole, Half, half)                   \
  EMULATED Whole name(Whole a, Whole b) {                   \
    const auto x = split<Half>(a), y = split<Half>(b);      \
    return join<Whole>(half(x.lo, y.lo), half(x.hi, y.hi)); \
  }
HALVES_2(add_ps, __m512, __m256, _mm256_add_ps)
HALVES_2(sub_ps, __m512, __m256, _mm256_sub_ps)
HALVES_2(mul_ps, __m512, __m256, _mm256_mul_ps)
HALVES_2(max_ps, __m512, __m256, _mm256_max_ps)
HALVES_2(min_ps, __m512, __m256, _mm256_min_ps)
HALVES_2(unpacklo_ps, __m512, __m256, _mm256_unpacklo_ps)  // of each 128 bits, as AVX2 does it
HALVES_2(unpackhi_ps, __m512, __m256, _mm256_unpackhi_ps)
HALVES_2(add_epi32, __m512i, __m256i, _mm256_add_epi32)
HALVES_2(and_si512, __m512i, __m256i, _mm256_and_si256)
HALVES_2(or_si512, __m512i, __m256i, _mm256_or_si256)

EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = split<__m256>(a), y = split<__m256>(b), z = split<__m256>(c);
  return join<__m512>(_mm256_fmadd_ps(x.lo, y.lo, z.lo), _mm256_fmadd_ps(x.hi, y.hi, z.hi));
}
EMULATED __m512 set1_ps(float v) { return join<__m512>(_mm256_set1_ps(v), _mm256_set1_ps(v)); }
EMULATED __m512 setzero_ps() { return set1_ps(0); }
EMULATED __m512d set1_pd(double v) { return join<__m512d>(_mm256_set1_pd(v), _mm256_set1_pd(v)); }
EMULATED __m512i set1_epi32(int v) { return join<__m512i>(_mm256_set1_epi32(v), _mm256_set1_epi32(v)); }
EMULATED __m512 loadu_ps(const void* p) {
  const float* from = static_cast<const float*>(p);
  return join<__m512>(_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8));
}
EMULATED void storeu_ps(void* p, __m512 v) {
  const auto x = split<__m256>(v);
  _mm256_storeu_ps(static_cast<float*>(p), x.lo);
  _mm256_storeu_ps(static_cast<float*>(p) + 8, x.hi);
}
EMULATED __m512i slli_epi32(__m512i a, unsigned count) {
  const auto x = split<__m256i>(a);
  return join<__m512i>(_mm256_slli_epi32(x.lo, static_cast<int>(count)),
                       _mm256_slli_epi32(x.hi, static_cast<int>(count)));
}
EMULATED __m512i srli_epi32(__m512i a, unsigned count) {
  const auto x = split<__m256i>(a);
  return join<__m512i>(_mm256_srli_epi32(x.lo, static_cast<int>(count)),
                       _mm256_srli_epi32(x.hi, static_cast<int>(count)));
}
EMULATED __m512 castsi512_ps(__m512i a) {
  __m512 v;
  __builtin_memcpy(&v, &a, sizeof v);
  return v;
}
EMULATED __m512 castpd_ps(__m512d a) {
  __m512 v;
  __builtin_memcpy(&v, &a, sizeof v);
  return v;
}
EMULATED __m512i castps_si512(__m512 a) {
  __m512i v;
  __builtin_memcpy(&v, &a, sizeof v);
  return v;
}
template <int lanes>
EMULATED __m512 shuffle_ps(__m512 a, __m512 b) {
  const auto x = split<__m256>(a), y = split<__m256>(b);
  return join<__m512>(_mm256_shuffle_ps(x.lo, y.lo, lanes), _mm256_shuffle_ps(x.hi, y.hi, lanes));
}
EMULATED __m512 movehdup_ps(__m512 a) {  // lanes 1 1 3 3 ...
  const auto x = split<__m256>(a);
  return join<__m512>(_mm256_movehdup_ps(x.lo), _mm256_movehdup_ps(x.hi));
}

// Lane by lane. A masked load or store touches no memory but its lanes'.
EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const void* p) {
  float lanes[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) lanes[i] = static_cast<const float*>(p)[i];
  return loadu_ps(lanes);
}
EMULATED void mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
  float lanes[16];
  storeu_ps(lanes, v);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) static_cast<float*>(p)[i] = lanes[i];
}
EMULATED __m512 maskz_expand_ps(__mmask16 mask, __m512 v) {  // the first lanes, to where the bits are set
  float from[16], to[16] = {};
  storeu_ps(from, v);
  for (int i = 0, next = 0; i < 16; ++i)
    if (mask >> i & 1) to[i] = from[next++];
  return loadu_ps(to);
}
EMULATED __m512 maskz_compress_ps(__mmask16 mask, __m512 v) {  // the lanes whose bits are set, side by side
  float from[16], to[16] = {};
  storeu_ps(from, v);
  for (int i = 0, next = 0; i < 16; ++i)
    if (mask >> i & 1) to[next++] = from[i];
  return loadu_ps(to);
}
EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  float x[16], y[16];
  storeu_ps(x, a);
  storeu_ps(y, b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    bool holds = false;
    if (predicate == _CMP_UNORD_Q)
      holds = __builtin_isunordered(x[i], y[i]);
    else if (predicate == _CMP_LE_OQ)
      holds = x[i] <= y[i];
    else if (predicate == _CMP_GE_OQ)
      holds = x[i] >= y[i];
    else
      __builtin_trap();  // no other is in use
    mask |= static_cast<unsigned>(holds) << i;
  }
  return static_cast<__mmask16>(mask);
}
EMULATED __m512i mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {  // b where the bit is set
  int x[16], y[16];
  __builtin_memcpy(x, &a, sizeof x);
  __builtin_memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) x[i] = y[i];
  __builtin_memcpy(&a, x, sizeof x);
  return a;
}
EMULATED __mmask16 test_epi32_mask(__m512i a, __m512i b) {  // where they share a bit
  int lanes[16];
  const __m512i both = and_si512(a, b);
  __builtin_memcpy(lanes, &both, sizeof lanes);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(lanes[i] != 0) << i;
  return static_cast<__mmask16>(mask);
}
EMULATED __m512i mask_add_epi32(__m512i other, __mmask16 mask, __m512i a, __m512i b) {
  return mask_blend_epi32(mask, other, add_epi32(a, b));
}
EMULATED __m512i mask_or_epi32(__m512i other, __mmask16 mask, __m512i a, __m512i b) {
  return mask_blend_epi32(mask, other, or_si512(a, b));
}
// Of 16-bit numbers, in registers of any width.
template <class Whole>
EMULATED Whole maskz_loadu_epi16(unsigned mask, const void* p) {
  short lanes[sizeof(Whole) / 2] = {};
  for (unsigned i = 0; i < sizeof(Whole) / 2; ++i)
    if (mask >> i & 1) lanes[i] = static_cast<const short*>(p)[i];
  Whole v;
  __builtin_memcpy(&v, lanes, sizeof v);
  return v;
}
template <class Whole>
EMULATED void mask_storeu_epi16(void* p, unsigned mask, Whole v) {
  short lanes[sizeof(Whole) / 2];
  __builtin_memcpy(lanes, &v, sizeof lanes);
  for (unsigned i = 0; i < sizeof(Whole) / 2; ++i)
    if (mask >> i & 1) static_cast<short*>(p)[i] = lanes[i];
}
EMULATED __m512i loadu_si512(const void* p) {
  __m512i v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
EMULATED void storeu_si512(void* p, __m512i v) { __builtin_memcpy(p, &v, sizeof v); }
EMULATED __m512i mask_blend_epi16(unsigned mask, __m512i a, __m512i b) {  // b where the bit is set
  short x[32], y[32];
  storeu_si512(x, a);
  storeu_si512(y, b);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) x[i] = y[i];
  return loadu_si512(x);
}
EMULATED __m512i setzero_si512() { return set1_epi32(0); }
// To nearest, ties to even; denormals become zero, NaN quiet.
EMULATED void round_to_bf16(__m512 v, unsigned short* to) {
  unsigned lanes[16];
  __builtin_memcpy(lanes, &v, sizeof lanes);
  for (int i = 0; i < 16; ++i) {
    const unsigned bits = lanes[i], magnitude = bits & 0x7fffffff;
    if (magnitude < 0x00800000)
      to[i] = static_cast<unsigned short>(bits >> 16 & 0x8000);
    else if (magnitude > 0x7f800000)
      to[i] = static_cast<unsigned short>(bits >> 16 | 0x40);
    else
      to[i] = static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}
EMULATED __m256bh cvtneps_pbh(__m512 a) {
  unsigned short lanes[16];
  round_to_bf16(a, lanes);
  __m256bh v;
  __builtin_memcpy(&v, lanes, sizeof v);
  return v;
}
EMULATED __m512bh maskz_cvtne2ps_pbh(unsigned mask, __m512 a, __m512 b) {  // b's numbers first
  unsigned short lanes[32];
  round_to_bf16(b, lanes);
  round_to_bf16(a, lanes + 16);
  for (int i = 0; i < 32; ++i) lanes[i] = mask >> i & 1 ? lanes[i] : 0;
  __m512bh v;
  __builtin_memcpy(&v, lanes, sizeof v);
  return v;
}
EMULATED __m512bh cvtne2ps_pbh(__m512 a, __m512 b) { return maskz_cvtne2ps_pbh(0xffffffff, a, b); }
EMULATED __m512 mask_mov_ps(__m512 a, __mmask16 mask, __m512 b) {  // b where the bit is set
  return castsi512_ps(mask_blend_epi32(mask, castps_si512(a), castps_si512(b)));
}
EMULATED __m512i cvtepu16_epi32(__m256i a) {
  return join<__m512i>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                       _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
EMULATED __m256i cvtepi32_epi16(__m512i a) {  // the lower half of each lane
  int lanes[16];
  short low[16];
  __builtin_memcpy(lanes, &a, sizeof lanes);
  for (int i = 0; i < 16; ++i) low[i] = static_cast<short>(lanes[i]);
  __m256i v;
  __builtin_memcpy(&v, low, sizeof v);
  return v;
}
EMULATED __m512 cvtph_ps(__m256i a) {
  return join<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
template <int rounding>
EMULATED __m256i cvtps_ph(__m512 a) {
  const auto x = split<__m256>(a);
  return _mm256_set_m128i(_mm256_cvtps_ph(x.hi, rounding), _mm256_cvtps_ph(x.lo, rounding));
}

}  // namespace emulated

#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_shuffle_ps
#define _mm_maskz_loadu_epi16 emulated::maskz_loadu_epi16<__m128i>
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16<__m256i>
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_add_ps emulated::add_ps
#define _mm512_and_si512 emulated::and_si512
#define _mm512_castpd_ps emulated::castpd_ps
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph<rounding>(a)
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_mask_add_epi32 emulated::mask_add_epi32
#define _mm512_mask_blend_epi16 emulated::mask_blend_epi16
#define _mm512_mask_mov_ps emulated::mask_mov_ps
#define _mm512_mask_or_epi32 emulated::mask_or_epi32
#define _mm512_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_maskz_compress_ps emulated::maskz_compress_ps
#define _mm512_maskz_cvtne2ps_pbh emulated::maskz_cvtne2ps_pbh
#define _mm512_maskz_expand_ps emulated::maskz_expand_ps
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16<__m512i>
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_movehdup_ps emulated::movehdup_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_or_si512 emulated::or_si512
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_pd emulated::set1_pd
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_shuffle_ps(a, b, lanes) emulated::shuffle_ps<lanes>(a, b)
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_stream_ps emulated::storeu_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_test_epi32_mask emulated::test_epi32_mask
#define _mm512_unpackhi_ps emulated::unpackhi_ps
#define _mm512_unpacklo_ps emulated::unpacklo_ps
