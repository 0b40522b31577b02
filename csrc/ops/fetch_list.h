// Memory that is prefetched during a loop, one share in each iteration.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "base/cache_line.h"
#include "base/range.h"
#include "kernels/kernel_table.h"

namespace nplora {

class FetchList {
 public:
  FetchList(const kernels::Fetch& first, const kernels::Fetch& second) : left_{first, second} {}

  // Removes the next share from the list and returns it. The share is 1 / `shares` of the memory that is
  // left. The result has two ranges of memory. Usually the whole share is in the first range, and the second
  // is empty. If the share contains the end of `first` and the start of `second` (the two arguments of the
  // constructor), it has two parts, and the first range is the longer part.
  std::array<kernels::Fetch, 2> share(size_t shares) {
    const size_t n = ceil_div(left_[0].lines + left_[1].lines, shares);
    std::array<kernels::Fetch, 2> taken{take(left_[0], n), kernels::Fetch::none()};
    taken[1] = take(left_[1], n - taken[0].lines);
    if (taken[0].lines < taken[1].lines) std::swap(taken[0], taken[1]);
    return taken;
  }

 private:
  static kernels::Fetch take(kernels::Fetch& from, size_t lines) {
    const auto taken = kernels::Fetch::memory(from.at, std::min(lines, from.lines));
    from.at += taken.lines * kCacheLine;
    from.lines -= taken.lines;
    return taken;
  }

  kernels::Fetch left_[2];
};

}  // namespace nplora
