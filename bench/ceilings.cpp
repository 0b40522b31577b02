// Loops with a known count of operations: the most that this machine can do. bench/ceilings.py compiles and calls them.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Lanes __attribute__((vector_size(kBytes), aligned(4), may_alias));
constexpr long kLanes = kBytes / 4;
constexpr int kAccumulators = 12;  // covers latency 4 x 2 a cycle (8), and leaves registers free of AVX2's 16

extern "C" long lanes() {
  return kLanes;
}

// 2 * kAccumulators * kLanes floating-point operations an iteration, nothing in memory.
extern "C" float multiply_add(long iterations) {
  volatile float factor_source = 0.999f, term_source = 0.001f;
  const Lanes factor = Lanes{} + factor_source, term = Lanes{} + term_source;
  Lanes sums[kAccumulators];
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) sums[i] = term * static_cast<float>(i + 1);
  for (long k = 0; k < iterations; ++k) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) sums[i] = sums[i] * factor + term;
  }
  Lanes total{};
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) total += sums[i];
  float sum = 0;
  for (long j = 0; j < kLanes; ++j) sum += total[j];
  return sum;
}

// Reads `count` floats (a multiple of 8 * lanes) once.
extern "C" float read_once(const float* values, long count) {
  Lanes sums[8] = {};
  for (long i = 0; i < count; i += 8 * kLanes) {
#pragma GCC unroll 8
    for (long j = 0; j < 8; ++j) sums[j] += *reinterpret_cast<const Lanes*>(values + i + j * kLanes);
  }
  Lanes total{};
  for (const Lanes& s : sums) total += s;
  float sum = 0;
  for (long j = 0; j < kLanes; ++j) sum += total[j];
  return sum;
}

// Reads and writes `count` floats (a multiple of lanes) in place.
extern "C" void rewrite(float* values, long count) {
  volatile float factor_source = 0.999f;
  const Lanes factor = Lanes{} + factor_source;
  for (long i = 0; i < count; i += kLanes) *reinterpret_cast<Lanes*>(values + i) *= factor;
}
