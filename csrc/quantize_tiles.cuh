// Tiles of a block's 128 x 128 numbers (quantize.cu): tiles of 128x1, stored transposed (wgrad), optionally 1x128 tiles
// of the same numbers in the same pass, or one 128x128 tile, optionally with its transpose (weights).
#pragma once

#include "kernels.h"
#include "producers.cuh"

namespace mds {

constexpr int kTileLanes = kTile / kVector;  // that share a row of a tile

enum class Tiling { kColumns, kRowsAndColumns, kBlock };

template <typename Element>
struct TileShared {
  static constexpr int kPitch = kTile + 16 / int(sizeof(Element));  // 16 bytes more: no two rows start in one bank
  static constexpr int kCodePitch = kTile + 16;
  alignas(16) Element value[kTile][kPitch];
  alignas(16) e4m3 code[kTile][kCodePitch];  // transposed
  uint32_t magnitude[2][kTile];
  uint32_t warp_magnitude[kQuantizeWarps];
};

struct TileOutputs {
  e4m3* q_rows;        // [M, K]
  float* s_rows;       // [M, k], or [ceil(M / 128), k] of blocks
  e4m3* q_columns;     // [K, T * 128]; null: none
  float* s_columns;    // [K, T], or [k, ceil(M / 128)] of blocks
  const int* tiles;    // [T, 2]: first row and rows of each tile; null: one after the other
  int64_t rows;        // M, of each matrix where there are several
  int num_tiles;       // T, likewise
  int column_tiles;    // k
};

struct TileRows {
  int matrix, tile, of_all;
  int column_tile;
  int64_t first;  // counted over all matrices
  int count;
};

__device__ __forceinline__ TileRows rows_of(const TileOutputs& out) {
  const int of_all = int(blockIdx.x) / out.column_tiles, column_tile = int(blockIdx.x) % out.column_tiles;
  const int matrix = of_all / out.num_tiles, tile = of_all % out.num_tiles;
  if (out.tiles != nullptr) return {matrix, tile, of_all, column_tile, out.tiles[2 * tile], out.tiles[2 * tile + 1]};
  const int64_t first = int64_t(tile) * kTile, left = out.rows - first;
  return {matrix, tile, of_all, column_tile, matrix * out.rows + first, int(left < kTile ? left : kTile)};
}

// Loads the tile's numbers into shared memory, zero outside; 16 lanes share a row. With kRowsAndColumns it writes their
// 1x128 tiles as well. Returns this thread's largest magnitude.
template <Tiling kind, typename Producer>
__device__ __forceinline__ uint32_t load_tile(Producer& producer, TileShared<typename Producer::Element>& shared,
                                              const TileOutputs& out, TileRows rows, bool power_of_two) {
  const int local = int(threadIdx.x) % kTileLanes * kVector, column = rows.column_tile * kTile + local;
  uint32_t largest = 0;
#pragma unroll 4
  for (int r = int(threadIdx.x) / kTileLanes; r < kTile; r += kQuantizeThreads / kTileLanes) {
    const int64_t row = rows.first + r;
    const bool inside = r < rows.count && column < producer.columns;
    float values[kVector] = {};
    if (inside) {
      producer.enter_row(row);
      producer.load(row, column, values);
    }
    store8(&shared.value[r][local], values);
    const uint32_t magnitude = largest_magnitude(values);
    largest = Max{}(largest, magnitude);
    if constexpr (kind == Tiling::kRowsAndColumns) {
      const float scale = tile_scale(group_reduce<kTileLanes>(magnitude, Max{}), power_of_two);
      if (inside) {
        *reinterpret_cast<Words2*>(out.q_rows + row * producer.columns + column) = encode8(values, scale, power_of_two);
        if (local == 0) out.s_rows[row * out.column_tiles + rows.column_tile] = scale;
      }
    }
  }
  return largest;
}

// Writes the codes of 64 numbers of one column to shared memory, transposed.
template <typename Element, typename Division>
__device__ __forceinline__ void encode_half_column(TileShared<Element>& shared, int column, int half,
                                                   const Division& divide) {
#pragma unroll
  for (int first = half * kTile / 2; first < (half + 1) * kTile / 2; first += 16) {
    Words4 codes;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = as_float(shared.value[first + part * kVector + i][column]);
      const Words2 eight = encode8(values, divide);
      codes.word[2 * part] = eight.word[0];
      codes.word[2 * part + 1] = eight.word[1];
    }
    store16(&shared.code[column][first], codes);
  }
}

// Returns a column's scale; two threads have half of the column each. All threads must call it.
template <typename Element>
__device__ __forceinline__ float column_scale(TileShared<Element>& shared, int column, int half, bool power_of_two) {
  uint32_t largest = 0;
#pragma unroll 8
  for (int r = half * kTile / 2; r < (half + 1) * kTile / 2; ++r)
    largest = Max{}(largest, magnitude_bits(as_float(shared.value[r][column])));
  shared.magnitude[half][column] = largest;
  __syncthreads();
  return tile_scale(Max{}(shared.magnitude[0][column], shared.magnitude[1][column]), power_of_two);
}

// Returns the scale of the whole tile. All threads must call it.
template <typename Element>
__device__ __forceinline__ float block_scale(TileShared<Element>& shared, uint32_t largest, bool power_of_two) {
  largest = group_reduce<kWarp>(largest, Max{});
  if (lane_id() == 0) shared.warp_magnitude[warp_id()] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kQuantizeWarps; ++w) largest = Max{}(largest, shared.warp_magnitude[w]);
  return tile_scale(largest, power_of_two);
}

template <typename Element>
__device__ __forceinline__ void write_rows(const TileShared<Element>& shared, const TileOutputs& out, TileRows rows,
                                           int columns, float scale) {
  const int local = int(threadIdx.x) % kTileLanes * kVector, column = rows.column_tile * kTile + local;
  if (column >= columns) return;
  const Divider divide(scale);
  for (int r = int(threadIdx.x) / kTileLanes; r < rows.count; r += kQuantizeThreads / kTileLanes) {
    float values[kVector];
    load8(&shared.value[r][local], values);
    *reinterpret_cast<Words2*>(out.q_rows + (rows.first + r) * columns + column) = encode8(values, divide);
  }
}

// Writes 128 columns of 128 codes, each a whole line of the transposed result.
template <typename Element>
__device__ __forceinline__ void write_columns(const TileShared<Element>& shared, const TileOutputs& out, TileRows rows,
                                              int columns) {
  const int64_t pitch = int64_t(out.num_tiles) * kTile;
  constexpr int kVectors = kTile / 16;
  for (int i = int(threadIdx.x); i < kTile * kVectors; i += kQuantizeThreads) {
    const int local = i / kVectors, place = i % kVectors * 16;
    const int column = rows.column_tile * kTile + local;
    if (column < columns)
      store16(out.q_columns + (int64_t(rows.matrix) * columns + column) * pitch + int64_t(rows.tile) * kTile + place,
              load16(&shared.code[local][place]));
  }
}

// Blocks are tiles of columns, then of rows, in one dimension: a grid's second one ends at 65,535.
template <Tiling kind, typename Producer>
__global__ void __launch_bounds__(kQuantizeThreads) tile_kernel(Producer producer, TileOutputs out, bool power_of_two) {
  auto& shared = block_shared<TileShared<typename Producer::Element>>();
  const int columns = producer.columns;
  const TileRows rows = rows_of(out);
  const uint32_t largest = load_tile<kind>(producer, shared, out, rows, power_of_two);
  __syncthreads();
  const int local = int(threadIdx.x) % kTile, half = int(threadIdx.x) / kTile;
  const int column = rows.column_tile * kTile + local;
  if constexpr (kind == Tiling::kBlock) {
    const float scale = block_scale(shared, largest, power_of_two);
    write_rows(shared, out, rows, columns, scale);
    if (threadIdx.x == 0) out.s_rows[int64_t(rows.of_all) * out.column_tiles + rows.column_tile] = scale;
    if (out.q_columns == nullptr) return;
    if (threadIdx.x == 0)
      out.s_columns[(int64_t(rows.matrix) * out.column_tiles + rows.column_tile) * out.num_tiles + rows.tile] = scale;
    encode_half_column(shared, local, half, Divider(scale));
  } else {
    const float scale = column_scale(shared, local, half, power_of_two);
    if (half == 0 && column < columns) out.s_columns[int64_t(column) * out.num_tiles + rows.tile] = scale;
    if (power_of_two)
      encode_half_column(shared, local, half, PowerOfTwoDivider(scale));
    else
      encode_half_column(shared, local, half, Divider(scale));
  }
  __syncthreads();
  write_columns(shared, out, rows, columns);
}

}  // namespace mds
