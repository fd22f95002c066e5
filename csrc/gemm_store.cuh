// How a GEMM's sums leave the registers (gemm_fp8.cu): stored from there, or by way of shared memory by the copy
// engine, which writes them while the block computes its next tile.
#pragma once

#include "gemm_schedule.cuh"
#include "hopper.cuh"
#include "warp.cuh"

namespace mds {

enum class Store { kDirect, kCopyEngine };

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

// What a warp has of a wave's result, 16 rows of 128 columns, on its way out: as the copy engine's boxes of 64 columns,
// 128 bytes, with the 128-byte swizzle.
struct alignas(hopper::kSwizzleAtom) OutputBoxes {
  static constexpr int kRows = 16, kBoxes = 2, kColumns = kTileN / kBoxes;
  bf16 box[kBoxes][kRows * kColumns];

  // The place of 8 numbers of a row.
  __device__ __forceinline__ bf16* eight(int row, int group) {
    constexpr int kGroups = kColumns / 8;
    return box[group / kGroups] +
           hopper::swizzled(row * hopper::kSwizzleRow + group % kGroups * 16) / sizeof(bf16);
  }
};

// Where a warp's 16 rows go: `exist` of them do, of those of a `group` that another one follows.
struct OutputPlace {
  int64_t row;
  int column, columns, exist;
  bool group;
};

// Stores a warp's 16 rows by the copy engine, which leaves out what is outside of the result. It would not leave out
// the rows of the next group: where there are such, the lanes store what exists. Whole warps must call it. The copies
// read `staging` after it returned: it waits for those of the call before, and the last ones must be waited for before
// the block ends.
__device__ __forceinline__ void store_by_copies(OutputBoxes& staging, const hopper::TensorMap* map, bf16* out,
                                                int64_t pitch, OutputPlace place,
                                                const float (&total)[hopper::kAccumulators]) {
  using Boxes = OutputBoxes;
  const int lane = lane_id();
  hopper::wait_for_reads();  // which the whole warp has done once it stores matrices together
#pragma unroll
  for (int group = 0; group < kTileN / 8; group += 2) {  // of 8 columns
    uint32_t word[4];  // 8 x 8 numbers each: the upper rows of a group, the lower ones, both of the next group
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = pack_bf16x2(total[group * 4 + 2 * i], total[group * 4 + 2 * i + 1]);
    hopper::store_matrices(staging.eight(lane % Boxes::kRows, group + lane / Boxes::kRows), word);
  }
  hopper::fence_for_copies();
  __syncwarp();
  if (place.exist >= Boxes::kRows || !place.group) {
    if (lane == 0)
#pragma unroll
      for (int i = 0; i < Boxes::kBoxes; ++i)
        if (i * Boxes::kColumns < place.columns)
          hopper::copy_tile_out(map, (place.column + i * Boxes::kColumns) * int(sizeof(bf16)), int(place.row),
                                staging.box[i]);
    hopper::commit_copies();
  } else {
    for (int i = lane; i < Boxes::kRows * kTileN / 8; i += kWarp) {
      const int row = i / (kTileN / 8), group = i % (kTileN / 8);
      if (row < place.exist && group * 8 < place.columns)
        store16(out + (place.row + row) * pitch + place.column + group * 8, load16(staging.eight(row, group)));
    }
  }
}

}  // namespace mds
