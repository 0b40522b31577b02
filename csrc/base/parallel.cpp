#include "base/parallel.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <charconv>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <string_view>

#include "base/cache_line.h"
#include "base/platform.h"
#include "base/pool.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace nplora {

namespace {

std::atomic<size_t> thread_limit{0};
std::atomic<bool (*)()> interrupt_hook{nullptr};

// Whether this thread is running the interrupt hook in the middle of a parallel_for. If the hook itself calls
// parallel_for, all tasks of the hook's call run on this thread.
thread_local bool asking = false;

// The number of floating-point operations that makes it worthwhile to use one more thread. One core computes
// this many operations in about 5 µs, and waking a worker also takes about 5 µs.
constexpr double kOperationsPerThread = 5e5;

// Hands out tasks one by one. The tasks are cut into shares (see parallel_for). After the first exception,
// no more tasks are handed out. All threads compute in the caller's floating-point environment (rounding
// mode, flushing of subnormals), so results do not depend on which thread takes a task.
//
// Each share has its own counter of tasks. One counter for all threads would be slow, because its cache line
// would move from core to core for each task. In a virtual machine, such a move took 180 ns, and attention
// with 4 x 256 tokens was 1.5 times as fast with shares as with one counter.
class TaskRun {
 public:
  TaskRun(size_t tasks, size_t shares, Interruptible interruptible, void (*body)(const void*, size_t),
          const void* context)
      : shares_(std::clamp<size_t>(shares, 1, kMostShares)),
        hook_(interruptible == Interruptible::kYes && !asking ? interrupt_hook.load() : nullptr),
        body_(body),
        context_(context) {
    std::fegetenv(&environment_);
    for (size_t i = 0; i < shares_; ++i) {
      share_[i].next = tasks * i / shares_;
      share_[i].end = tasks * (i + 1) / shares_;
      share_[i].owned = i == 0;  // by the calling thread
    }
  }

  // Runs tasks until no task is left: first the tasks of this thread's share, then those of the other shares.
  // `thread` is 0 on the calling thread. A worker has the same number `thread` in every call, so it usually
  // begins with the same share.
  void work(size_t thread) noexcept {
    const bool calling_thread = thread == 0;
    const size_t own_share = calling_thread ? 0 : claim(thread);
    std::fenv_t own;
    if (!calling_thread) {
      std::fegetenv(&own);
      std::fesetenv(&environment_);
    }
    try {
      for (size_t i = 0; i < shares_; ++i) {
        Share& share = share_[(own_share + i) % shares_];
        for (size_t task; !stop_ && share.next < share.end && (task = share.next++) < share.end;) {
          body_(context_, task);
          if (calling_thread && hook_) poll();
        }
      }
    } catch (...) {
      if (!stop_.exchange(true)) error_ = std::current_exception();
    }
    if (!calling_thread) std::fesetenv(&own);
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // The hook may run a signal handler, which may do anything: for example, fork the process or call this
  // library.
  void poll() const {
    asking = true;
    const bool stop = hook_();
    asking = false;
    if (stop) throw Interrupted();
    if (forked() && !forked_before_)
      throw std::runtime_error("the process was forked by a signal handler inside a call");
  }

  // Returns the number of the share with which this worker begins. Tries the shares in order, beginning with
  // share thread % shares_. The worker becomes the owner of the first share that has no owner. If all shares
  // have owners, the worker begins with share thread % shares_ and does not own it.
  size_t claim(size_t thread) {
    for (size_t i = 0; i < shares_; ++i)
      if (!share_[(thread + i) % shares_].owned.exchange(true)) return (thread + i) % shares_;
    return thread % shares_;
  }

  static constexpr size_t kMostShares = 128;
  struct alignas(kCacheLine) Share {
    std::atomic<size_t> next;
    size_t end;
    std::atomic<bool> owned;
  };

  const size_t shares_;
  Share share_[kMostShares];
  bool (*const hook_)();
  void (*const body_)(const void*, size_t);
  const void* const context_;
  const bool forked_before_ = forked();
  std::fenv_t environment_;
  std::atomic<bool> stop_{false};
  std::exception_ptr error_;
};

#ifdef _OPENMP
constexpr bool kHaveOpenMP = true;
#else
constexpr bool kHaveOpenMP = false;
#endif

enum class Backend { kPool, kOpenMP };

Backend choose_backend() {
  const char* name = std::getenv("NPLORA_PARALLEL");
  if (name == nullptr || *name == '\0' || std::string_view(name) == "pool") return Backend::kPool;
  if (std::string_view(name) == "openmp" && kHaveOpenMP) return Backend::kOpenMP;
  throw std::invalid_argument(
      std::string("NPLORA_PARALLEL=") + name +
      (kHaveOpenMP ? ": expected pool or openmp" : ": expected pool, because this build has no OpenMP"));
}

Backend backend() {
  static const Backend chosen = choose_backend();
  return chosen;
}

#ifndef _OPENMP

size_t threads_at_start() {
  static const size_t found = [] {
    const char* text = std::getenv("OMP_NUM_THREADS");
    if (text == nullptr) text = "";
    text += std::strspn(text, " \t");
    unsigned number = 0;  // stays 0 if `text` does not begin with a whole number
    std::from_chars(text, text + std::strlen(text), number);
    return number > 0 ? size_t{number} : platform::usable_processors();
  }();
  return found;
}

thread_local size_t outer_limit = 0;  // 0 means that this thread has set no limit

#endif

}  // namespace

const char* parallel_backend() {
  return backend() == Backend::kPool ? "pool" : "openmp";
}

void set_thread_limit(size_t n) {
  thread_limit = n;
}
void set_interrupt_hook(bool (*hook)()) {
  interrupt_hook = hook;
}

int openmp_version() {
#ifdef _OPENMP
  return _OPENMP;
#else
  return 0;
#endif
}

void set_outer_threads(size_t n) {
#ifdef _OPENMP
  omp_set_num_threads(static_cast<int>(std::min<size_t>(n, INT_MAX)));
#else
  outer_limit = n;
#endif
}

size_t outer_threads() {
#ifdef _OPENMP
  return static_cast<size_t>(std::max(1, omp_get_max_threads()));
#else
  return outer_limit > 0 ? outer_limit : threads_at_start();
#endif
}

size_t num_threads() {
  if (forked() || !platform::has_threads()) return 1;
  const size_t most = outer_threads(), limit = thread_limit;
  return limit == 0 ? most : std::min(limit, most);
}

size_t useful_threads(double operations) {
  const size_t threads = num_threads();
  return operations >= kOperationsPerThread * static_cast<double>(threads)
             ? threads
             : std::max<size_t>(1, static_cast<size_t>(operations / kOperationsPerThread));
}

void detail::run_tasks(size_t tasks, size_t threads, size_t shares, Interruptible interruptible,
                       void (*body)(const void*, size_t), const void* context) {
  threads = asking ? 1 : std::min(threads, tasks);
  TaskRun run(tasks, std::min(shares, threads), interruptible, body, context);
  if (threads <= 1) {
    run.work(0);
  } else if (backend() == Backend::kPool) {
    run_on_pool(
        threads - 1, [](void* self, size_t worker) { static_cast<TaskRun*>(self)->work(worker); }, &run);
  } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads)) if (!omp_in_parallel())
    run.work(static_cast<size_t>(omp_get_thread_num()));
#endif
  }
  run.rethrow();
}

}  // namespace nplora
