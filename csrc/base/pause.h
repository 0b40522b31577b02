// How a thread waits for another one that is at work.
#pragma once

#include <thread>

namespace nplora {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Returns when done(), which another thread is about to make true. If that one should have lost its processor, to this thread
// perhaps, it gets this one; not at once, since a thread that yields may have to wait for a time slice itself.
template <class Done>
void wait_until(const Done& done) {
  constexpr int kPauses = 2000;  // some 50 µs
  for (int looks = 0; !done(); ++looks) looks < kPauses ? pause() : std::this_thread::yield();
}

}  // namespace nplora
