// NEON with dot products of bytes but without BF16 (Neoverse N1, Cortex-A76, Apple M1). The kernels of this
// file compute the int8 products of large batches with the instruction sdot. The file dispatch.cpp combines
// these kernels with the other kernels of neon.
#define NPLORA_ISA neondot
#define NPLORA_SIMD_NEON
#define NPLORA_SIMD_DOTPROD

#include "kernels/kernel_table.h"
#include "simd/vec.h"
#include "simd/vec_bytes.h"
#include "simd/vec_quads.h"

namespace nplora::kernels::neondot {
inline constexpr size_t kTokenTileRows = 6, kTokenTileVectors = 4, kGroupTileRows = 3, kGroupTileVectors = 4;
}  // namespace nplora::kernels::neondot

#include "kernels/int8_gemm-inl.h"

namespace nplora::kernels {
extern const Int8Gemm k_neondot_products;
constinit const Int8Gemm k_neondot_products = neondot::make_int8_gemm();
}  // namespace nplora::kernels
