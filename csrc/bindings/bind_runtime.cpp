#include <chrono>

#include "base/mapping_faults.h"
#include "base/parallel.h"
#include "bindings/arrays.h"
#include "kernels/kernel_table.h"
#include "ops/scratch.h"

namespace nplora::bindings {

namespace {

// The identifier of Python's main thread, the only thread that runs signal handlers.
unsigned long main_thread = 0;  // the result of PyThread_get_thread_ident

// The interrupt hook. The hook is called between tasks, on the thread that called this library and released
// the GIL. On Python's main thread, the hook runs the handlers of pending signals, and returns true if a
// handler raises an exception, as for Ctrl-C. On other threads, the hook does not take the GIL: while the
// interpreter shuts down, taking the GIL could end a daemon thread.
bool signal_pending() {
  using Clock = std::chrono::steady_clock;
  constexpr auto kInterval = std::chrono::milliseconds(50);
  if (PyThread_get_thread_ident() != main_thread) return false;
  static Clock::time_point last = Clock::now();
  const auto now = Clock::now();
  if (now - last < kInterval) return false;
  last = now;
  const py::gil_scoped_acquire acquire;
  const ScratchFrame frame;  // keeps signal handlers away from the scratch buffers of the interrupted call
  return PyErr_CheckSignals() != 0;
}

py::list available_isas() {
  const kernels::KernelTable* tables[16];
  const size_t count = kernels::available_tables(tables, 16);
  py::list isas;
  for (size_t i = 0; i < count; ++i) isas.append(tables[i]->isa);
  return isas;
}

py::dict config() {
  py::dict all;
  all["version"] = NPLORA_VERSION;
  all["isa"] = kernels::table().isa;
  all["num_threads"] = num_threads();
  all["parallel"] = parallel_backend();
  all["openmp"] = openmp_version();
#if defined(__clang__)
  all["compiler"] = "clang " __clang_version__;
#else
  all["compiler"] = "gcc " __VERSION__;
#endif
  return all;
}

}  // namespace

}  // namespace nplora::bindings

// To find nplora's core library, threadpoolctl searches all libraries of a process for this symbol.
extern "C" PYBIND11_EXPORT size_t nplora_outer_threads() {
  return nplora::outer_threads();
}

namespace nplora::bindings {

void register_runtime(py::module_& m) {
  // If NPLORA_ISA or NPLORA_PARALLEL cannot be satisfied, the import fails with an error that says why.
  kernels::table();
  parallel_backend();
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  set_interrupt_hook(&signal_pending);
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Interrupted& e) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_KeyboardInterrupt, e.what());
    }
  });
  m.def(
      "set_num_threads",
      [](int64_t n) {
        require(n >= 1, "the number of threads must be at least 1, got " + std::to_string(n));
        set_thread_limit(size_t(n));
      },
      py::arg("n"), "Use at most n threads");
  m.def(
      "set_outer_threads",
      [](int64_t n) {
        require(n >= 1, "the number of threads must be at least 1, got " + std::to_string(n));
        set_outer_threads(size_t(n));
      },
      py::arg("n"), "Limit the threads for calls from this thread, as omp_set_num_threads does");
  m.def("get_outer_threads", &outer_threads, "The thread limit of this thread, as in omp_get_max_threads");
  m.def("get_num_threads", &num_threads, "The largest number of threads that an operation uses");
  m.def("config", &config, "Version, instruction set, threads and compiler");
  m.def(
      "watch_mapping",
      [](const py::buffer& mapping, const py::bytes& message) {
        const py::buffer_info memory = mapping.request();
        const std::string_view text = message;
        return watch_mapping(memory.ptr, size_t(memory.size * memory.itemsize), text.data(), text.size());
      },
      py::arg("mapping"), py::arg("message"), "Print this message if reading this memory raises SIGBUS");
  m.def("unwatch_mapping", &unwatch_mapping, py::arg("number"),
        "End the effect of watch_mapping, after the memory is unmapped");
  m.def("available_isas", &available_isas,
        "The instruction sets that NPLORA_ISA may name on this machine; the last one is the best");
}

}  // namespace nplora::bindings
