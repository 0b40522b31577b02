// The list of the block formats. The file of a format holds its layout and, for kernel units only, its
// decoder and its int8 codes. A new format needs such a file, two lines here that name it, and a quantiser in
// ops/quantizers.
//
// In blocks of 32, the low nibbles of q are elements 0 ... 15, the high nibbles are elements 16 ... 31. Bit i
// of `high` is bit 4 of element i.
#ifndef NPLORA_KERNELS_FORMATS_H
#define NPLORA_KERNELS_FORMATS_H

#include "base/block.h"

// X(name, Name) for each row format. BlockName is its layout, kName its number. Every table has this order.
#define NPLORA_ROW_FORMATS(X) \
  X(q4_0, Q4_0)               \
  X(q4_1, Q4_1)               \
  X(q5_0, Q5_0)               \
  X(q5_1, Q5_1)               \
  X(q8_0, Q8_0)               \
  X(q4_k, Q4_K)               \
  X(q5_k, Q5_K)               \
  X(q6_k, Q6_K)               \
  X(iq4_nl, IQ4_NL)           \
  X(q3_k, Q3_K)               \
  X(q2_k, Q2_K)               \
  X(iq4_xs, IQ4_XS)           \
  // New formats come above this line.

namespace nplora {

#define NPLORA_NUMBER(name, Name) k##Name,
enum class BlockFormat : uint8_t { NPLORA_ROW_FORMATS(NPLORA_NUMBER) kNf4 };
#undef NPLORA_NUMBER

inline constexpr size_t kRowFormats = static_cast<size_t>(BlockFormat::kNf4);

}  // namespace nplora

#endif

// A kernel unit includes this file a second time, after the parts that decoders are made of (see
// table-inl.h).
#if !defined(NPLORA_ISA) || defined(NPLORA_DECODERS)
#include "kernels/formats/iq4_nl-inl.h"
#include "kernels/formats/iq4_xs-inl.h"
#include "kernels/formats/nf4-inl.h"
#include "kernels/formats/q2_k-inl.h"
#include "kernels/formats/q3_k-inl.h"
#include "kernels/formats/q4_0-inl.h"
#include "kernels/formats/q4_1-inl.h"
#include "kernels/formats/q4_k-inl.h"
#include "kernels/formats/q5_0-inl.h"
#include "kernels/formats/q5_1-inl.h"
#include "kernels/formats/q5_k-inl.h"
#include "kernels/formats/q6_k-inl.h"
#include "kernels/formats/q8_0-inl.h"
#endif
