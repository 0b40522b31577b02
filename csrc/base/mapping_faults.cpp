#include "base/mapping_faults.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>

namespace nplora {

namespace {

// One watched mapping, as an entry of a list. The signal handler reads the list without a lock, so an entry
// is never freed. A new mapping reuses an entry that is not in use.
struct Watch {
  size_t number = 0;
  std::atomic<uintptr_t> begin = 0, end = 0;  // `begin` and `end` are 0 if the entry is not in use
  char message[kLongestMessage];
  size_t length = 0;
  Watch* next = nullptr;
};

std::atomic<Watch*> watches = nullptr;
static_assert(std::atomic<Watch*>::is_always_lock_free && std::atomic<uintptr_t>::is_always_lock_free);

// Entries are added and removed while this mutex and the interpreter's lock are held, so Python cannot fork
// in the middle of a change.
std::mutex mutex;
struct sigaction before;  // the handler of SIGBUS before ours

const Watch* find(uintptr_t address) {
  for (const Watch* watch = watches.load(); watch != nullptr; watch = watch->next)
    if (watch->begin.load() <= address && address < watch->end.load()) return watch;
  return nullptr;
}

bool is_function(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) || (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN);
}

void call(const struct sigaction& action, int signal, siginfo_t* info, void* context) {
  if (action.sa_flags & SA_SIGINFO)
    action.sa_sigaction(signal, info, context);
  else
    action.sa_handler(signal);
}

// ---- the handler: only async-signal-safe calls ----

[[noreturn]] void end_with(const Watch& watch, int signal, siginfo_t* info, void* context) {
  static std::atomic_flag begun;
  while (begun.test_and_set()) pause();  // another thread is ending the process
  for (size_t done = 0; done < watch.length;) {
    const ssize_t count = write(STDERR_FILENO, watch.message + done, watch.length - done);
    if (count <= 0) break;
    done += static_cast<size_t>(count);
  }
  if (is_function(before)) call(before, signal, info, context);  // for example faulthandler's
  _exit(128 + signal);
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const bool is_access = info->si_code > 0;  // false if another process sent the signal
  if (is_access)
    if (const Watch* const watch = find(reinterpret_cast<uintptr_t>(info->si_addr)))
      end_with(*watch, signal, info, context);
  if (is_function(before)) return call(before, signal, info, context);
  if (before.sa_handler == SIG_IGN && !is_access) return;
  ::signal(signal, SIG_DFL);
  if (!is_access) raise(signal);  // after the handler returns, the failed access is repeated and fails again
}

// Installs our handler again if needed: other code may have restored an older handler, as
// faulthandler.disable() does.
void install() {
  struct sigaction current;
  if (sigaction(SIGBUS, nullptr, &current) != 0) return;
  if (watches.load() != nullptr && is_function(current)) return;
  before = current;
  struct sigaction ours = {};
  ours.sa_sigaction = &on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

// Returns an entry that is not in use. If all entries are in use, adds a new entry, which covers no memory
// yet.
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
  install();
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
