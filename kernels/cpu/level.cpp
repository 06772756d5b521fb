// All kernels for one instruction set. This file is compiled several times, with other machine flags and another
// PSYCHE_LEVEL: plain loops, which the compiler vectorises for each. Everything it includes has internal linkage, and
// no header of the C++ library is among it: the linker keeps one copy of each inline function with external linkage,
// and it might be one that this machine cannot run.
#include "fp32.h"
#include "int2.h"
#include "int4.h"
#include "int8.h"
#include "topk2.h"

#define PSYCHE_STRING_OF(x) #x
#define PSYCHE_STRING(x) PSYCHE_STRING_OF(x)

namespace psyche {

extern const Level PSYCHE_LEVEL;
const Level PSYCHE_LEVEL = {
    PSYCHE_STRING(PSYCHE_LEVEL),
    {fp32::encode, fp32::check, fp32::decode_add, fp32::norm_terms},
    {int8::encode, int8::check, int8::decode_add, int8::norm_terms},
    {int4::encode<128>, int4::check<128>, int4::decode_add<128>, int4::norm_terms<128>},
    {int4::encode<32>, int4::check<32>, int4::decode_add<32>, int4::norm_terms<32>},
    {int2::encode, int2::check, int2::decode_add, int2::norm_terms},
    {topk2::encode, topk2::check, topk2::decode_add, topk2::norm_terms},
    outer_step_range,
};

}  // namespace psyche
