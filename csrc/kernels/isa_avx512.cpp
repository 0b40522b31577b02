// AVX-512 F, BW, DQ and VL (Skylake-X, Zen 4): 32 registers of 512 bits. The accumulators (rows x vectors)
// are 12 x 2 in gemm_tokens_in_lanes and 8 x 3 in gemm_outputs_in_lanes.
#define NPLORA_ISA avx512
#define NPLORA_SIMD_AVX512

#include "kernels/kernel_table.h"
#include "simd/vec.h"
#include "simd/vec_bytes.h"
#include "simd/vec_lanes.h"
#include "simd/vec_quads.h"
#include "simd/vec_sub_blocks.h"

namespace nplora::kernels::avx512 {
inline constexpr size_t kTileRows = 12;
inline constexpr size_t kTileTokens = 8, kOutputVectors = 3, kPanelVectors = kOutputVectors, kNearRows = 4;
inline constexpr size_t kDotResident = 24, kDotRows = 4, kDotSums = 4;
inline constexpr size_t kUnrolledSubBlocks = 8, kMostBlockSums = 8;
inline constexpr size_t kTokenTileRows = 6, kTokenTileVectors = 3, kGroupTileRows = 4, kGroupTileVectors = 2;
}  // namespace nplora::kernels::avx512

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
extern const KernelTable k_avx512_table;
constinit const KernelTable k_avx512_table = avx512::make_table("avx512");
}  // namespace nplora::kernels
