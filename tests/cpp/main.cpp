// Holds every kernel of every instruction set that this machine runs against an independent oracle, on at
// least 500 shapes each, in buffers between guard pages: kernel_tests [PART PARTS], of which each takes some of
// the instruction sets.
#include "check.h"
#include "kernel_tests.h"

#include <cstdlib>

int main(int count, char** words) {
  const size_t part = count == 3 ? strtoul(words[1], nullptr, 10) - 1 : 0;
  const size_t parts = count == 3 ? strtoul(words[2], nullptr, 10) : 1;
  check::catch_crashes();
  test_dispatch();
  if (part == 0) {
    test_quantize();
    test_fetch_list();
  }
  const auto tables = usable_tables();
  for (size_t i = part; i < tables.size(); i += parts) {
    test_products(*tables[i]);
    // AMX's table is that of AVX512-BF16 with other products.
    if (i > 0 && tables[i]->transformer.dot == tables[i - 1]->transformer.dot) {
      check::close_isa(tables[i]->isa);
      continue;
    }
    test_dots(*tables[i]);
    test_lanes(*tables[i]);
    test_elementwise(*tables[i]);
    test_conversions(*tables[i]);
    test_blocks(*tables[i]);
    test_int8(*tables[i]);
    test_transformer(*tables[i]);
    check::close_isa(tables[i]->isa);
  }
  return check::close();
}
