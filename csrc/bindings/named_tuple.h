// Converts Python's named tuples to C++ structs when they are passed to C++. Python creates a named tuple
// faster than an object of a bound class. The template parameter `Fields` describes one struct: kType is its
// name, kNames holds the names of its fields, and Types is a std::tuple of the field types, in the same
// order.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace nplora::bindings {

namespace py = pybind11;

template <class Field>
Field field(py::handle part, size_t i, const char* type, const char* name) {
  py::detail::make_caster<Field> caster;
  if (!caster.load(PyTuple_GET_ITEM(part.ptr(), py::ssize_t(i)), false))
    throw py::type_error(std::string(type) + ": " + name + " does not have the expected type");
  return py::detail::cast_op<Field>(std::move(caster));
}

template <class Fields, class Types = typename Fields::Types>
Types fields_of(py::handle part) {
  constexpr size_t kCount = std::tuple_size_v<Types>;
  if (!PyTuple_Check(part.ptr()) || size_t(PyTuple_GET_SIZE(part.ptr())) != kCount)
    throw py::type_error(std::string("expected a ") + Fields::kType);
  return [part]<size_t... kField>(std::index_sequence<kField...>) {
    return Types{
        field<std::tuple_element_t<kField, Types>>(part, kField, Fields::kType, Fields::kNames[kField])...};
  }(std::make_index_sequence<kCount>());
}

template <class Fields>
std::vector<typename Fields::Types> all_fields(const py::list& layers) {
  std::vector<typename Fields::Types> all;
  all.reserve(layers.size());
  for (const py::handle layer : layers) all.push_back(fields_of<Fields>(layer));
  return all;
}

// Adds a class of named tuples to the module.
inline py::object make_named_tuple(py::module_& m, const char* type, const py::list& names) {
  const py::object make = py::module_::import("collections").attr("namedtuple");
  py::object made = make(type, names, py::arg("module") = m.attr("__name__"));
  m.attr(type) = made;
  return made;
}

template <class Fields>
void register_fields(py::module_& m) {
  py::list names;
  for (const char* name : Fields::kNames) names.append(name);
  make_named_tuple(m, Fields::kType, names);
}

}  // namespace nplora::bindings
