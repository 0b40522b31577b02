#include "ops/peak.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "base/parallel.h"
#include "kernels/kernel_table.h"

namespace nplora {

namespace {

constexpr size_t kIterations = 1 << 16;  // with AVX2, these iterations take less than a millisecond
constexpr int kRepeats = 8;              // only the fastest repeat counts: other programs may slow a repeat

kernels::Peak peak_of(Arithmetic arithmetic) {
  const kernels::KernelTable& table = kernels::table();
  switch (arithmetic) {
    case Arithmetic::kFloat64:
      return table.f64.peak;
    case Arithmetic::kFloat32:
      return table.f32.peak;
    case Arithmetic::kBfloat16:
      return table.bf16.peak;
    case Arithmetic::kInt8:
      return table.int8_gemm.peak;
  }
  return nullptr;
}

}  // namespace

// Each thread measures its own rate, and the rates are added. One common measurement would be too low,
// because a thread may start late.
double peak_rate(Arithmetic arithmetic) {
  using Clock = std::chrono::steady_clock;
  const kernels::Peak peak = peak_of(arithmetic);
  const size_t threads = num_threads();
  double best = 0;
  for (int i = 0; i < kRepeats; ++i) {
    std::vector<double> rates(threads);
    parallel_for(threads, threads, Interruptible::kYes, [&](size_t thread) {
      const Clock::time_point start = Clock::now();
      const double operations = peak(kIterations);
      rates[thread] = operations / std::chrono::duration<double>(Clock::now() - start).count();
    });
    double sum = 0;
    for (const double rate : rates) sum += rate;
    best = std::max(best, sum);
  }
  return best;
}

}  // namespace nplora
