// RoPE for MLA's decoupled dimensions, fused with the split before it and the concatenation after it.
//
// The last R of a head's D dimensions are rotated, the others copied: one pass instead of a split, a rotation (in
// float32) and a concatenation. The numbers are those of ops/rope.py: pairs stay interleaved, float32 arithmetic
// without fused multiply-adds, one rounding to bfloat16.
//
// Shapes: T tokens = B*S, N heads, D = nope + R, V value width. A block has one token.
#include "kernels.h"
#include "launch.cuh"
#include "numbers.cuh"

namespace mds {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxRope = 256;

struct Shared {
  float sum[kThreads / kWarp][kMaxRope];
  alignas(16) bf16 turned[kMaxRope];
};

// Reads cos and sin of a position from the table [2, S, R/2].
struct Angles {
  const float* cos;
  const float* sin;
};

__device__ __forceinline__ Angles angles_of(const float* table, int positions, int rope, int64_t token) {
  int64_t row = (token % positions) * (rope / 2);
  return {table + row, table + int64_t(positions) * (rope / 2) + row};
}

// Rotates four pairs, the first of which is number `pair`. The backward (`inverse`) rotates by the opposite angle.
__device__ __forceinline__ void turn(float (&x)[kVector], const Angles& angles, int pair, bool inverse) {
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    float cos = angles.cos[pair + i], sin = inverse ? -angles.sin[pair + i] : angles.sin[pair + i];
    float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * cos - odd * sin;
    x[2 * i + 1] = even * sin + odd * cos;
  }
}

__device__ __forceinline__ const bf16* at(const StridedHeads& x, int64_t token, int positions, int head) {
  return x.data + (token / positions) * x.batch_stride + (token % positions) * x.position_stride +
         head * x.head_stride;
}

// `out` [T, N, D] is contiguous.
__global__ void __launch_bounds__(kThreads)
    rope_tail_kernel(StridedHeads x, const float* table, bf16* out, RopeShape shape, bool inverse) {
  const int64_t token = blockIdx.x;
  const Angles angles = angles_of(table, shape.positions, shape.rope, token);
  const int width = shape.nope + shape.rope, vectors = width / kVector;
  for (int i = int(threadIdx.x); i < shape.heads * vectors; i += kThreads) {
    const int head = i / vectors, column = i % vectors * kVector;
    float values[kVector];
    load8(at(x, token, shape.positions, head) + column, values);
    if (column >= shape.nope) turn(values, angles, (column - shape.nope) / 2, inverse);
    store8(out + (token * shape.heads + head) * width + column, values);
  }
}

// Makes k [T, N, nope + R] and v [T, N, V] of kv [T, N, nope + V] and k_rope [T, R]; rotates k_rope if given a table.
__global__ void __launch_bounds__(kThreads)
    keys_values_kernel(const bf16* kv, const bf16* k_rope, const float* table, bf16* k, bf16* v, RopeShape shape) {
  Shared& shared = block_shared<Shared>();
  const int64_t token = blockIdx.x;
  for (int column = int(threadIdx.x) * kVector; column < shape.rope; column += kThreads * kVector) {
    float values[kVector];
    load8(k_rope + token * shape.rope + column, values);
    if (table != nullptr)
      turn(values, angles_of(table, shape.positions, shape.rope, token), column / 2, false);
    store8(shared.turned + column, values);
  }
  __syncthreads();
  const int joint = shape.nope + shape.rope + shape.value, vectors = joint / kVector;
  for (int i = int(threadIdx.x); i < shape.heads * vectors; i += kThreads) {
    const int head = i / vectors, column = i % vectors * kVector;  // of [k_nope, k_rope, v]
    const int64_t row = token * shape.heads + head;
    const bf16* from = kv + row * (shape.nope + shape.value);
    if (column < shape.nope)
      store16(k + row * (shape.nope + shape.rope) + column, load16(from + column));
    else if (column < shape.nope + shape.rope)
      store16(k + row * (shape.nope + shape.rope) + column, load16(shared.turned + column - shape.nope));
    else
      store16(v + row * shape.value + column - shape.nope - shape.rope, load16(from + column - shape.rope));
  }
}

// The gradient of k_rope is a sum over the heads in float32: each warp sums every 8th head, then the warps are summed.
__global__ void __launch_bounds__(kThreads) keys_values_backward_kernel(StridedHeads grad_k, StridedHeads grad_v,
                                                                        const float* table, bf16* grad_kv,
                                                                        bf16* grad_k_rope, RopeShape shape) {
  Shared& shared = block_shared<Shared>();
  const int64_t token = blockIdx.x;
  const int width = shape.nope + shape.value, vectors = width / kVector;
  for (int i = int(threadIdx.x); i < shape.heads * vectors; i += kThreads) {
    const int head = i / vectors, column = i % vectors * kVector;
    const bf16* from = column < shape.nope ? at(grad_k, token, shape.positions, head) + column
                                           : at(grad_v, token, shape.positions, head) + column - shape.nope;
    store16(grad_kv + (token * shape.heads + head) * width + column, load16(from));
  }
  constexpr int kWarps = kThreads / kWarp;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  for (int column = lane * kVector; column < shape.rope; column += kWarp * kVector) {
    float total[kVector] = {};
    for (int head = warp; head < shape.heads; head += kWarps) {
      float values[kVector];
      load8(at(grad_k, token, shape.positions, head) + shape.nope + column, values);
#pragma unroll
      for (int j = 0; j < kVector; ++j) total[j] += values[j];
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) shared.sum[warp][column + j] = total[j];
  }
  __syncthreads();
  for (int column = int(threadIdx.x) * kVector; column < shape.rope; column += kThreads * kVector) {
    float total[kVector] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
#pragma unroll
      for (int j = 0; j < kVector; ++j) total[j] += shared.sum[w][column + j];
    if (table != nullptr)
      turn(total, angles_of(table, shape.positions, shape.rope, token), column / 2, true);
    store8(grad_k_rope + token * shape.rope + column, total);
  }
}

}  // namespace

int max_rope_width() { return kMaxRope; }

void rope_tail(StridedHeads x, const float* table, bf16* out, RopeShape shape, bool inverse, void* stream) {
  launch(rope_tail_kernel, {one_dimension(shape.tokens), kThreads}, stream, x, table, out, shape, inverse);
}

void keys_values(const bf16* kv, const bf16* k_rope, const float* table, bf16* k, bf16* v, RopeShape shape,
                 void* stream) {
  launch(keys_values_kernel, {one_dimension(shape.tokens), kThreads, sizeof(Shared)}, stream, kv, k_rope, table, k, v,
         shape);
}

void keys_values_backward(StridedHeads grad_k, StridedHeads grad_v, const float* table, bf16* grad_kv,
                          bf16* grad_k_rope, RopeShape shape, void* stream) {
  launch(keys_values_backward_kernel, {one_dimension(shape.tokens), kThreads, sizeof(Shared)}, stream, grad_k, grad_v,
         table, grad_kv, grad_k_rope, shape);
}

}  // namespace mds
