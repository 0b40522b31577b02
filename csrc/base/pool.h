// A pool of threads in which the caller never waits for a worker that has not started.
//
// An OpenMP region ends at a barrier that every thread must reach. If another program holds the second core
// (or OpenBLAS, whose workers spin for 100 ms after each product), the caller waits there for a whole time
// slice, although it has done all the work itself. Here a worker joins a job when it wakes, if the job is
// still open, and the caller waits only for workers that joined.
#pragma once

#include <cstddef>

namespace nplora {

// Runs work(context, true) on the calling thread and work(context, false) on up to `helpers` workers. Returns
// when all calls that started have returned. work must return at once when nothing is left to do, and must
// not throw. Several threads may call this at once, but work must not call it.
void run_on_pool(size_t helpers, void (*work)(void*, bool calling_thread), void* context);

// Whether this process is a child of fork. Threads do not survive a fork, so the pool must not be used there.
bool forked();

}  // namespace nplora
