#include "base/profile.h"
#include "bindings/arrays.h"
#include "ops/peak.h"

namespace nplora::bindings {

namespace {

thread_local Profile totals;  // the totals of this thread while it profiles

// Returns a tuple (activity, calls, seconds, operations) for each activity with at least one call.
// `operations` is a dict from the name of an Arithmetic to the number of floating-point operations.
py::list take_profile() {
  py::list rows;
  for (size_t i = 0; i < kActivities; ++i) {
    const ActivityTotals& each = totals[i];
    if (each.calls == 0) continue;
    py::dict operations;
    for (size_t j = 0; j < kArithmetics; ++j)
      if (each.operations[j] > 0) operations[kArithmeticNames[j]] = each.operations[j];
    rows.append(py::make_tuple(kActivityNames[i], each.calls, each.seconds, operations));
  }
  totals = {};
  return rows;
}

double peak(const std::string& name) {
  for (size_t i = 0; i < kArithmetics; ++i)
    if (name == kArithmeticNames[i]) {
      double rate = 0;
      without_gil([&] { rate = peak_rate(Arithmetic(i)); });
      return rate;
    }
  throw std::invalid_argument("no arithmetic is named " + name);
}

}  // namespace

void register_profile(py::module_& m) {
  m.def(
      "start_profile",
      [] {
        totals = {};
        current_profile = &totals;
      },
      "Time the calls of this thread, and count their operations");
  m.def("stop_profile", [] { current_profile = nullptr; }, "Stop timing the calls of this thread");
  m.def("take_profile", &take_profile,
        "(activity, calls, seconds, operations by arithmetic) since start_profile or the last take_profile");
  m.def("peak_rate", &peak, py::arg("arithmetic"),
        "The highest number of operations per second, with operands in registers");
}

}  // namespace nplora::bindings
