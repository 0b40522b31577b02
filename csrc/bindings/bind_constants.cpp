// Constants of the core that Python needs.
#include "base/buffer_cache.h"
#include "base/cache_line.h"
#include "bindings/arrays.h"
#include "bindings/named_tuple.h"
#include "kernels/formats.h"
#include "ops/blocking.h"

namespace nplora::bindings {

namespace {

struct Constant {
  const char* name;
  size_t value;
};

constexpr Constant kConstants[] = {
    {"cache_line", kCacheLine},
    {"least_buffer_bytes", kLeastBufferBytes},
    {"small_batch", kernels::kSmallBatch},
    {"spare_buffer_bytes", BufferCache::kSpareBytes},
    {"float_batch", kFloatBatch},
    {"task_tokens", kTaskTokens},
    {"lanes_bytes", kLanesBytes},
    {"l3_block_bytes", kL3BlockBytes},
    {"nf4_group", kNf4Group},
    {"nf4_book", kNf4Book},
};

}  // namespace

void register_constants(py::module_& m) {
  py::list names, values;
  for (const Constant& each : kConstants) {
    names.append(each.name);
    values.append(each.value);
  }
  m.attr("constants") = make_named_tuple(m, "Constants", names)(*values);
}

}  // namespace nplora::bindings
