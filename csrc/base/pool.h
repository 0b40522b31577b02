// A pool of threads in which the caller never waits for a worker that has not started.
//
// An OpenMP region ends at a barrier that every thread must reach. Where another program (or OpenBLAS, whose
// workers spin for 100 ms after each product) holds the second core, the caller then waits a whole time slice,
// though it has done all the work itself. Here a worker joins a job when it wakes, if the job is still open, and
// the caller waits only for those that joined.
#pragma once

#include <cstddef>

namespace nplora {

// Runs work(context, true) on the calling thread and work(context, false) on up to `helpers` workers; returns when
// all that started have returned. work must return at once when there is nothing left to do, and must not throw. May
// be called from several threads at once, but not from inside work.
void run_on_pool(size_t helpers, void (*work)(void*, bool calling_thread), void* context);

// Whether this process is a child of fork: threads do not survive one, so the pool must not be used.
bool forked();

}  // namespace nplora
