// Each function runs all cases of its kernels on one table.
#pragma once

#include <cstring>
#include <vector>

#include "kernels/kernel_table.h"
#include "simd/cpu.h"

// The tables that this process may use, best last. If Linux refuses the AMX registers, its table is left out.
inline std::vector<const nplora::kernels::KernelTable*> usable_tables() {
  std::vector<const nplora::kernels::KernelTable*> tables(16);
  tables.resize(nplora::kernels::available_tables(tables.data(), tables.size()));
  if (nplora::simd::cpu().amx && !nplora::simd::ask_for_tiles()) tables.pop_back();
  return tables;
}

// Whether a multiply-add is rounded once: on every instruction set except generic.
inline bool fuses(const nplora::kernels::KernelTable& table) {
  return std::strcmp(table.isa, "generic") != 0;
}

// How a unit multiplies pairs of bfloat16.
enum class Pairs {
  kAsFloats,   // as floats, one number after the other
  kVdpbf16ps,  // in one instruction, which rounds twice in an order of its own; subnormals are zeros
  // Up to sixteen pairs in one instruction, as two sums of halves, which are then added; subnormals are
  // zeros.
  kTiles,
  kBfdot,  // in one instruction, as in bfdot.h; subnormals are zeros
};
inline Pairs pairs_of(const nplora::kernels::KernelTable& table) {
  if (std::strcmp(table.isa, "avx512bf16") == 0) return Pairs::kVdpbf16ps;
  if (std::strcmp(table.isa, "amx") == 0) return Pairs::kTiles;
  if (std::strcmp(table.isa, "neonbf16") == 0 || std::strcmp(table.isa, "neoni8mm") == 0)
    return Pairs::kBfdot;
  return Pairs::kAsFloats;
}

// Lines to fetch. The memory need not exist.
inline nplora::kernels::Fetch lines_at(const void* from, size_t lines) {
  return nplora::kernels::Fetch::memory(from, lines);
}

void test_products(const nplora::kernels::KernelTable& table);
void test_dots(const nplora::kernels::KernelTable& table);
void test_lanes(const nplora::kernels::KernelTable& table);
void test_elementwise(const nplora::kernels::KernelTable& table);
void test_conversions(const nplora::kernels::KernelTable& table);
void test_blocks(const nplora::kernels::KernelTable& table);
void test_int8(const nplora::kernels::KernelTable& table);
void test_int8_gemm(const nplora::kernels::KernelTable& table);
void test_transformer(const nplora::kernels::KernelTable& table);

// The choice of the table, and NPLORA_ISA.
void test_dispatch();

// Parts of ops that belong to no table: the quantisers, and lists of memory to fetch.
void test_quantize();
void test_fetch_list();
void test_grid();
