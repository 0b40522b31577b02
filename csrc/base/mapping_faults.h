// Prints a message when a mapped file is cut short. Reading a page beyond the new end raises SIGBUS, which by
// default kills the process without a word.
#pragma once

#include <cstddef>

namespace nplora {

// From now on, a SIGBUS between `start` and `start + bytes` writes `message` to stderr, calls the handler
// that was installed before, and ends the process with status 128 + SIGBUS. Any other SIGBUS goes to that
// earlier handler. Returns a number for `unwatch_mapping`. Only the first kLongestMessage bytes of the
// message are kept.
inline constexpr size_t kLongestMessage = 1000;
size_t watch_mapping(const void* start, size_t bytes, const char* message, size_t length);

// To be called when the mapping is gone; other numbers are ignored.
void unwatch_mapping(size_t number);

}  // namespace nplora
