// Counts cases, names the one that fails or crashes, and watches the floating-point control word.
#pragma once

#include <cstddef>
#include <string>

namespace check {

// One call of one kernel. It passes unless an expect() during its life is false or the control word (rounding
// mode, flush-to-zero, exception masks) has changed by its end.
class Case {
 public:
  [[gnu::format(printf, 2, 3)]] explicit Case(const char* format, ...);
  ~Case();
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

 private:
  unsigned control_word_;
};

// Fails the current case where ok is false; the first of its failures is printed.
[[gnu::format(printf, 2, 3)]] void expect(bool ok, const char* format, ...);

// One more shape for this kernel; every kernel must meet at least kFewestShapes between two calls of
// close_isa.
inline constexpr size_t kFewestShapes = 500;
void count_shape(const std::string& kernel);

// Ends the account of one instruction set and prints its line.
void close_isa(const char* isa);

// A fault (an access to a guard page, an illegal instruction) names its case and ends the program with 1.
void catch_crashes();

// Prints the total; 0 if nothing failed, else 1: the exit status.
int close();

}  // namespace check
