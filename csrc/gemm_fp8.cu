// Block-scaled FP8 GEMMs on Hopper (sm_90a), with the arithmetic of ops/fp8/gemm.py:
//
//   out[m, n] = sum over blocks j of 128 of K:  (sum over k in j of a[m, k] b[n, k]) * (scale_a[m, j] * scale_b[n, j])
//
// wgmma computes the inner sums; the outer one is float32 in registers. Hopper's tensor cores keep about 14 bits of a
// sum, so their result is promoted after every 128 of K (DeepSeek-V3 report, section 3.3.2; DeepGEMM).
//
// A block has one producer warpgroup and two consumers. The producer's first thread has the copy engine fill a ring
// of stages, a [TileM, 128] and b [128, 128] codes each; `full` and `empty` barriers pass them back and forth. A
// consumer has 64 rows of a and all of b (twice, with TileM = 256: `Waves`). Blocks are persistent: block i takes tiles
// i, i + grid, ..., and its producer already loads the next tile while the result of the last is written.
#include <algorithm>

#include "gemm_schedule.cuh"
#include "hopper.cuh"
#include "warp.cuh"

namespace mds {
namespace {

using hopper::Barrier;
using hopper::kAccumulators;
using hopper::TensorMap;

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536, "registers of one block");

template <int Waves>
struct Shape {
  static constexpr int kTileM = kConsumers * hopper::kProductM * Waves;
  static constexpr int kStages = Waves == 1 ? 6 : 4;
  static constexpr uint32_t kStageBytes = (kTileM + kTileN) * kTile;
};

template <int Waves>
struct Shared {
  using S = Shape<Waves>;
  e4m3 a[S::kStages][S::kTileM * kTile];
  e4m3 b[S::kStages][kTileN * kTile];
  float scale_b[kConsumers][2][kTileN];  // of this and the next block of K, each consumer for itself
  Barrier full[S::kStages], empty[S::kStages];
};
static_assert(sizeof(Shared<1>) <= 227 * 1024 && sizeof(Shared<2>) <= 227 * 1024, "shared memory of one block");

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

template <Grouping grouping, int Waves>
__device__ __forceinline__ void produce(Shared<Waves>& shared, const TensorMap* a, const TensorMap* b,
                                        const Gemm& product) {
  using S = Shape<Waves>;
  Ring<S::kStages> ring;
  for (int64_t tile = blockIdx.x; tile < product.tiles; tile += gridDim.x) {
    const Work work = work_of<grouping, S::kTileM>(product, tile);
    for (int k = work.k; k < work.k + work.k_tiles; ++k, ring.advance()) {
      Barrier* full = &shared.full[ring.stage];
      hopper::barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      hopper::barrier_arrive_expecting(full, S::kStageBytes);
      hopper::copy_tile(shared.a[ring.stage], a, k * kTile, int(work.a_row), full);
      hopper::copy_tile(shared.b[ring.stage], b, k * kTile, int(work.b_row), full);
    }
  }
}

// The scales of one block of K that a thread's accumulators need: those of its rows, and of b either one for the whole
// tile or, shared with its warpgroup, one for each column.
template <int Waves>
struct Scales {
  float row[Waves][2];
  float column;  // of the tile (blocks), or of column `thread` before it goes to shared memory
};

// Scales are read a group of steps ahead, so that no step waits for memory: the lanes of a quad hold four steps of the
// rows that they share, those of a warp 32 steps of the tile's block of b, and hand them out by shuffles. Of b's
// columns each thread holds four steps of its own.
constexpr int kQuad = 4;

template <bool BlocksB, int Waves>
class ScaleReader {
 public:
  __device__ __forceinline__ ScaleReader(const Gemm& p, const Work& work, int consumer, int thread)
      : k_tiles_(work.k_tiles) {
#pragma unroll
    for (int wave = 0; wave < Waves; ++wave)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = (wave * kConsumers + consumer) * hopper::kProductM + hopper::accumulator_row(thread, 2 * half);
        row_[wave][half] = p.scale_a + (work.a_row + (r < work.rows ? r : 0)) * p.pitch_a + work.k;
      }
    const int c = BlocksB ? work.column / kTile : work.column + (thread < work.columns ? thread : 0);
    column_ = p.scale_b + (work.matrix * p.scale_rows_b + c) * p.pitch_b + work.k;
    read_rows(0);
    read_columns(0);
  }

  // Returns the scales of step k. Whole warps must call it, for 0, 1, ... in order.
  __device__ __forceinline__ Scales<Waves> step(int k) {
    if (k % kQuad == 0) {
#pragma unroll
      for (int wave = 0; wave < Waves; ++wave)
#pragma unroll
        for (int half = 0; half < 2; ++half) rows_[wave][half] = next_rows_[wave][half];
      read_rows(k + kQuad);
    }
    if (k % kColumnSteps == 0) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) columns_[i] = next_columns_[i];
      read_columns(k + kColumnSteps);
    }
    Scales<Waves> scales;
#pragma unroll
    for (int wave = 0; wave < Waves; ++wave)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        scales.row[wave][half] = __shfl_sync(kFullWarp, rows_[wave][half], lane_id() / kQuad * kQuad + k % kQuad);
    if constexpr (BlocksB) {
      scales.column = __shfl_sync(kFullWarp, columns_[0], k % kWarp);
    } else {
      const float low = k % 2 ? columns_[1] : columns_[0], high = k % 2 ? columns_[3] : columns_[2];
      scales.column = k / 2 % 2 ? high : low;
    }
    return scales;
  }

 private:
  static constexpr int kColumnSteps = BlocksB ? kWarp : kQuad;
  static constexpr int kColumns = BlocksB ? 1 : kQuad;

  __device__ __forceinline__ void read_rows(int k) {
    const int mine = k + lane_id() % kQuad;
#pragma unroll
    for (int wave = 0; wave < Waves; ++wave)
#pragma unroll
      for (int half = 0; half < 2; ++half) next_rows_[wave][half] = mine < k_tiles_ ? row_[wave][half][mine] : 0.0f;
  }

  __device__ __forceinline__ void read_columns(int k) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int mine = BlocksB ? k + lane_id() : k + i;
      next_columns_[i] = mine < k_tiles_ ? column_[mine] : 0.0f;
    }
  }

  const float* row_[Waves][2];
  const float* column_;
  int k_tiles_;
  float rows_[Waves][2], next_rows_[Waves][2], columns_[kColumns], next_columns_[kColumns];
};

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

// Transposes four words of each of four neighbouring lanes: word w of lane l becomes word l of lane w.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? word[i] : word[i + 1], 1);
    (odd ? word[i] : word[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, high ? word[i] : word[i + 2], 2);
    (high ? word[i] : word[i + 2]) = other;
  }
}

// A lane has pairs of neighbouring columns; four lanes exchange them so that each has 8 columns, 16 bytes.
__device__ __forceinline__ void store(bf16* row, int columns, bool aligned, bool exists, const float* total,
                                      int thread) {
#pragma unroll
  for (int first = 0; first < kTileN / 8; first += 4) {  // four groups of 8 columns
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = pack_bf16x2(total[(first + i) * 4], total[(first + i) * 4 + 1]);
    transpose_quad(word);
    const int column = (first + thread % 4) * 8;
    if (!exists) continue;
    if (aligned && column + 8 <= columns) {
      store16(row + column, Words4{{word[0], word[1], word[2], word[3]}});
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (column + i < columns) row[column + i] = bf16(word[i / 2] >> (16 * (i % 2)));
    }
  }
}

// The pairs of four lanes are 32 bytes of a row, a whole sector of memory.
__device__ __forceinline__ void store(float* row, int columns, bool, bool exists, const float* total, int thread) {
#pragma unroll
  for (int group = 0; group < kTileN / 8; ++group)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = group * 8 + thread % 4 * 2 + i;
      if (exists && column < columns) row[column] = total[group * 4 + i];
    }
}

template <Grouping grouping, bool BlocksB, int Waves, typename Out>
__device__ __forceinline__ void consume(Shared<Waves>& shared, const Gemm& product, Out* out, int consumer) {
  using S = Shape<Waves>;
  const int thread = int(threadIdx.x) % kWarpgroup;
  Ring<S::kStages> ring;
  int buffer = 0;  // of scale_b; it alternates through all tiles, see below
  for (int64_t tile = blockIdx.x; tile < product.tiles; tile += gridDim.x) {
    const Work work = work_of<grouping, S::kTileM>(product, tile);
    ScaleReader<BlocksB, Waves> reader(product, work, consumer, thread);
    float total[Waves][kAccumulators] = {};
    for (int k = 0; k < work.k_tiles; ++k, ring.advance()) {
      const Scales<Waves> scales = reader.step(k);
      float* column_scales = shared.scale_b[consumer][buffer];
      if (!BlocksB) {
        // There are two buffers, with a barrier each. A thread that writes this buffer again has passed the other's
        // barrier, which the other threads reach only after they have read this one.
        buffer ^= 1;
        column_scales[thread] = scales.column;
        hopper::warpgroup_barrier(1 + consumer);
      }
      hopper::barrier_wait(&shared.full[ring.stage], ring.parity);
#pragma unroll
      for (int wave = 0; wave < Waves; ++wave) {
        float sum[kAccumulators];
        const int row = (wave * kConsumers + consumer) * hopper::kProductM;
        multiply(sum, shared.a[ring.stage] + row * kTile, shared.b[ring.stage]);
        if (wave == Waves - 1 && lane_id() == 0) hopper::barrier_arrive(&shared.empty[ring.stage]);
        promote<BlocksB>(total[wave], sum, scales.row[wave], scales.column, column_scales, thread);
      }
    }
#pragma unroll
    for (int wave = 0; wave < Waves; ++wave)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = (wave * kConsumers + consumer) * hopper::kProductM + hopper::accumulator_row(thread, 2 * half);
        store(out + (work.out_row + r) * product.n + work.column, work.columns, product.n % 8 == 0, r < work.rows,
              total[wave] + 2 * half, thread);
      }
  }
}

template <Grouping grouping, bool BlocksB, int Waves, typename Out>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const Gemm product,
                Out* out) {
  Shared<Waves>& shared = block_shared<Shared<Waves>>();
  if (threadIdx.x == 0) {
    hopper::prefetch(&a);
    hopper::prefetch(&b);
    for (int stage = 0; stage < Shape<Waves>::kStages; ++stage) {
      hopper::barrier_init(&shared.full[stage], 1);
      hopper::barrier_init(&shared.empty[stage], kConsumerWarps);
    }
    hopper::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    hopper::take_registers<kConsumerRegisters>();
    consume<grouping, BlocksB, Waves>(shared, product, out, int(threadIdx.x) / kWarpgroup);
  } else {
    hopper::give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) produce<grouping>(shared, &a, &b, product);
  }
}

template <Grouping grouping, bool BlocksB, int Waves, typename Out>
void start(const ScaledOperand& a, const ScaledOperand& b, const Gemm& product, Out* out, void* stream) {
  hopper::require_hopper();
  if (product.tiles == 0) return;
  using S = Shape<Waves>;
  const TensorMap map_a = hopper::tensor_map(a.q, a.matrices * a.rows, a.columns, a.pitch, S::kTileM);
  const TensorMap map_b = hopper::tensor_map(b.q, b.matrices * b.rows, b.columns, b.pitch, kTileN);
  const unsigned blocks = unsigned(std::min<int64_t>(product.tiles, multiprocessors()));
  launch(gemm_kernel<grouping, BlocksB, Waves, Out>, {blocks, kThreads, sizeof(Shared<Waves>)}, stream, map_a, map_b,
         product, out);
}

template <Grouping grouping, bool BlocksB, int Waves>
void start(const ScaledOperand& a, const ScaledOperand& b, const Gemm& product, GemmOutput out, void* stream) {
  if (out.is_float)
    start<grouping, BlocksB, Waves>(a, b, product, static_cast<float*>(out.data), stream);
  else
    start<grouping, BlocksB, Waves>(a, b, product, static_cast<bf16*>(out.data), stream);
}

Gemm product_of(const ScaledOperand& a, const ScaledOperand& b, int tile_m) {
  Gemm p{};
  p.m = a.rows, p.n = b.rows;
  p.k_tiles = int(ceil_div<int64_t>(a.columns, kTile));
  p.m_tiles = int(ceil_div<int64_t>(p.m, tile_m)), p.n_tiles = int(ceil_div<int64_t>(p.n, kTileN));
  p.tiles = int64_t(p.m_tiles) * p.n_tiles;
  p.scale_a = a.scales, p.scale_b = b.scales, p.pitch_a = a.scale_pitch, p.pitch_b = b.scale_pitch;
  p.scale_rows_b = b.blocks ? ceil_div<int64_t>(b.rows, kTile) : b.rows;
  return p;
}

// Tall tiles read b half as often; below two tiles for each multiprocessor, short ones keep more of them busy.
bool tall(const ScaledOperand& a, const ScaledOperand& b) {
  return ceil_div<int64_t>(a.rows, Shape<2>::kTileM) * ceil_div<int64_t>(b.rows, kTileN) >= 2 * multiprocessors();
}

}  // namespace

void scaled_mm(ScaledOperand a, ScaledOperand b, GemmOutput out, void* stream) {
  const bool two = tall(a, b);
  const Gemm product = product_of(a, b, two ? Shape<2>::kTileM : Shape<1>::kTileM);
  if (b.blocks && two)
    start<Grouping::kNone, true, 2>(a, b, product, out, stream);
  else if (b.blocks)
    start<Grouping::kNone, true, 1>(a, b, product, out, stream);
  else
    start<Grouping::kNone, false, 1>(a, b, product_of(a, b, Shape<1>::kTileM), out, stream);
}

void grouped_scaled_mm(ScaledOperand a, ScaledOperand b, Groups tiles, bool tall, GemmOutput out, void* stream) {
  Gemm product = product_of(a, b, Shape<1>::kTileM);
  product.table = tiles.table, product.m_tiles = tiles.count;
  product.tiles = int64_t(tiles.count) * product.n_tiles;
  if (tall)
    start<Grouping::kRows, true, 2>(a, b, product, out, stream);
  else
    start<Grouping::kRows, true, 1>(a, b, product, out, stream);
}

void grouped_scaled_mm_wgrad(ScaledOperand a, ScaledOperand b, Groups groups, GemmOutput out, void* stream) {
  Gemm product = product_of(a, b, Shape<1>::kTileM);
  product.table = groups.table;
  product.tiles *= groups.count;
  start<Grouping::kDepth, false, 1>(a, b, product, out, stream);
}

}  // namespace mds
