// A table of the block formats. The names are in the list of kernels/formats.h, and the numbers are computed
// from the structs of the blocks.
#pragma once

#include <cstddef>

#include "kernels/formats.h"

namespace nplora {

struct BlockFormatInfo {
  const char *name, *ggml_name;  // ggml_name is null if ggml does not have the format
  size_t elements, bytes;        // elements: the number of values in a block; bytes: the size of a block
  size_t scales, scale_at[2];    // the number of float16 scales and minima, and their offsets in bytes
  BlockFacts facts;
};

template <class Block>
constexpr BlockFormatInfo info_of(const char* name, const char* ggml_name) {
  BlockFormatInfo info{name, ggml_name, Block::kElements, sizeof(Block), 0, {}, Block::kFacts};
  if constexpr (requires(Block b) { b.d; }) info.scale_at[info.scales++] = offsetof(Block, d);
  if constexpr (requires(Block b) { b.m; }) info.scale_at[info.scales++] = offsetof(Block, m);
  if constexpr (requires(Block b) { b.dmin; }) info.scale_at[info.scales++] = offsetof(Block, dmin);
  return info;
}

#define NPLORA_INFO(name, Name) info_of<Block##Name>(#name, #Name),
inline constexpr BlockFormatInfo kBlockFormats[] = {NPLORA_ROW_FORMATS(NPLORA_INFO)
                                                        info_of<BlockNf4>("nf4", nullptr)};
#undef NPLORA_INFO

inline const BlockFormatInfo& info(BlockFormat format) {
  return kBlockFormats[static_cast<size_t>(format)];
}

}  // namespace nplora
