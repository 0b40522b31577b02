// Platform functions that Linux and macOS share.
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "base/platform.h"

namespace nplora::platform {

namespace {

// The page size is read when the library is loaded. If the size were a static variable inside page_size(),
// the child of a fork could wait forever for a thread that was initialising the variable.
const size_t size_of_page = static_cast<size_t>(sysconf(_SC_PAGESIZE));

char* map_anywhere(size_t bytes) {
  void* const start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return start == MAP_FAILED ? nullptr : static_cast<char*>(start);
}

}  // namespace

size_t page_size() {
  return size_of_page;
}

char* map_pages(size_t bytes, size_t alignment) {
  if (alignment <= size_of_page) return map_anywhere(bytes);
  char* const first = map_anywhere(bytes + alignment);
  if (first == nullptr) return nullptr;
  const size_t before = -reinterpret_cast<uintptr_t>(first) % alignment;
  char* const start = first + before;
  if (before > 0) munmap(first, before);
  munmap(start + bytes, alignment - before);
  return start;
}

void unmap_pages(void* at, size_t bytes) {
  munmap(at, bytes);
}

bool has_threads() {
  return true;
}

void call_in_forked_child(void (*f)()) {
  pthread_atfork(nullptr, nullptr, f);
}

WithoutSignals::WithoutSignals() {
  static_assert(sizeof(sigset_t) <= sizeof before_);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::memcpy(before_, &before, sizeof before);
}

WithoutSignals::~WithoutSignals() {
  sigset_t before;
  std::memcpy(&before, before_, sizeof before);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// ---- faults: the handler makes only async-signal-safe calls ----

namespace {

struct sigaction before;  // the SIGBUS handler that on_bus_error has replaced
std::atomic<FaultMessage> message_of = nullptr;
static_assert(std::atomic<FaultMessage>::is_always_lock_free);

bool is_function(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) || (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN);
}

void call(const struct sigaction& action, int signal, siginfo_t* info, void* context) {
  if (action.sa_flags & SA_SIGINFO)
    action.sa_sigaction(signal, info, context);
  else
    action.sa_handler(signal);
}

[[noreturn]] void end_with(std::string_view message, int signal, siginfo_t* info, void* context) {
  static std::atomic_flag begun;
  while (begun.test_and_set()) ::pause();  // another thread is already ending the process
  for (size_t done = 0; done < message.size();) {
    const ssize_t count = write(STDERR_FILENO, message.data() + done, message.size() - done);
    if (count <= 0) break;
    done += static_cast<size_t>(count);
  }
  if (is_function(before)) call(before, signal, info, context);  // for example the handler of faulthandler
  _exit(kFaultStatus);
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const bool is_access = info->si_code > 0;  // false if a process sent the signal, for example with kill
  if (is_access) {
    const std::string_view message = message_of.load()(reinterpret_cast<uintptr_t>(info->si_addr));
    if (!message.empty()) end_with(message, signal, info, context);
  }
  if (is_function(before)) return call(before, signal, info, context);
  if (before.sa_handler == SIG_IGN && !is_access) return;
  ::signal(signal, SIG_DFL);
  if (!is_access) raise(signal);  // a failed access needs no raise: after the return, it fails again
}

}  // namespace

void explain_faults(FaultMessage find) {
  struct sigaction current;
  if (sigaction(SIGBUS, nullptr, &current) != 0) return;
  // After the first call, an installed handler stays. It is on_bus_error, or a newer handler that may call
  // on_bus_error. If on_bus_error also called the newer handler, the two would call each other forever.
  if (message_of.load() != nullptr && is_function(current)) return;
  message_of = find;
  before = current;
  struct sigaction ours = {};
  ours.sa_sigaction = &on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace nplora::platform
