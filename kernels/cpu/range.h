// Streaming passes over fp32 ranges. Part of level.cpp, which is compiled once for each instruction set.
#pragma once

#include "codec.h"

namespace psyche {
namespace {

struct Delta {
  float* values;  // where the residual lies, or in the scratch buffer
  u32 largest;    // magnitude bits
};

// What is to be encoded of `n` values from `at`. Integers find the largest magnitude: unlike a maximum of floats, theirs
// is the same in every order, which lets the compiler vectorise it.
inline Delta delta_of(const Input& in, i64 at, int n, float* scratch) {
  const float* __restrict base = in.base + at;
  const float* __restrict local = in.local + at;
  float* __restrict values = in.residual ? in.residual + at : scratch;
  i32 largest = 0;
  if (in.residual) {
    for (int i = 0; i < n; ++i) {
      values[i] = with_feedback(base[i], local[i], values[i], in.beta);
      const i32 magnitude = (i32)magnitude_bits(values[i]);
      largest = largest > magnitude ? largest : magnitude;
    }
  } else {
    for (int i = 0; i < n; ++i) {
      values[i] = sub(base[i], local[i]);
      const i32 magnitude = (i32)magnitude_bits(values[i]);
      largest = largest > magnitude ? largest : magnitude;
    }
  }
  return Delta{values, (u32)largest};
}

inline i64 first_non_finite(const float* values) {
  i64 at = 0;
  while (magnitude_bits(values[at]) < INFINITE) ++at;
  return at;
}

inline void outer_step_range(float* theta, float* momentum, const float* gradient, float* local, i64 n, float lr,
                             float mu) {
  float* __restrict t = theta;
  float* __restrict m = momentum;
  const float* __restrict g = gradient;
  float* __restrict copy = local;
  if (copy) {
    for (i64 i = 0; i < n; ++i) {
      float new_theta = t[i], new_momentum = m[i];
      outer_step(new_theta, new_momentum, g[i], lr, mu);
      t[i] = new_theta;
      m[i] = new_momentum;
      copy[i] = new_theta;
    }
  } else {
    for (i64 i = 0; i < n; ++i) {
      float new_theta = t[i], new_momentum = m[i];
      outer_step(new_theta, new_momentum, g[i], lr, mu);
      t[i] = new_theta;
      m[i] = new_momentum;
    }
  }
}

}  // namespace
}  // namespace psyche
