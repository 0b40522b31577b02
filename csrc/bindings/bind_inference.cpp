// Layers for repeated inference: their arrays are checked once and then read in place.
#include <variant>
#include <vector>

#include "bindings/low_rank.h"
#include "bindings/made_whole.h"

namespace nplora::bindings {

namespace {

// A layer that computes y = x Wᵀ + scale (x Bᵀ) Aᵀ [+ bias]. The layer keeps the weight and the arrays alive.
class InferenceLayer {
 public:
  template <class T>
  InferenceLayer(const py::object& weight, const Array<T>& a, const Array<T>& b, double scale,
                 const std::optional<Array<T>>& bias)
      : owners_(py::make_tuple(weight, a, b, bias)) {
    py::detail::make_caster<WeightArgument<T>> argument;
    require(argument.load(weight, false), "expected a weight");
    const WeightView w = view<T>(py::detail::cast_op<WeightArgument<T>>(argument));
    part_ = ForwardPart<T>{w, low_rank(w, a, b, scale, 0, 0), bias_data(w, bias), {}, {}};
  }

  template <class T>
  ForwardPart<T> part() const {
    const auto* part = std::get_if<ForwardPart<T>>(&part_);
    require(part, "the layer has another dtype than x");
    return *part;
  }

 private:
  py::tuple owners_;
  std::variant<ForwardPart<float>, ForwardPart<double>> part_;
};

template <class T>
py::list infer(const Array<T>& x, const std::vector<const InferenceLayer*>& layers) {
  const Matrix<const T> from = read(x);
  std::vector<ForwardPart<T>> parts;
  py::list ys(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    require(layers[i], "expected a layer");
    ForwardPart<T>& part = parts.emplace_back(layers[i]->part<T>());
    require_shape("x", x, from.rows, part.w.d_in);
    require(part.w.compute == parts[0].w.compute, "the weights of a stack must have the same compute type");
    auto y = empty_rows<T>(from.rows, part.w.d_out);
    part.y = write(y);
    ys[i] = std::move(y);
  }
  without_gil([&] { lora_forward<T>(parts, from); });
  return ys;
}

template <class T>
void register_products(py::module_& m, py::class_<InferenceLayer>& layer) {
  using py::arg;
  layer.def(
      py::init<const py::object&, const Array<T>&, const Array<T>&, double, const std::optional<Array<T>>&>(),
      arg("weight"), arg("a").noconvert(), arg("b").noconvert(), arg("scale"),
      arg("bias").noconvert().none(true));
  m.def("infer", &infer<T>, arg("x").noconvert(), arg("layers"),
        "y = x W^T + scale (x B^T) A^T [+ bias] for layers that read one x");
}

}  // namespace

void register_inference(py::module_& m) {
  py::class_<InferenceLayer> layer(m, "InferenceLayer", py::is_final(), made_whole());
  register_products<float>(m, layer);
  register_products<double>(m, layer);
}

}  // namespace nplora::bindings
