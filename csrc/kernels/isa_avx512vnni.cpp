// AVX-512 with VNNI, without BF16 (Cascade Lake, Ice Lake). The kernels of this file compute the int8
// products of large batches with the instruction vpdpbusd. The file dispatch.cpp combines these kernels with
// the other kernels of avx512.
#define NPLORA_ISA avx512vnni
#define NPLORA_SIMD_AVX512
#define NPLORA_SIMD_VNNI

#include "kernels/kernel_table.h"
#include "simd/vec.h"
#include "simd/vec_bytes.h"
#include "simd/vec_quads.h"

namespace nplora::kernels::avx512vnni {
inline constexpr size_t kTokenTileRows = 9, kTokenTileVectors = 3, kGroupTileRows = 7, kGroupTileVectors = 2;
}  // namespace nplora::kernels::avx512vnni

#include "kernels/int8_gemm-inl.h"

namespace nplora::kernels {
extern const Int8Gemm k_avx512vnni_products;
constinit const Int8Gemm k_avx512vnni_products = avx512vnni::make_int8_gemm();
}  // namespace nplora::kernels
