// Functions with which a thread waits for another thread.
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

// Polls until done() is true or the time `most` has passed. Returns done().
template <class Done>
bool spin(const Done& done, std::chrono::microseconds most) {
  const auto end = std::chrono::steady_clock::now() + most;
  do {
    for (int i = 0; i < 32; ++i, pause())
      if (done()) return true;
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

// Waits until another thread makes done() true. Use this function only for short waits. The waiting thread
// first polls. After 50 µs, this thread yields its processor again and again, because the other thread may
// need this processor. The waiting thread does not yield earlier, because each yield may cost it a whole time
// slice.
template <class Done>
void wait_until(const Done& done) {
  if (spin(done, std::chrono::microseconds(50))) return;
  while (!done()) std::this_thread::yield();
}

}  // namespace nplora
