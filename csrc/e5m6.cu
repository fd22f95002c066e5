// E5M6 by the rules of ops/fp8/e5m6.py: the 12-bit format in which attention's output is kept for two backwards.
//
// A block has a row; a thread has 8 numbers, whose codes are 12 bytes, three words, and 16 lanes share a 1x128 tile.
// Every number is read once and every code written once. Shapes: M rows, K columns (a multiple of 8),
// k = ceil(K / 128).
#include "kernels.h"
#include "launch.cuh"
#include "numbers.cuh"
#include "warp.cuh"

namespace mds {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = kTile / kVector;  // that share a tile

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_e5m6_kernel(const T* x, int64_t pitch, int columns, uint32_t* packed, float* scales) {
  const int64_t row = blockIdx.x;
  // Whole warps run: lanes behind the edge take part in the exchange with zeros.
  const int end = round_up(columns, kWarp * kVector);
  for (int column = int(threadIdx.x) * kVector; column < end; column += kThreads * kVector) {
    const bool inside = column < columns;
    float values[kVector] = {};
    if (inside) load8(x + row * pitch + column, values);
    const float scale = tile_scale(group_reduce<kLanes>(largest_magnitude(values), Max{}), true, kE5M6Max);
    if (!inside) continue;
    store_e5m6(packed + e5m6_word(row, column, columns), values, scale);
    if (column % kTile == 0) scales[row * ceil_div(columns, kTile) + column / kTile] = scale;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_e5m6_kernel(const uint32_t* packed, const float* scales, int columns, T* out) {
  const int64_t row = blockIdx.x;
  for (int column = int(threadIdx.x) * kVector; column < columns; column += kThreads * kVector) {
    float values[kVector];
    const float scale = scales[row * ceil_div(columns, kTile) + column / kTile];
    load_e5m6(packed + e5m6_word(row, column, columns), scale, values);
    store8(out + row * columns + column, values);
  }
}

}  // namespace

void quantize_e5m6(Numbers x, int64_t rows, int columns, uint32_t* packed, float* scales, void* stream) {
  const Grid grid{one_dimension(rows), kThreads};
  if (x.is_float)
    launch(quantize_e5m6_kernel<float>, grid, stream, static_cast<const float*>(x.data), x.pitch, columns, packed,
           scales);
  else
    launch(quantize_e5m6_kernel<bf16>, grid, stream, static_cast<const bf16*>(x.data), x.pitch, columns, packed,
           scales);
}

void dequantize_e5m6(const uint32_t* packed, const float* scales, int64_t rows, int columns, GemmOutput out,
                     void* stream) {
  const Grid grid{one_dimension(rows), kThreads};
  if (out.is_float)
    launch(dequantize_e5m6_kernel<float>, grid, stream, packed, scales, columns, static_cast<float*>(out.data));
  else
    launch(dequantize_e5m6_kernel<bf16>, grid, stream, packed, scales, columns, static_cast<bf16*>(out.data));
}

}  // namespace mds
