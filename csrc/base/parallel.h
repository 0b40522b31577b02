// Threads. The only user of OpenMP; everything above sees tasks.
#pragma once

#include <cstddef>
#include <stdexcept>

namespace nplora {

// The caller's hook asked to stop (Ctrl-C): outputs are unfinished.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// Our own limit; 0 means none. The number used is the smaller of it and omp_get_max_threads(), so that
// OMP_NUM_THREADS and threadpoolctl are honoured, and always 1 in a forked child, where threads do not survive.
void set_thread_limit(size_t n);
size_t num_threads();

// How threads are had: "openmp" or "pool" (pool.h). NPLORA_PARALLEL names one, read once; results do not
// depend on it. Throws std::invalid_argument where it names another, or one that is not built in.
const char* parallel_backend();

// The OpenMP version as its standard numbers it (201511 is 4.5), or 0 where the build has none.
int openmp_version();

// Asked between tasks, on the thread that called parallel_for only: true stops the work.
void set_interrupt_hook(bool (*hook)());

enum class Interruptible { kNo, kYes };

namespace detail {
void run_tasks(size_t tasks, size_t threads, Interruptible interruptible, void (*body)(const void*, size_t),
               const void* context);
}

// The threads worth starting for this many floating-point operations (or elements, for elementwise work).
size_t useful_threads(double operations);

// Calls body(task) once for each task in [0, tasks), in any order, on at most `threads` threads. A reduction
// is never split: each task owns its outputs, so results do not depend on the number of threads. The first
// exception is rethrown here.
template <class Body>
void parallel_for(size_t tasks, size_t threads, Interruptible interruptible, const Body& body) {
  detail::run_tasks(
      tasks, threads, interruptible,
      [](const void* context, size_t task) { (*static_cast<const Body*>(context))(task); }, &body);
}

}  // namespace nplora
