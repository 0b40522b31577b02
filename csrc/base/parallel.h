// Runs tasks on several threads. Only parallel.cpp uses OpenMP; all other code calls the functions of this
// file.
#pragma once

#include <cstddef>
#include <stdexcept>

namespace nplora {

// Thrown when the interrupt hook asks to stop (Ctrl-C). The outputs of the interrupted call are incomplete.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// Sets nplora's own limit for the number of threads; 0 means no limit. num_threads() is the smaller of this
// limit and outer_threads(). In a forked child num_threads() is always 1, because threads do not survive a
// fork.
void set_thread_limit(size_t n);
size_t num_threads();

// The thread limit that other libraries, such as threadpoolctl, can change. The initial limit is the value of
// the environment variable OMP_NUM_THREADS or, if this variable is not set, the number of processors that
// this process may use. Each calling thread has its own limit, as in OpenMP. A build with OpenMP uses
// OpenMP's own limit.
void set_outer_threads(size_t n);
size_t outer_threads();

// The backend that provides the threads: "openmp" or "pool" (pool.h). The environment variable
// NPLORA_PARALLEL chooses the backend, and is read once. Results do not depend on the backend. Throws
// std::invalid_argument if NPLORA_PARALLEL has any other value, or names a backend that this build lacks.
const char* parallel_backend();

// The value of the macro _OPENMP (201511 for version 4.5), or 0 if the build has no OpenMP.
int openmp_version();

// Sets the interrupt hook. parallel_for calls the hook between tasks, only on the thread that called
// parallel_for. If the hook returns true, no more tasks are started and Interrupted is thrown.
void set_interrupt_hook(bool (*hook)());

enum class Interruptible { kNo, kYes };

namespace detail {
void run_tasks(size_t tasks, size_t threads, size_t shares, Interruptible interruptible,
               void (*body)(const void*, size_t), const void* context);

template <class Body>
void call_body(const void* body, size_t task) {
  (*static_cast<const Body*>(body))(task);
}
}  // namespace detail

// Returns how many threads to use for work of `operations` floating-point operations. More threads would not
// help, because starting them would take longer than the time that they save. For elementwise work,
// `operations` may be the number of elements.
size_t useful_threads(double operations);

// Calls body(task) once for each task in [0, tasks), in any order, on at most `threads` threads. The tasks
// are cut into shares of neighbouring tasks, one for each of up to 128 threads. A thread takes the tasks of
// its own share first, and then helps with the other shares. So if successive calls cut an array at about the
// same rows, a thread finds most of its rows in the cache of its own core.
//
// Each output must be computed by a single task. So no sum is split between tasks, and results do not
// depend on the number of threads. If tasks throw, the first exception is rethrown.
template <class Body>
void parallel_for(size_t tasks, size_t threads, Interruptible interruptible, const Body& body) {
  detail::run_tasks(tasks, threads, threads, interruptible, detail::call_body<Body>, &body);
}

// Does the same as parallel_for, but starts the tasks in order: whenever a thread is free, it takes the next
// task. If the tasks become shorter and shorter, no thread waits long for another thread.
template <class Body>
void parallel_in_order(size_t tasks, size_t threads, Interruptible interruptible, const Body& body) {
  detail::run_tasks(tasks, threads, 1, interruptible, detail::call_body<Body>, &body);
}

}  // namespace nplora
