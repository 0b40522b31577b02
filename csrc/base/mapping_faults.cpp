#include "base/mapping_faults.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string_view>

#include "base/platform.h"

namespace nplora {

namespace {

// The entry for one watched mapping. The entries form a linked list. The signal handler reads the list
// without a lock, so an entry is never freed. A new mapping takes an entry that is not in use.
struct Watch {
  size_t number = 0;
  std::atomic<uintptr_t> begin = 0, end = 0;  // `begin` and `end` are 0 if the entry is not in use
  char message[kLongestMessage];
  size_t length = 0;
  Watch* next = nullptr;
};

std::atomic<Watch*> watches = nullptr;
static_assert(std::atomic<Watch*>::is_always_lock_free && std::atomic<uintptr_t>::is_always_lock_free);

// A thread must hold `mutex` and the GIL while it changes the list or an entry. Because of the GIL, Python
// cannot fork in the middle of a change.
std::mutex mutex;

// Called in the signal handler.
std::string_view message_about(uintptr_t address) {
  for (const Watch* watch = watches.load(); watch != nullptr; watch = watch->next)
    if (watch->begin.load() <= address && address < watch->end.load()) return {watch->message, watch->length};
  return {};
}

// Returns an entry that is not in use. If all entries are in use, adds a new entry to the list. The new entry
// covers no memory yet.
Watch* free_watch() {
  for (Watch* watch = watches.load(); watch != nullptr; watch = watch->next)
    if (watch->end.load() == 0) return watch;
  auto* const added = new Watch;
  added->next = watches.load();
  watches.store(added);
  return added;
}

}  // namespace

size_t watch_mapping(const void* start, size_t bytes, const char* message, size_t length) {
  static size_t last = 0;
  const std::lock_guard lock(mutex);
  platform::explain_faults(&message_about);
  Watch* const watch = free_watch();
  watch->number = ++last;
  watch->length = std::min(length, kLongestMessage);
  std::memcpy(watch->message, message, watch->length);
  watch->begin = reinterpret_cast<uintptr_t>(start);
  watch->end = reinterpret_cast<uintptr_t>(start) + bytes;
  return last;
}

void unwatch_mapping(size_t number) {
  const std::lock_guard lock(mutex);
  for (Watch* watch = watches.load(); watch != nullptr; watch = watch->next)
    if (watch->number == number) watch->begin = watch->end = 0;
}

}  // namespace nplora
