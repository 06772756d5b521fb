// Enough of CUDA for g++ to compile kernels/cuda/*.cu as they are, and to run them, thread by thread, on a CPU.
//
// Every CUDA thread is a fibre on a stack of its own; one OS thread runs the fibres of one block after the other. A
// fibre runs until it reaches a barrier or a warp operation. The order in which fibres and blocks run is chosen by the
// caller (forwards, backwards, shuffled), so that a kernel that lacks a barrier gives other results in some order.
// What is an error instead of a hang or a silent success: a barrier or a warp operation that not all threads reach,
// or that they reach at different lines; a 16-byte access that is not aligned to 16 bytes; a mask of part of a warp
// (our kernels have none). Shared memory holds garbage when a block starts. With ASan, access out of bounds is caught.
//
// This file is included before each kernel source. NVRTC's macro is defined, so that psyche_numerics.h takes the path
// that it takes on a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __CUDACC_RTC__ 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// All shared memory of a kernel lies in one section, which is filled with garbage before each block.
#define __shared__ static __attribute__((section("psyche_shared")))

namespace emulator {

struct Index {
  unsigned x, y, z;
};
extern Index thread_index, block_index, block_size, grid_size;

[[noreturn]] void fail(const char* what, int line);

void sync_threads(int line);

// Gives `mine` and returns when all lanes of the warp are here; `all[lane]` is then what each of them gave. Valid until
// the warp's next operation but one.
const std::uint64_t* exchange(unsigned mask, std::uint64_t mine, int line);
unsigned lane();

template <typename T>
T shuffled(unsigned mask, T mine, int from, int line) {
  static_assert(sizeof(T) <= 8, "one register or two");
  std::uint64_t word = 0;
  std::memcpy(&word, &mine, sizeof(T));
  const std::uint64_t* all = exchange(mask, word, line);
  T theirs;
  std::memcpy(&theirs, &all[from], sizeof(T));
  return theirs;
}
template <typename T>
T shuffled_up(unsigned mask, T mine, unsigned apart, int line) {
  const int from = static_cast<int>(lane()) - static_cast<int>(apart);
  return shuffled(mask, mine, from < 0 ? static_cast<int>(lane()) : from, line);
}
unsigned ballot(unsigned mask, bool mine, int line);

inline void require_aligned(const void* where) {
  if (reinterpret_cast<std::uintptr_t>(where) % 16 != 0) fail("a 16-byte access is not aligned to 16 bytes", 0);
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

#define __syncthreads() emulator::sync_threads(__LINE__)
#define __syncwarp(...) ((void)emulator::exchange(0xFFFFFFFFu, 0, __LINE__))
#define __shfl_sync(mask, x, from) emulator::shuffled(mask, x, (from) & 31, __LINE__)
#define __shfl_xor_sync(mask, x, bits) emulator::shuffled(mask, x, static_cast<int>(emulator::lane()) ^ (bits), __LINE__)
#define __shfl_up_sync(mask, x, apart) emulator::shuffled_up(mask, x, apart, __LINE__)
#define __ballot_sync(mask, x) emulator::ballot(mask, x, __LINE__)

// Not declared as aligned: the compiler would then be free to leave the check out.
template <typename T>
struct EmulatedFour {
  T x, y, z, w;
  EmulatedFour(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  EmulatedFour(const EmulatedFour& other) {
    emulator::require_aligned(&other);
    std::memcpy(static_cast<void*>(this), &other, sizeof other);
  }
  EmulatedFour& operator=(const EmulatedFour& other) {
    emulator::require_aligned(this);
    std::memcpy(static_cast<void*>(this), &other, sizeof other);
    return *this;
  }
};
using float4 = EmulatedFour<float>;
using uint4 = EmulatedFour<unsigned>;
inline float4 make_float4(float x, float y, float z, float w) { return float4(x, y, z, w); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename T>
T atomicAdd(T* at, T x) {
  const T before = *at;
  *at = before + x;
  return before;
}
template <typename T>
T atomicOr(T* at, T x) {
  const T before = *at;
  *at = before | x;
  return before;
}
template <typename T>
T atomicMin(T* at, T x) {
  const T before = *at;
  if (x < before) *at = x;
  return before;
}
