// A pool of threads. The caller never waits for a worker that has not begun to work on the job.
//
// An OpenMP region ends at a barrier that every thread must reach. If a core is busy with another program, or
// with a worker of OpenBLAS (which spins for 100 ms after each product), the OpenMP thread on this core
// reaches the barrier late. The caller of the region then waits at the barrier for a whole time slice, even
// if the caller has done all the work itself. In this pool, a worker that wakes up joins a job only if the
// job is still open, and the caller waits only for workers that joined.
#pragma once

#include <cstddef>

namespace nplora {

// Runs work(context, 0) on the calling thread and work(context, worker) on up to `helpers` workers. `worker`
// is the worker's number, beginning with 1. Returns when every call of `work` that started has returned.
// `work` must return at once when nothing is left to do, and must not throw. Several threads may call
// run_on_pool at the same time, but `work` must not call run_on_pool.
void run_on_pool(size_t helpers, void (*work)(void*, size_t worker), void* context);

// Whether this process is a child of fork. Threads do not survive a fork, so a child must not use the pool.
bool forked();

}  // namespace nplora
