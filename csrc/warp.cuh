// Reductions over the lanes of a warp and the warps of a block, in an order that depends on the indices alone.
#pragma once

#include "platform.cuh"

namespace mds {

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / kWarp; }

// Every lane of an aligned group of `Lanes` gets the group's result.
template <int Lanes, typename T, typename Op>
__device__ __forceinline__ T group_reduce(T x, Op op) {
#pragma unroll
  for (int distance = Lanes / 2; distance > 0; distance /= 2) x = op(x, __shfl_xor_sync(kFullWarp, x, distance));
  return x;
}

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};

// Every thread of the block gets the sum; `scratch` has a place for each warp. All threads must call it.
template <int Warps>
__device__ __forceinline__ float block_sum(float x, float (&scratch)[Warps]) {
  x = group_reduce<kWarp>(x, Sum{});
  __syncthreads();  // an earlier sum may still be read
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int w = 0; w < Warps; ++w) total += scratch[w];
  return total;
}

// Computes exp to 2^-21 in two instructions, for kernels that would otherwise wait for arithmetic instead of memory.
__device__ __forceinline__ float fast_exp(float x) {
#ifdef MEGATRON_DEEPSEEK_EMULATED
  return expf(x);
#else
  return __expf(x);
#endif
}

// Returns the inclusive sum over the lanes of a warp.
__device__ __forceinline__ int warp_inclusive_sum(int x) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    int before = __shfl_up_sync(kFullWarp, x, distance);
    if (lane_id() >= distance) x += before;
  }
  return x;
}

}  // namespace mds
