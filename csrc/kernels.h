// The kernels as plain C++ functions of pointers to device memory, sizes and a stream. The *_binding.cpp call them and
// check their arguments; each function's kernel file says what it computes. None of them synchronises.
#pragma once

#include <cstdint>

namespace mds {

using bf16 = uint16_t;  // its bits
using e4m3 = uint8_t;   // its bits: sign, 4 of exponent (bias 7), 3 of mantissa; no infinities, NaN is 0x7f

constexpr int kMaxExperts = 1024;
constexpr int kTile = 128;  // of FP8 scales, along K and for weights along both

// rope.cu -------------------------------------------------------------------------------------------------------------

// A tensor [B, S, N, .] whose last dimension is contiguous; strides count numbers.
struct StridedHeads {
  const bf16* data;
  int64_t batch_stride, position_stride, head_stride;
};

struct RopeShape {
  int64_t tokens;  // B * S
  int positions;   // S
  int heads, nope, rope, value;
};

int max_rope_width();
void rope_tail(StridedHeads x, const float* table, bf16* out, RopeShape shape, bool inverse, void* stream);
void keys_values(const bf16* kv, const bf16* k_rope, const float* table, bf16* k, bf16* v, RopeShape shape,
                 void* stream);
void keys_values_backward(StridedHeads grad_k, StridedHeads grad_v, const float* table, bf16* grad_kv,
                          bf16* grad_k_rope, RopeShape shape, void* stream);

// cross_entropy.cu ----------------------------------------------------------------------------------------------------

void cross_entropy_statistics(const bf16* logits, const int64_t* labels, int64_t first_id, int64_t rows, int columns,
                              float* max, float* sum, float* label_logit, void* stream);
void cross_entropy_gradient(bf16* logits, const int64_t* labels, int64_t first_id, int64_t rows, int columns,
                            const float* max, const float* sum, const float* grad, void* stream);

// route.cu ------------------------------------------------------------------------------------------------------------

struct RouteShape {
  int64_t copies;
  int experts, align;
  int64_t slots;            // enough for any choice of experts
  int64_t copies_per_warp;  // consecutive ones
};

RouteShape route_shape(int64_t copies, int experts, int align);
int64_t route_scratch(const RouteShape& shape);  // numbers of int32
void route(const int64_t* experts, RouteShape shape, int* scratch, int* copy_of_slot, int* slot_of_copy,
           int* count_of_expert, int* offsets, void* stream);

// permute.cu ----------------------------------------------------------------------------------------------------------

void gather_rows(const void* x, const int* copy_of_slot, int copies_of_token, void* out, int64_t slots, int row_bytes,
                 void* stream);
void combine_rows(const bf16* y, const int* slot_of_copy, const float* weights, int64_t tokens, int choices, bf16* out,
                  int width, void* stream);
void combine_backward(const bf16* grad, const bf16* y, const int* copy_of_slot, const float* weights, int64_t slots,
                      int choices, bf16* grad_y, float* grad_weights, int width, void* stream);

// quantize.cu ---------------------------------------------------------------------------------------------------------

// Where to write E4M3 codes and their scales; null to write none.
struct Codes {
  e4m3* q = nullptr;
  float* scales = nullptr;
};

// The rows of each tile of 128x1: `table` [count, 2] has a tile's first row and rows; null if tiles have no gaps.
struct RowTiles {
  const int* table;
  int count;
};

// A matrix in bfloat16 or float32 with rows `pitch` numbers apart.
struct Numbers {
  const void* data;
  bool is_float;
  int64_t pitch;
};

// Rows of both are `pitch` numbers apart.
struct GateUp {
  const bf16* gate;
  const bf16* up;
  int64_t pitch;
};

// Both as E4M3 codes [M, K] with 1x128 scales, from which the backward computes them again.
struct KeptTiles {
  const e4m3* q;
  const float* scales;
};

struct KeptGateUp {
  KeptTiles gate, up;
};

void quantize_rows(Numbers x, int64_t rows, int columns, Codes out, bool power_of_two, void* stream);
void quantize_columns(Numbers x, int64_t rows, int columns, Codes by_row, Codes by_column, RowTiles tiles,
                      bool power_of_two, void* stream);
void quantize_blocks(Numbers x, int matrices, int64_t rows, int columns, Codes by_row, Codes by_column,
                     bool power_of_two, void* stream);
void retile_columns(const e4m3* q, const float* scales, int64_t rows, int columns, Codes by_column, RowTiles tiles,
                    bool power_of_two, void* stream);
void swiglu_quantize_rows(GateUp x, int64_t rows, int columns, Codes out, bool power_of_two, void* stream);
void swiglu_quantize_columns(GateUp x, int64_t rows, int columns, Codes by_column, RowTiles tiles, bool power_of_two,
                             void* stream);
void swiglu_backward_quantize(const bf16* grad, GateUp x, int64_t rows, int columns, Codes by_row, Codes by_column,
                              RowTiles tiles, bool power_of_two, void* stream);
void kept_swiglu_quantize_columns(KeptGateUp x, int64_t rows, int columns, Codes by_column, RowTiles tiles,
                                  bool power_of_two, void* stream);
void kept_swiglu_backward_quantize(const bf16* grad, KeptGateUp x, int64_t rows, int columns, Codes by_row,
                                   Codes by_column, RowTiles tiles, bool power_of_two, void* stream);
void norm_quantize_rows(const bf16* x, const float* weight, float eps, int64_t rows, int columns, Codes out,
                        float* rstd, bf16* kept, bool power_of_two, void* stream);
void norm_backward_quantize(const bf16* grad, const bf16* x, const float* weight, const float* rstd, int64_t rows,
                            int columns, Codes by_row, Codes by_column, float* inner, RowTiles tiles,
                            bool power_of_two, void* stream);
int norm_weight_parts(int64_t rows);
void norm_weight_gradient(const bf16* grad, const bf16* x, const float* rstd, float* partial, int64_t rows,
                          int columns, void* stream);

// e5m6.cu, and retile_e5m6 in quantize.cu -----------------------------------------------------------------------------

struct GemmOutput;

// Codes are three words for 8 numbers.
void quantize_e5m6(Numbers x, int64_t rows, int columns, uint32_t* packed, float* scales, void* stream);
void dequantize_e5m6(const uint32_t* packed, const float* scales, int64_t rows, int columns, GemmOutput out,
                     void* stream);
void retile_e5m6(const uint32_t* packed, const float* scales, int64_t rows, int columns, Codes by_column,
                 RowTiles tiles, bool power_of_two, void* stream);

// gemm_fp8.cu ---------------------------------------------------------------------------------------------------------

// E4M3 codes [matrices * rows, columns], `pitch` bytes from row to row, and the scales of tiles of 128 along the
// columns: of each row, or of blocks of 128 rows of a matrix.
struct ScaledOperand {
  const e4m3* q;
  const float* scales;
  int matrices;
  int64_t rows, columns, pitch;
  bool blocks;
  int64_t scale_pitch;  // numbers from one row (or row of blocks) to the next
};

struct GemmOutput {
  void* data;  // bfloat16 or float32
  bool is_float;
};

// Tiles of M of the M-grouped GEMM, and groups of K of the K-grouped one; int32 on the device.
struct Groups {
  const int* table;  // M: [count, 3] matrix of b, first row, rows; K: [count, 2] first tile of K, tiles
  int count;
};

// Forms of the kernel that are not the default before they have run on a GPU. Results do not depend on them.
struct GemmOptions {
  bool tma_store;  // bfloat16 results leave by the copy engine, where b has scales of blocks
  bool clusters;   // two blocks share what they read of a
};

void scaled_mm(ScaledOperand a, ScaledOperand b, GemmOutput out, GemmOptions options, void* stream);
// Tiles have up to 256 rows if `tall`, else up to 128.
void grouped_scaled_mm(ScaledOperand a, ScaledOperand b, Groups tiles, bool tall, GemmOutput out,
                       GemmOptions options, void* stream);
void grouped_scaled_mm_wgrad(ScaledOperand a, ScaledOperand b, Groups groups, GemmOutput out, bool clusters,
                             void* stream);

}  // namespace mds
