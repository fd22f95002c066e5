// Sorts token copies by the experts that tokens chose: histogram, offsets and a stable counting sort in one launch.
//
// Copy c = t*K + k of token t goes to expert experts[c]. Slots are expert by expert, within an expert in the order of
// the copies (stable: the result is argsort(stable=True) of the choices), and each expert's slots are rounded up to a
// multiple of `align` (128 for FP8 tiles; 1 for none), so that a tile never has rows of two experts. A choice outside
// 0..E-1 has no slot.
//
//   1. every block counts its part of the copies, each warp for itself          counts[block][expert]
//   2. all blocks synchronise; then each sums up, for every expert, the copies of all blocks and of those before it
//   3. every warp goes through its part again, 32 copies at a time, and assigns slots
//
// Blocks wait for each other, so all of them must be resident at once: there are no more blocks than multiprocessors,
// and each warp takes its share of the copies.
#include <algorithm>

#include "kernels.h"
#include "launch.cuh"
#include "warp.cuh"

#ifndef MEGATRON_DEEPSEEK_EMULATED
#include <cooperative_groups.h>
#endif

namespace mds {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
#ifdef MEGATRON_DEEPSEEK_EMULATED
constexpr int kTogether = 2;  // few, as multiprocessors there are
#else
constexpr int kTogether = 12;  // counts of blocks that a thread reads at once
#endif
constexpr int kMinCopies = 256;  // of a warp: less would make the sums over warps longer than the walk

struct Shared {
  int next[kWarps][kMaxExperts];  // copies of each expert, then how many of them come before the next one
  int before[kMaxExperts];        // copies of each expert in the blocks before this one
  int start[kMaxExperts + 1];     // copies of each expert in all, then its first slot; the end of the last
  int warp_total[kWarps];
};

__device__ __forceinline__ void wait_for_all_blocks() {
#ifdef MEGATRON_DEEPSEEK_EMULATED
  emulation::grid_barrier();
#else
  cooperative_groups::this_grid().sync();
#endif
}

__device__ __forceinline__ int expert_of(const int64_t* experts, int64_t copy, int64_t end, int num_experts) {
  if (copy >= end) return -1;
  const int64_t expert = experts[copy];
  return expert >= 0 && expert < num_experts ? int(expert) : -1;
}

// Replaces the experts' counts in shared.start by the exclusive sum of the rounded counts. A thread has 4 experts.
__device__ __forceinline__ void scan_starts(Shared& shared, RouteShape shape) {
  constexpr int kEach = kMaxExperts / kThreads;
  int own[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int expert = int(threadIdx.x) * kEach + i;
    own[i] = sum;
    sum += expert < shape.experts ? round_up(shared.start[expert], shape.align) : 0;
  }
  const int inclusive = warp_inclusive_sum(sum);
  if (lane_id() == kWarp - 1) shared.warp_total[warp_id()] = inclusive;
  __syncthreads();
  int before = inclusive - sum;
  for (int w = 0; w < warp_id(); ++w) before += shared.warp_total[w];
#pragma unroll
  for (int i = 0; i < kEach; ++i) shared.start[int(threadIdx.x) * kEach + i] = before + own[i];
  if (threadIdx.x == kThreads - 1) shared.start[kMaxExperts] = before + sum;
  __syncthreads();
}

// Sets counts[block] to the copies of each expert in this block, and clears the sums over blocks.
__device__ __forceinline__ void write_counts(Shared& shared, int* counts, int experts) {
  for (int e = int(threadIdx.x); e < experts; e += kThreads) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.next[w][e];
    counts[int64_t(blockIdx.x) * experts + e] = sum;
    shared.before[e] = shared.start[e] = 0;
  }
}

// Sets shared.start to the copies of each expert, shared.next to those before each warp of this block. The blocks of an
// expert are divided among as many threads as there are for it, and each thread reads kTogether of them at once.
__device__ __forceinline__ void count_before(Shared& shared, const int* counts, int blocks, int experts) {
  const int parts = experts < kThreads ? kThreads / experts : 1;
  for (int i = int(threadIdx.x); i < parts * experts; i += kThreads) {
    const int e = i % experts;
    int before = 0, all = 0;
#pragma unroll 1
    for (int first = i / experts; first < blocks; first += kTogether * parts) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int block = first + j * parts;
        const int count = block < blocks ? counts[int64_t(block) * experts + e] : 0;
        all += count;
        before += block < int(blockIdx.x) ? count : 0;
      }
    }
    atomicAdd(&shared.before[e], before);
    atomicAdd(&shared.start[e], all);
  }
  __syncthreads();
  for (int e = int(threadIdx.x); e < experts; e += kThreads) {
    int before = shared.before[e];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int count = shared.next[w][e];
      shared.next[w][e] = before;
      before += count;
    }
  }
  __syncthreads();
}

// counts [blocks, E] is scratch; offsets [E + 1]: first slot of each expert and the end of the last.
__global__ void __launch_bounds__(kThreads)
    route_kernel(const int64_t* experts, RouteShape shape, int* counts, int* copy_of_slot, int* slot_of_copy,
                 int* count_of_expert, int* offsets) {
  Shared& shared = block_shared<Shared>();
  const int64_t begin = (int64_t(blockIdx.x) * kWarps + warp_id()) * shape.copies_per_warp;
  const int64_t end = begin + shape.copies_per_warp < shape.copies ? begin + shape.copies_per_warp : shape.copies;
  int* next = shared.next[warp_id()];

  for (int e = lane_id(); e < shape.experts; e += kWarp) next[e] = 0;
  __syncwarp();
  for (int64_t copy = begin + lane_id(); copy < end; copy += kWarp) {
    const int expert = expert_of(experts, copy, end, shape.experts);
    if (expert >= 0) atomicAdd(&next[expert], 1);
  }
  __syncthreads();
  write_counts(shared, counts, shape.experts);
  for (int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x; slot < shape.slots; slot += gridDim.x * kThreads)
    copy_of_slot[slot] = -1;  // a place of padding, until a copy takes it

  wait_for_all_blocks();

  count_before(shared, counts, int(gridDim.x), shape.experts);
  if (blockIdx.x == 0)
    for (int e = int(threadIdx.x); e < shape.experts; e += kThreads) count_of_expert[e] = shared.start[e];
  __syncthreads();
  scan_starts(shared, shape);
  if (blockIdx.x == 0)
    for (int e = int(threadIdx.x); e <= shape.experts; e += kThreads) offsets[e] = shared.start[e];

  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t copy = first + lane_id();
    const int expert = expert_of(experts, copy, end, shape.experts);
    const unsigned same = __match_any_sync(kFullWarp, expert);
    const unsigned before = same & ((1u << lane_id()) - 1);
    int slot = -1;
    if (expert >= 0) {
      slot = shared.start[expert] + next[expert] + __popc(before);
      copy_of_slot[slot] = int(copy);
    }
    if (copy < end) slot_of_copy[copy] = slot;
    __syncwarp();  // all lanes have read next[]
    if (expert >= 0 && before == 0) next[expert] += __popc(same);
    __syncwarp();
  }
}

}  // namespace

RouteShape route_shape(int64_t copies, int experts, int align) {
  const int64_t fair = ceil_div<int64_t>(copies, int64_t(multiprocessors()) * kWarps);
  const int64_t slots = align == 1 ? copies : round_up<int64_t>(copies + int64_t(experts) * (align - 1), align);
  return {copies, experts, align, slots, std::max<int64_t>(kMinCopies, round_up<int64_t>(fair, kWarp))};
}

int64_t route_blocks(const RouteShape& shape) {
  return std::max<int64_t>(1, ceil_div<int64_t>(shape.copies, shape.copies_per_warp * kWarps));
}

int64_t route_scratch(const RouteShape& shape) { return route_blocks(shape) * shape.experts; }

void route(const int64_t* experts, RouteShape shape, int* scratch, int* copy_of_slot, int* slot_of_copy,
           int* count_of_expert, int* offsets, void* stream) {
  const Grid grid{unsigned(route_blocks(shape)), kThreads, sizeof(Shared), true};
  launch(route_kernel, grid, stream, experts, shape, scratch, copy_of_slot, slot_of_copy, count_of_expert, offsets);
}

}  // namespace mds
