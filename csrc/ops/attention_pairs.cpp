#include <utility>

#include "base/parallel.h"
#include "ops/attention_tile.h"

namespace nplora {

using kernels::Bf16Pair;

PairedKeysAndValues::PairedKeysAndValues(std::vector<Run>& runs, Matrix<const float> k, Matrix<const float> v,
                                         bool backward) {
  const size_t width = k.cols;
  size_t pair_rows = 0;
  for (Run& run : runs) {
    run.k_pairs = &k_;
    run.v_pairs = &v_;
    run.pair_row = pair_rows;
    pair_rows += ceil_div(run.count, 2);
  }
  const size_t along = k.rows * width / 2, down = pair_rows * width;
  Bf16Pair* at = scratch<Bf16Pair>(Scratch::kLanes, (backward ? 2 : 1) * (along + down));
  const auto take = [&](size_t size) { return std::exchange(at, at + size); };
  Bf16Pair *k_along = take(along), *v_down = take(down);
  Bf16Pair *v_along = backward ? take(along) : nullptr, *k_down = backward ? take(down) : nullptr;
  k_ = {k_along, k_down, width};
  v_ = {v_along, v_down, width};

  struct KeyBlock {
    const Run* run;
    size_t first, count;
  };
  std::vector<KeyBlock> blocks;
  for (const Run& run : runs)
    for (size_t first = 0; first < run.count; first += kTileKeys)
      blocks.push_back({&run, first, std::min(kTileKeys, run.count - first)});
  const kernels::Conversions& convert = kernels::table().convert;
  parallel_for(blocks.size(), useful_threads(double(k.rows * width)), Interruptible::kYes, [&](size_t i) {
    const KeyBlock& block = blocks[i];
    const size_t row = block.run->row + block.first, pair = block.run->pair_row + block.first / 2;
    const auto narrow = [&](Matrix<const float> x, Bf16Pair* to) {
      if (to)
        for (size_t j = row; j < row + block.count; ++j)
          convert.narrow_bfloat16(width, x.row(j), reinterpret_cast<uint16_t*>(to + j * width / 2));
    };
    const auto pair_down = [&](Matrix<const float> x, Bf16Pair* to) {
      if (to) convert.pair_rows(block.count, width, x.row(row), x.stride, to + pair * width);
    };
    narrow(k, k_along);
    narrow(v, v_along);
    pair_down(k, k_down);
    pair_down(v, v_down);
  });
}

}  // namespace nplora
