// Layers that are created once and then called many times, without a backward pass. The arrays of a layer are
// checked when the layer is created, and each call reads them in place.
#include <bit>
#include <type_traits>
#include <variant>
#include <vector>

#include "bindings/low_rank.h"
#include "bindings/made_whole.h"

namespace nplora::bindings {

namespace {

// A layer that computes y = x Wᵀ + scale (x Bᵀ) Aᵀ [+ bias]. The layer keeps the weight and the arrays alive.
class InferenceLayer {
 public:
  InferenceLayer(const InferenceLayer&) = delete;
  InferenceLayer& operator=(const InferenceLayer&) = delete;

  // If `constant` is set, the arrays `a` and `b` never change. The constructor then copies both arrays to
  // bfloat16, if bfloat16 can represent all their values.
  template <class T>
  InferenceLayer(const py::object& weight, const Array<T>& a, const Array<T>& b, double scale,
                 const std::optional<Array<T>>& bias, bool constant)
      : owners_(py::make_tuple(weight, a, b, bias)) {
    py::detail::make_caster<WeightArgument<T>> argument;
    require(argument.load(weight, false), "expected a weight");
    const WeightView w = view<T>(py::detail::cast_op<WeightArgument<T>>(argument));
    ForwardPart<T> part{w, low_rank(w, a, b, scale, 0, 0), bias_data(w, bias), {}, {}};
    if constexpr (std::is_same_v<T, float>)
      if (constant && part.low.rank() > 0 && narrowed(part.low.a, narrow_a_) &&
          narrowed(part.low.b, narrow_b_)) {
        part.low.narrow_a = narrow_a_.data();
        part.low.narrow_b = narrow_b_.data();
      }
    part_ = part;
  }

  template <class T>
  ForwardPart<T> part() const {
    const auto* part = std::get_if<ForwardPart<T>>(&part_);
    require(part, "the layer has another dtype than x");
    return *part;
  }

 private:
  // Copies a matrix to bfloat16. Returns false if bfloat16 cannot represent all its values.
  static bool narrowed(Matrix<const float> m, std::vector<kernels::Bf16>& out) {
    out.reserve(m.rows * m.cols);
    for (size_t i = 0; i < m.rows; ++i)
      for (size_t j = 0; j < m.cols; ++j) {
        const auto bits = std::bit_cast<uint32_t>(m.row(i)[j]);
        if (bits & 0xFFFF) return false;
        out.push_back(kernels::Bf16(bits >> 16));
      }
    return true;
  }

  py::tuple owners_;
  std::vector<kernels::Bf16> narrow_a_, narrow_b_;
  std::variant<ForwardPart<float>, ForwardPart<double>> part_;
};

using Layers = std::vector<const InferenceLayer*>;

// Checks that x (rows, d_in) fits each layer, and returns a ForwardPart for each layer. The `y` of each
// ForwardPart is not set yet.
template <class T>
std::vector<ForwardPart<T>> parts_of(const Layers& layers, const Array<T>& x, size_t rows) {
  std::vector<ForwardPart<T>> parts;
  for (const InferenceLayer* layer : layers) {
    require(layer, "expected a layer");
    parts.push_back(layer->part<T>());
    require_shape("x", x, rows, parts.back().w.d_in);
    require(parts.back().w.compute == parts[0].w.compute,
            "the weights of a stack must have the same compute type");
  }
  return parts;
}

template <class T>
py::list infer(const Array<T>& x, const Layers& layers, std::optional<size_t> batch) {
  const Matrix<const T> from = read(x);
  std::vector<ForwardPart<T>> parts = parts_of<T>(layers, x, from.rows);
  py::list ys(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    auto y = empty_rows<T>(from.rows, parts[i].w.d_out);
    parts[i].y = write(y);
    ys[i] = std::move(y);
  }
  without_gil([&] { lora_infer<T>(parts, from, batch.value_or(from.rows)); });
  return ys;
}

template <class T>
py::list infer_groups(const Array<T>& x, const std::vector<Layers>& groups, const std::vector<size_t>& rows) {
  const Matrix<const T> from = read(x);
  require(!groups.empty() && groups.size() == rows.size(), "expected layers for each group of rows");
  std::vector<GroupParts<T>> all;
  for (size_t g = 0; g < groups.size(); ++g) {
    require(groups[g].size() == groups[0].size(), "the groups must have the same number of layers");
    all.push_back({rows[g], parts_of<T>(groups[g], x, from.rows)});
  }
  py::list ys(groups[0].size());
  for (size_t i = 0; i < groups[0].size(); ++i) {
    const size_t d_out = all[0].parts[i].w.d_out;
    auto y = empty_rows<T>(from.rows, d_out);
    const Matrix<T> to = write(y);
    size_t first = 0;
    for (GroupParts<T>& group : all) {
      require(group.parts[i].w.d_out == d_out, "the groups must have the same d_out");
      require(group.rows <= from.rows - first, "the groups have more rows than x");
      group.parts[i].y = {to.row(first), group.rows, d_out, to.stride};
      first += group.rows;
    }
    require(first == from.rows, "the groups have fewer rows than x");
    ys[i] = std::move(y);
  }
  without_gil([&] { lora_forward_groups<T>(all, from); });
  return ys;
}

template <class T>
void register_products(py::module_& m, py::class_<InferenceLayer>& layer) {
  using py::arg;
  layer.def(py::init<const py::object&, const Array<T>&, const Array<T>&, double,
                     const std::optional<Array<T>>&, bool>(),
            arg("weight"), arg("a").noconvert(), arg("b").noconvert(), arg("scale"),
            arg("bias").noconvert().none(true), arg("constant") = false);
  m.def("infer", &infer<T>, arg("x").noconvert(), arg("layers"), arg("batch") = py::none(),
        "y = x W^T + scale (x B^T) A^T [+ bias] for layers that read the same x");
  m.def("infer_groups", &infer_groups<T>, arg("x").noconvert(), arg("groups"), arg("rows"),
        "Does the same as infer for groups of rows of x; each group has its own layers");
}

}  // namespace

void register_inference(py::module_& m) {
  py::class_<InferenceLayer> layer(m, "InferenceLayer", py::is_final(), made_whole());
  register_products<float>(m, layer);
  register_products<double>(m, layer);
}

}  // namespace nplora::bindings
