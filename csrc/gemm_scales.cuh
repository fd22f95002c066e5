// The scales of a GEMM's operands on their way into the promotion of each block of K (gemm_fp8.cu).
#pragma once

#include "gemm_schedule.cuh"
#include "hopper.cuh"
#include "warp.cuh"

namespace mds {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups of a block that multiply

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
      : rows_of_a_(p.scale_a + work.a_row * p.pitch_a + work.k), k_tiles_(work.k_tiles) {
#pragma unroll
    for (int wave = 0; wave < Waves; ++wave)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = (wave * kConsumers + consumer) * hopper::kProductM + hopper::accumulator_row(thread, 2 * half);
        row_[wave][half] = r < work.rows ? r * int(p.pitch_a) : 0;
      }
    const int c = BlocksB ? work.column / kTile : work.column + (thread < work.columns ? thread : 0);
    column_ = p.scale_b + (work.matrix * p.scale_rows_b + c) * p.pitch_b + work.k;
    read_rows(0);
    read_columns(0);
  }

  // Makes the scales of kQuad steps from `k` on, which were read before, the current ones, and reads later ones.
  __device__ __forceinline__ void advance(int k) {
#pragma unroll
    for (int wave = 0; wave < Waves; ++wave)
#pragma unroll
      for (int half = 0; half < 2; ++half) rows_[wave][half] = next_rows_[wave][half];
    read_rows(k + kQuad);
    if (k % kColumnSteps) return;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) columns_[i] = next_columns_[i];
    read_columns(k + kColumnSteps);
  }

  // Returns the scales of step k, one of the current ones. Whole warps must call it.
  __device__ __forceinline__ Scales<Waves> step(int k) const {
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
      for (int half = 0; half < 2; ++half)
        next_rows_[wave][half] = mine < k_tiles_ ? rows_of_a_[row_[wave][half] + mine] : 0.0f;
  }

  __device__ __forceinline__ void read_columns(int k) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int mine = BlocksB ? k + lane_id() : k + i;
      next_columns_[i] = mine < k_tiles_ ? column_[mine] : 0.0f;
    }
  }

  const float* rows_of_a_;  // of the tile
  int row_[Waves][2];       // where those of this thread begin there
  const float* column_;
  int k_tiles_;
  float rows_[Waves][2], next_rows_[Waves][2], columns_[kColumns], next_columns_[kColumns];
};

}  // namespace mds
