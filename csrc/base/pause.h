// How a thread waits for another one that is at work.
#pragma once

#include <chrono>
#include <thread>

namespace nplora {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Looks until done(), or for so long; returns done().
template <class Done>
bool spin(const Done& done, std::chrono::microseconds most) {
  const auto end = std::chrono::steady_clock::now() + most;
  do {
    for (int i = 0; i < 32; ++i, pause())
      if (done()) return true;
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

// Returns when done(), which another thread is about to make true. If that one has lost its processor, to this thread perhaps,
// it gets this one; not at once, since a thread that yields may have to wait for a time slice itself.
template <class Done>
void wait_until(const Done& done) {
  if (spin(done, std::chrono::microseconds(50))) return;
  while (!done()) std::this_thread::yield();
}

}  // namespace nplora
