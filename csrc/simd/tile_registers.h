// The tile registers of AMX: eight matrices of up to 16 rows of 64 bytes. The program sets the shape of each
// matrix. One instruction multiplies two registers, which hold pairs of bfloat16, and adds the product to a
// third register. Such an instruction does up to 16 x 16 x 32 multiply-adds. The code is in assembly, because
// the compiler does not allocate the tile registers.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace nplora::kernels::NPLORA_ISA {

inline constexpr size_t kTileSide = 16;

// The operand of the instruction ldtilecfg. Each element of a tile has four bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, size_t tile_rows, size_t columns) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(columns * sizeof(float));
  }
};

// Sets the shapes of all tile registers and clears the registers.
inline void set_tile_shapes(const TileShapes& shapes) {
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
}
inline void release_tiles() {
  __asm__ volatile("tilerelease" : : : "memory");
}

template <int kTile>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "n"(kTile));
}
// In `load_tile` and `store_tile`, `stride` is the number of elements from one row in memory to the next row.
template <int kTile, class T>
inline void load_tile(const T* from, size_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                   :
                   : "r"(from), "r"(stride * sizeof(T)), "n"(kTile)
                   : "memory");
}
template <int kTile>
inline void store_tile(float* to, size_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(to), "r"(stride * sizeof(float)), "n"(kTile)
                   : "memory");
}
// Adds the matrix product A B to the register kSums, which holds m x n floats. The matrices A (m, depth) and
// B (depth, n) are bfloat16. An element of register kA (m, depth / 2) is a pair of neighbours in a row of A.
// An element of register kB (depth / 2, n) is a pair of neighbours in a column of B.
template <int kSums, int kA, int kB>
inline void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(kSums), "n"(kA), "n"(kB));
}

}  // namespace nplora::kernels::NPLORA_ISA
