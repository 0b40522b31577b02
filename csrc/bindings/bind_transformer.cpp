#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/filtered_cross_entropy.h"
#include "ops/transformer.h"

namespace nplora::bindings {

namespace {

using Floats = Array<float>;
using Integers = Array<int64_t>;

template <class T, class U>
void require_like(const char* name, const Array<T>& array, const Array<U>& other) {
  require(other.ndim() == 2, "expected an array with 2 axes");
  require_shape(name, array, size_t(other.shape(0)), size_t(other.shape(1)));
}

// Returns a copy of an array of n indices. The indices are checked in the copy, because other code may change
// the array while the GIL is released.
std::vector<int64_t> copied(const char* name, const Integers& array, size_t n) {
  require_size(name, array, n);
  return {array.data(), array.data() + n};
}

// Returns a copy of an array of n integers. Checks that each integer is at least `least` and below `end`.
std::vector<int64_t> within(const char* name, const Integers& array, size_t n, int64_t least, int64_t end) {
  std::vector<int64_t> values = copied(name, array, n);
  for (const int64_t value : values)
    if (value < least || value >= end)
      throw std::invalid_argument(std::string(name) + " holds " + std::to_string(value) +
                                  ", expected at least " + std::to_string(least) + " and below " +
                                  std::to_string(end));
  return values;
}

// Returns a copy of `targets`, which holds one target for each row of `logits`. Checks that each target is
// either kIgnoredTarget or the index of a column of `logits`.
std::vector<int64_t> checked_targets(const Integers& targets, const Matrix<float>& logits) {
  std::vector<int64_t> wanted = copied("targets", targets, logits.rows);
  for (const int64_t target : wanted)
    if (target != kIgnoredTarget && (target < 0 || target >= int64_t(logits.cols)))
      throw std::invalid_argument("targets holds " + std::to_string(target) +
                                  ", expected at least 0 and below " + std::to_string(logits.cols) +
                                  ", or -100");
  return wanted;
}

// Returns the activation with the name `act`. The names are those of hidden_act in the transformers library.
Activation activation_of(const std::string& act) {
  if (act == "silu") return Activation::kSilu;
  if (act == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  if (act == "gelu") return Activation::kGelu;
  throw std::invalid_argument("act is '" + act + "', expected silu, gelu_pytorch_tanh or gelu");
}

// Registers the activations and gated units for inputs of type T: float32, or bfloat16 as bit patterns.
template <class T>
void register_activations(py::module_& m) {
  using py::arg;
  m.def(
      "activated",
      [](const std::string& act, const Array<T>& x, Floats out) {
        const Activation activation = activation_of(act);
        require_like("out", out, x);
        const auto from = read(x);
        const auto to = write(out);
        const T* const up = nullptr;
        without_gil([&] { gated(activation, from.rows * from.cols, from.data, up, to.data); });
      },
      arg("act"), arg("x").noconvert(), arg("out").noconvert(), "out = act(x)");
  m.def(
      "activated_backward",
      [](const std::string& act, const Floats& dout, const Array<T>& x, Floats dx) {
        const Activation activation = activation_of(act);
        require_like("dout", dout, x);
        require_like("dx", dx, x);
        const auto gradient = read(dout);
        const auto from = read(x);
        const auto to = write(dx);
        const T* const up = nullptr;
        without_gil([&] {
          gated_backward(activation, from.rows * from.cols, gradient.data, from.data, up, to.data, nullptr);
        });
      },
      arg("act"), arg("dout").noconvert(), arg("x").noconvert(), arg("dx").noconvert(),
      "dx = act'(x) ∘ dout");
  m.def(
      "gated",
      [](const std::string& act, const Array<T>& gate, const Array<T>& up, Floats out) {
        const Activation activation = activation_of(act);
        require_like("up", up, gate);
        require_like("out", out, gate);
        const auto g = read(gate), u = read(up);
        const auto to = write(out);
        without_gil([&] { gated(activation, g.rows * g.cols, g.data, u.data, to.data); });
      },
      arg("act"), arg("gate").noconvert(), arg("up").noconvert(), arg("out").noconvert(),
      "out = act(gate) ∘ up, where act is silu, gelu_pytorch_tanh or gelu");
  m.def(
      "gated_backward",
      [](const std::string& act, const Floats& dout, const Array<T>& gate, const Array<T>& up, Floats dgate,
         Floats dup) {
        const Activation activation = activation_of(act);
        require_like("dout", dout, gate);
        require_like("up", up, gate);
        require_like("dgate", dgate, gate);
        require_like("dup", dup, gate);
        const auto d = read(dout);
        const auto g = read(gate), u = read(up);
        const auto dg = write(dgate), du = write(dup);
        without_gil(
            [&] { gated_backward(activation, g.rows * g.cols, d.data, g.data, u.data, dg.data, du.data); });
      },
      arg("act"), arg("dout").noconvert(), arg("gate").noconvert(), arg("up").noconvert(),
      arg("dgate").noconvert(), arg("dup").noconvert(), "The gradients of gated");
}

void register_elements(py::module_& m) {
  using py::arg;
  m.def(
      "rms_norm",
      [](const Floats& x, const Floats& weight, double eps, Floats y) {
        require_like("y", y, x);
        require_size("weight", weight, size_t(x.shape(1)));
        const auto from = read(x);
        const auto to = write(y);
        without_gil([&] { rms_norm(from, weight.data(), float(eps), to); });
      },
      arg("x").noconvert(), arg("weight").noconvert(), arg("eps"), arg("y").noconvert(),
      "y = weight ∘ x / sqrt(mean x² + eps)");
  m.def(
      "rms_norm_backward",
      [](const Floats& dy, const Floats& x, const Floats& weight, double eps, Floats dx, bool accumulate) {
        require_like("dy", dy, x);
        require_like("dx", dx, x);
        require_size("weight", weight, size_t(x.shape(1)));
        const auto gradient = read(dy), from = read(x);
        const auto to = write(dx);
        without_gil([&] { rms_norm_backward(gradient, from, weight.data(), float(eps), to, accumulate); });
      },
      arg("dy").noconvert(), arg("x").noconvert(), arg("weight").noconvert(), arg("eps"),
      arg("dx").noconvert(), arg("accumulate"), "dx = [dx +] the gradient of x");
  m.def(
      "layer_norm",
      [](const Floats& x, const Floats& weight, const std::optional<Floats>& bias, double eps, Floats y) {
        require_like("y", y, x);
        require_size("weight", weight, size_t(x.shape(1)));
        if (bias) require_size("bias", *bias, size_t(x.shape(1)));
        const auto from = read(x);
        const auto to = write(y);
        const float* added = bias ? bias->data() : nullptr;
        without_gil([&] { layer_norm(from, weight.data(), added, float(eps), to); });
      },
      arg("x").noconvert(), arg("weight").noconvert(), arg("bias").noconvert(), arg("eps"),
      arg("y").noconvert(), "y = weight ∘ (x - mean x) / sqrt(variance x + eps) [+ bias]");
  m.def(
      "add_layer_norm",
      [](const Floats& x, Floats sum, const Floats& weight, const std::optional<Floats>& bias, double eps,
         Floats y) {
        require_like("sum", sum, x);
        require_like("y", y, x);
        require_size("weight", weight, size_t(x.shape(1)));
        if (bias) require_size("bias", *bias, size_t(x.shape(1)));
        const auto from = read(x);
        const auto total = write(sum), to = write(y);
        const float* added = bias ? bias->data() : nullptr;
        without_gil([&] { add_layer_norm(from, total, weight.data(), added, float(eps), to); });
      },
      arg("x").noconvert(), arg("sum").noconvert(), arg("weight").noconvert(), arg("bias").noconvert(),
      arg("eps"), arg("y").noconvert(), "sum += x; y = the LayerNorm of sum");
  m.def(
      "layer_norm_backward",
      [](const Floats& dy, const Floats& x, const Floats& weight, double eps, Floats dx, bool accumulate) {
        require_like("dy", dy, x);
        require_like("dx", dx, x);
        require_size("weight", weight, size_t(x.shape(1)));
        const auto gradient = read(dy), from = read(x);
        const auto to = write(dx);
        without_gil([&] { layer_norm_backward(gradient, from, weight.data(), float(eps), to, accumulate); });
      },
      arg("dy").noconvert(), arg("x").noconvert(), arg("weight").noconvert(), arg("eps"),
      arg("dx").noconvert(), arg("accumulate"), "dx = [dx +] the gradient of x");
  m.def(
      "rope",
      [](Floats x, const Integers& positions, const Floats& table, bool interleaved, bool inverse,
         size_t head_dim) {
        const auto to = write(x);
        const auto angles = read(table);
        const size_t rotary_dim = angles.cols;
        require(head_dim > 0 && to.cols % head_dim == 0, "x must have a width of heads * head_dim");
        require(rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= head_dim,
                "table must have an even width of at most head_dim");
        const auto rows = within("positions", positions, to.rows, 0, int64_t(angles.rows));
        without_gil(
            [&] { rope(to, head_dim, rows.data(), {angles.data, rotary_dim, interleaved}, inverse); });
      },
      arg("x").noconvert(), arg("positions").noconvert(), arg("table").noconvert(), arg("interleaved"),
      arg("inverse"), arg("head_dim"), "Apply rotary position embeddings in place");
  register_activations<float>(m);
  register_activations<uint16_t>(m);
  m.def(
      "activated_narrow",
      [](const std::string& act, const Floats& x, Floats out, Array<uint16_t> bits) {
        const Activation activation = activation_of(act);
        require_like("out", out, x);
        require_like("bits", bits, x);
        const auto from = read(x);
        const auto to = write(out);
        const auto stored = write(bits);
        without_gil([&] {
          gated_narrow(activation, from.rows * from.cols, from.data, nullptr, to.data, stored.data, nullptr);
        });
      },
      arg("act"), arg("x").noconvert(), arg("out").noconvert(), arg("bits").noconvert(),
      "Does the same as activated, and stores x as bit patterns of bfloat16");
  m.def(
      "gated_narrow",
      [](const std::string& act, const Floats& gate, const Floats& up, Floats out, Array<uint16_t> gate_bits,
         Array<uint16_t> up_bits) {
        const Activation activation = activation_of(act);
        require_like("up", up, gate);
        require_like("out", out, gate);
        require_like("gate_bits", gate_bits, gate);
        require_like("up_bits", up_bits, gate);
        const auto g = read(gate), u = read(up);
        const auto to = write(out);
        const auto g_bits = write(gate_bits), u_bits = write(up_bits);
        without_gil([&] {
          gated_narrow(activation, g.rows * g.cols, g.data, u.data, to.data, g_bits.data, u_bits.data);
        });
      },
      arg("act"), arg("gate").noconvert(), arg("up").noconvert(), arg("out").noconvert(),
      arg("gate_bits").noconvert(), arg("up_bits").noconvert(),
      "Does the same as gated, and stores gate and up as bit patterns of bfloat16");
  m.def(
      "cross_entropy",
      [](Floats logits, const Integers& targets, double factor, Array<double> losses, bool gradient) {
        const auto rows = write(logits);
        require_size("losses", losses, rows.rows);
        const auto wanted = checked_targets(targets, rows);
        double* to = losses.mutable_data();
        without_gil([&] { cross_entropy(rows, wanted.data(), factor, to, gradient); });
      },
      arg("logits").noconvert(), arg("targets").noconvert(), arg("factor"), arg("losses").noconvert(),
      arg("gradient"), "losses = log Σ exp(logits) - logits[target]");
}

void register_filtered_cross_entropy(py::module_& m) {
  using py::arg;
  m.def(
      "filtered_cross_entropy",
      [](const WeightArgument<float>& weight, Floats logits, const Integers& targets, double factor,
         double bound, const Floats& mean, Array<double> losses, Array<double> skipped, Integers kept,
         Floats dx, const std::optional<Floats>& x, std::optional<Floats> dweight) {
        const WeightView w = view<float>(weight);
        const auto rows = write(logits), to = write(dx);
        require(w.d_out <= size_t(INT32_MAX), "the vocabulary is too large");
        require(rows.rows <= UINT32_MAX / (rows.cols + 1), "logits are too large");
        require(bound > 0, "bound must be above 0");
        require_shape("logits", logits, rows.rows, w.d_out);
        require_shape("dx", dx, rows.rows, w.d_in);
        require_size("mean", mean, w.d_in);
        require_size("losses", losses, rows.rows);
        require_size("skipped", skipped, rows.rows);
        require_size("kept", kept, rows.rows);
        require(x.has_value() == dweight.has_value(), "x and dweight must both be given, or neither");
        std::optional<HeadGradient> head;
        if (dweight) {
          require_shape("x", *x, rows.rows, w.d_in);
          require_shape("dweight", *dweight, w.d_out, w.d_in);
          head = HeadGradient{read(*x), write(*dweight)};
        }
        const auto wanted = checked_targets(targets, rows);
        const FilteredRows out{losses.mutable_data(), skipped.mutable_data(), kept.mutable_data()};
        const WordFilter filter{bound, mean.data()};
        without_gil([&] {
          filtered_cross_entropy(w, rows, wanted.data(), factor, filter, out, to, head ? &*head : nullptr);
        });
      },
      arg("weight"), arg("logits").noconvert(), arg("targets").noconvert(), arg("factor"), arg("bound"),
      arg("mean").noconvert(), arg("losses").noconvert(), arg("skipped").noconvert(), arg("kept").noconvert(),
      arg("dx").noconvert(), arg("x").noconvert() = py::none(), arg("dweight").noconvert() = py::none(),
      "The losses, and dx = factor (Σ p W + skipped mean - W[target]), where Σ runs over the kept words. "
      "If dweight is given: dweight += factor (p - one_hot)^T x, without the skipped words");
}

AttentionShape shape_of(const Floats& q, size_t kv_width, size_t heads, size_t kv_heads, double scale,
                        int64_t window, bool bfloat16 = false) {
  require(q.ndim() == 2, "expected an array with 2 axes");
  require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
  const size_t width = size_t(q.shape(1)), dim = width / heads;
  require(dim > 0 && width == heads * dim, "q must have a width of heads * head_dim");
  require(kv_width == kv_heads * dim, "k must have a width of kv_heads * head_dim");
  require(window >= 0, "window must be at least 0");
  constexpr int64_t kMostKeys = int64_t{1} << 40;  // more keys than any sequence can have
  return {heads, kv_heads, dim, float(scale), size_t(std::min(window, kMostKeys)), bfloat16};
}

// Sets the members `causal`, `bias` and `reach` of `shape`. Checks that `bias` has enough columns for the
// longest sequence: one column for each possible distance between two of its tokens.
void set_direction(AttentionShape& shape, bool causal, const std::optional<Floats>& bias,
                   const std::vector<int64_t>& starts) {
  shape.causal = causal;
  if (!bias) return;
  require(bias->ndim() == 2 && bias->shape(1) % 2 == 1, "bias must have an odd number of columns");
  require_shape("bias", *bias, shape.heads, size_t(bias->shape(1)));
  require_aligned(*bias);
  shape.bias = bias->data();
  shape.reach = size_t(bias->shape(1)) / 2;
  for (size_t i = 1; i < starts.size(); ++i)
    require(starts[i] - starts[i - 1] <= int64_t(shape.reach) + 1,
            "bias must have a column for every distance in a sequence");
}

// Returns a checked copy of the array `starts`, which holds the first row of each sequence and, as its last
// element, the total number of rows n.
std::vector<int64_t> checked_starts(const Integers& array, size_t n) {
  const std::vector<int64_t> starts = copied("starts", array, size_t(array.size()));
  require(array.ndim() == 1 && !starts.empty() && starts.front() == 0 && starts.back() == int64_t(n) &&
              std::is_sorted(starts.begin(), starts.end()),
          "starts must ascend from 0 to the number of rows");
  return starts;
}

Sequences sequences_of(const std::vector<int64_t>& starts) {
  return {starts.data(), starts.size() - 1};
}

void register_attention(py::module_& m) {
  using py::arg;
  m.def(
      "attention",
      [](const Floats& q, const Floats& k, const Floats& v, const Integers& starts, size_t heads,
         size_t kv_heads, double scale, int64_t window, Floats out, Floats lse, bool bfloat16, bool causal,
         const std::optional<Floats>& bias) {
        const auto queries = read(q), keys = read(k), values = read(v);
        AttentionShape shape = shape_of(q, keys.cols, heads, kv_heads, scale, window, bfloat16);
        require_shape("k", k, queries.rows, keys.cols);
        require_like("v", v, k);
        require_like("out", out, q);
        require_shape("lse", lse, queries.rows, heads);
        const auto begins = checked_starts(starts, queries.rows);
        set_direction(shape, causal, bias, begins);
        const auto to = write(out), sums = write(lse);
        without_gil([&] { attention(shape, sequences_of(begins), queries, keys, values, to, sums); });
      },
      arg("q").noconvert(), arg("k").noconvert(), arg("v").noconvert(), arg("starts").noconvert(),
      arg("heads"), arg("kv_heads"), arg("scale"), arg("window"), arg("out").noconvert(),
      arg("lse").noconvert(), arg("bfloat16") = false, arg("causal") = true,
      arg("bias").noconvert() = py::none(), "Attention within each of the packed sequences");
  m.def(
      "attention_backward",
      [](const Floats& dout, const Floats& q, const Floats& k, const Floats& v, const Floats& out,
         const Floats& lse, const Integers& starts, size_t heads, size_t kv_heads, double scale,
         int64_t window, Floats dq, Floats dk, Floats dv, bool bfloat16, bool causal,
         const std::optional<Floats>& bias) {
        const auto gradient = read(dout);
        const AttentionSaved saved{read(q), read(k), read(v), read(out), read(lse)};
        AttentionShape shape = shape_of(q, saved.k.cols, heads, kv_heads, scale, window, bfloat16);
        require_shape("k", k, saved.q.rows, saved.k.cols);
        require_like("v", v, k);
        require_like("out", out, q);
        require_like("dout", dout, q);
        require_shape("lse", lse, saved.q.rows, heads);
        require_like("dq", dq, q);
        require_like("dk", dk, k);
        require_like("dv", dv, k);
        const auto begins = checked_starts(starts, saved.q.rows);
        set_direction(shape, causal, bias, begins);
        const auto to_q = write(dq), to_k = write(dk), to_v = write(dv);
        without_gil(
            [&] { attention_backward(shape, sequences_of(begins), gradient, saved, to_q, to_k, to_v); });
      },
      arg("dout").noconvert(), arg("q").noconvert(), arg("k").noconvert(), arg("v").noconvert(),
      arg("out").noconvert(), arg("lse").noconvert(), arg("starts").noconvert(), arg("heads"),
      arg("kv_heads"), arg("scale"), arg("window"), arg("dq").noconvert(), arg("dk").noconvert(),
      arg("dv").noconvert(), arg("bfloat16") = false, arg("causal") = true,
      arg("bias").noconvert() = py::none(), "The gradients of attention");
  m.def(
      "attention_cached",
      [](const Floats& q, const Floats& keys, const Floats& values, const Integers& pages,
         const Integers& slots, const Integers& lengths, size_t heads, size_t kv_heads, double scale,
         int64_t window, Floats out) {
        const auto queries = read(q);
        require(keys.ndim() == 3, "keys must have 3 axes");
        require(values.ndim() == 3 && std::equal(keys.shape(), keys.shape() + 3, values.shape()),
                "values must have the shape of keys");
        require_aligned(keys);
        require_aligned(values);
        const AttentionShape shape = shape_of(q, size_t(keys.shape(2)), heads, kv_heads, scale, window);
        require_like("out", out, q);
        require(pages.ndim() == 2, "pages must have 2 axes");
        require(pages.shape(1) <= 1 || size_t(keys.shape(1)) % kPageUnit == 0,
                "the second axis of keys must be a multiple of 16");
        const auto table = within("pages", pages, size_t(pages.size()), 0, keys.shape(0));
        const auto of = within("slots", slots, queries.rows, 0, pages.shape(0));
        const auto seen =
            within("lengths", lengths, queries.rows, 1, int64_t(pages.shape(1) * keys.shape(1)) + 1);
        const KeyValueCache cache{keys.data(), values.data(), size_t(keys.shape(1)), table.data(),
                                  size_t(pages.shape(1))};
        const auto to = write(out);
        without_gil([&] { attention_cached(shape, queries, cache, of.data(), seen.data(), to); });
      },
      arg("q").noconvert(), arg("keys").noconvert(), arg("values").noconvert(), arg("pages").noconvert(),
      arg("slots").noconvert(), arg("lengths").noconvert(), arg("heads"), arg("kv_heads"), arg("scale"),
      arg("window"), arg("out").noconvert(), "Attention of new queries to the keys and values in a cache");
}

}  // namespace

void register_transformer(py::module_& m) {
  register_elements(m);
  register_filtered_cross_entropy(m);
  register_attention(m);
}

}  // namespace nplora::bindings
