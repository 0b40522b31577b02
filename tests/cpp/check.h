// Counts cases, names the case that fails or crashes, and watches the floating-point control word.
#pragma once

#include <cstddef>
#include <string>

namespace check {

// One call of one kernel. It fails if an expect() during its life is false, or if the control word (rounding
// mode, flush-to-zero, exception masks) has changed at its end.
class Case {
 public:
  [[gnu::format(printf, 2, 3)]] explicit Case(const char* format, ...);
  ~Case();
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

 private:
  unsigned control_word_;
};

// Fails the current case if ok is false. Only the first failure of a case is printed.
[[gnu::format(printf, 2, 3)]] void expect(bool ok, const char* format, ...);

// Counts one more shape for this kernel, and says whether to test it. Every kernel must see at least
// kFewestShapes of them between two calls of close_isa.
inline constexpr size_t kFewestShapes = 500;
[[nodiscard]] bool count_shape(const std::string& kernel);

// From now on, only about one of n shapes is tested.
void take_one_of(size_t n);

// Ends the counts of one instruction set and prints its line.
void close_isa(const char* isa);

// On a fault (an access to a guard page, an illegal instruction) prints the case and ends the program with 1.
void catch_crashes();

// Prints the total. Returns the exit status: 0 if nothing failed, else 1.
int close();

}  // namespace check
