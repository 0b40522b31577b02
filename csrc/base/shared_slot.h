// A place for a shared object that one thread may replace while other threads use it.
#pragma once

#include <atomic>
#include <memory>

#include "base/pause.h"
#include "base/pool.h"

namespace nplora {

// After a fork, the lock may be held by a thread that does not exist in the child. A child therefore never
// waits for the lock. If the lock is held, `get` returns null and `set` does nothing.
template <class T>
class SharedSlot {
 public:
  // Returns the object, or null. The object exists at least as long as the returned pointer.
  std::shared_ptr<const T> get() const {
    if (!lock()) return nullptr;
    std::shared_ptr<const T> object = object_;
    unlock();
    return object;
  }

  // Replaces the object. The old object is deleted when nobody uses it any more.
  void set(std::shared_ptr<const T> object) {
    if (!lock()) return;
    object_.swap(object);
    unlock();
  }

 private:
  bool lock() const {
    while (locked_.exchange(true, std::memory_order_acquire)) {
      if (forked()) return false;
      pause();
    }
    return true;
  }
  void unlock() const { locked_.store(false, std::memory_order_release); }

  mutable std::atomic<bool> locked_{false};
  std::shared_ptr<const T> object_;
};

}  // namespace nplora
