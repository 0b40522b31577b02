// A place for a shared object that one thread may replace while other threads use it.
#pragma once

#include <memory>
#include <mutex>
#include <utility>

namespace nplora {

template <class T>
class SharedSlot {
 public:
  // The object, or null. It exists at least as long as the returned pointer.
  std::shared_ptr<const T> get() const {
    const std::lock_guard lock(mutex_);
    return object_;
  }

  // Replaces the object. The old object is deleted when nobody uses it any more.
  void set(std::shared_ptr<const T> object) {
    const std::lock_guard lock(mutex_);
    object_.swap(object);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const T> object_;
};

}  // namespace nplora
