// Measures how much time a thread spends in each activity. While a thread profiles, each operation adds its
// wall time and its floating-point operations to the totals of its activity. While a thread does not profile,
// the only extra cost of an operation is to read one variable.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <iterator>

namespace nplora {

enum class Activity : uint8_t {
  kForward,
  kBackward,
  kAttention,
  kAttentionBackward,
  kNorm,
  kRope,
  kActivation,
  kConversion,
  kLoss,
  kOptimizer,
};
inline constexpr const char* kActivityNames[] = {"forward", "backward", "attention",  "attention_backward",
                                                 "norm",    "rope",     "activation", "conversion",
                                                 "loss",    "optimizer"};
inline constexpr size_t kActivities = std::size(kActivityNames);

// The element types in which matrix products are computed.
enum class Arithmetic : uint8_t { kFloat64, kFloat32, kBfloat16, kInt8 };
inline constexpr const char* kArithmeticNames[] = {"float64", "float32", "bfloat16", "int8"};
inline constexpr size_t kArithmetics = std::size(kArithmeticNames);

struct ActivityTotals {
  uint64_t calls = 0;
  double seconds = 0;
  std::array<double, kArithmetics> operations{};  // for each Arithmetic, the number of operations
};
using Profile = std::array<ActivityTotals, kActivities>;

// The totals of the calling thread; null if the thread does not profile.
inline thread_local Profile* current_profile = nullptr;

// A Timed object measures the time between its construction and its destruction, and adds this time to the
// totals of an activity. If a thread creates a Timed object while another Timed object of this thread exists,
// the new object adds nothing.
class Timed {
 public:
  explicit Timed(Activity activity) : profile_(current_profile), activity_(activity) {
    if (!profile_) return;
    current_profile = nullptr;
    start_ = Clock::now();
  }
  ~Timed() {
    if (!profile_) return;
    current_profile = profile_;
    ActivityTotals& totals = (*profile_)[size_t(activity_)];
    ++totals.calls;
    totals.seconds += std::chrono::duration<double>(Clock::now() - start_).count();
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

  // Whether the thread profiles. If the thread does not profile, operations need not be counted.
  explicit operator bool() const { return profile_ != nullptr; }

  void count(Arithmetic arithmetic, double operations) const {
    (*profile_)[size_t(activity_)].operations[size_t(arithmetic)] += operations;
  }

 private:
  using Clock = std::chrono::steady_clock;

  Profile* const profile_;
  const Activity activity_;
  Clock::time_point start_;
};

}  // namespace nplora
