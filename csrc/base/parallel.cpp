#include "base/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <string>
#include <string_view>
#include <thread>

#include "base/pool.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace nplora {

namespace {

std::atomic<size_t> thread_limit{0};
std::atomic<bool (*)()> interrupt_hook{nullptr};
std::atomic<bool> forked{false};
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// About 5 µs of arithmetic on one core, which is what starting a parallel region costs.
constexpr double kOperationsPerThread = 5e5;

// Tasks are handed out one by one from a shared counter; the first exception stops the rest.
class TaskRun {
 public:
  TaskRun(size_t tasks, Interruptible interruptible, void (*body)(const void*, size_t), const void* context)
      : tasks_(tasks),
        hook_(interruptible == Interruptible::kYes ? interrupt_hook.load() : nullptr),
        body_(body),
        context_(context) {}

  void work(bool calling_thread) noexcept {
    try {
      for (size_t task; !stop_ && (task = next_++) < tasks_;) {
        body_(context_, task);
        if (calling_thread && hook_ && hook_()) throw Interrupted();
      }
    } catch (...) {
      if (!stop_.exchange(true)) error_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const size_t tasks_;
  bool (*const hook_)();
  void (*const body_)(const void*, size_t);
  const void* const context_;
  std::atomic<size_t> next_{0};
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
  throw std::invalid_argument(std::string("NPLORA_PARALLEL=") + name +
                              (kHaveOpenMP ? ": expected pool or openmp" : ": this build knows pool only"));
}

Backend backend() {
  static const Backend chosen = choose_backend();
  return chosen;
}

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

size_t num_threads() {
  if (forked) return 1;
#ifdef _OPENMP
  const size_t most = static_cast<size_t>(std::max(1, omp_get_max_threads()));
#else
  const size_t most = std::max(1u, std::thread::hardware_concurrency());
#endif
  const size_t limit = thread_limit;
  return limit == 0 ? most : std::min(limit, most);
}

size_t useful_threads(double operations) {
  const size_t threads = num_threads();
  return operations >= kOperationsPerThread * static_cast<double>(threads)
             ? threads
             : std::max<size_t>(1, static_cast<size_t>(operations / kOperationsPerThread));
}

void detail::run_tasks(size_t tasks, size_t threads, Interruptible interruptible,
                       void (*body)(const void*, size_t), const void* context) {
  TaskRun run(tasks, interruptible, body, context);
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    run.work(true);
  } else if (backend() == Backend::kPool) {
    run_on_pool(
        threads - 1, [](void* tasks, bool calling) { static_cast<TaskRun*>(tasks)->work(calling); }, &run);
  } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads)) if (!omp_in_parallel())
    run.work(omp_get_thread_num() == 0);
#endif
  }
  run.rethrow();
}

}  // namespace nplora
