// The kernels, compiled as they are. Sources are found on the include path, so that tests can put changed ones first.
#include "kernels.h"

#include <cstring>

#include "cuda_emulator.h"

// After the emulator, which must come first.
#include "fp32.cu"
#include "int2.cu"
#include "int4.cu"
#include "int8.cu"
#include "outer.cu"
#include "topk2.cu"

namespace {

#define KERNEL(name) emulator::Kernel{#name, emulator::Invoked<&name>::COUNT, emulator::Invoked<&name>::with}
#define CODEC(name) KERNEL(name##_encode), KERNEL(name##_decode_add), KERNEL(name##_check)

constexpr emulator::Kernel KERNELS[] = {
    CODEC(fp32),      CODEC(int8),      CODEC(int4),         CODEC(int4_32),       CODEC(int2),
    CODEC(topk2_64),  CODEC(topk2_256), CODEC(topk2_512),
    KERNEL(outer_step), KERNEL(header_write), KERNEL(header_check),
};

}  // namespace

const emulator::Kernel* emulator::kernel_named(const char* name) {
  for (const Kernel& kernel : KERNELS)
    if (std::strcmp(kernel.name, name) == 0) return &kernel;
  return nullptr;
}
