// Holds every kernel of every instruction set that this machine runs against an independent oracle, on at
// least 500 shapes each, in buffers between guard pages.
#include "check.h"
#include "kernel_tests.h"

int main() {
  check::catch_crashes();
  test_dispatch();
  test_quantize();
  const nplora::kernels::KernelTable* tables[16];
  const size_t count = nplora::kernels::available_tables(tables, 16);
  for (size_t i = 0; i < count; ++i) {
    test_products(*tables[i]);
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
