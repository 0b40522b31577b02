// The tasks of a Grid meet each token and each column once, and keep all threads at work to the end.
#include <algorithm>
#include <vector>

#include "check.h"
#include "kernel_tests.h"
#include "ops/blocking.h"

using nplora::Grid;
using nplora::Range;

namespace {

// Where threads of one speed take a task whenever they have none: how long it takes, in rows and columns.
size_t length(const Grid& grid, size_t threads) {
  std::vector<size_t> ends(threads);
  for (size_t i = 0; i < grid.tasks(); ++i)
    *std::min_element(ends.begin(), ends.end()) += grid.tokens(i).count * grid.side(i).count;
  return *std::max_element(ends.begin(), ends.end());
}

void run_grid(Grid::Cut tokens, Grid::Cut side, double operations, size_t threads) {
  check::Case one("%zu tokens by %zu, up to %zu, %zu columns by %zu, up to %zu, %.0e operations, %zu threads",
                  tokens.count, tokens.unit, tokens.most, side.count, side.unit, side.most, operations,
                  threads);
  const Grid grid(tokens, side, operations, threads);
  std::vector<int> met(tokens.count * side.count);
  for (size_t i = 0; i < grid.tasks(); ++i) {
    const Range its = grid.tokens(i), cols = grid.side(i);
    check::expect(its.first % tokens.unit == 0 && cols.first % side.unit == 0,
                  "task %zu begins within a unit", i);
    check::expect(its.count > 0 && its.count <= nplora::round_up(tokens.most, tokens.unit),
                  "task %zu has %zu tokens", i, its.count);
    check::expect(cols.count <= std::max(side.most, side.unit), "task %zu has %zu columns", i, cols.count);
    for (size_t t = 0; t < its.count; ++t)
      for (size_t c = 0; c < cols.count; ++c) ++met[(its.first + t) * side.count + cols.first + c];
  }
  check::expect(std::all_of(met.begin(), met.end(), [](int n) { return n == 1; }),
                "not everything is met once");
  const size_t longest = std::min(tokens.most, tokens.count) * side.unit;
  check::expect(length(grid, threads) <= tokens.count * side.count / threads + longest,
                "a thread waits for another");
}

}  // namespace

void test_grid() {
  for (size_t threads : {1, 2, 3, 7, 16})
    for (size_t tokens : {0, 1, 64, 256, 500})
      for (size_t columns : {0, 1, 47, 48, 577, 1001, 2048})
        for (double operations : {1e6, 3e10}) {
          run_grid({tokens, 32, 256}, {columns, 48, 4096}, operations, threads);
          run_grid({tokens, 1, 8}, {columns, 1, 96}, operations, threads);
        }
}
