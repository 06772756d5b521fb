// The outer step, and the header of a payload, both without a copy through the host.
#include "lanes.cuh"

// One thread for four values. `local` may be null.
extern "C" __global__ void __launch_bounds__(256)
outer_step(float* theta, float* momentum, const float* gradient, float lr, float mu, float* local, psyche::u64 count) {
  using namespace psyche;
  const u64 at = 4 * ((u64)blockIdx.x * THREADS + threadIdx.x);
  if (at >= count) return;
  Four t = load_four(theta + at), m = load_four(momentum + at);
  const Four g = load_four(gradient + at);
  for (int k = 0; k < 4; ++k) psyche::outer_step(t.of[k], m.of[k], g.of[k], lr, mu);
  store_four(theta + at, t);
  store_four(momentum + at, m);
  if (local != nullptr) store_four(local + at, t);
}

// The 32 bytes of a header travel as four words among the arguments.
extern "C" __global__ void __launch_bounds__(256)
header_write(psyche::u64* payload, psyche::u64 a, psyche::u64 b, psyche::u64 c, psyche::u64 d) {
  const psyche::u64 words[4] = {a, b, c, d};
  if (threadIdx.x == 0)
    for (int i = 0; i < 4; ++i) payload[i] = words[i];
}

extern "C" __global__ void __launch_bounds__(256)
header_check(const psyche::u64* payload, psyche::u64 a, psyche::u64 b, psyche::u64 c, psyche::u64 d,
             psyche::u32* malformed) {
  const psyche::u64 words[4] = {a, b, c, d};
  if (threadIdx.x == 0)
    for (int i = 0; i < 4; ++i)
      if (payload[i] != words[i]) psyche::refuse(malformed, psyche::BAD_HEADER);
}
