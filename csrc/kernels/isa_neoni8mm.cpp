// NEON with int8 matrix products (Neoverse V1 and N2, Apple M2). The kernels of this file compute the int8
// products of large batches with the instruction smmla. The file dispatch.cpp combines these kernels with the
// other kernels of neonbf16.
#define NPLORA_ISA neoni8mm
#define NPLORA_SIMD_NEON
#define NPLORA_SIMD_DOTPROD
#define NPLORA_SIMD_I8MM

#include "kernels/kernel_table.h"
#include "simd/vec.h"
#include "simd/vec_bytes.h"
#include "simd/vec_quads.h"

namespace nplora::kernels::neoni8mm {
// A full tile has an even number of rows, because smmla multiplies two rows at a time.
inline constexpr size_t kTokenTileRows = 8, kTokenTileVectors = 2, kGroupTileRows = 4, kGroupTileVectors = 2;
}  // namespace nplora::kernels::neoni8mm

#include "kernels/int8_gemm-inl.h"

namespace nplora::kernels {
extern const Int8Gemm k_neoni8mm_products;
constinit const Int8Gemm k_neoni8mm_products = neoni8mm::make_int8_gemm();
}  // namespace nplora::kernels
