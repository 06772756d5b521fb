// fp32: values as they are. One thread for four of them.
#include "lanes.cuh"

namespace psyche {
PSYCHE_FN u64 first_of_four() { return 4 * ((u64)blockIdx.x * THREADS + threadIdx.x); }
}  // namespace psyche

extern "C" __global__ void __launch_bounds__(256)
fp32_encode(const float* base, const float* local, float* residual, float beta, psyche::u8* body, psyche::u64 count,
            psyche::u64* non_finite) {
  using namespace psyche;
  const u64 at = first_of_four();
  if (at >= count) return;
  Four values = load_feedback(base, local, residual, beta, at);
  note_non_finite(values, at, non_finite);
  store_four(reinterpret_cast<float*>(body) + at, values);
  if (residual == nullptr) return;
  for (int k = 0; k < 4; ++k) values.of[k] = sub(values.of[k], values.of[k]);
  store_four(residual + at, values);
}

extern "C" __global__ void __launch_bounds__(256)
fp32_decode_add(const psyche::u8* body, float weight, float* sum, psyche::u64 count, const psyche::u32* malformed) {
  using namespace psyche;
  const u64 at = first_of_four();
  if (at >= count || *malformed != 0) return;
  const Four values = load_four(reinterpret_cast<const float*>(body) + at);
  Four sums = load_four(sum + at);
  for (int k = 0; k < 4; ++k) sums.of[k] = weighted_sum(sums.of[k], weight, values.of[k]);
  store_four(sum + at, sums);
}

extern "C" __global__ void __launch_bounds__(256)
fp32_check(const psyche::u8* body, psyche::u64 count, psyche::u32* malformed) {
  using namespace psyche;
  const u64 at = first_of_four();
  if (at >= count) return;
  const Four values = load_four(reinterpret_cast<const float*>(body) + at);
  for (int k = 0; k < 4; ++k)
    if (magnitude_bits(values.of[k]) >= INFINITE) refuse(malformed, BAD_CODE);
}
