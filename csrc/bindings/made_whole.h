// Makes sure that the constructor of a bound class has run before Python code gets the object.
#pragma once

#include <pybind11/pybind11.h>

namespace nplora::bindings {

// pybind11's own tp_new leaves the object empty, and a method of an empty object would read uninitialised
// memory. new_with_init therefore calls __init__ itself. Python then calls __init__ a second time. The second
// call finds a constructed object and returns at once.
inline PyObject* new_with_init(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  PyObject* self = type->tp_base->tp_new(type, args, kwargs);
  if (self && type->tp_init(self, args, kwargs) < 0) Py_CLEAR(self);
  return self;
}

// Use made_whole only for classes that Python code cannot subclass. new_with_init calls the tp_new of
// type->tp_base, which must be pybind11's base class. If Python code subclassed the bound class,
// type->tp_base would be the bound class.
inline pybind11::custom_type_setup made_whole() {
  return pybind11::custom_type_setup([](PyHeapTypeObject* type) { type->ht_type.tp_new = &new_with_init; });
}

}  // namespace nplora::bindings
