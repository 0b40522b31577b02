// Loops with a known number of operations or bytes. They measure the most that this machine can do.
// bench/ceilings.py compiles and calls them. Each loop runs on its own threads, one per processor.
// The threads start together. The result is operations or bytes per second.
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>
#if defined(__AMX_BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__AVX512BF16__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Lanes __attribute__((vector_size(kBytes), aligned(4), may_alias));
constexpr long kLanes = kBytes / 4;
constexpr int kAccumulators =
    12;  // hides latency: 4 cycles x 2 per cycle = 8; leaves some of AVX2's 16 registers free

volatile float sink;  // keeps the compiler from removing the sums

void pin(long thread) {
  cpu_set_t allowed, one;
  sched_getaffinity(0, sizeof allowed, &allowed);
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed) && thread-- == 0) CPU_SET(cpu, &one);
  pthread_setaffinity_np(pthread_self(), sizeof one, &one);
}

// Runs body(i) on each thread. Returns `amount` divided by the seconds from the common start to the last end.
template <class Body>
double rate(long threads, double amount, const Body& body) {
  using Clock = std::chrono::steady_clock;
  std::atomic<long> waiting{threads};
  std::vector<Clock::time_point> starts(threads), ends(threads);
  std::vector<std::thread> all;
  for (long i = 0; i < threads; ++i)
    all.emplace_back([&, i] {
      pin(i);
      for (--waiting; waiting > 0;) {
      }
      starts[i] = Clock::now();
      body(i);
      ends[i] = Clock::now();
    });
  for (std::thread& thread : all) thread.join();
  Clock::time_point start = starts[0], end = ends[0];
  for (long i = 1; i < threads; ++i) {
    if (starts[i] < start) start = starts[i];
    if (ends[i] > end) end = ends[i];
  }
  return amount / std::chrono::duration<double>(end - start).count();
}

// 2 * kAccumulators * kLanes floating-point operations per iteration, without memory access.
void fma_loop(long iterations) {
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
  for (long j = 0; j < kLanes; ++j) sink = total[j];
}

#if defined(__AMX_BF16__)

constexpr long kBf16Operations = 2 * 16 * 16 * 32 / 2;  // per instruction, with half of kAccumulators

void bf16_loop(long iterations) {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  struct alignas(64) {
    unsigned char palette = 1, zeros[15] = {};
    unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  float sums[16][16] = {};
  unsigned ones[16][16];
  for (auto& row : ones)
    for (unsigned& pair : row) pair = 0x3f803f80;
  _tile_loadconfig(&shapes);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
#define EACH_SUM(call) \
  call(0);             \
  call(1);             \
  call(2);             \
  call(3);             \
  call(4);             \
  call(5)
#define MULTIPLY(sum) _tile_dpbf16ps(sum, 6, 7)
  EACH_SUM(_tile_zero);
  for (long k = 0; k < iterations; ++k) {
    EACH_SUM(MULTIPLY);
  }
#undef EACH_SUM
#undef MULTIPLY
  _tile_stored(0, sums, 64);
  _tile_release();
  sink = sums[0][0];
}

#elif defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

#if defined(__AVX512BF16__)
constexpr long kBf16Operations = 4 * 16;  // per instruction
typedef __m512 Bf16Sum;
Bf16Sum bf16_dot(Bf16Sum sum, __m512i x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(x));
}
__m512i bf16_ones() {
  volatile int pair = 0x3f803f80;
  return _mm512_set1_epi32(pair);
}
#else
constexpr long kBf16Operations = 4 * 4;
typedef float32x4_t Bf16Sum;
Bf16Sum bf16_dot(Bf16Sum sum, bfloat16x8_t x) {
  return vbfdotq_f32(sum, x, x);
}
bfloat16x8_t bf16_ones() {
  volatile unsigned pair = 0x3f803f80;
  return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
}
#endif

void bf16_loop(long iterations) {
  const auto ones = bf16_ones();
  Bf16Sum sums[kAccumulators];
  // The compiler would merge equal ones into one.
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) sums[i] = Bf16Sum{} + static_cast<float>(i + 1);
  for (long k = 0; k < iterations; ++k) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) sums[i] = bf16_dot(sums[i], ones);
  }
  for (const Bf16Sum& sum : sums) sink = sum[0];
}

#else
constexpr long kBf16Operations = 0;
void bf16_loop(long) {}
#endif

#if (defined(__AVX512VNNI__) || defined(__AVXVNNI__)) || defined(__ARM_FEATURE_DOTPROD)

// Four products of bytes in each 32-bit lane: 8 operations.
typedef int IntLanes __attribute__((vector_size(kBytes)));
constexpr long kInt8Operations = 2 * kBytes;

void int8_dot(IntLanes& sum, IntLanes x) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %1, %1, %0" : "+v"(sum) : "v"(x));
#elif defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %1, %1, %0" : "+x"(sum) : "x"(x));
#else
  asm("sdot %0.4s, %1.16b, %1.16b" : "+w"(sum) : "w"(x));
#endif
}

void int8_loop(long iterations) {
  volatile int source = 0x01010101;
  const IntLanes ones = IntLanes{} + source;
  IntLanes sums[kAccumulators];
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) sums[i] = IntLanes{} + i;
  for (long k = 0; k < iterations; ++k) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) int8_dot(sums[i], ones);
    asm volatile("" : "+r"(k));  // GCC would otherwise take the loop for empty
  }
  IntLanes total{};
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) total += sums[i];
  sink = static_cast<float>(total[0]);
}

#else
constexpr long kInt8Operations = 0;
void int8_loop(long) {}
#endif

constexpr long kReadLines = 8;

void read_loop(const float* values, long count) {
  Lanes sums[kReadLines] = {};
  for (long i = 0; i < count; i += kReadLines * kLanes) {
#pragma GCC unroll 8
    for (long j = 0; j < kReadLines; ++j) sums[j] += *reinterpret_cast<const Lanes*>(values + i + j * kLanes);
  }
  Lanes total{};
  for (const Lanes& s : sums) total += s;
  for (long j = 0; j < kLanes; ++j) sink = total[j];
}

void rewrite_loop(float* values, long count) {
  volatile float factor_source = 0.999f;
  const Lanes factor = Lanes{} + factor_source;
  for (long i = 0; i < count; i += kLanes) *reinterpret_cast<Lanes*>(values + i) *= factor;
}

}  // namespace

extern "C" double multiply_add(long threads, long iterations) {
  return rate(threads, 2.0 * kAccumulators * kLanes * iterations * threads,
              [&](long) { fma_loop(iterations); });
}

// 0 if there is no such instruction.
extern "C" double bf16_dots(long threads, long iterations) {
  return rate(threads, 1.0 * kAccumulators * kBf16Operations * iterations * threads,
              [&](long) { bf16_loop(iterations); });
}

// 0 if there is no such instruction.
extern "C" double int8_dots(long threads, long iterations) {
  return rate(threads, 1.0 * kAccumulators * kInt8Operations * iterations * threads,
              [&](long) { int8_loop(iterations); });
}

// Reads `count` floats once. Each thread reads a share of them (a multiple of 8 * 16).
extern "C" double read_once(long threads, const float* values, long count) {
  const long share = count / threads;
  return rate(threads, 4.0 * share * threads, [&](long i) { read_loop(values + i * share, share); });
}

// Reads and writes `count` floats in place. Every byte counts twice.
extern "C" double rewrite(long threads, float* values, long count) {
  const long share = count / threads;
  return rate(threads, 8.0 * share * threads, [&](long i) { rewrite_loop(values + i * share, share); });
}
