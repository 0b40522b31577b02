// The list of all block formats. Each format has a file in kernels/formats that holds its block layout. The
// second part of the file is compiled only in kernel units (isa_*.cpp). This part holds the decoder of the
// format and, in row formats, the functions that int8 products need. In C++, a new format needs a file in
// kernels/formats, a quantiser in ops/quantizers, and two lines in this file. One line adds the format to the
// list, and the other line includes the file of the format. The guide docs/add-a-block-format.md describes
// all steps.
//
// In all present 4-bit and 5-bit formats with blocks of 32 elements, the low nibbles of the bytes `q` belong
// to elements 0 to 15, and the high nibbles belong to elements 16 to 31. In the 5-bit formats, bit i of
// `high` is the fifth bit of the code of element i.
#ifndef NPLORA_KERNELS_FORMATS_H
#define NPLORA_KERNELS_FORMATS_H

#include "base/block.h"

// Calls the macro X(name, Name) for each row format. A row format is a format whose blocks run along rows.
// Block<Name> is the layout of the format, and BlockFormat::k<Name> is the number of the format. Some arrays
// hold one kernel for each row format; the order of their elements is the order of this list.
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

// A kernel unit (isa_*.cpp) includes this file twice. The first include provides only the list of formats
// above. The second include, in table-inl.h, provides the layouts and decoders. The second include must come
// after the functions that the decoders call.
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
