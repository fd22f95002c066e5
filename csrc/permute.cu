// Moves token copies to their slots and back (route.cu assigns the slots), 16 bytes at a time; every pass is a gather.
//
//   gather_rows      out[s] = x[copy_of_slot[s] / K], zero for padding            permute forward; its bytes may be FP8
//   combine_rows     out[t] = sum over k of weight[t, k] * y[slot_of_copy[t, k]]  unpermute forward; permute backward
//   combine_backward grad_y[s] = weight * grad[t], grad_weight = <grad[t], y[s]>  unpermute backward, in one pass
//
// Sums are float32 and in the order of k. A slot or copy of -1 is padding or has no slot, and counts as zero.
// Shapes: T tokens, K choices, S slots, H numbers of a row (a multiple of 16 bytes).
#include "kernels.h"
#include "launch.cuh"
#include "numbers.cuh"
#include "warp.cuh"

namespace mds {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;  // independent 16-byte loads of a thread in flight

// `Threads` share a row: a block where rows are long, a warp where they are short, as rows of FP8 scales are.
template <int Threads>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const Words4* x, const int* copy_of_slot, int copies_of_token, Words4* out, int64_t slots,
                       int vectors) {
  const int64_t slot = int64_t(blockIdx.x) * (kThreads / Threads) + threadIdx.x / Threads;
  if (slot >= slots) return;
  const int copy = copy_of_slot[slot];
  const Words4* from = x + int64_t(copy < 0 ? 0 : copy / copies_of_token) * vectors;
  Words4* to = out + slot * vectors;
  for (int first = int(threadIdx.x) % Threads; first < vectors; first += Threads * kUnroll) {
    Words4 held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      held[u] = Words4{};
      if (copy >= 0 && first + u * Threads < vectors) held[u] = load16(from + first + u * Threads);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * Threads < vectors) store16(to + first + u * Threads, held[u]);
  }
}

template <int Threads>
void launch_gather(const void* x, const int* copy_of_slot, int copies_of_token, void* out, int64_t slots, int row_bytes,
                   void* stream) {
  launch(gather_rows_kernel<Threads>, {one_dimension(ceil_div<int64_t>(slots, kThreads / Threads)), kThreads}, stream,
         static_cast<const Words4*>(x), copy_of_slot, copies_of_token, static_cast<Words4*>(out), slots,
         row_bytes / 16);
}

// A block has one token; every thread reads its slots and weights once, from the L1 cache.
__global__ void __launch_bounds__(kThreads)
    combine_rows_kernel(const bf16* y, const int* slot_of_copy, const float* weights, int choices, bf16* out,
                        int width) {
  const int64_t token = blockIdx.x;
  const int* slots = slot_of_copy + token * choices;
  for (int column = int(threadIdx.x) * kVector; column < width; column += kThreads * kVector) {
    float total[kVector] = {};
#pragma unroll 4
    for (int k = 0; k < choices; ++k) {
      const int slot = slots[k];
      if (slot < 0) continue;
      const float weight = weights == nullptr ? 1.0f : weights[token * choices + k];
      float values[kVector];
      load8(y + int64_t(slot) * width + column, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) total[i] += weight * values[i];
    }
    store8(out + token * width + column, total);
  }
}

struct Shared {
  float scratch[kWarps];
};

// A block has one slot. Copies without a slot get no gradient: the caller clears grad_weights.
__global__ void __launch_bounds__(kThreads)
    combine_backward_kernel(const bf16* grad, const bf16* y, const int* copy_of_slot, const float* weights,
                            int choices, bf16* grad_y, float* grad_weights, int width) {
  Shared& shared = block_shared<Shared>();
  const int64_t slot = blockIdx.x;
  const int copy = copy_of_slot[slot];
  const float weight = copy < 0 ? 0.0f : weights[copy];
  const bf16* from = grad + int64_t(copy < 0 ? 0 : copy / choices) * width;
  float product = 0;
  for (int column = int(threadIdx.x) * kVector; column < width; column += kThreads * kVector) {
    float g[kVector] = {}, values[kVector] = {};
    if (copy >= 0) {
      load8(from + column, g);
      load8(y + slot * width + column, values);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      product += g[i] * values[i];
      g[i] *= weight;
    }
    store8(grad_y + slot * width + column, g);
  }
  product = block_sum<kWarps>(product, shared.scratch);
  if (copy >= 0 && threadIdx.x == 0) grad_weights[copy] = product;
}

}  // namespace

void gather_rows(const void* x, const int* copy_of_slot, int copies_of_token, void* out, int64_t slots, int row_bytes,
                 void* stream) {
  if (row_bytes >= 16 * kThreads)
    launch_gather<kThreads>(x, copy_of_slot, copies_of_token, out, slots, row_bytes, stream);
  else
    launch_gather<kWarp>(x, copy_of_slot, copies_of_token, out, slots, row_bytes, stream);
}

void combine_rows(const bf16* y, const int* slot_of_copy, const float* weights, int64_t tokens, int choices, bf16* out,
                  int width, void* stream) {
  launch(combine_rows_kernel, {one_dimension(tokens), kThreads}, stream, y, slot_of_copy, weights, choices, out, width);
}

void combine_backward(const bf16* grad, const bf16* y, const int* copy_of_slot, const float* weights, int64_t slots,
                      int choices, bf16* grad_y, float* grad_weights, int width, void* stream) {
  launch(combine_backward_kernel, {one_dimension(slots), kThreads, sizeof(Shared)}, stream, grad, y, copy_of_slot,
         weights, choices, grad_y, grad_weights, width);
}

}  // namespace mds
