// Checks every kernel of every instruction set that this machine runs against an independent oracle, on at
// least 500 shapes each, in buffers between guard pages. Usage: kernel_tests [PART PARTS [N]]. Each part
// tests some of the instruction sets. With N, it tests only one of N shapes. With --table, it only prints the
// table that it would use.
#include "check.h"
#include "kernel_tests.h"
#include "system.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

using nplora::kernels::KernelTable;

namespace {

// Whether one of these groups of kernels differs between two tables.
template <class... Tables, class... Groups>
bool differ(const KernelTable& table, const KernelTable& other, Groups Tables::*... groups) {
  static_assert((std::has_unique_object_representations_v<Groups> && ...));  // no padding
  return ((std::memcmp(&(table.*groups), &(other.*groups), sizeof(Groups)) != 0) || ...);
}

}  // namespace

int main(int count, char** words) {
  if (count == 2 && std::strcmp(words[1], "--table") == 0) {
    std::fputs(test_system::chosen_table().c_str(), stdout);
    return 0;
  }
  const size_t part = count >= 3 ? strtoul(words[1], nullptr, 10) - 1 : 0;
  const size_t parts = count >= 3 ? strtoul(words[2], nullptr, 10) : 1;
  check::take_one_of(count == 4 ? strtoul(words[3], nullptr, 10) : 1);
  check::catch_crashes();
  test_dispatch();
  if (part == parts - 1) {  // in the last part, because on aarch64 CI skips the first part (generic)
    test_quantize();
    test_fetch_list();
    test_grid();
  }
  const auto tables = usable_tables();
  for (size_t i = part; i < tables.size(); i += parts) {
    const KernelTable& table = *tables[i];
    // Some tables share most of their kernels with the table before them. Shared kernels are tested once.
    const auto has_own = [&](auto... groups) { return i == 0 || differ(table, *tables[i - 1], groups...); };
    using K = KernelTable;
    test_products(table);
    if (has_own(&K::f32, &K::f64, &K::small_f32, &K::small_f64, &K::small_bf16, &K::small_pairs))
      test_dots(table);
    if (has_own(&K::f32, &K::f64)) {
      test_lanes(table);
      test_elementwise(table);
    }
    if (has_own(&K::convert)) test_conversions(table);
    if (has_own(&K::blocks, &K::block_dots)) test_blocks(table);
    if (has_own(&K::int8)) test_int8(table);
    if (has_own(&K::int8_gemm)) test_int8_gemm(table);
    if (has_own(&K::transformer)) test_transformer(table);
    check::close_isa(table.isa);
  }
  return check::close();
}
