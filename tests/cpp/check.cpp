#include "check.h"

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>

#include "system.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace check {

namespace {

char current[256] = "no case";
bool current_failed = false;
size_t passed = 0, failed = 0, passed_before = 0, failed_before = 0;
std::map<std::string, size_t> shapes;
size_t one_of = 1;

// Arithmetic may raise the sticky exception flags, so they do not count as control bits.
unsigned control_word() {
#if defined(__x86_64__)
  return _mm_getcsr() & ~0x3fu;
#elif defined(__aarch64__)
  unsigned long word;
  __asm__ volatile("mrs %0, fpcr" : "=r"(word));
  return static_cast<unsigned>(word);
#else
  return 0;
#endif
}

}  // namespace

Case::Case(const char* format, ...) : control_word_(control_word()) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(current, sizeof current, format, arguments);
  va_end(arguments);
  current_failed = false;
}

Case::~Case() {
  expect(control_word() == control_word_, "the floating-point control word changed from %#x to %#x",
         control_word_, control_word());
  ++(current_failed ? failed : passed);
}

void expect(bool ok, const char* format, ...) {
  if (ok || current_failed) return;
  current_failed = true;
  if (failed >= 40) return;  // more messages would add nothing
  printf("FAILED %s: ", current);
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  printf("\n");
}

void take_one_of(size_t n) {
  one_of = n;
}

bool count_shape(const std::string& kernel) {
  const size_t number = shapes[kernel]++;
  return number * 2654435761u % 4294967296u / 65536 % one_of ==
         0;  // mixed, because loops over shapes are regular
}

void close_isa(const char* isa) {
  size_t fewest = SIZE_MAX;
  for (const auto& [kernel, count] : shapes) {
    Case one("the number of shapes of %s", kernel.c_str());
    expect(count >= kFewestShapes, "%zu, wanted at least %zu", count, kFewestShapes);
    if (count < fewest) fewest = count;
  }
  printf("%-12s %zu kernels, %zu shapes or more each: %zu checks, %zu of them failed\n", isa, shapes.size(),
         fewest / one_of, passed + failed - passed_before - failed_before, failed - failed_before);
  fflush(stdout);
  shapes.clear();
  passed_before = passed;
  failed_before = failed;
}

void catch_crashes() {
#if !defined(__SANITIZE_ADDRESS__)  // it has a better report of its own
  test_system::report_crashes(current);
#endif
}

int close() {
  printf("%zu passed, %zu failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace check
