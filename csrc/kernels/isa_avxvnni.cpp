// AVX2 with AVX-VNNI (Alder Lake, Meteor Lake and other machines without AVX-512). The kernels of this file
// compute the int8 products of large batches with the instruction vpdpbusd. The file dispatch.cpp combines
// these kernels with the other kernels of avx2.
#define NPLORA_ISA avxvnni
#define NPLORA_SIMD_AVX2
#define NPLORA_SIMD_VNNI

#include "kernels/kernel_table.h"
#include "simd/vec.h"
#include "simd/vec_bytes.h"
#include "simd/vec_quads.h"

namespace nplora::kernels::avxvnni {
inline constexpr size_t kTokenTileRows = 4, kTokenTileVectors = 3, kGroupTileRows = 3, kGroupTileVectors = 2;
}  // namespace nplora::kernels::avxvnni

#include "kernels/int8_gemm-inl.h"

namespace nplora::kernels {
extern const Int8Gemm k_avxvnni_products;
constinit const Int8Gemm k_avxvnni_products = avxvnni::make_int8_gemm();
}  // namespace nplora::kernels
