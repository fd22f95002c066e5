// The kernel of the block-scaled GEMMs (gemm_fp8.cu): its warpgroups, their barriers, and what they do.
//
// A block has one producer warpgroup and two consumers. The producer's first thread has the copy engine fill a ring
// of stages, a [128 or 256, 128] and b [128, 128] codes each; `full` and `empty` barriers pass them back and forth. A
// consumer has 64 rows of each half of a (`Waves` halves) and all of b; of a half that does not exist nothing is loaded
// or multiplied. Blocks are persistent: block i takes turns i, i + grid, ... (gemm_schedule.cuh), and its producer
// already loads the next tile while the result of the last is written (gemm_store.cuh).
//
// With clusters two blocks compute neighbouring tiles of N in step, and each loads one half of their common tile of a
// for both: the copy engine writes it into both blocks' stages (multicast). So a stage is empty once the consumers of
// both blocks have read it, and no block may end while the other can still arrive at its barriers.
#pragma once

#include "gemm_scales.cuh"
#include "gemm_schedule.cuh"
#include "gemm_store.cuh"
#include "hopper.cuh"
#include "warp.cuh"

namespace mds {

using hopper::Barrier;
using hopper::kAccumulators;
using hopper::TensorMap;

constexpr int kGemmThreads = kWarpgroup * (1 + kConsumers);
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536, "registers of one block");
static_assert(kHalf == kConsumers * hopper::kProductM, "rows that the consumers multiply at once");

// The form of a kernel: how operands are grouped, whether b has scales of 128x128 blocks (else of rows), how many
// halves its tiles have, how the result is stored, and how many blocks form a cluster.
template <Grouping grouping_, bool BlocksB_, int Waves_, Store store_, int Cluster_>
struct Form {
  static constexpr Grouping grouping = grouping_;
  static constexpr bool BlocksB = BlocksB_;
  static constexpr int Waves = Waves_;
  static constexpr Store store = store_;
  static constexpr int Cluster = Cluster_;
  static constexpr int kTileM = kHalf * Waves;
  static constexpr int kStages = Waves == 1 ? 6 : 4;
};

template <Store store>
struct Staging {};
template <>
struct Staging<Store::kCopyEngine> {
  OutputBoxes of_warp[kConsumerWarps];
};

// The scales of two neighbouring columns, which a thread reads at once: it has sums of both.
struct alignas(8) ColumnPair {
  float scale[2];
};

template <typename F>
struct GemmShared {
  e4m3 a[F::kStages][F::kTileM * kTile];
  e4m3 b[F::kStages][kTileN * kTile];
  Staging<F::store> out;
  ColumnPair scale_b[kConsumers][2][kTileN / 2];  // for this and the next block of K, each consumer for itself
  Barrier full[F::kStages], empty[F::kStages];
};
template <bool BlocksB, int Waves, Store store>
constexpr bool kFits = sizeof(GemmShared<Form<Grouping::kNone, BlocksB, Waves, store, 1>>) <= 227 * 1024;
static_assert(kFits<false, 2, Store::kDirect> && kFits<true, 1, Store::kCopyEngine> &&
                  kFits<true, 2, Store::kCopyEngine>,
              "shared memory of one block");

// The place in the ring: the stage, and the parity of the round through all stages.
template <int Stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Has the copy engine load a stage's tile of a, or the half of it that there is.
template <typename F>
__device__ __forceinline__ void load_a(e4m3* tile, const TensorMap* a, int column, int row, bool both, int rank,
                                       Barrier* full) {
  if constexpr (F::Cluster == 1) {
    hopper::copy_tile(tile, a, column, row, full);
    if (both) hopper::copy_tile(tile + kHalf * kTile, a, column, row + kHalf, full);
  } else {
    const int half = both ? rank : 0;
    if (both || rank == 0)
      hopper::copy_tile_to_cluster(tile + half * kHalf * kTile, a, column, row + half * kHalf, full,
                                   (1 << F::Cluster) - 1);
  }
}

template <typename F>
__device__ __forceinline__ void produce(GemmShared<F>& shared, const TensorMap* a, const TensorMap* b,
                                        const Gemm& product, int rank) {
  Ring<F::kStages> ring;
  for (int64_t turn = blockIdx.x / F::Cluster; turn < turns_of(product); turn += gridDim.x / F::Cluster) {
    const Work work = work_of<F::grouping, F::Cluster>(product, turn, rank);
    const bool both = F::Waves == 2 && work.rows > kHalf;
    for (int k = work.k; k < work.k + work.k_tiles; ++k, ring.advance()) {
      Barrier* full = &shared.full[ring.stage];
      hopper::barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      hopper::barrier_arrive_expecting(full, (kTileN + (both ? 2 : 1) * kHalf) * kTile);
      load_a<F>(shared.a[ring.stage], a, k * kTile, int(work.a_row), both, rank, full);
      hopper::copy_tile(shared.b[ring.stage], b, k * kTile, int(work.b_row), full);
    }
  }
}

// Tells the producers that fill the stage, one in each block of the cluster, that this warp has read it.
template <typename F>
__device__ __forceinline__ void release(Barrier* empty) {
  if constexpr (F::Cluster == 1) {
    if (lane_id() == 0) hopper::barrier_arrive(empty);
  } else {
    if (lane_id() < F::Cluster) hopper::barrier_arrive_at(empty, lane_id());
  }
}

// Multiplies 64 x 128 x 128 as four wgmmas of 32 along K; such a step is 2 in the descriptor's units of 16 bytes.
__device__ __forceinline__ void multiply(float (&sum)[kAccumulators], const e4m3* a, const e4m3* b) {
  const uint64_t from_a = hopper::descriptor(hopper::shared_address(a));
  const uint64_t from_b = hopper::descriptor(hopper::shared_address(b));
  constexpr int kStep = hopper::kProductK / 16;
  hopper::hold(sum);
  hopper::product_fence();
#pragma unroll
  for (int i = 0; i < kTile / hopper::kProductK; ++i)
    hopper::product(sum, from_a + i * kStep, from_b + i * kStep, i > 0);
  hopper::product_commit();
  hopper::hold(sum);
  hopper::product_wait();
  hopper::hold(sum);
}

template <bool BlocksB>
__device__ __forceinline__ void promote(float (&total)[kAccumulators], const float (&sum)[kAccumulators],
                                        const float (&row)[2], float block_scale, const ColumnPair* column_scales,
                                        int thread) {
#pragma unroll
  for (int i = 0; i < kAccumulators; i += 2) {
    ColumnPair column{{block_scale, block_scale}};
    if constexpr (!BlocksB) column = column_scales[hopper::accumulator_column(thread, i) / 2];
#pragma unroll
    for (int j = 0; j < 2; ++j) total[i + j] = fmaf(sum[i + j], row[i / 2 % 2] * column.scale[j], total[i + j]);
  }
}

// Stores a consumer's 64 rows of the tile from its row `first` on.
template <typename F, typename Out>
__device__ __forceinline__ void store_rows(GemmShared<F>& shared, Out* out, const TensorMap* map, const Gemm& product,
                                           const Work& work, int first, const float (&total)[kAccumulators],
                                           int consumer, int thread) {
  if constexpr (F::store == Store::kCopyEngine) {
    const int warp = thread / kWarp, row = first + warp * OutputBoxes::kRows;
    store_by_copies(shared.out.of_warp[consumer * kWarpgroup / kWarp + warp], map, out, product.n,
                    {work.out_row + row, work.column, work.columns, work.rows - row, F::grouping == Grouping::kRows},
                    total);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + hopper::accumulator_row(thread, 2 * half);
      store(out + (work.out_row + row) * product.n + work.column, work.columns, product.n % 8 == 0, row < work.rows,
            total + 2 * half, thread);
    }
  }
}

// Hands the scales of b's columns to the threads of the consumer that need them, by one of two buffers, with a barrier
// each. A thread that writes this buffer again has passed the other's barrier, which the other threads reach only after
// they have read this one.
template <typename F>
__device__ __forceinline__ const ColumnPair* share_columns(GemmShared<F>& shared, float scale, int buffer, int consumer,
                                                           int thread) {
  ColumnPair* pairs = shared.scale_b[consumer][buffer];
  pairs[thread / 2].scale[thread % 2] = scale;
  hopper::warpgroup_barrier(1 + consumer);
  return pairs;
}

// Adds a stage's products to the sums of the `waves` halves that there are.
template <typename F>
__device__ __forceinline__ void consume_stage(GemmShared<F>& shared, const Ring<F::kStages>& ring, int waves,
                                              const Scales<F::Waves>& scales, const ColumnPair* column_scales,
                                              float (&total)[F::Waves][kAccumulators], int consumer, int thread) {
  hopper::barrier_wait(&shared.full[ring.stage], ring.parity);
#pragma unroll
  for (int wave = 0; wave < F::Waves; ++wave) {
    if (wave == waves) break;
    float sum[kAccumulators];
    const int row = (wave * kConsumers + consumer) * hopper::kProductM;
    multiply(sum, shared.a[ring.stage] + row * kTile, shared.b[ring.stage]);
    if (wave == waves - 1) release<F>(&shared.empty[ring.stage]);
    promote<F::BlocksB>(total[wave], sum, scales.row[wave], scales.column, column_scales, thread);
  }
}

template <typename F, typename Out>
__device__ __forceinline__ void consume(GemmShared<F>& shared, const Gemm& product, Out* out,
                                        const TensorMap* map, int consumer, int rank) {
  const int thread = int(threadIdx.x) % kWarpgroup;
  Ring<F::kStages> ring;
  int buffer = 0;  // of scale_b; it alternates through all tiles
  for (int64_t turn = blockIdx.x / F::Cluster; turn < turns_of(product); turn += gridDim.x / F::Cluster) {
    const Work work = work_of<F::grouping, F::Cluster>(product, turn, rank);
    const int waves = F::Waves == 2 && work.rows > kHalf ? 2 : 1;
    ScaleReader<F::BlocksB, F::Waves> reader(product, work, consumer, thread);
    float total[F::Waves][kAccumulators] = {};
    // Two loops: in one, the compiler has the numbers that a step loaded ahead copied at the end of that same step.
    for (int group = 0; group < work.k_tiles; group += kQuad) {
      reader.advance(group);
      const int end = group + kQuad < work.k_tiles ? group + kQuad : work.k_tiles;
#pragma unroll 1
      for (int k = group; k < end; ++k, ring.advance()) {
        const Scales<F::Waves> scales = reader.step(k);
        const ColumnPair* column_scales = nullptr;
        if constexpr (!F::BlocksB) {
          column_scales = share_columns(shared, scales.column, buffer, consumer, thread);
          buffer ^= 1;
        }
        consume_stage(shared, ring, waves, scales, column_scales, total, consumer, thread);
      }
    }
#pragma unroll
    for (int wave = 0; wave < F::Waves; ++wave)
      if (wave < waves && work.stored)
        store_rows(shared, out, map, product, work, (wave * kConsumers + consumer) * hopper::kProductM, total[wave],
                   consumer, thread);
  }
  if constexpr (F::store == Store::kCopyEngine) hopper::wait_for_reads();
}

// Waits until the barriers of all blocks of the cluster are there; returns this block's place in it.
template <typename F>
__device__ __forceinline__ int start_together() {
  if constexpr (F::Cluster == 1) {
    __syncthreads();
    return 0;
  } else {
    hopper::cluster_barrier();
    return int(blockIdx.x) % F::Cluster;
  }
}

template <typename F, typename Out>
__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                const __grid_constant__ TensorMap out_map, const Gemm product, Out* out) {
  GemmShared<F>& shared = block_shared<GemmShared<F>>();
  if (threadIdx.x == 0) {
    hopper::prefetch(&a);
    hopper::prefetch(&b);
    if constexpr (F::store == Store::kCopyEngine) hopper::prefetch(&out_map);
    for (int stage = 0; stage < F::kStages; ++stage) {
      hopper::barrier_init(&shared.full[stage], 1);
      hopper::barrier_init(&shared.empty[stage], kConsumerWarps * F::Cluster);
    }
    hopper::barrier_init_fence();
  }
  const int rank = start_together<F>();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    hopper::take_registers<kConsumerRegisters>();
    consume(shared, product, out, &out_map, int(threadIdx.x) / kWarpgroup, rank);
  } else {
    hopper::give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) produce(shared, &a, &b, product, rank);
  }
  if constexpr (F::Cluster > 1) hopper::cluster_barrier();
}

}  // namespace mds
