// AVX-512 with BF16 and VNNI (Cooper Lake, Sapphire Rapids, Zen 4). Products of bfloat16 pairs use vdpbf16ps,
// which treats subnormal inputs and results as zero. Products of bytes use vpdpbusd. The file dispatch.cpp
// combines these kernels with the other kernels of avx512.
#define NPLORA_ISA avx512bf16
#define NPLORA_SIMD_AVX512
#define NPLORA_SIMD_BF16
#define NPLORA_SIMD_VNNI

#include "kernels/kernel_table.h"
#include "simd/vec.h"
#include "simd/vec_bytes.h"
#include "simd/vec_lanes.h"
#include "simd/vec_quads.h"
#include "simd/vec_sub_blocks.h"

namespace nplora::kernels::avx512bf16 {
inline constexpr size_t kTileRows = 12;
inline constexpr size_t kTileTokens = 8, kOutputVectors = 3, kPanelVectors = kOutputVectors, kNearRows = 4;
inline constexpr size_t kDotResident = 24, kDotRows = 4, kDotSums = 4;
inline constexpr size_t kUnrolledSubBlocks = 8, kMostBlockSums = 8;
inline constexpr size_t kTokenTileRows = 9, kTokenTileVectors = 3, kGroupTileRows = 7, kGroupTileVectors = 2;
}  // namespace nplora::kernels::avx512bf16

#include "kernels/dots-inl.h"
#include "kernels/elementwise-inl.h"
#include "kernels/products-inl.h"

#include "kernels/blocks-inl.h"
#include "kernels/exp-inl.h"
#include "kernels/int8-inl.h"
#include "kernels/int8_gemm-inl.h"

#include "kernels/attention-inl.h"
#include "kernels/transformer-inl.h"

#include "kernels/table-inl.h"

namespace nplora::kernels {
extern const NarrowKernels k_avx512bf16_kernels;
constinit const NarrowKernels k_avx512bf16_kernels = avx512bf16::make_narrow();
}  // namespace nplora::kernels
