// Block-scaled FP8 GEMMs on Hopper (sm_90a), with the arithmetic of ops/fp8/gemm.py:
//
//   out[m, n] = sum over blocks j of 128 of K:  (sum over k in j of a[m, k] b[n, k]) * (scale_a[m, j] * scale_b[n, j])
//
// wgmma computes the inner sums; the outer one is float32 in registers. Hopper's tensor cores keep about 14 bits of a
// sum, so their result is promoted after every 128 of K (DeepSeek-V3 report, section 3.3.2; DeepGEMM).
//
// A block has one producer warpgroup and two consumers. The producer's first thread has the copy engine fill a ring
// of stages, a [128 or 256, 128] and b [128, 128] codes each; `full` and `empty` barriers pass them back and forth. A
// consumer has 64 rows of each half of a (`Waves` halves) and all of b; of a half that does not exist nothing is loaded
// or multiplied. Blocks are persistent: block i takes turns i, i + grid, ... (gemm_schedule.cuh), and its producer
// already loads the next tile while the result of the last is written (gemm_store.cuh).
#include <algorithm>

#include "gemm_scales.cuh"
#include "gemm_schedule.cuh"
#include "gemm_store.cuh"
#include "hopper.cuh"
#include "warp.cuh"

namespace mds {
namespace {

using hopper::Barrier;
using hopper::kAccumulators;
using hopper::TensorMap;

constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536, "registers of one block");
static_assert(kHalf == kConsumers * hopper::kProductM, "rows that the consumers multiply at once");

// The form of a kernel: how operands are grouped, whether b has scales of 128x128 blocks (else of rows), how many halves
// its tiles have, and how the result is stored.
template <Grouping grouping_, bool BlocksB_, int Waves_, Store store_>
struct Form {
  static constexpr Grouping grouping = grouping_;
  static constexpr bool BlocksB = BlocksB_;
  static constexpr int Waves = Waves_;
  static constexpr Store store = store_;
  static constexpr int kTileM = kHalf * Waves;
  static constexpr int kStages = Waves == 1 ? 6 : 4;
};

// Of b's columns, for this and the next block of K, each consumer for itself.
template <bool BlocksB>
struct ColumnScales {
  float of[kConsumers][2][kTileN];
};
template <>
struct ColumnScales<true> {};

template <Store store>
struct Staging {};
template <>
struct Staging<Store::kCopyEngine> {
  OutputRows of_warp[kConsumerWarps];
};

template <typename F>
struct Shared {
  e4m3 a[F::kStages][F::kTileM * kTile];
  e4m3 b[F::kStages][kTileN * kTile];
  ColumnScales<F::BlocksB> scale_b;
  Staging<F::store> out;
  Barrier full[F::kStages], empty[F::kStages];
};
template <bool BlocksB, int Waves, Store store>
constexpr bool kFits = sizeof(Shared<Form<Grouping::kNone, BlocksB, Waves, store>>) <= 227 * 1024;
static_assert(kFits<false, 1, Store::kDirect> && kFits<true, 1, Store::kCopyEngine> &&
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

template <typename F>
__device__ __forceinline__ void produce(Shared<F>& shared, const TensorMap* a, const TensorMap* b,
                                        const Gemm& product) {
  Ring<F::kStages> ring;
  for (int64_t turn = blockIdx.x; turn < turns_of(product); turn += gridDim.x) {
    const Work work = work_of<F::grouping>(product, turn);
    const bool both = F::Waves == 2 && work.rows > kHalf;
    for (int k = work.k; k < work.k + work.k_tiles; ++k, ring.advance()) {
      Barrier* full = &shared.full[ring.stage];
      e4m3* half = shared.a[ring.stage];
      hopper::barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      hopper::barrier_arrive_expecting(full, (kTileN + (both ? 2 : 1) * kHalf) * kTile);
      hopper::copy_tile(half, a, k * kTile, int(work.a_row), full);
      if (both) hopper::copy_tile(half + kHalf * kTile, a, k * kTile, int(work.a_row) + kHalf, full);
      hopper::copy_tile(shared.b[ring.stage], b, k * kTile, int(work.b_row), full);
    }
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
                                        const float (&row)[2], float block_scale, const float* column_scales,
                                        int thread) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    const float column = BlocksB ? block_scale : column_scales[hopper::accumulator_column(thread, i)];
    total[i] = fmaf(sum[i], row[i / 2 % 2] * column, total[i]);
  }
}

// Stores a consumer's 64 rows of one half of the tile, of which `rows` exist from the half's first on.
template <typename F, typename Out>
__device__ __forceinline__ void store_half(Shared<F>& shared, Out* out, const Gemm& product, const Work& work,
                                           int first_row, const float (&total)[kAccumulators], int consumer,
                                           int thread) {
  if constexpr (F::store == Store::kCopyEngine) {
    const int row = first_row + thread / kWarp * OutputRows::kRows;
    store_by_copies(shared.out.of_warp[consumer * kWarpgroup / kWarp + thread / kWarp],
                    out + (work.out_row + row) * product.n + work.column, product.n, work.rows - row, work.columns,
                    total);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + hopper::accumulator_row(thread, 2 * half);
      store(out + (work.out_row + row) * product.n + work.column, work.columns, product.n % 8 == 0, row < work.rows,
            total + 2 * half, thread);
    }
  }
}

template <typename F, typename Out>
__device__ __forceinline__ void consume(Shared<F>& shared, const Gemm& product, Out* out, int consumer) {
  const int thread = int(threadIdx.x) % kWarpgroup;
  Ring<F::kStages> ring;
  int buffer = 0;  // of scale_b; it alternates through all tiles, see below
  for (int64_t turn = blockIdx.x; turn < turns_of(product); turn += gridDim.x) {
    const Work work = work_of<F::grouping>(product, turn);
    const int waves = F::Waves == 2 && work.rows > kHalf ? 2 : 1;
    ScaleReader<F::BlocksB, F::Waves> reader(product, work, consumer, thread);
    float total[F::Waves][kAccumulators] = {};
    for (int k = 0; k < work.k_tiles; ++k, ring.advance()) {
      const Scales<F::Waves> scales = reader.step(k);
      const float* column_scales = nullptr;
      if constexpr (!F::BlocksB) {
        // There are two buffers, with a barrier each. A thread that writes this buffer again has passed the other's
        // barrier, which the other threads reach only after they have read this one.
        float* column_of = shared.scale_b.of[consumer][buffer];
        buffer ^= 1;
        column_of[thread] = scales.column;
        hopper::warpgroup_barrier(1 + consumer);
        column_scales = column_of;
      }
      hopper::barrier_wait(&shared.full[ring.stage], ring.parity);
#pragma unroll
      for (int wave = 0; wave < F::Waves; ++wave) {
        if (wave == waves) break;
        float sum[kAccumulators];
        const int row = (wave * kConsumers + consumer) * hopper::kProductM;
        multiply(sum, shared.a[ring.stage] + row * kTile, shared.b[ring.stage]);
        if (wave == waves - 1 && lane_id() == 0) hopper::barrier_arrive(&shared.empty[ring.stage]);
        promote<F::BlocksB>(total[wave], sum, scales.row[wave], scales.column, column_scales, thread);
      }
    }
#pragma unroll
    for (int wave = 0; wave < F::Waves; ++wave)
      if (wave < waves)
        store_half(shared, out, product, work, (wave * kConsumers + consumer) * hopper::kProductM, total[wave],
                   consumer, thread);
  }
  if constexpr (F::store == Store::kCopyEngine) hopper::wait_for_reads();
}

template <typename F, typename Out>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const Gemm product,
                Out* out) {
  Shared<F>& shared = block_shared<Shared<F>>();
  if (threadIdx.x == 0) {
    hopper::prefetch(&a);
    hopper::prefetch(&b);
    for (int stage = 0; stage < F::kStages; ++stage) {
      hopper::barrier_init(&shared.full[stage], 1);
      hopper::barrier_init(&shared.empty[stage], kConsumerWarps);
    }
    hopper::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    hopper::take_registers<kConsumerRegisters>();
    consume(shared, product, out, int(threadIdx.x) / kWarpgroup);
  } else {
    hopper::give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) produce(shared, &a, &b, product);
  }
}

template <typename F, typename Out>
void start(const ScaledOperand& a, const ScaledOperand& b, const Gemm& product, Out* out, void* stream) {
  hopper::require_hopper();
  if (product.tiles == 0) return;
  const TensorMap map_a = hopper::tensor_map(a.q, a.matrices * a.rows, a.columns, a.pitch, kHalf);
  const TensorMap map_b = hopper::tensor_map(b.q, b.matrices * b.rows, b.columns, b.pitch, kTileN);
  const unsigned blocks = unsigned(std::min<int64_t>(turns_of(product), multiprocessors()));
  launch(gemm_kernel<F, Out>, {blocks, kThreads, sizeof(Shared<F>)}, stream, map_a, map_b, product, out);
}

// The copy engine writes rows of bfloat16 that begin at multiples of 16 bytes; others are stored directly.
template <Grouping grouping, bool BlocksB, int Waves>
void start(const ScaledOperand& a, const ScaledOperand& b, const Gemm& product, GemmOutput out, Store store,
           void* stream) {
  using Direct = Form<grouping, BlocksB, Waves, Store::kDirect>;
  if (out.is_float) {
    start<Direct>(a, b, product, static_cast<float*>(out.data), stream);
    return;
  }
  if constexpr (BlocksB) {
    if (store == Store::kCopyEngine && product.n % 8 == 0) {
      start<Form<grouping, BlocksB, Waves, Store::kCopyEngine>>(a, b, product, static_cast<bf16*>(out.data), stream);
      return;
    }
  }
  start<Direct>(a, b, product, static_cast<bf16*>(out.data), stream);
}

// Halved tiles alone are those of the kernel with one half, whose ring is deeper.
template <Grouping grouping>
void start_tall(const ScaledOperand& a, const ScaledOperand& b, Gemm product, GemmOutput out, Store store,
                void* stream) {
  product.whole = whole_tiles(product.tiles, multiprocessors());
  if (product.whole > 0)
    start<grouping, true, 2>(a, b, product, out, store, stream);
  else
    start<grouping, true, 1>(a, b, product, out, store, stream);
}

Gemm product_of(const ScaledOperand& a, const ScaledOperand& b, int tile_m) {
  Gemm p{};
  p.m = a.rows, p.n = b.rows, p.tile_m = tile_m;
  p.k_tiles = int(ceil_div<int64_t>(a.columns, kTile));
  p.m_tiles = int(ceil_div<int64_t>(p.m, tile_m)), p.n_tiles = int(ceil_div<int64_t>(p.n, kTileN));
  p.tiles = p.whole = int64_t(p.m_tiles) * p.n_tiles;
  p.scale_a = a.scales, p.scale_b = b.scales, p.pitch_a = a.scale_pitch, p.pitch_b = b.scale_pitch;
  p.scale_rows_b = b.blocks ? ceil_div<int64_t>(b.rows, kTile) : b.rows;
  return p;
}

}  // namespace

void scaled_mm(ScaledOperand a, ScaledOperand b, GemmOutput out, Store store, void* stream) {
  if (b.blocks)
    start_tall<Grouping::kNone>(a, b, product_of(a, b, 2 * kHalf), out, store, stream);
  else
    start<Grouping::kNone, false, 1>(a, b, product_of(a, b, kHalf), out, store, stream);
}

void grouped_scaled_mm(ScaledOperand a, ScaledOperand b, Groups tiles, bool tall, GemmOutput out, Store store,
                       void* stream) {
  Gemm product = product_of(a, b, tall ? 2 * kHalf : kHalf);
  product.table = tiles.table, product.m_tiles = tiles.count;
  product.tiles = product.whole = int64_t(tiles.count) * product.n_tiles;
  if (tall)
    start_tall<Grouping::kRows>(a, b, product, out, store, stream);
  else
    start<Grouping::kRows, true, 1>(a, b, product, out, store, stream);
}

void grouped_scaled_mm_wgrad(ScaledOperand a, ScaledOperand b, Groups groups, GemmOutput out, void* stream) {
  Gemm product = product_of(a, b, kHalf);
  product.table = groups.table;
  product.tiles *= groups.count;
  product.whole = product.tiles;
  start<Grouping::kDepth, false, 1>(a, b, product, out, Store::kDirect, stream);
}

}  // namespace mds
