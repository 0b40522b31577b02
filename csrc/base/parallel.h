// Threads. This is the only user of OpenMP; all code above it sees tasks.
#pragma once

#include <cstddef>
#include <stdexcept>

namespace nplora {

// The caller's hook asked to stop (Ctrl-C). Outputs are unfinished.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// Our own limit; 0 means no limit. num_threads() is the smaller of this limit and omp_get_max_threads(), so
// OMP_NUM_THREADS and threadpoolctl are honoured. It is always 1 in a forked child, where threads do not
// survive.
void set_thread_limit(size_t n);
size_t num_threads();

// Where the threads come from: "openmp" or "pool" (pool.h). The variable NPLORA_PARALLEL chooses, and is read
// once. Results do not depend on this choice. Throws std::invalid_argument if the variable has another value,
// or names a backend that is not built in.
const char* parallel_backend();

// The OpenMP version as its standard writes it (201511 is 4.5), or 0 if the build has no OpenMP.
int openmp_version();

// The hook is called between tasks, only on the thread that called parallel_for. If it returns true, the work
// stops.
void set_interrupt_hook(bool (*hook)());

enum class Interruptible { kNo, kYes };

namespace detail {
void run_tasks(size_t tasks, size_t threads, Interruptible interruptible, void (*body)(const void*, size_t),
               const void* context);
}

// How many threads are worth starting for this many floating-point operations (or elements, for elementwise
// work).
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
