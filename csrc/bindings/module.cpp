#include "bindings/arrays.h"

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "The compiled core of nplora. Strict about shapes, dtypes and order; use the functions of `nplora`.";
  nplora::bindings::register_runtime(m);
  nplora::bindings::register_buffers(m);
  nplora::bindings::register_weight(m);
  nplora::bindings::register_lora(m);
  nplora::bindings::register_inference(m);
  nplora::bindings::register_optimizer(m);
  nplora::bindings::register_elementwise(m);
  nplora::bindings::register_blocks(m);
  nplora::bindings::register_transformer(m);
}
