// Block-scaled FP8 by the rules of ops/fp8/encoding.py, fused with the producers of the numbers (producers.cuh).
//
//   rows_kernel   1x128 tiles along K; a block has one row, so that it can also reduce over it (RMSNorm)
//   tile_kernel   a block has 128 x 128 numbers: tiles of 128x1, stored transposed (wgrad), optionally 1x128 tiles of
//                 the same numbers in the same pass, or one 128x128 tile, optionally with its transpose (weights)
//
// Memory: every number is read once (rows_kernel with a reduction reads a row again from the cache), every code written
// once, 16 and 8 bytes at a time. Transposed results have rows of whole tiles, T * 128 codes, with zeros behind the
// edge of a group, so that TMA can address them and wgrad can sum over them without a mask.
// Shapes: M rows, K columns (multiples of 8), k = ceil(K / 128), T tiles of rows.
#include "kernels.h"
#include "launch.cuh"
#include "producers.cuh"

namespace mds {
namespace {

constexpr int kThreads = kQuantizeThreads;
constexpr int kLanes = kTile / kVector;  // that share a row of a tile

// `kept`, unless null, receives the producer's bfloat16 numbers.
template <typename Producer>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(Producer producer, e4m3* q, float* scales, bf16* kept, bool power_of_two) {
  RowScratch& scratch = block_shared<RowScratch>();
  const int64_t row = blockIdx.x;
  const int columns = producer.columns, tiles = ceil_div(columns, kTile);
  producer.enter_row_alone(row, scratch);
  // Whole warps run: lanes behind the edge take part in the exchange with zeros.
  const int end = round_up(columns, kWarp * kVector);
  for (int column = int(threadIdx.x) * kVector; column < end; column += kThreads * kVector) {
    const bool inside = column < columns;
    float values[kVector] = {};
    if (inside) producer.load(row, column, values);
    const float scale = tile_scale(group_reduce<kLanes>(largest_magnitude(values), Max{}), power_of_two);
    if (inside) {
      *reinterpret_cast<Words2*>(q + row * columns + column) = encode8(values, scale, power_of_two);
      if (kept != nullptr) store8(kept + row * columns + column, values);
      if (column % kTile == 0) scales[row * tiles + column / kTile] = scale;
    }
  }
}

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
  const int local = int(threadIdx.x) % kLanes * kVector, column = rows.column_tile * kTile + local;
  uint32_t largest = 0;
#pragma unroll 4
  for (int r = int(threadIdx.x) / kLanes; r < kTile; r += kThreads / kLanes) {
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
      const float scale = tile_scale(group_reduce<kLanes>(magnitude, Max{}), power_of_two);
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
  const int local = int(threadIdx.x) % kLanes * kVector, column = rows.column_tile * kTile + local;
  if (column >= columns) return;
  const Divider divide(scale);
  for (int r = int(threadIdx.x) / kLanes; r < rows.count; r += kThreads / kLanes) {
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
  for (int i = int(threadIdx.x); i < kTile * kVectors; i += kThreads) {
    const int local = i / kVectors, place = i % kVectors * 16;
    const int column = rows.column_tile * kTile + local;
    if (column < columns)
      store16(out.q_columns + (int64_t(rows.matrix) * columns + column) * pitch + int64_t(rows.tile) * kTile + place,
              load16(&shared.code[local][place]));
  }
}

// Blocks are tiles of columns, then of rows, in one dimension: a grid's second one ends at 65,535.
template <Tiling kind, typename Producer>
__global__ void __launch_bounds__(kThreads) tile_kernel(Producer producer, TileOutputs out, bool power_of_two) {
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

template <typename Producer>
void launch_rows(const Producer& producer, int64_t rows, Codes out, bf16* kept, bool power_of_two, void* stream) {
  launch(rows_kernel<Producer>, {one_dimension(rows), kThreads, sizeof(RowScratch)}, stream, producer, out.q,
         out.scales,
         kept, power_of_two);
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
