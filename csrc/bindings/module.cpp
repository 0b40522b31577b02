#include "bindings/arrays.h"

namespace {

// pybind11, NumPy and the thread pool exist once in a process. In a subinterpreter, pybind11 would wait for
// the GIL forever.
constexpr const char* kOnlyInMain =
    "nplora cannot be imported in a subinterpreter, only in the main interpreter: use threads or processes "
    "(with mod_wsgi: WSGIApplicationGroup %{GLOBAL})";

bool in_main_interpreter() {
  return PyInterpreterState_Get() == PyInterpreterState_Main();
}

}  // namespace

// PYBIND11_MODULE defines a function PyInit__core. A macro renames this function, so that our own
// PyInit__core can check the interpreter first. Python 3.13 calls PyInit__core in the main interpreter even
// if a subinterpreter imports the module, so the body of the module checks again.
#define PyInit__core PyInit__core_of_pybind11
PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  if (!in_main_interpreter()) throw pybind11::import_error(kOnlyInMain);
  m.doc() =
      "The compiled core of nplora. It requires exact shapes, dtypes and C order; the functions of `nplora` "
      "convert their arguments.";
  nplora::bindings::register_runtime(m);
  nplora::bindings::register_constants(m);
  nplora::bindings::register_buffers(m);
  nplora::bindings::register_weight(m);
  nplora::bindings::register_lora(m);
  nplora::bindings::register_inference(m);
  nplora::bindings::register_optimizer(m);
  nplora::bindings::register_elementwise(m);
  nplora::bindings::register_blocks(m);
  nplora::bindings::register_transformer(m);
  nplora::bindings::register_profile(m);
}
#undef PyInit__core

extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  if (in_main_interpreter()) return PyInit__core_of_pybind11();
  PyErr_SetString(PyExc_ImportError, kOnlyInMain);
  return nullptr;
}
