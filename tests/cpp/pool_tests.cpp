// Jobs on the pool from several threads at once. Every task must run once, and ThreadSanitizer watches.
// `pool_tests race` has a deliberate race: a sanitizer build that does not stop at it checks nothing.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <vector>

#include "base/parallel.h"

namespace {

std::atomic<int> passed{0}, failed{0};

void expect(bool condition, const char* what) {
  condition ? ++passed : ++failed;
  if (!condition) std::printf("failed: %s\n", what);
}

void run_jobs(size_t threads) {
  for (size_t tasks : {1, 2, 7, 100, 200}) {
    for (bool in_order : {false, true}) {
      std::vector<int> counts(tasks, 0);  // not atomic, because each task has its own
      const auto body = [&](size_t i) { ++counts[i]; };
      if (in_order)
        nplora::parallel_in_order(tasks, threads, nplora::Interruptible::kYes, body);
      else
        nplora::parallel_for(tasks, threads, nplora::Interruptible::kYes, body);
      bool once = true;
      for (int count : counts) once = once && count == 1;
      expect(once, "every task runs once");
    }
  }
}

// When a task starts, all tasks before it have started, except those that other threads have just taken.
void run_in_order(size_t threads) {
  std::atomic<size_t> started{0};
  std::atomic<bool> ordered{true};
  nplora::parallel_in_order(1000, threads, nplora::Interruptible::kNo, [&](size_t i) {
    if (++started + threads <= i) ordered = false;
  });
  expect(ordered, "tasks start in order");
}

void run_failing_job(size_t threads) {
  try {
    nplora::parallel_for(50, threads, nplora::Interruptible::kNo, [](size_t i) {
      if (i == 10) throw std::runtime_error("task 10");
    });
    expect(false, "an exception reaches the caller");
  } catch (const std::runtime_error& error) {
    expect(std::string_view(error.what()) == "task 10", "the exception is the task's own");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string_view(argv[1]) == "race") {
    int count = 0;  // the sleeps and the rounds give other threads time to take tasks, even on a busy machine
    for (int round = 0; round < 30; ++round)
      nplora::parallel_for(100, 4, nplora::Interruptible::kNo, [&](size_t) {
        ++count;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      });
    std::printf("not found: counted %d of 3000\n", count);
    return 0;
  }
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < 3; ++caller)
    callers.emplace_back([] {
      for (int round = 0; round < 300; ++round)
        for (size_t threads : {2, 4}) {
          run_jobs(threads);
          run_in_order(threads);
          run_failing_job(threads);
        }
    });
  for (auto& caller : callers) caller.join();
  run_jobs(130);  // more threads than shares
  run_in_order(130);
  run_failing_job(130);
  std::printf("%d passed, %d failed\n", passed.load(), failed.load());
  return failed > 0;
}
