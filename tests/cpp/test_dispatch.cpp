// The choice of the table. table() chooses once per process, so each choice is tried in a child process.
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "kernel_tests.h"
#include "system.h"

using nplora::kernels::KernelTable;
using test_system::table_in_child;

std::string test_system::chosen_table() {
  try {
    return nplora::kernels::table().isa;
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

namespace {

// Tables that some machines of this architecture cannot run.
const std::vector<const char*> kOptional = {
#if defined(__x86_64__)
    "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx",
#elif defined(__aarch64__)
    "neondot",
    "neonbf16",
    "neoni8mm",
#endif
};

// Whether a table has kernels of its own for int8 products only.
bool has_only_int8(std::string_view isa) {
  return isa == "avxvnni" || isa == "avx512vnni" || isa == "neondot" || isa == "neoni8mm";
}

bool has(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

void test_dispatch() {
  const std::vector<const KernelTable*> tables = usable_tables();
  const size_t count = tables.size();
  {
    check::Case one("dispatch: the list of tables");
    check::expect(count >= 1 && std::strcmp(tables[0]->isa, "generic") == 0,
                  "generic is not the first of %zu", count);
    const KernelTable* one_table;
    check::expect(nplora::kernels::available_tables(&one_table, 1) == 1, "the capacity was not respected");
  }
  for (const char* unset : {static_cast<const char*>(nullptr), ""}) {
    check::Case one("dispatch: NPLORA_ISA %s", unset ? "empty" : "unset");
    check::expect(table_in_child(unset) == tables[count - 1]->isa, "chose %s", table_in_child(unset).c_str());
  }
  for (size_t i = 0; i < count; ++i) {
    check::Case one("dispatch: NPLORA_ISA=%s", tables[i]->isa);
    check::expect(table_in_child(tables[i]->isa) == tables[i]->isa, "chose %s",
                  table_in_child(tables[i]->isa).c_str());
  }
  {
    check::Case one("dispatch: an unknown name");
    const std::string answer = table_in_child("sse9");
    check::expect(has(answer, "NPLORA_ISA=sse9") && has(answer, tables[count - 1]->isa), "said: %s",
                  answer.c_str());
  }
  for (const char* isa : kOptional) {
    bool runs = false;
    for (size_t i = 0; i < count; ++i) runs |= std::strcmp(tables[i]->isa, isa) == 0;
    if (runs) continue;
    check::Case one("dispatch: %s, which this process may not use", isa);
    const std::string answer = table_in_child(isa);
    const bool refused = std::strcmp(isa, "amx") == 0 && nplora::simd::cpu().amx;
    check::expect(has(answer, isa) && has(answer, refused ? "Linux refuses" : "lacks"), "said: %s",
                  answer.c_str());
  }
  for (size_t i = 1; i < count; ++i) {
    const KernelTable &table = *tables[i], &lesser = *tables[i - 1];
    if (has_only_int8(table.isa)) {
      check::Case one("dispatch: the products of bytes of %s", table.isa);
      check::expect(table.int8_gemm.multiply != lesser.int8_gemm.multiply, "multiply is that of %s",
                    lesser.isa);
      continue;
    }
    check::Case one("dispatch: the products of pairs of %s", table.isa);
    check::expect(table.bf16.gemm_tokens_in_lanes != lesser.bf16.gemm_tokens_in_lanes,
                  "gemm_tokens_in_lanes is that of %s", lesser.isa);
    check::expect(table.bf16.gemm_outputs_in_lanes != lesser.bf16.gemm_outputs_in_lanes,
                  "gemm_outputs_in_lanes is that of %s", lesser.isa);
    check::expect(table.small_pairs.gemm_outputs_in_lanes != lesser.small_pairs.gemm_outputs_in_lanes,
                  "gemm_outputs_in_lanes of single values is that of %s", lesser.isa);
    check::expect(table.pairs_in_registers == (std::strcmp(table.isa, "amx") != 0), "pairs in registers: %d",
                  table.pairs_in_registers);
  }
  for (size_t i = 0; i < count; ++i) {
    check::Case one("dispatch: the tile sizes of %s", tables[i]->isa);
    const auto sound = [](const auto& k) {
      return k.lanes >= 2 && k.lanes % 2 == 0 && k.tile_rows > 0 && k.tile_tokens > 0 && k.tile_columns > 0 &&
             nplora::kernels::kPanelColumns % (k.lanes / 2) == 0 &&
             nplora::kernels::kDepthUnit % k.depth_unit == 0;
    };
    check::expect(
        sound(tables[i]->f32) && sound(tables[i]->f64) && sound(tables[i]->bf16),
        "lanes must be pairs of vectors that divide a panel, and depth_unit must divide kDepthUnit");
  }
}
