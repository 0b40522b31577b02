// AMX with bfloat16 (Sapphire Rapids): products of bfloat16 pairs in tile registers. The file dispatch.cpp
// combines these kernels with the other kernels of avx512bf16.
#define NPLORA_ISA amx
#define NPLORA_SIMD_AVX512
#define NPLORA_SIMD_BF16

#include "kernels/kernel_table.h"
#include "simd/tile_registers.h"
#include "simd/vec.h"

#include "kernels/tile_products-inl.h"

namespace nplora::kernels {
static_assert(kDepthUnit % amx::kTileSide == 0);

extern const PairProducts k_amx_products;
constinit const PairProducts k_amx_products = {
    {2 * amx::kTileSide, 3 * amx::kTileSide, 2 * amx::kTileSide, kPanelColumns, 0, amx::kTileSide,
     amx::gemm_tokens_in_lanes, amx::gemm_outputs_in_lanes, amx::peak},
    amx::paired_gemm_outputs_in_lanes};
}  // namespace nplora::kernels
