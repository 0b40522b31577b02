#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "ops/optimizer.h"

namespace nplora::bindings {

namespace {

// Python passes the buffers of an optimiser step as tuples, which no code can change while the GIL is
// released. The functions below check the buffers one by one. These functions do not cast lists to vectors of
// array_t, and make an error message only when it is needed. With the 420 factors of a language model, the
// casts would take a sixth of the time of a step, and error messages for all buffers would take another
// sixth.
[[noreturn]] void refuse(const std::string& message) {
  throw std::invalid_argument(message);
}

py::handle item_of(py::handle tuple, size_t i) {
  return PyTuple_GET_ITEM(tuple.ptr(), py::ssize_t(i));
}

py::array buffer_of(py::handle tuple, size_t i) {
  constexpr int kFlags =
      py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (!py::isinstance<py::array>(item_of(tuple, i))) refuse("expected an array");
  py::array array = py::reinterpret_borrow<py::array>(item_of(tuple, i));
  if ((array.flags() & kFlags) != kFlags) refuse("expected an aligned array in C order");
  return array;
}

bool is_double(const py::array& array) {
  const py::dtype type = array.dtype();
  const bool is_double = type.num() == py::dtype::num_of<double>();
  if ((!is_double && type.num() != py::dtype::num_of<float>()) || type.byteorder() != '=')
    refuse("expected an array of float32 or float64");
  return is_double;
}

void require_alike(const char* name, const py::array& array, const py::array& value) {
  if (is_double(array) != is_double(value) || array.ndim() != value.ndim() ||
      !std::equal(array.shape(), array.shape() + array.ndim(), value.shape()))
    refuse(std::string(name) + " must have the shape and dtype of its parameter");
}

// Checks that the buffers to which a step writes do not overlap, because two threads may write to them at the
// same time.
void require_apart(const std::vector<Trained>& all) {
  static thread_local std::vector<std::pair<const char*, size_t>> written;
  written.clear();
  for (void* Trained::* buffer : {&Trained::value, &Trained::first, &Trained::second})
    for (const Trained& one : all)
      if (one.*buffer)
        written.emplace_back(static_cast<const char*>(one.*buffer), one.n * (one.is_double ? 8 : 4));
  if (!std::is_sorted(written.begin(), written.end())) std::sort(written.begin(), written.end());
  for (size_t i = 1; i < written.size(); ++i)
    if (written[i - 1].first + written[i - 1].second > written[i].first)
      refuse("two buffers of the step overlap");
}

// The learning rates of a step (LoRA+): lr_of_a for each parameter whose is_a is true, and lr for all other
// parameters.
struct Rates {
  double lr, lr_of_a;
  const Array<bool>& is_a;
};

// Collects the buffers of one step, and checks that they fit each other. The result is valid until the next
// call on this thread. A parameter is a tuple (name, value, grad). For AdamW, `first` and `second` hold the
// two moments of each parameter. For SGD, `second` is null, and `first` holds the momentum. For SGD without
// momentum, `first` is null too.
const std::vector<Trained>& collect(const py::tuple& parameters, const py::tuple* first,
                                    const py::tuple* second, const Rates& rates) {
  static thread_local std::vector<Trained> all;
  all.clear();
  const size_t count = parameters.size();
  if (size_t(rates.is_a.size()) != count || (first && first->size() != count) ||
      (second && second->size() != count))
    refuse("the tuples must have the same length");
  for (size_t i = 0; i < count; ++i) {
    const py::handle parameter = item_of(parameters, i);
    if (!py::isinstance<py::tuple>(parameter) || PyTuple_GET_SIZE(parameter.ptr()) != 3)
      refuse("a parameter must be a tuple (name, value, grad)");
    py::array value = buffer_of(parameter, 1);
    const py::array grad = buffer_of(parameter, 2);
    require_alike("a gradient", grad, value);
    const auto state = [&](const py::tuple* arrays) -> void* {
      if (!arrays) return nullptr;
      py::array array = buffer_of(*arrays, i);
      require_alike("an optimiser buffer", array, value);
      return array.mutable_data();
    };
    all.push_back({is_double(value), size_t(value.size()), value.mutable_data(), grad.data(), state(first),
                   state(second), rates.is_a.data()[i] ? rates.lr_of_a : rates.lr});
  }
  require_apart(all);
  return all;
}

// Clips the gradients if max_norm is given, and calls step(scale) without the GIL. To clip, the function
// computes `norm`, the Euclidean norm of all gradients times `scale`. If `norm` is above max_norm, `scale` is
// multiplied by max_norm / norm. If `norm` is not finite, `step` is not called. Returns `norm`, or
// std::nullopt if max_norm is not given.
template <class Step>
std::optional<double> clip_and_step(const std::vector<Trained>& parameters, double scale,
                                    std::optional<double> max_norm, const Step& step) {
  std::optional<double> norm;
  without_gil([&] {
    if (max_norm) {
      norm = clip(parameters, *max_norm, &scale);
      if (!std::isfinite(*norm)) return;
    }
    step(scale);
  });
  return norm;
}

std::optional<double> adamw(const py::tuple& parameters, const py::tuple& exp_avgs,
                            const py::tuple& exp_avg_sqs, double lr, double lr_of_a, const Array<bool>& is_a,
                            double weight_decay, double beta1, double beta2, double eps, int64_t step,
                            double grad_scale, std::optional<double> max_norm) {
  require(step >= 1, "step must be at least 1");
  const std::vector<Trained>& all = collect(parameters, &exp_avgs, &exp_avg_sqs, {lr, lr_of_a, is_a});
  const double bias1 = 1 - std::pow(beta1, step), bias2 = 1 - std::pow(beta2, step);
  return clip_and_step(all, grad_scale, max_norm, [&](double scale) {
    adamw_step(all, {0, beta1, beta2, eps, weight_decay, bias1, bias2, scale});
  });
}

std::optional<double> sgd(const py::tuple& parameters, const std::optional<py::tuple>& buffers, double lr,
                          double lr_of_a, const Array<bool>& is_a, double weight_decay, double momentum,
                          bool nesterov, double grad_scale, std::optional<double> max_norm) {
  const std::vector<Trained>& all =
      collect(parameters, buffers ? &*buffers : nullptr, nullptr, {lr, lr_of_a, is_a});
  return clip_and_step(all, grad_scale, max_norm,
                       [&](double scale) { sgd_step(all, {0, momentum, weight_decay, scale, nesterov}); });
}

double squares(const py::tuple& arrays) {
  static thread_local std::vector<Trained> kept;
  std::vector<Trained>& all = kept;
  all.clear();
  for (size_t i = 0; i < arrays.size(); ++i) {
    const py::array array = buffer_of(arrays, i);
    all.push_back({is_double(array), size_t(array.size()), nullptr, array.data(), nullptr, nullptr, 0});
  }
  double total = 0;
  without_gil([&] { total = sum_of_squares(all); });
  return total;
}

}  // namespace

void register_optimizer(py::module_& m) {
  using py::arg;
  m.def("adamw_step", &adamw, arg("parameters"), arg("exp_avgs"), arg("exp_avg_sqs"), arg("lr"),
        arg("lr_of_a"), arg("is_a").noconvert(), arg("weight_decay"), arg("beta1"), arg("beta2"), arg("eps"),
        arg("step"), arg("grad_scale"), arg("max_norm").none(true),
        "One AdamW step in place (Loshchilov & Hutter 2019)");
  m.def("sgd_step", &sgd, arg("parameters"), arg("momentum_buffers").none(true), arg("lr"), arg("lr_of_a"),
        arg("is_a").noconvert(), arg("weight_decay"), arg("momentum"), arg("nesterov"), arg("grad_scale"),
        arg("max_norm").none(true), "One SGD step in place");
  m.def("sum_of_squares", &squares, arg("arrays"),
        "The sum of the squares of all elements of all arrays, in float64");
}

}  // namespace nplora::bindings
