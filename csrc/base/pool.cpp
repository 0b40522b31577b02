#include "base/pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace nplora {

namespace {

thread_local bool is_worker = false;

// How often an idle thread looks before it sleeps: about 20 µs, less than a wake-up costs and less than a
// time slice.
constexpr int kSpins = 2000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

struct Job {
  void (*work)(void*, bool);
  void* context;
  size_t places;                   // workers that may still join; guarded by Pool::mutex_
  std::atomic<size_t> working{0};  // workers that joined and have not returned
};

class Pool {
 public:
  void run(size_t helpers, void (*work)(void*, bool), void* context) {
    Job job{work, context, helpers};
    open(&job);
    work(context, true);
    close(&job);
  }

 private:
  void open(Job* job) {
    {
      const std::lock_guard lock(mutex_);
      start_workers(job->places);
      jobs_.push_back(job);
      open_jobs_.store(jobs_.size(), std::memory_order_release);
    }
    for (size_t i = 0; i < job->places; ++i) wake_.notify_one();
  }

  void close(Job* job) {
    std::unique_lock lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
    open_jobs_.store(jobs_.size(), std::memory_order_release);
    lock.unlock();
    for (int i = 0; job->working.load(std::memory_order_acquire) > 0; ++i) {
      if (i < kSpins) {
        pause();
      } else {
        lock.lock();
        done_.wait(lock, [&] { return job->working.load(std::memory_order_acquire) == 0; });
        return;
      }
    }
    // A worker that has counted itself out may still hold the mutex to wake us: the job must outlive that.
    lock.lock();
  }

  // A system that refuses a thread costs speed, nothing else.
  void start_workers(size_t wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  void serve() {
    is_worker = true;
    for (;;) {
      for (int i = 0; i < kSpins && open_jobs_.load(std::memory_order_acquire) == 0; ++i) pause();
      std::unique_lock lock(mutex_);
      Job* job = nullptr;
      wake_.wait(lock, [&] { return (job = next_job()) != nullptr; });
      --job->places;
      job->working.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job->work(job->context, false);
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
  std::atomic<size_t> open_jobs_{0};
  size_t workers_ = 0;
};

}  // namespace

void run_on_pool(size_t helpers, void (*work)(void*, bool), void* context) {
  if (helpers == 0 || is_worker) return work(context, true);
  static Pool* const pool = new Pool;  // never destroyed: its threads outlive static destruction
  pool->run(helpers, work, context);
}

}  // namespace nplora
