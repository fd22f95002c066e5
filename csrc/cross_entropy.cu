// Softmax cross-entropy over this rank's part of the vocabulary, without ever keeping a float32 logit.
//
// Forward: one pass over the bfloat16 logits gives each row's maximum, sum of exponentials and label logit; the ranks
// then combine those three numbers (parallel/vocabulary.py). Backward: one pass turns the logits into their gradient in
// place. The logits are read twice and written once, and there is no other memory traffic.
//
// The running sum is online (arXiv 1805.02867): a thread rescales what it has when it meets a larger logit.
// A block has one row; v = V / tp columns.
#include "kernels.h"
#include "launch.cuh"
#include "numbers.cuh"
#include "warp.cuh"

namespace mds {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr float kMinusInfinity = -INFINITY;

// sum is the total of exp(x - max) so far; (-inf, 0) before the first number and while all of them are -inf.
struct Online {
  float max = kMinusInfinity;
  float sum = 0;

  __device__ __forceinline__ void rescale(float new_max) {
    if (max != kMinusInfinity) sum *= fast_exp(max - new_max);
    max = new_max;
  }
};

__device__ __forceinline__ Online join(Online a, Online b) {
  const float max = fmaxf(a.max, b.max);
  a.rescale(max);
  b.rescale(max);
  return {max, a.sum + b.sum};
}

// Five instructions for each number: with more, the arithmetic would take longer than reading the logits.
template <int Count>
__device__ __forceinline__ void add(Online& online, const float (&x)[Count]) {
  float max = online.max;
#pragma unroll
  for (int i = 0; i < Count; ++i) max = fmaxf(max, x[i]);
  if (max != online.max) online.rescale(max);
  const float shift = max == kMinusInfinity ? 0.0f : max;  // -inf alone: exp(-inf - 0) is the 0 that it should be
#pragma unroll
  for (int i = 0; i < Count; ++i) online.sum += fast_exp(x[i] - shift);
}

__device__ __forceinline__ Online warp_join(Online x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Online other{__shfl_xor_sync(kFullWarp, x.max, distance), __shfl_xor_sync(kFullWarp, x.sum, distance)};
    x = join(x, other);
  }
  return x;
}

struct Shared {
  Online warp[kWarps];
};

// Width is how many numbers are read at once: 8 where rows are 16-byte aligned, else 1.
template <int Width>
__device__ __forceinline__ void load(const bf16* address, float (&x)[Width]) {
  if constexpr (Width == kVector)
    load8(address, x);
  else
    x[0] = to_float(*address);
}

template <int Width>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const bf16* logits, const int64_t* labels, int64_t first_id, int columns, float* max, float* sum,
                      float* label_logit) {
  Shared& shared = block_shared<Shared>();
  const int64_t row = blockIdx.x;
  const bf16* x = logits + row * columns;
  Online online;
#pragma unroll 4  // as many loads in flight
  for (int column = int(threadIdx.x) * Width; column < columns; column += kThreads * Width) {
    float values[Width];
    load(x + column, values);
    add(online, values);
  }
  online = warp_join(online);
  if (lane_id() == 0) shared.warp[warp_id()] = online;
  __syncthreads();
  if (warp_id() == 0) {
    online = warp_join(lane_id() < kWarps ? shared.warp[lane_id()] : Online{});
    if (lane_id() == 0) {
      const int64_t label = labels[row] - first_id;
      max[row] = online.max;
      sum[row] = online.sum;
      label_logit[row] = label >= 0 && label < columns ? to_float(x[label]) : 0.0f;
    }
  }
}

// logits <- (exp(logits - max) / sum - [column is the label]) * grad
template <int Width>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(bf16* logits, const int64_t* labels, int64_t first_id, int columns, const float* max,
                    const float* sum, const float* grad) {
  const int64_t row = blockIdx.x;
  bf16* x = logits + row * columns;
  const int64_t label = labels[row] - first_id;
  const float row_max = max[row], row_grad = grad[row], scale = row_grad / sum[row];
#pragma unroll 2
  for (int column = int(threadIdx.x) * Width; column < columns; column += kThreads * Width) {
    float values[Width];
    load(x + column, values);
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      values[i] = fast_exp(values[i] - row_max) * scale;
      if (column + i == label) values[i] -= row_grad;
    }
    if constexpr (Width == kVector)
      store8(x + column, values);
    else
      x[column] = to_bf16(values[0]);
  }
}

}  // namespace

void cross_entropy_statistics(const bf16* logits, const int64_t* labels, int64_t first_id, int64_t rows, int columns,
                              float* max, float* sum, float* label_logit, void* stream) {
  const Grid grid{one_dimension(rows), kThreads, sizeof(Shared)};
  auto kernel = columns % kVector == 0 ? statistics_kernel<kVector> : statistics_kernel<1>;
  launch(kernel, grid, stream, logits, labels, first_id, columns, max, sum, label_logit);
}

void cross_entropy_gradient(bf16* logits, const int64_t* labels, int64_t first_id, int64_t rows, int columns,
                            const float* max, const float* sum, const float* grad, void* stream) {
  auto kernel = columns % kVector == 0 ? gradient_kernel<kVector> : gradient_kernel<1>;
  launch(kernel, {one_dimension(rows), kThreads}, stream, logits, labels, first_id, columns, max, sum, grad);
}

}  // namespace mds
