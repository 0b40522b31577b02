// Two deliberate bugs. A sanitizer build that does not stop at each of them checks nothing. `planted_bug
// read` lets a kernel read one element after its buffer; `planted_bug overflow` overflows a signed integer.
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/kernel_table.h"

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "read") == 0) {
    const std::vector<float> x(100, 1.0f);
    const double sum = nplora::kernels::table().f32.sum_of_squares(x.size() + 1, x.data());
    std::printf("not found: the sum is %g\n", sum);
    return 0;
  }
  if (argc == 2 && std::strcmp(argv[1], "overflow") == 0) {
    volatile int largest = std::numeric_limits<int>::max();
    const int sum = largest + argc;
    std::printf("not found: the sum is %d\n", sum);
    return 0;
  }
  std::fprintf(stderr, "usage: planted_bug read|overflow\n");
  return 2;
}
