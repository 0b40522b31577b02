// Bound classes whose objects never exist before their constructor has run.
#pragma once

#include <pybind11/pybind11.h>

namespace nplora::bindings {

// pybind11's own tp_new leaves the object empty, and a method called on it would read uninitialised memory.
// This function also runs __init__. Python then calls __init__ again, which sees a constructed object and
// returns at once.
inline PyObject* new_with_init(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  PyObject* self = type->tp_base->tp_new(type, args, kwargs);
  if (self && type->tp_init(self, args, kwargs) < 0) Py_CLEAR(self);
  return self;
}

// For final classes: tp_base must be pybind11's.
inline pybind11::custom_type_setup made_whole() {
  return pybind11::custom_type_setup([](PyHeapTypeObject* type) { type->ht_type.tp_new = &new_with_init; });
}

}  // namespace nplora::bindings
