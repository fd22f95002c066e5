// What the kernels are compiled for: a GPU by nvcc, or the CPU by any C++17 compiler, where tests/emulation runs every
// thread of a grid as a fiber. The kernels are the same text in both; what differs is in this file, numbers.cuh,
// launch.cuh and hopper.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef MEGATRON_DEEPSEEK_EMULATED
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace mds {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// A block's shared memory is always one struct of the kernel's own, so that its size is sizeof and nothing is static.
// 1,024 bytes is what the 128-byte swizzle of TMA and wgmma repeats with.
template <typename T>
__device__ __forceinline__ T& block_shared() {
#ifdef MEGATRON_DEEPSEEK_EMULATED
  return *reinterpret_cast<T*>(emulation::shared_memory());
#else
  extern __shared__ __align__(1024) unsigned char raw_shared_memory[];
  return *reinterpret_cast<T*>(raw_shared_memory);
#endif
}

template <typename T>
constexpr __host__ __device__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename T>
constexpr __host__ __device__ T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

}  // namespace mds
