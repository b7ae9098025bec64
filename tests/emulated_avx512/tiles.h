// The tile registers of AMX: what tests/test_avx512_emulated.py runs csrc/core/amx_tiles.h on. As the Intel SDM defines
// the instructions, to the last bit; where hardware would fault, or read what nothing says, a test ends here.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

constexpr int kTiles = 8, kTileRows = 16, kRowBytes = 64;

struct Tiles {
  bool configured = false;
  int rows[kTiles] = {}, row_bytes[kTiles] = {};
  alignas(32) unsigned char data[kTiles][kTileRows][kRowBytes] = {};
};
inline thread_local Tiles tiles;  // a thread's, and one for all files

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated: %s\n", what);
  std::abort();
}

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "what LDTILECFG reads");

inline void ldtilecfg(const void* memory) {
  TileConfig config;
  std::memcpy(&config, memory, sizeof config);
  require(config.palette == 1, "LDTILECFG of another palette than 1");
  require(config.start_row == 0, "a start row is for restarted loads");
  for (uint8_t byte : config.reserved) require(byte == 0, "LDTILECFG with a reserved byte set");
  tiles = Tiles();  // all zero
  tiles.configured = true;
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], bytes = config.row_bytes[i];
    require(rows <= kTileRows && bytes <= kRowBytes, "LDTILECFG with a tile that is too large");
    require((rows == 0) == (bytes == 0), "LDTILECFG with rows or bytes of a tile, and not both");
    require(i < kTiles || rows == 0, "LDTILECFG with a ninth tile");
    if (i >= kTiles) continue;
    tiles.rows[i] = rows;
    tiles.row_bytes[i] = bytes;
  }
}
inline void tilerelease() { tiles = Tiles(); }

inline void require_tile(int tile) {
  require(tiles.configured && tiles.rows[tile] != 0, "a tile that is not configured");
}

inline void tileloadd(int tile, const void* first, int64_t stride) {
  require_tile(tile);
  auto& data = tiles.data[tile];
  std::memset(data, 0, sizeof data);  // what lies behind a row's bytes, and rows behind the last
  for (int row = 0; row < tiles.rows[tile]; ++row)
    std::memcpy(data[row], static_cast<const char*>(first) + row * stride, static_cast<size_t>(tiles.row_bytes[tile]));
}
inline void tilestored(int tile, void* first, int64_t stride) {
  require_tile(tile);
  for (int row = 0; row < tiles.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(first) + row * stride, tiles.data[tile][row],
                static_cast<size_t>(tiles.row_bytes[tile]));
}

// What takes the time, if all the rest is not optimised.
#pragma GCC push_options
#pragma GCC optimize("O2")

// A denormal as the zero of its sign.
inline __m256 flush(__m256 v) {
  const __m256i exponent = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7f800000));
  const __m256 denormal = _mm256_castsi256_ps(_mm256_cmpeq_epi32(exponent, _mm256_setzero_si256()));
  return _mm256_blendv_ps(v, _mm256_and_ps(v, _mm256_set1_ps(-0.0f)), denormal);
}
// The first or second of pairs of bf16.
inline __m256 first_of(__m256i pairs) { return flush(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))); }
inline __m256 second_of(__m256i pairs) {
  return flush(_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)))));
}

// The pairs' firsts and their seconds are summed up apart, then added to each other, then to the sums so far. Rounding
// to nearest, denormals are zero going in and coming out.
inline void tdpbf16ps(int sums, int a, int b) {
  require_tile(sums);
  require_tile(a);
  require_tile(b);
  require(sums != a && sums != b && a != b, "TDPBF16PS of a tile with itself");
  require(tiles.rows[sums] == tiles.rows[a], "TDPBF16PS with other rows than the sums have");
  require(tiles.row_bytes[sums] == tiles.row_bytes[b], "TDPBF16PS with other columns than the sums have");
  require(tiles.row_bytes[a] == 4 * tiles.rows[b], "TDPBF16PS of two depths");
  require(tiles.row_bytes[b] % 4 == 0, "TDPBF16PS with a part of a pair");
  for (int row = 0; row < tiles.rows[sums]; ++row)
    for (int at = 0; at < kRowBytes; at += 32) {
      __m256 firsts = _mm256_setzero_ps(), seconds = firsts;
      for (int k = 0; k < tiles.rows[b]; ++k) {
        int pair;
        std::memcpy(&pair, tiles.data[a][row] + 4 * k, sizeof pair);
        const __m256i pixels = _mm256_set1_epi32(pair);
        const __m256i weights = _mm256_load_si256(reinterpret_cast<const __m256i*>(tiles.data[b][k] + at));
        firsts = flush(_mm256_fmadd_ps(first_of(pixels), first_of(weights), firsts));
        seconds = flush(_mm256_fmadd_ps(second_of(pixels), second_of(weights), seconds));
      }
      float* to = reinterpret_cast<float*>(tiles.data[sums][row] + at);
      const __m256 both = flush(_mm256_add_ps(firsts, seconds));
      _mm256_store_ps(to, flush(_mm256_add_ps(flush(_mm256_load_ps(to)), both)));
    }
}

#pragma GCC pop_options

}  // namespace emulated

#define emulated_ldtilecfg emulated::ldtilecfg
#define emulated_tilerelease emulated::tilerelease
#define emulated_tileloadd emulated::tileloadd
#define emulated_tilestored emulated::tilestored
#define emulated_tdpbf16ps emulated::tdpbf16ps
