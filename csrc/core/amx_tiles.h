// The instructions on tiles of AMX, for the tiers that multiply them: amx.h says what a tile is. Registers 0 to 3:
// sums; 4 and 5: pixels; 6 and 7: weights. The compiler knows nothing of them.
//
// Included by their files inside their own anonymous namespaces, as tile_generic.h is. No #pragma once.

#define V_INLINE static inline __attribute__((always_inline))

// What LDTILECFG reads (Intel SDM).
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

#ifdef __AMX_BF16__
V_INLINE void load_config(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
V_INLINE void release_tiles() { asm volatile("tilerelease"); }
template <int Tile>
V_INLINE void load_tile(const void* first, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(first), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
V_INLINE void store_tile(void* first, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(first), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Sums, int Pixels, int Weights>
V_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Pixels), "i"(Weights));
}
#else  // emulated, by tests on lesser CPUs
V_INLINE void load_config(const TileConfig& config) { emulated_ldtilecfg(&config); }
V_INLINE void release_tiles() { emulated_tilerelease(); }
template <int Tile>
V_INLINE void load_tile(const void* first, int64_t row_bytes) {
  emulated_tileloadd(Tile, first, row_bytes);
}
template <int Tile>
V_INLINE void store_tile(void* first, int64_t row_bytes) {
  emulated_tilestored(Tile, first, row_bytes);
}
template <int Sums, int Pixels, int Weights>
V_INLINE void multiply_tiles() {
  emulated_tdpbf16ps(Sums, Pixels, Weights);
}
#endif
#undef V_INLINE

// The shapes of the tiles: `rows` pixels, a step of the depth in bf16 numbers. Setting them takes as long as ten
// multiplications, so only when they change.
class TileShapes {
 public:
  void set(int64_t rows, int64_t step) {
    if (rows == rows_ && step == step_) return;
    rows_ = rows;
    step_ = step;
    TileConfig config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? step * 2 : 64);
      config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : step / 2);
    }
    load_config(config);
  }
  // Back to the state of a thread that has not used tiles, which the operating system need not save.
  void release() {
    if (rows_) release_tiles();
    rows_ = 0;
  }

 private:
  int64_t rows_ = 0, step_ = 0;
};
