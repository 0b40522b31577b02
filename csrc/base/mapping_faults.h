// Prints a message when the program reads a mapped file that was truncated. Reading a page beyond the new end
// of the file raises SIGBUS, which by default kills the process without a message.
#pragma once

#include <cstddef>

namespace nplora {

// After this call, a SIGBUS between `start` and `start + bytes` writes `message` to stderr, calls the handler
// that was installed before, and ends the process with status platform::kFaultStatus. A SIGBUS at any other
// address only calls the handler that was installed before. Returns a number for `unwatch_mapping`. Only the
// first kLongestMessage bytes of the message are printed.
inline constexpr size_t kLongestMessage = 1000;
size_t watch_mapping(const void* start, size_t bytes, const char* message, size_t length);

// Stops watching the mapping for which `watch_mapping` returned `number`. Call unwatch_mapping when the
// memory is no longer mapped. Unknown numbers are ignored.
void unwatch_mapping(size_t number);

}  // namespace nplora
