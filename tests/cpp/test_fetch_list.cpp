// The shares of a FetchList are even and add up to all of its memory.
#include "ops/fetch_list.h"

#include <set>

#include "check.h"
#include "kernel_tests.h"

using nplora::kernels::Fetch;

namespace {

void run_shares(size_t first, size_t second, size_t shares) {
  check::Case one("%zu and %zu lines in %zu shares", first, second, shares);
  const char memory[2] = {};
  const auto* there = reinterpret_cast<const char*>(uintptr_t{1} << 40);  // never read
  nplora::FetchList list(lines_at(there, first), lines_at(memory, second));
  std::set<const char*> seen;
  for (size_t left = shares; left > 0; --left) {
    size_t lines = 0;
    const auto pieces = list.share(left);
    for (const Fetch& piece : pieces) {
      for (size_t i = 0; i < piece.lines; ++i) seen.insert(piece.at + i * nplora::kCacheLine);
      lines += piece.lines;
    }
    check::expect(lines <= (first + second + shares - 1) / shares, "a share of %zu lines", lines);
    check::expect(pieces[0].lines >= pieces[1].lines, "the smaller piece came first");
  }
  check::expect(seen.size() == first + second, "%zu lines were fetched", seen.size());
  for (size_t i = 0; i < first; ++i)
    check::expect(seen.count(there + i * nplora::kCacheLine) == 1, "line %zu was not fetched", i);
}

}  // namespace

void test_fetch_list() {
  for (size_t first : {0, 1, 5, 24, 96})
    for (size_t second : {0, 1, 24, 100})
      for (size_t shares : {1, 2, 3, 7, 32}) run_shares(first, second, shares);
}
