#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "ops/optimizer.h"

namespace nplora::bindings {

namespace {

template <class T>
using Arrays = std::vector<Array<T>>;

// Buffers that are written must not overlap: two threads may be at work on them.
template <class T>
void require_apart(const std::vector<Trained<T>>& all) {
  std::vector<std::pair<const T*, size_t>> written;
  for (const auto& one : all)
    for (const T* data : {one.value, one.first, one.second})
      if (data) written.emplace_back(data, one.n);
  std::sort(written.begin(), written.end());
  for (size_t i = 1; i < written.size(); ++i)
    require(written[i - 1].first + written[i - 1].second <= written[i].first,
            "two buffers of the step overlap");
}

// The buffers of one step, checked against each other. second is null for SGD, first too where there is no
// momentum.
template <class T>
std::vector<Trained<T>> collect(Arrays<T>& values, const Arrays<T>& grads, Arrays<T>* first,
                                Arrays<T>* second, const std::vector<double>& lrs,
                                const std::vector<double>& weight_decays) {
  const size_t count = values.size();
  require(grads.size() == count && lrs.size() == count && weight_decays.size() == count &&
              (!first || first->size() == count) && (!second || second->size() == count),
          "the lists must have the same length");
  std::vector<Trained<T>> all;
  for (size_t i = 0; i < count; ++i) {
    const size_t n = size_t(values[i].size());
    const auto state = [&](Arrays<T>* arrays) -> T* {
      if (!arrays) return nullptr;
      require_size("an optimiser buffer", (*arrays)[i], n);
      return (*arrays)[i].mutable_data();
    };
    require_size("a gradient", grads[i], n);
    require_aligned(values[i]);
    require_aligned(grads[i]);
    all.push_back({n, values[i].mutable_data(), grads[i].data(), state(first), state(second), lrs[i],
                   weight_decays[i]});
  }
  require_apart(all);
  return all;
}

template <class T>
void adamw(Arrays<T> values, const Arrays<T>& grads, Arrays<T> exp_avgs, Arrays<T> exp_avg_sqs,
           const std::vector<double>& lrs, const std::vector<double>& weight_decays, double beta1,
           double beta2, double eps, long step, double grad_scale) {
  require(step >= 1, "step counts from 1");
  const auto trained = collect(values, grads, &exp_avgs, &exp_avg_sqs, lrs, weight_decays);
  const double bias1 = 1 - std::pow(beta1, step), bias2 = 1 - std::pow(beta2, step);
  without_gil([&] { adamw_step(trained, {0, beta1, beta2, eps, 0, bias1, bias2, grad_scale}); });
}

template <class T>
void sgd(Arrays<T> values, const Arrays<T>& grads, std::optional<Arrays<T>> buffers,
         const std::vector<double>& lrs, const std::vector<double>& weight_decays, double momentum,
         bool nesterov, double grad_scale) {
  const auto trained = collect(values, grads, buffers ? &*buffers : nullptr, static_cast<Arrays<T>*>(nullptr),
                               lrs, weight_decays);
  without_gil([&] { sgd_step(trained, {0, momentum, 0, grad_scale, nesterov}); });
}

template <class T>
double squares(const Arrays<T>& arrays) {
  std::vector<Span<T>> spans;
  for (const auto& array : arrays) spans.push_back({size_t(array.size()), array.data()});
  double total = 0;
  without_gil([&] { total = sum_of_squares(spans); });
  return total;
}

template <class T>
void register_steps(py::module_& m) {
  using py::arg;
  m.def("adamw_step", &adamw<T>, arg("parameters").noconvert(), arg("grads").noconvert(),
        arg("exp_avgs").noconvert(), arg("exp_avg_sqs").noconvert(), arg("lrs"), arg("weight_decays"),
        arg("beta1"), arg("beta2"), arg("eps"), arg("step"), arg("grad_scale"),
        "One AdamW step in place (Loshchilov & Hutter 2019)");
  m.def("sgd_step", &sgd<T>, arg("parameters").noconvert(), arg("grads").noconvert(),
        arg("momentum_buffers").noconvert().none(true), arg("lrs"), arg("weight_decays"), arg("momentum"),
        arg("nesterov"), arg("grad_scale"), "One SGD step in place");
  m.def("sum_of_squares", &squares<T>, arg("arrays").noconvert(),
        "Sum of squares over all arrays, in double");
}

}  // namespace

void register_optimizer(py::module_& m) {
  register_steps<float>(m);
  register_steps<double>(m);
}

}  // namespace nplora::bindings
