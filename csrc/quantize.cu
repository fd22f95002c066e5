// Block-scaled FP8 by the rules of ops/fp8/encoding.py, fused with the producers of the numbers (producers.cuh).
//
//   rows_kernel   1x128 tiles along K; a block has one row, so that it can also reduce over it (RMSNorm)
//   tile_kernel   a block has 128 x 128 numbers, for all other tiles: quantize_tiles.cuh
//
// Memory: every number is read once (rows_kernel with a reduction reads a row again from the cache), every code written
// once, 16 and 8 bytes at a time. Transposed results have rows of whole tiles, T * 128 codes, with zeros behind the
// edge of a group, so that TMA can address them and wgrad can sum over them without a mask.
// Shapes: M rows, K columns (multiples of 8), k = ceil(K / 128), T tiles of rows.
#include "kernels.h"
#include "launch.cuh"
#include "producers.cuh"
#include "quantize_tiles.cuh"

namespace mds {
namespace {

constexpr int kThreads = kQuantizeThreads;
constexpr int kVectors = 2;                            // of a thread in a tile of a row
constexpr int kRowLanes = kTile / kVector / kVectors;  // that share it

// `kept`, unless null, receives the producer's bfloat16 numbers. A thread has the vectors `lane` and lane + 8 of a
// tile's 16: two loads are under way at once, and one scale is made for 16 numbers.
template <typename Producer>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(Producer producer, e4m3* q, float* scales, bf16* kept, bool power_of_two) {
  RowScratch& scratch = block_shared<RowScratch>();
  const int64_t row = blockIdx.x;
  const int columns = producer.columns, tiles = ceil_div(columns, kTile), lane = int(threadIdx.x) % kRowLanes;
  producer.enter_row_alone(row, scratch);
  // Whole warps run: lanes behind the edge take part in the exchange with zeros.
  const int end = round_up(columns, kWarp / kRowLanes * kTile);
  for (int first = int(threadIdx.x) / kRowLanes * kTile; first < end; first += kThreads / kRowLanes * kTile) {
    float values[kVectors][kVector] = {};
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = first + (i * kRowLanes + lane) * kVector;
      if (column < columns) producer.load(row, column, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) largest = Max{}(largest, largest_magnitude(values[i]));
    const float scale = tile_scale(group_reduce<kRowLanes>(largest, Max{}), power_of_two);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = first + (i * kRowLanes + lane) * kVector;
      if (column >= columns) continue;
      *reinterpret_cast<Words2*>(q + row * columns + column) = encode8(values[i], scale, power_of_two);
      if (kept != nullptr) store8(kept + row * columns + column, values[i]);
    }
    if (lane == 0 && first < columns) scales[row * tiles + first / kTile] = scale;
  }
}

template <typename Producer>
void launch_rows(const Producer& producer, int64_t rows, Codes out, bf16* kept, bool power_of_two, void* stream) {
  launch(rows_kernel<Producer>, {one_dimension(rows), kThreads, sizeof(RowScratch)}, stream, producer, out.q,
         out.scales, kept, power_of_two);
}

template <Tiling kind, typename Producer>
void launch_tiles(const Producer& producer, int64_t rows, Codes by_row, Codes by_column, RowTiles tiles,
                  bool power_of_two, void* stream, int matrices = 1) {
  const int column_tiles = ceil_div(producer.columns, kTile);
  const TileOutputs out{by_row.q, by_row.scales, by_column.q, by_column.scales, tiles.table, rows, tiles.count,
                        column_tiles};
  const Grid grid{one_dimension(int64_t(matrices) * tiles.count * column_tiles), kThreads,
                  sizeof(TileShared<typename Producer::Element>)};
  launch(tile_kernel<kind, Producer>, grid, stream, producer, out, power_of_two);
}

// Computes grad_weight of RMSNorm in parts: sums [parts, K] of g x rstd over the rows of each part.
__global__ void __launch_bounds__(kThreads)
    norm_weight_kernel(const bf16* grad, const bf16* x, const float* rstd, float* partial, int64_t rows, int columns,
                       int rows_of_part) {
  const int column = (int(blockIdx.x) * kThreads + int(threadIdx.x)) * kVector;
  if (column >= columns) return;
  const int64_t first = int64_t(blockIdx.y) * rows_of_part;
  const int64_t end = first + rows_of_part < rows ? first + rows_of_part : rows;
  float total[kVector] = {};
#pragma unroll 4
  for (int64_t row = first; row < end; ++row) {
    float g[kVector], values[kVector];
    load8(grad + row * columns + column, g);
    load8(x + row * columns + column, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) total[i] += g[i] * (values[i] * rstd[row]);
  }
  store8(partial + int64_t(blockIdx.y) * columns + column, total);
}

}  // namespace

namespace {

template <typename T>
Plain<T> plain(Numbers x, int columns) {
  return {static_cast<const T*>(x.data), x.pitch, columns};
}

Plain<bf16> half_of(const bf16* x, GateUp both, int columns) { return {x, both.pitch, columns}; }

Kept kept_of(KeptTiles x, int columns) { return {Scaled{x.q, x.scales, columns}}; }

template <typename T>
void quantize_columns_of(const Plain<T>& producer, int64_t rows, Codes by_row, Codes by_column, RowTiles tiles,
                         bool power_of_two, void* stream) {
  if (by_row.q != nullptr)
    launch_tiles<Tiling::kRowsAndColumns>(producer, rows, by_row, by_column, tiles, power_of_two, stream);
  else
    launch_tiles<Tiling::kColumns>(producer, rows, by_row, by_column, tiles, power_of_two, stream);
}

}  // namespace

void quantize_rows(Numbers x, int64_t rows, int columns, Codes out, bool power_of_two, void* stream) {
  if (x.is_float)
    launch_rows(plain<float>(x, columns), rows, out, nullptr, power_of_two, stream);
  else
    launch_rows(plain<bf16>(x, columns), rows, out, nullptr, power_of_two, stream);
}

void quantize_columns(Numbers x, int64_t rows, int columns, Codes by_row, Codes by_column, RowTiles tiles,
                      bool power_of_two, void* stream) {
  if (x.is_float)
    quantize_columns_of(plain<float>(x, columns), rows, by_row, by_column, tiles, power_of_two, stream);
  else
    quantize_columns_of(plain<bf16>(x, columns), rows, by_row, by_column, tiles, power_of_two, stream);
}

void quantize_blocks(Numbers x, int matrices, int64_t rows, int columns, Codes by_row, Codes by_column,
                     bool power_of_two, void* stream) {
  const RowTiles tiles{nullptr, int(ceil_div<int64_t>(rows, kTile))};
  if (x.is_float)
    launch_tiles<Tiling::kBlock>(plain<float>(x, columns), rows, by_row, by_column, tiles, power_of_two, stream,
                                 matrices);
  else
    launch_tiles<Tiling::kBlock>(plain<bf16>(x, columns), rows, by_row, by_column, tiles, power_of_two, stream,
                                 matrices);
}

void retile_columns(const e4m3* q, const float* scales, int64_t rows, int columns, Codes by_column, RowTiles tiles,
                    bool power_of_two, void* stream) {
  launch_tiles<Tiling::kColumns>(Scaled{q, scales, columns}, rows, {}, by_column, tiles, power_of_two, stream);
}

void retile_e5m6(const uint32_t* packed, const float* scales, int64_t rows, int columns, Codes by_column,
                 RowTiles tiles, bool power_of_two, void* stream) {
  launch_tiles<Tiling::kColumns>(E5M6{packed, scales, columns}, rows, {}, by_column, tiles, power_of_two, stream);
}

void swiglu_quantize_rows(GateUp x, int64_t rows, int columns, Codes out, bool power_of_two, void* stream) {
  launch_rows(SwiGLU<Plain<bf16>>{half_of(x.gate, x, columns), half_of(x.up, x, columns), columns}, rows, out, nullptr,
              power_of_two, stream);
}

void swiglu_quantize_columns(GateUp x, int64_t rows, int columns, Codes by_column, RowTiles tiles, bool power_of_two,
                             void* stream) {
  launch_tiles<Tiling::kColumns>(SwiGLU<Plain<bf16>>{half_of(x.gate, x, columns), half_of(x.up, x, columns), columns},
                                 rows, {}, by_column, tiles, power_of_two, stream);
}

void kept_swiglu_quantize_columns(KeptGateUp x, int64_t rows, int columns, Codes by_column, RowTiles tiles,
                                  bool power_of_two, void* stream) {
  launch_tiles<Tiling::kColumns>(SwiGLU<Kept>{kept_of(x.gate, columns), kept_of(x.up, columns), columns}, rows, {},
                                 by_column, tiles, power_of_two, stream);
}

void swiglu_backward_quantize(const bf16* grad, GateUp x, int64_t rows, int columns, Codes by_row, Codes by_column,
                              RowTiles tiles, bool power_of_two, void* stream) {
  launch_tiles<Tiling::kRowsAndColumns>(
      SwiGLUBackward<Plain<bf16>>{grad, half_of(x.gate, x, columns), half_of(x.up, x, columns), 2 * columns}, rows,
      by_row, by_column, tiles, power_of_two, stream);
}

void kept_swiglu_backward_quantize(const bf16* grad, KeptGateUp x, int64_t rows, int columns, Codes by_row,
                                   Codes by_column, RowTiles tiles, bool power_of_two, void* stream) {
  launch_tiles<Tiling::kRowsAndColumns>(
      SwiGLUBackward<Kept>{grad, kept_of(x.gate, columns), kept_of(x.up, columns), 2 * columns}, rows, by_row,
      by_column, tiles, power_of_two, stream);
}

void norm_quantize_rows(const bf16* x, const float* weight, float eps, int64_t rows, int columns, Codes out,
                        float* rstd, bf16* kept, bool power_of_two, void* stream) {
  launch_rows(RMSNorm{x, weight, rstd, eps, columns}, rows, out, kept, power_of_two, stream);
}

void norm_backward_quantize(const bf16* grad, const bf16* x, const float* weight, const float* rstd, int64_t rows,
                            int columns, Codes by_row, Codes by_column, float* inner, RowTiles tiles,
                            bool power_of_two, void* stream) {
  const RMSNormBackward producer{grad, x, weight, rstd, inner, columns};
  launch_rows(producer, rows, by_row, nullptr, power_of_two, stream);
  launch_tiles<Tiling::kColumns>(producer, rows, {}, by_column, tiles, power_of_two, stream);
}

int norm_weight_parts(int64_t rows) { return int(rows < 256 * 16 ? ceil_div<int64_t>(rows, 16) : 256); }

void norm_weight_gradient(const bf16* grad, const bf16* x, const float* rstd, float* partial, int64_t rows,
                          int columns, void* stream) {
  const int parts = norm_weight_parts(rows);
  Grid grid{unsigned(ceil_div(columns, kThreads * kVector)), kThreads};
  grid.rows = unsigned(parts);
  launch(norm_weight_kernel, grid, stream, grad, x, rstd, partial, rows, columns,
         parts == 0 ? 0 : int(ceil_div<int64_t>(rows, parts)));
}

}  // namespace mds
