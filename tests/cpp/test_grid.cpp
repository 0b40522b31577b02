// Pieces and tasks cover everything once. They keep all threads busy to the end, without more cuts than that
// needs.
#include <algorithm>
#include <set>
#include <vector>

#include "check.h"
#include "kernel_tests.h"
#include "ops/blocking.h"

using nplora::ceil_div;
using nplora::Grid;
using nplora::kTaskFlops;
using nplora::Range;

namespace {

void run_pieces(size_t n, size_t unit, size_t pieces) {
  check::Case one("%zu items by %zu in %zu pieces", n, unit, pieces);
  const size_t shortest = ceil_div(n, unit) / pieces;
  size_t next = 0;
  for (size_t i = 0; i < pieces; ++i) {
    const Range piece = nplora::nth_piece(n, unit, pieces, i);
    const size_t units = ceil_div(piece.count, unit);
    check::expect(piece.first == next && next % unit == 0, "piece %zu begins at %zu", i, piece.first);
    check::expect(units == shortest || (units == shortest + 1 && i + 1 < pieces), "piece %zu has %zu units",
                  i, units);
    next = piece.first + piece.count;
  }
  check::expect(next == n, "the pieces end at %zu", next);
}

// The time, in tokens times columns, if threads of equal speed take the next task whenever they are free.
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
  const double all = double(tokens.count) * double(side.count);
  std::vector<int> met(tokens.count * side.count);
  std::set<size_t> starts;
  size_t longest = 0;
  for (size_t i = 0; i < grid.tasks(); ++i) {
    const Range its = grid.tokens(i), cols = grid.side(i);
    starts.insert(its.first);
    longest = std::max(longest, its.count);
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
  for (size_t i = 0; i < grid.tasks(); ++i) {
    const size_t cols = grid.side(i).count;
    check::expect(cols <= side.unit || double(longest) * double(cols) / all * operations <= 1.1 * kTaskFlops,
                  "task %zu takes long", i);
  }
  check::expect(length(grid, threads) <= tokens.count * side.count / threads + longest * side.unit,
                "a thread waits for another");

  const size_t units = ceil_div(side.count, side.unit), fewest = ceil_div(tokens.count, tokens.most);
  const bool shared = units >= nplora::pieces_for(threads) || (units > 0 && units % threads == 0);
  check::expect(!shared || starts.size() == fewest, "W is read %zu times, not %zu", starts.size(), fewest);
  const size_t cut =
      // Of tokens, if there are too few columns.
      units == 0 ? 1 : ceil_div(nplora::pieces_for(threads), units);
  check::expect(shared || units == 0 || longest <= nplora::round_up(ceil_div(tokens.count, cut), tokens.unit),
                "columns are too few, and a task has %zu tokens", longest);
  check::expect(
      longest == 0 || starts.size() == ceil_div(tokens.count, nplora::round_up(longest, tokens.unit)),
      "W is read %zu times for tasks of %zu tokens", starts.size(), longest);
  check::expect(operations > kTaskFlops || units < 16 * threads || side.most < side.count ||
                    2 * grid.tasks() <= units * fewest,
                "there are %zu tasks", grid.tasks());
}

}  // namespace

void test_grid() {
  for (size_t unit : {1, 48})
    for (size_t n : {0, 1, 47, 577, 1001})
      for (size_t units = ceil_div(n, unit), pieces = 1; pieces <= units; pieces += 1 + pieces / 4)
        run_pieces(n, unit, pieces);
  for (size_t threads : {1, 2, 3, 7, 16, 64})
    for (size_t tokens : {0, 1, 64, 256, 500, 512})
      for (size_t columns : {0, 1, 47, 48, 240, 577, 1001, 2048})
        for (double operations : {1e6, 3e10}) {
          if (!check::count_shape("grid")) continue;
          run_grid({tokens, 32, 256}, {columns, 48, 4096}, operations, threads);
          run_grid({tokens, 1, 8}, {columns, 1, 96}, operations, threads);
        }
}
