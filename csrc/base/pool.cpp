#include "base/pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/pause.h"
#include "base/platform.h"

namespace nplora {

namespace {

std::atomic<bool> in_child{false};
[[maybe_unused]] const bool fork_watch = (platform::call_in_forked_child([] { in_child = true; }), true);

// How long an idle thread polls before it sleeps. During a training step, the time from one job to the next
// is shorter than the polling time, so threads do not sleep between jobs. The system may wake a sleeping
// thread on the caller's own core even if another core has no work: in a virtual machine, a core that is
// halted does not count as idle. The woken thread then waits for a time slice while the caller does all the
// work. On two cores, a step took 8.0 ms when idle threads polled for only 20 µs, and 4.3 ms when they polled
// longer.
constexpr auto kSpinTime = std::chrono::microseconds(1000);

struct Job {
  void (*work)(void*, size_t);
  void* context;
  size_t places;                   // the number of workers that may still join; guarded by Pool::mutex_
  std::atomic<size_t> working{0};  // the number of workers that have joined and not yet returned
};

class Pool {
 public:
  void run(size_t helpers, void (*work)(void*, size_t), void* context) {
    Job job{work, context, helpers};
    open(&job, helpers);
    work(context, 0);
    if (!forked()) close(&job);  // in a forked child, the workers are gone and the mutex may be locked
  }

 private:
  void open(Job* job, size_t helpers) {
    {
      const std::lock_guard lock(mutex_);
      start_workers(helpers);
      steer_workers();
      jobs_.push_back(job);
      open_places_.fetch_add(job->places, std::memory_order_release);
    }
    for (size_t i = 0; i < helpers; ++i) wake_.notify_one();
  }

  void close(Job* job) {
    {
      const std::lock_guard lock(mutex_);
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
      open_places_.fetch_sub(job->places, std::memory_order_relaxed);
    }
    const auto all_returned = [job] { return job->working.load(std::memory_order_acquire) == 0; };
    if (spin(all_returned, kSpinTime)) return;
    std::unique_lock lock(mutex_);
    done_.wait(lock, all_returned);
  }

  // If the system refuses a thread or the memory for it, only speed is lost.
  void start_workers(size_t wanted) {
    if (worker_threads_.size() >= wanted) return;
    const platform::WithoutSignals without_signals;
    try {
      while (worker_threads_.size() < wanted) {
        worker_threads_.reserve(worker_threads_.size() + 1);
        std::thread worker([this, number = worker_threads_.size() + 1] { serve(number); });
        worker_threads_.push_back(worker.native_handle());
        worker.detach();
        steered_from_ = -1;
      }
    } catch (const std::exception&) {
    }
  }

  // Keeps the workers off the caller's processor. A sleeping worker would often be woken on that processor,
  // and would wait there for a time slice while the caller does all the work. On any other processor, a
  // worker soon gets to run, even if a thread of a BLAS library spins there for a while after a matrix
  // product.
  void steer_workers() {
    const int processor = platform::current_processor();
    if (processor == steered_from_ || processor < 0) return;
    if (platform::avoid_processor(worker_threads_, processor)) steered_from_ = processor;
  }

  [[noreturn]] void serve(size_t number) {
    for (;;) {
      const bool seen = spin([this] { return open_places_.load(std::memory_order_acquire) > 0; }, kSpinTime);
      std::unique_lock lock(mutex_);
      Job* job = next_job();
      if (!job && seen) continue;  // the job ended before this thread joined; another job may follow soon
      wake_.wait(lock, [&] { return (job = next_job()) != nullptr; });
      --job->places;
      open_places_.fetch_sub(1, std::memory_order_relaxed);
      job->working.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job->work(job->context, number);
      lock.lock();
      job->working.fetch_sub(1, std::memory_order_release);
      done_.notify_all();
    }
  }

  Job* next_job() {
    const auto open =
        std::find_if(jobs_.begin(), jobs_.end(), [](const Job* job) { return job->places > 0; });
    return open == jobs_.end() ? nullptr : *open;
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Job*> jobs_;
  std::atomic<size_t> open_places_{0};            // the number of workers that may still join any job
  std::vector<platform::Thread> worker_threads_;  // workers never end
  int steered_from_ = -1;                         // the caller's processor, which the workers avoid
};

}  // namespace

bool forked() {
  return in_child;
}

void run_on_pool(size_t helpers, void (*work)(void*, size_t), void* context) {
  static Pool* const pool = new Pool;  // the pool is never destroyed, because its threads never end
  pool->run(helpers, work, context);
}

}  // namespace nplora
