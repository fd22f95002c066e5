// The inputs of the quantising kernels: each producer gives 8 neighbouring numbers of a row, as float32 values of the
// bfloat16 (or float32) numbers that a separate kernel would have stored. Before a row's first `load` tile kernels call
// `enter_row`, and row kernels `enter_row_alone`, which may use the whole block.
#pragma once

#include "numbers.cuh"
#include "warp.cuh"

namespace mds {

constexpr int kQuantizeThreads = 256;
constexpr int kQuantizeWarps = kQuantizeThreads / kWarp;

struct RowScratch {
  float warp[kQuantizeWarps];
};

// The tensor itself, bfloat16 or float32.
template <typename T>
struct Plain {
  using Element = T;
  const T* x;
  int64_t pitch;
  int columns;

  __device__ __forceinline__ void enter_row_alone(int64_t, RowScratch&) {}
  __device__ __forceinline__ void enter_row(int64_t) {}
  __device__ __forceinline__ void load(int64_t row, int column, float (&out)[kVector]) const {
    load8(x + row * pitch + column, out);
  }
};

// E4M3 codes with 1x128 scales, to be converted to tiles of another shape by way of float32, without rounding.
struct Scaled {
  using Element = float;
  const e4m3* q;
  const float* scale;
  int columns;

  __device__ __forceinline__ void enter_row(int64_t) {}
  __device__ __forceinline__ void load(int64_t row, int column, float (&out)[kVector]) const {
    const Words2 codes = *reinterpret_cast<const Words2*>(q + row * columns + column);
    const float s = scale[row * ceil_div(columns, kTile) + column / kTile];
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] = from_e4m3(e4m3(codes.word[i / 4] >> (8 * (i % 4)))) * s;
  }
};

// E5M6 codes with 1x128 scales, likewise.
struct E5M6 {
  using Element = float;
  const uint32_t* packed;
  const float* scale;
  int columns;

  __device__ __forceinline__ void enter_row(int64_t) {}
  __device__ __forceinline__ void load(int64_t row, int column, float (&out)[kVector]) const {
    load_e5m6(packed + e5m6_word(row, column, columns), scale[row * ceil_div(columns, kTile) + column / kTile], out);
  }
};

// E4M3 codes with 1x128 scales, rounded to the bfloat16 numbers that a separate kernel would have stored.
struct Kept {
  Scaled tiles;

  __device__ __forceinline__ void load(int64_t row, int column, float (&out)[kVector]) const {
    tiles.load(row, column, out);
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] = round_to_bf16(out[i]);
  }
};

// silu(gate) * up, rounded after silu and after the product as ops/swiglu.py rounds. Gate and up are Plain, with rows
// that may be further apart than they are wide, as halves of one GEMM's output are, or Kept.
template <typename Source>
struct SwiGLU {
  using Element = bf16;
  Source gate, up;
  int columns;

  __device__ __forceinline__ void enter_row_alone(int64_t, RowScratch&) {}
  __device__ __forceinline__ void enter_row(int64_t) {}
  __device__ __forceinline__ void load(int64_t row, int column, float (&out)[kVector]) const {
    float g[kVector], u[kVector];
    gate.load(row, column, g);
    up.load(row, column, u);
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] = round_to_bf16(round_to_bf16(g[i] / (1.0f + expf(-g[i]))) * u[i]);
  }
};

// The gradients of gate and up side by side, from the gradient of the activation [M, columns / 2].
template <typename Source>
struct SwiGLUBackward {
  using Element = bf16;
  const bf16* grad;
  Source gate, up;
  int columns;

  __device__ __forceinline__ void enter_row_alone(int64_t, RowScratch&) {}
  __device__ __forceinline__ void enter_row(int64_t) {}
  __device__ __forceinline__ void load(int64_t row, int column, float (&out)[kVector]) const {
    const int half = columns / 2, place = column < half ? column : column - half;
    float g[kVector], d[kVector];
    gate.load(row, place, g);
    load8(grad + row * half + place, d);
    if (column < half) {
      float u[kVector];
      up.load(row, place, u);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float s = 1.0f / (1.0f + expf(-g[i]));
        out[i] = round_to_bf16(round_to_bf16(d[i] * u[i]) * s * (1.0f + g[i] * (1.0f - s)));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) out[i] = round_to_bf16(round_to_bf16(g[i] / (1.0f + expf(-g[i]))) * d[i]);
    }
  }
};

// x * rstd, rounded, times the weight. For row kernels, which compute rstd and write it.
struct RMSNorm {
  using Element = bf16;
  const bf16* x;
  const float* weight;
  float* rstd;
  float eps;
  int columns;
  float own_rstd = 0;

  __device__ __forceinline__ void enter_row_alone(int64_t row, RowScratch& scratch) {
    float squares = 0;
    for (int column = int(threadIdx.x) * kVector; column < columns; column += kQuantizeThreads * kVector) {
      float values[kVector];
      load8(x + row * columns + column, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares += values[i] * values[i];
    }
    own_rstd = 1.0f / sqrtf(block_sum<kQuantizeWarps>(squares, scratch.warp) / float(columns) + eps);
    if (threadIdx.x == 0) rstd[row] = own_rstd;
  }
  __device__ __forceinline__ void load(int64_t row, int column, float (&out)[kVector]) const {
    float w[kVector];
    load8(x + row * columns + column, out);
    load8(weight + column, w);
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] = round_to_bf16(round_to_bf16(out[i] * own_rstd) * w[i]);
  }
};

// The gradient of RMSNorm's input: (g w - n mean(g w n)) rstd with n = x rstd. Row kernels write the mean too.
struct RMSNormBackward {
  using Element = bf16;
  const bf16* grad;
  const bf16* x;
  const float* weight;
  const float* rstd;
  float* inner;
  int columns;
  float own_rstd = 0, own_inner = 0;

  __device__ __forceinline__ void enter_row(int64_t row) {
    own_rstd = rstd[row];
    own_inner = inner[row];
  }
  __device__ __forceinline__ void enter_row_alone(int64_t row, RowScratch& scratch) {
    own_rstd = rstd[row];
    float product = 0;
    for (int column = int(threadIdx.x) * kVector; column < columns; column += kQuantizeThreads * kVector) {
      float g[kVector], values[kVector];
      read(row, column, g, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) product += g[i] * values[i];
    }
    own_inner = block_sum<kQuantizeWarps>(product, scratch.warp) / float(columns);
    if (threadIdx.x == 0) inner[row] = own_inner;
  }
  // g w and n
  __device__ __forceinline__ void read(int64_t row, int column, float (&g)[kVector], float (&n)[kVector]) const {
    float w[kVector];
    load8(grad + row * columns + column, g);
    load8(x + row * columns + column, n);
    load8(weight + column, w);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      g[i] *= w[i];
      n[i] *= own_rstd;
    }
  }
  __device__ __forceinline__ void load(int64_t row, int column, float (&out)[kVector]) const {
    float n[kVector];
    read(row, column, out, n);
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] = round_to_bf16((out[i] - n[i] * own_inner) * own_rstd);
  }
};

}  // namespace mds
