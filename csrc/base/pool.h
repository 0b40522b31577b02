// A pool of threads in which the caller never waits for a worker that has not started.
//
// An OpenMP region ends at a barrier that every thread must reach. Where another program (or OpenBLAS, whose
// workers spin for 100 ms after each product) holds the second core, the caller then waits a whole time
// slice, though it has done all the work itself. Here a worker joins a job when it wakes, if the job is still
// open, and the caller waits only for those that joined.
#pragma once

#include <cstddef>

namespace nplora {

// Runs work(context) on the calling thread and on up to `helpers` workers at the same time; returns when all
// that started have returned. work must return at once when there is nothing left to do, and must not throw.
// May be called from several threads at once; a call from inside a worker runs alone.
void run_on_pool(size_t helpers, void (*work)(void*, bool calling_thread), void* context);

}  // namespace nplora
