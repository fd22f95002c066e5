// torch.ops.megatron_deepseek.*, by the LibTorch stable ABI: one build serves every torch from the one it names on, and
// every Python. Here tensors are checked, results allocated, and the functions of kernels.h called on the current
// stream; derivatives and shapes without data are in megatron_deepseek/ops/kernels.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The device that a call works on and its current stream.
class Launch {
 public:
#ifdef MEGATRON_DEEPSEEK_EMULATED
  explicit Launch(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit Launch(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {}
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

template <typename T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

const float* floats(const std::optional<Tensor>& x) { return x ? pointer<float>(*x) : nullptr; }

// Whole numbers are read one by one, all others 16 bytes at a time.
void check_dense(const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has another dtype than the kernel takes");
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  if (dtype == ScalarType::Int || dtype == ScalarType::Long) return;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name, " must start at a multiple of 16 bytes");
}

void check_vectors(int64_t size, const char* name) {
  STD_TORCH_CHECK(size % 8 == 0, name, " must be a multiple of 8, is ", size);
}

Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

int64_t tiles_of(int64_t size) { return (size + mds::kTile - 1) / mds::kTile; }

// RoPE ----------------------------------------------------------------------------------------------------------------

mds::StridedHeads heads_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::BFloat16, name, " must be bfloat16 [B, S, N, D]");
  STD_TORCH_CHECK(x.stride(3) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && x.stride(2) % 8 == 0 &&
                      reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0,
                  name, " must have rows that are contiguous and start at multiples of 16 bytes");
  return {pointer<mds::bf16>(x), x.stride(0), x.stride(1), x.stride(2)};
}

mds::RopeShape rope_shape(const Tensor& x, int64_t nope, int64_t rope, int64_t value) {
  check_vectors(nope, "nope");
  check_vectors(rope, "the rotary width");
  check_vectors(value, "the value width");
  STD_TORCH_CHECK(rope > 0 && rope <= mds::max_rope_width(), "the rotary width is ", rope);
  return {x.size(0) * x.size(1), int(x.size(1)), int(x.size(2)), int(nope), int(rope), int(value)};
}

void check_table(const Tensor& table, const mds::RopeShape& shape) {
  check_dense(table, ScalarType::Float, "the rotary table");
  STD_TORCH_CHECK(table.dim() == 3 && table.size(0) == 2 && table.size(1) == shape.positions &&
                      table.size(2) == shape.rope / 2,
                  "the rotary table must be [2, S, R/2] of the same positions and width");
}

Tensor rope_tail(const Tensor& x, const Tensor& table, int64_t nope, bool inverse) {
  const auto heads = heads_of(x, "x");
  const auto shape = rope_shape(x, nope, x.size(3) - nope, 0);
  check_table(table, shape);
  const Launch launch(x);
  Tensor out = make(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, ScalarType::BFloat16);
  mds::rope_tail(heads, pointer<float>(table), pointer<mds::bf16>(out), shape, inverse, launch.stream());
  return out;
}

Tensors2 keys_values(const Tensor& kv, const Tensor& k_rope, const std::optional<Tensor>& table, int64_t nope) {
  check_dense(kv, ScalarType::BFloat16, "kv");
  check_dense(k_rope, ScalarType::BFloat16, "k_rope");
  const int64_t rope = k_rope.size(2), value = kv.size(3) - nope;
  const auto shape = rope_shape(kv, nope, rope, value);
  STD_TORCH_CHECK(k_rope.numel() == shape.tokens * rope, "kv and k_rope must have the same tokens");
  if (table) check_table(*table, shape);
  const Launch launch(kv);
  Tensor k = make(kv, {kv.size(0), kv.size(1), kv.size(2), nope + rope}, ScalarType::BFloat16);
  Tensor v = make(kv, {kv.size(0), kv.size(1), kv.size(2), value}, ScalarType::BFloat16);
  mds::keys_values(pointer<mds::bf16>(kv), pointer<mds::bf16>(k_rope), floats(table), pointer<mds::bf16>(k),
                   pointer<mds::bf16>(v), shape, launch.stream());
  return {k, v};
}

Tensors2 keys_values_backward(const Tensor& grad_k, const Tensor& grad_v, const std::optional<Tensor>& table,
                              int64_t nope) {
  const int64_t rope = grad_k.size(3) - nope, value = grad_v.size(3);
  const auto k_heads = heads_of(grad_k, "grad_k"), v_heads = heads_of(grad_v, "grad_v");
  const auto shape = rope_shape(grad_k, nope, rope, value);
  if (table) check_table(*table, shape);
  const Launch launch(grad_k);
  Tensor grad_kv =
      make(grad_k, {grad_k.size(0), grad_k.size(1), grad_k.size(2), nope + value}, ScalarType::BFloat16);
  Tensor grad_k_rope = make(grad_k, {grad_k.size(0), grad_k.size(1), rope}, ScalarType::BFloat16);
  mds::keys_values_backward(k_heads, v_heads, floats(table), pointer<mds::bf16>(grad_kv),
                            pointer<mds::bf16>(grad_k_rope), shape, launch.stream());
  return {grad_kv, grad_k_rope};
}

// Cross-entropy -------------------------------------------------------------------------------------------------------

void check_logits(const Tensor& logits, const Tensor& labels) {
  check_dense(logits, ScalarType::BFloat16, "logits");
  check_dense(labels, ScalarType::Long, "labels");
  STD_TORCH_CHECK(logits.dim() == 2 && labels.numel() == logits.size(0), "logits must be [T, v], labels [T]");
}

Tensors3 cross_entropy_statistics(const Tensor& logits, const Tensor& labels, int64_t first_id) {
  check_logits(logits, labels);
  const Launch launch(logits);
  const int64_t rows = logits.size(0);
  Tensor max = make(logits, {rows}, ScalarType::Float), sum = make(logits, {rows}, ScalarType::Float),
         label_logit = make(logits, {rows}, ScalarType::Float);
  mds::cross_entropy_statistics(pointer<mds::bf16>(logits), pointer<int64_t>(labels), first_id, rows,
                                int(logits.size(1)), pointer<float>(max), pointer<float>(sum),
                                pointer<float>(label_logit), launch.stream());
  return {max, sum, label_logit};
}

void cross_entropy_gradient_(Tensor logits, const Tensor& labels, int64_t first_id, const Tensor& max,
                             const Tensor& sum, const Tensor& grad) {
  check_logits(logits, labels);
  for (const Tensor& x : {max, sum, grad}) check_dense(x, ScalarType::Float, "max, sum or grad");
  const Launch launch(logits);
  mds::cross_entropy_gradient(pointer<mds::bf16>(logits), pointer<int64_t>(labels), first_id, logits.size(0),
                              int(logits.size(1)), pointer<float>(max), pointer<float>(sum), pointer<float>(grad),
                              launch.stream());
}

// Routing and permutation ---------------------------------------------------------------------------------------------

Tensors4 route(const Tensor& experts, int64_t num_experts, int64_t align) {
  check_dense(experts, ScalarType::Long, "experts");
  STD_TORCH_CHECK(num_experts > 0 && num_experts <= mds::kMaxExperts, "at most ", mds::kMaxExperts, " experts");
  STD_TORCH_CHECK(align > 0 && experts.numel() + num_experts * align < (int64_t(1) << 31), "slots are int32");
  const auto shape = mds::route_shape(experts.numel(), int(num_experts), int(align));
  const Launch launch(experts);
  Tensor scratch = make(experts, {mds::route_scratch(shape)}, ScalarType::Int);
  Tensor copy_of_slot = make(experts, {shape.slots}, ScalarType::Int);
  Tensor slot_of_copy = make(experts, {shape.copies}, ScalarType::Int);
  Tensor counts = make(experts, {num_experts}, ScalarType::Int);
  Tensor offsets = make(experts, {num_experts + 1}, ScalarType::Int);
  mds::route(pointer<int64_t>(experts), shape, pointer<int>(scratch), pointer<int>(copy_of_slot),
             pointer<int>(slot_of_copy), pointer<int>(counts), pointer<int>(offsets), launch.stream());
  return {copy_of_slot, slot_of_copy, counts, offsets};
}

void check_places(const Tensor& copy_of_slot, const Tensor& slot_of_copy) {
  check_dense(copy_of_slot, ScalarType::Int, "copy_of_slot");
  check_dense(slot_of_copy, ScalarType::Int, "slot_of_copy");
  STD_TORCH_CHECK(slot_of_copy.dim() == 2, "slot_of_copy must be [T, K]");
}

Tensor gather_rows(const Tensor& x, const Tensor& copy_of_slot, const Tensor& slot_of_copy) {
  check_dense(x, x.scalar_type(), "x");
  check_places(copy_of_slot, slot_of_copy);
  STD_TORCH_CHECK(x.size(0) == slot_of_copy.size(0), "x and slot_of_copy have different tokens");
  const int64_t row_bytes = x.size(1) * int64_t(x.element_size());
  STD_TORCH_CHECK(x.dim() == 2 && row_bytes % 16 == 0, "rows must be multiples of 16 bytes");
  const Launch launch(x);
  Tensor out = make(x, {copy_of_slot.numel(), x.size(1)}, x.scalar_type());
  mds::gather_rows(x.data_ptr(), pointer<int>(copy_of_slot), int(slot_of_copy.size(1)), out.data_ptr(),
                   copy_of_slot.numel(), int(row_bytes), launch.stream());
  return out;
}

Tensor combine_rows(const Tensor& y, const Tensor& copy_of_slot, const Tensor& slot_of_copy,
                    const std::optional<Tensor>& weights) {
  check_dense(y, ScalarType::BFloat16, "y");
  check_places(copy_of_slot, slot_of_copy);
  if (weights) check_dense(*weights, ScalarType::Float, "weights");
  check_vectors(y.size(1), "the width");
  const Launch launch(y);
  Tensor out = make(y, {slot_of_copy.size(0), y.size(1)}, ScalarType::BFloat16);
  mds::combine_rows(pointer<mds::bf16>(y), pointer<int>(slot_of_copy), floats(weights), slot_of_copy.size(0),
                    int(slot_of_copy.size(1)), pointer<mds::bf16>(out), int(y.size(1)), launch.stream());
  return out;
}

Tensors2 combine_backward(const Tensor& grad, const Tensor& y, const Tensor& copy_of_slot, const Tensor& weights) {
  check_dense(grad, ScalarType::BFloat16, "grad");
  check_dense(y, ScalarType::BFloat16, "y");
  check_dense(copy_of_slot, ScalarType::Int, "copy_of_slot");
  check_dense(weights, ScalarType::Float, "weights");
  check_vectors(y.size(1), "the width");
  STD_TORCH_CHECK(copy_of_slot.numel() == y.size(0) && grad.size(0) == weights.size(0), "sizes do not agree");
  const Launch launch(y);
  Tensor grad_y = make(y, {y.size(0), y.size(1)}, ScalarType::BFloat16);
  Tensor grad_weights = torch::stable::new_zeros(weights, weights.sizes());
  mds::combine_backward(pointer<mds::bf16>(grad), pointer<mds::bf16>(y), pointer<int>(copy_of_slot),
                        pointer<float>(weights), y.size(0), int(weights.size(1)), pointer<mds::bf16>(grad_y),
                        pointer<float>(grad_weights), int(y.size(1)), launch.stream());
  return {grad_y, grad_weights};
}

// Quantisation --------------------------------------------------------------------------------------------------------

struct Matrix {
  int64_t rows;
  int columns;
};

Matrix check_matrix(const Tensor& x, ScalarType dtype, const char* name) {
  check_dense(x, dtype, name);
  STD_TORCH_CHECK(x.dim() == 2, name, " must be a matrix");
  check_vectors(x.size(1), "the columns of a quantised matrix");
  return {x.size(0), int(x.size(1))};
}

struct Quantized {
  Tensor q, scales;

  mds::Codes codes() const { return {pointer<mds::e4m3>(q), pointer<float>(scales)}; }
};

Quantized make_rows(const Tensor& like, int64_t rows, int64_t columns) {
  return {make(like, {rows, columns}, ScalarType::Float8_e4m3fn),
          make(like, {rows, tiles_of(columns)}, ScalarType::Float)};
}

Quantized make_columns(const Tensor& like, int64_t columns, int64_t tiles) {
  return {make(like, {columns, tiles * mds::kTile}, ScalarType::Float8_e4m3fn),
          make(like, {columns, tiles}, ScalarType::Float)};
}

mds::RowTiles row_tiles(const std::optional<Tensor>& tiles, int64_t rows) {
  if (!tiles) return {nullptr, int(tiles_of(rows))};
  check_dense(*tiles, ScalarType::Int, "tiles");
  STD_TORCH_CHECK(tiles->dim() == 2 && tiles->size(1) == 2, "tiles must be [T, 2]");
  return {pointer<int>(*tiles), int(tiles->size(0))};
}

ScalarType bf16_or_float(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float ? ScalarType::Float : ScalarType::BFloat16;
}

mds::Numbers numbers(const Tensor& x, int64_t pitch) {
  return {x.data_ptr(), x.scalar_type() == ScalarType::Float, pitch};
}

// Rows may be further apart than their numbers, as halves of a product are.
Matrix check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == bf16_or_float(x), name, " must be a bfloat16 or float32 matrix");
  check_vectors(x.size(1), "the columns of a quantised matrix");
  STD_TORCH_CHECK(x.stride(1) == 1 && x.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name,
                  " must have contiguous rows that start at multiples of 16 bytes");
  return {x.size(0), int(x.size(1))};
}

Tensors2 quantize_rows(const Tensor& x, bool power_of_two) {
  const auto [rows, columns] = check_rows(x, "x");
  const Launch launch(x);
  const Quantized out = make_rows(x, rows, columns);
  mds::quantize_rows(numbers(x, x.stride(0)), rows, columns, out.codes(), power_of_two, launch.stream());
  return {out.q, out.scales};
}

Tensors2 quantize_columns(const Tensor& x, const std::optional<Tensor>& tiles, bool power_of_two) {
  const auto [rows, columns] = check_matrix(x, bf16_or_float(x), "x");
  const auto table = row_tiles(tiles, rows);
  const Launch launch(x);
  const Quantized out = make_columns(x, columns, table.count);
  mds::quantize_columns(numbers(x, columns), rows, columns, {}, out.codes(), table, power_of_two, launch.stream());
  return {out.q, out.scales};
}

Tensors4 quantize_both(const Tensor& x, const std::optional<Tensor>& tiles, bool power_of_two) {
  const auto [rows, columns] = check_matrix(x, bf16_or_float(x), "x");
  const auto table = row_tiles(tiles, rows);
  const Launch launch(x);
  const Quantized by_row = make_rows(x, rows, columns), by_column = make_columns(x, columns, table.count);
  mds::quantize_columns(numbers(x, columns), rows, columns, by_row.codes(), by_column.codes(), table, power_of_two,
                        launch.stream());
  return {by_row.q, by_row.scales, by_column.q, by_column.scales};
}

// w [M, K] or [E, M, K] -> codes and scales, and those of the transpose, [E, K, tiles of M * 128], or nothing of it.
Tensors4 quantize_blocks(const Tensor& w, bool transpose, bool power_of_two) {
  check_dense(w, bf16_or_float(w), "w");
  STD_TORCH_CHECK(w.dim() == 2 || w.dim() == 3, "w must be a matrix or a stack of them");
  const bool stack = w.dim() == 3;
  const int64_t matrices = stack ? w.size(0) : 1, rows = w.size(w.dim() - 2), columns = w.size(w.dim() - 1);
  check_vectors(columns, "the columns of a quantised matrix");
  const int64_t m = tiles_of(rows), k = tiles_of(columns), kept = transpose ? columns : 0, kept_k = transpose ? k : 0;
  const auto fp8 = ScalarType::Float8_e4m3fn, fp32 = ScalarType::Float;
  const Launch launch(w);
  const Quantized by_row{stack ? make(w, {matrices, rows, columns}, fp8) : make(w, {rows, columns}, fp8),
                         stack ? make(w, {matrices, m, k}, fp32) : make(w, {m, k}, fp32)};
  const Quantized by_column{
      stack ? make(w, {matrices, kept, m * mds::kTile}, fp8) : make(w, {kept, m * mds::kTile}, fp8),
      stack ? make(w, {matrices, kept_k, m}, fp32) : make(w, {kept_k, m}, fp32)};
  mds::quantize_blocks(numbers(w, columns), int(matrices), rows, int(columns), by_row.codes(),
                       transpose ? by_column.codes() : mds::Codes{}, power_of_two, launch.stream());
  return {by_row.q, by_row.scales, by_column.q, by_column.scales};
}

Tensors2 retile_columns(const Tensor& q, const Tensor& scales, const std::optional<Tensor>& tiles,
                        bool power_of_two) {
  const auto [rows, columns] = check_matrix(q, ScalarType::Float8_e4m3fn, "q");
  check_dense(scales, ScalarType::Float, "scales");
  STD_TORCH_CHECK(scales.numel() == rows * tiles_of(columns), "scales must be those of 1x128 tiles");
  const auto table = row_tiles(tiles, rows);
  const Launch launch(q);
  const Quantized out = make_columns(q, columns, table.count);
  mds::retile_columns(pointer<mds::e4m3>(q), pointer<float>(scales), rows, columns, out.codes(), table, power_of_two,
                      launch.stream());
  return {out.q, out.scales};
}

mds::GateUp gate_up(const Tensor& gate, const Tensor& up) {
  for (const Tensor& x : {gate, up})
    STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && x.stride(1) == 1 &&
                        x.stride(0) == gate.stride(0) && x.stride(0) % 8 == 0 && x.size(0) == gate.size(0) &&
                        x.size(1) == gate.size(1) && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0,
                    "gate and up must be bfloat16 matrices alike, with rows that start at multiples of 16 bytes");
  check_vectors(gate.size(1), "the columns of gate and up");
  return {pointer<mds::bf16>(gate), pointer<mds::bf16>(up), gate.stride(0)};
}

Tensors2 swiglu_quantize_rows(const Tensor& gate, const Tensor& up, bool power_of_two) {
  const auto x = gate_up(gate, up);
  const Launch launch(gate);
  const Quantized out = make_rows(gate, gate.size(0), gate.size(1));
  mds::swiglu_quantize_rows(x, gate.size(0), int(gate.size(1)), out.codes(), power_of_two, launch.stream());
  return {out.q, out.scales};
}

Tensors2 swiglu_quantize_columns(const Tensor& gate, const Tensor& up, const std::optional<Tensor>& tiles,
                                 bool power_of_two) {
  const auto x = gate_up(gate, up);
  const auto table = row_tiles(tiles, gate.size(0));
  const Launch launch(gate);
  const Quantized out = make_columns(gate, gate.size(1), table.count);
  mds::swiglu_quantize_columns(x, gate.size(0), int(gate.size(1)), out.codes(), table, power_of_two, launch.stream());
  return {out.q, out.scales};
}

// Of the gradients of gate and up side by side, [M, 2 I].
Tensors4 swiglu_backward_quantize(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                  const std::optional<Tensor>& tiles, bool power_of_two) {
  const auto x = gate_up(gate, up);
  const int64_t rows = gate.size(0), columns = gate.size(1);
  check_dense(grad, ScalarType::BFloat16, "grad");
  STD_TORCH_CHECK(grad.size(0) == rows && grad.size(1) == columns, "grad must have gate's shape");
  const auto table = row_tiles(tiles, rows);
  const Launch launch(gate);
  const Quantized by_row = make_rows(gate, rows, 2 * columns), by_column = make_columns(gate, 2 * columns, table.count);
  mds::swiglu_backward_quantize(pointer<mds::bf16>(grad), x, rows, int(columns), by_row.codes(), by_column.codes(),
                                table, power_of_two, launch.stream());
  return {by_row.q, by_row.scales, by_column.q, by_column.scales};
}

void check_norm(const Tensor& weight, int columns) {
  check_dense(weight, ScalarType::Float, "weight");
  STD_TORCH_CHECK(weight.numel() == columns, "weight must have a number for each column");
}

// codes, scales, rstd [M], and the normalised rows themselves if `keep`, else none.
Tensors4 norm_quantize_rows(const Tensor& x, const Tensor& weight, double eps, bool keep, bool power_of_two) {
  const auto [rows, columns] = check_matrix(x, ScalarType::BFloat16, "x");
  check_norm(weight, columns);
  const Launch launch(x);
  const Quantized out = make_rows(x, rows, columns);
  Tensor rstd = make(x, {rows}, ScalarType::Float), kept = make(x, {keep ? rows : 0, columns}, ScalarType::BFloat16);
  mds::norm_quantize_rows(pointer<mds::bf16>(x), pointer<float>(weight), float(eps), rows, columns, out.codes(),
                          pointer<float>(rstd), keep ? pointer<mds::bf16>(kept) : nullptr, power_of_two,
                          launch.stream());
  return {out.q, out.scales, rstd, kept};
}

// The gradient of a norm's input, codes and scales by row and by column; and the weight's gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward_quantize(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd, const std::optional<Tensor>& tiles,
    bool power_of_two) {
  const auto [rows, columns] = check_matrix(x, ScalarType::BFloat16, "x");
  check_matrix(grad, ScalarType::BFloat16, "grad");
  check_norm(weight, columns);
  check_dense(rstd, ScalarType::Float, "rstd");
  STD_TORCH_CHECK(grad.size(0) == rows && grad.size(1) == columns && rstd.numel() == rows, "sizes do not agree");
  const auto table = row_tiles(tiles, rows);
  const Launch launch(x);
  const Quantized by_row = make_rows(x, rows, columns), by_column = make_columns(x, columns, table.count);
  Tensor inner = make(x, {rows}, ScalarType::Float);
  Tensor parts = make(x, {mds::norm_weight_parts(rows), columns}, ScalarType::Float);
  mds::norm_backward_quantize(pointer<mds::bf16>(grad), pointer<mds::bf16>(x), pointer<float>(weight),
                              pointer<float>(rstd), rows, columns, by_row.codes(), by_column.codes(),
                              pointer<float>(inner), table, power_of_two, launch.stream());
  mds::norm_weight_gradient(pointer<mds::bf16>(grad), pointer<mds::bf16>(x), pointer<float>(rstd),
                            pointer<float>(parts), rows, columns, launch.stream());
  const int64_t of_parts[] = {0};
  Tensor grad_weight = torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(of_parts, 1));
  return {by_row.q, by_row.scales, by_column.q, by_column.scales, grad_weight};
}

// Block-scaled products -----------------------------------------------------------------------------------------------

// q [M, K] or [E, M, K] with rows that may be further apart than K; scales [.., M, k] or, of blocks, [.., M / 128, k].
mds::ScaledOperand operand(const Tensor& q, const Tensor& scales, const char* name) {
  const int64_t d = q.dim();
  STD_TORCH_CHECK((d == 2 || d == 3) && scales.dim() == d && q.scalar_type() == ScalarType::Float8_e4m3fn &&
                      scales.scalar_type() == ScalarType::Float,
                  name, " must be E4M3 matrices with float32 scales");
  const int64_t matrices = d == 3 ? q.size(0) : 1, rows = q.size(d - 2), columns = q.size(d - 1);
  const int64_t pitch = q.stride(d - 2);
  STD_TORCH_CHECK(q.stride(d - 1) == 1 && pitch % 16 == 0 && reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0 &&
                      (d == 2 || matrices == 1 || q.stride(0) == rows * pitch),
                  name, " must have contiguous rows that start at multiples of 16 bytes");
  STD_TORCH_CHECK(scales.is_contiguous() && scales.size(d - 1) >= tiles_of(columns), name, " has too few scales");
  const int64_t scale_rows = scales.size(d - 2);
  STD_TORCH_CHECK(scale_rows == rows || scale_rows == tiles_of(rows), name, " has scales for other rows");
  return {pointer<mds::e4m3>(q), pointer<float>(scales), int(matrices), rows, columns, pitch, scale_rows != rows,
          scales.size(d - 1)};
}

void check_product(const mds::ScaledOperand& a, const mds::ScaledOperand& b) {
  STD_TORCH_CHECK(!a.blocks, "a must have scales of 1x128 tiles");
  STD_TORCH_CHECK(b.columns >= a.columns && b.columns < a.columns + mds::kTile, "a and b have different K");
}

ScalarType result_type(bool fp32) { return fp32 ? ScalarType::Float : ScalarType::BFloat16; }

Tensor scaled_mm(const Tensor& a_q, const Tensor& a_s, const Tensor& b_q, const Tensor& b_s, bool fp32) {
  const auto a = operand(a_q, a_s, "a"), b = operand(b_q, b_s, "b");
  check_product(a, b);
  STD_TORCH_CHECK(a.matrices == 1 && b.matrices == 1, "a and b must be matrices");
  const Launch launch(a_q);
  Tensor out = make(a_q, {a.rows, b.rows}, result_type(fp32));
  mds::scaled_mm(a, b, {out.data_ptr(), fp32}, launch.stream());
  return out;
}

Tensor grouped_scaled_mm(const Tensor& a_q, const Tensor& a_s, const Tensor& b_q, const Tensor& b_s,
                         const Tensor& tiles, bool tall, bool fp32) {
  const auto a = operand(a_q, a_s, "a"), b = operand(b_q, b_s, "b");
  check_product(a, b);
  check_dense(tiles, ScalarType::Int, "tiles");
  STD_TORCH_CHECK(tiles.dim() == 2 && tiles.size(1) == 3, "tiles must be [T, 3]");
  STD_TORCH_CHECK(a.matrices == 1, "a must be a matrix");
  const Launch launch(a_q);
  Tensor out = make(a_q, {a.rows, b.rows}, result_type(fp32));
  mds::grouped_scaled_mm(a, b, {pointer<int>(tiles), int(tiles.size(0))}, tall, {out.data_ptr(), fp32},
                         launch.stream());
  return out;
}

Tensor grouped_scaled_mm_wgrad(const Tensor& a_q, const Tensor& a_s, const Tensor& b_q, const Tensor& b_s,
                               const Tensor& groups, bool fp32) {
  const auto a = operand(a_q, a_s, "a"), b = operand(b_q, b_s, "b");
  check_product(a, b);
  check_dense(groups, ScalarType::Int, "groups");
  STD_TORCH_CHECK(groups.dim() == 2 && groups.size(1) == 2, "groups must be [E, 2]");
  STD_TORCH_CHECK(a.matrices == 1 && b.matrices == 1 && !b.blocks, "a and b must be matrices with 1x128 scales");
  STD_TORCH_CHECK(a.columns % mds::kTile == 0, "groups must be padded to tiles of 128");
  const Launch launch(a_q);
  Tensor out = make(a_q, {groups.size(0), a.rows, b.rows}, result_type(fp32));
  mds::grouped_scaled_mm_wgrad(a, b, {pointer<int>(groups), int(groups.size(0))}, {out.data_ptr(), fp32},
                               launch.stream());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(megatron_deepseek, m) {
  m.def("rope_tail(Tensor x, Tensor table, int nope, bool inverse) -> Tensor");
  m.def("keys_values(Tensor kv, Tensor k_rope, Tensor? table, int nope) -> (Tensor, Tensor)");
  m.def("keys_values_backward(Tensor grad_k, Tensor grad_v, Tensor? table, int nope) -> (Tensor, Tensor)");
  m.def("cross_entropy_statistics(Tensor logits, Tensor labels, int first_id) -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, int first_id, Tensor max, Tensor sum, Tensor grad) "
        "-> ()");
  m.def("route(Tensor experts, int num_experts, int align) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gather_rows(Tensor x, Tensor copy_of_slot, Tensor slot_of_copy) -> Tensor");
  m.def("combine_rows(Tensor y, Tensor copy_of_slot, Tensor slot_of_copy, Tensor? weights) -> Tensor");
  m.def("combine_backward(Tensor grad, Tensor y, Tensor copy_of_slot, Tensor weights) -> (Tensor, Tensor)");
  m.def("quantize_rows(Tensor x, bool power_of_two) -> (Tensor, Tensor)");
  m.def("quantize_columns(Tensor x, Tensor? tiles, bool power_of_two) -> (Tensor, Tensor)");
  m.def("quantize_both(Tensor x, Tensor? tiles, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("quantize_blocks(Tensor w, bool transpose, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("retile_columns(Tensor q, Tensor scales, Tensor? tiles, bool power_of_two) -> (Tensor, Tensor)");
  m.def("swiglu_quantize_rows(Tensor gate, Tensor up, bool power_of_two) -> (Tensor, Tensor)");
  m.def("swiglu_quantize_columns(Tensor gate, Tensor up, Tensor? tiles, bool power_of_two) -> (Tensor, Tensor)");
  m.def("swiglu_backward_quantize(Tensor grad, Tensor gate, Tensor up, Tensor? tiles, bool power_of_two) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("norm_quantize_rows(Tensor x, Tensor weight, float eps, bool keep, bool power_of_two) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("norm_backward_quantize(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? tiles, bool power_of_two) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("scaled_mm(Tensor a_q, Tensor a_s, Tensor b_q, Tensor b_s, bool fp32) -> Tensor");
  m.def("grouped_scaled_mm(Tensor a_q, Tensor a_s, Tensor b_q, Tensor b_s, Tensor tiles, bool tall, bool fp32) "
        "-> Tensor");
  m.def("grouped_scaled_mm_wgrad(Tensor a_q, Tensor a_s, Tensor b_q, Tensor b_s, Tensor groups, bool fp32) -> Tensor");
}

#ifdef MEGATRON_DEEPSEEK_EMULATED
STABLE_TORCH_LIBRARY_IMPL(megatron_deepseek, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(megatron_deepseek, CUDA, m) {
#endif
#define REGISTER(name) m.impl(#name, TORCH_BOX(&name))
  REGISTER(rope_tail);
  REGISTER(keys_values);
  REGISTER(keys_values_backward);
  REGISTER(cross_entropy_statistics);
  REGISTER(cross_entropy_gradient_);
  REGISTER(route);
  REGISTER(gather_rows);
  REGISTER(combine_rows);
  REGISTER(combine_backward);
  REGISTER(quantize_rows);
  REGISTER(quantize_columns);
  REGISTER(quantize_both);
  REGISTER(quantize_blocks);
  REGISTER(retile_columns);
  REGISTER(swiglu_quantize_rows);
  REGISTER(swiglu_quantize_columns);
  REGISTER(swiglu_backward_quantize);
  REGISTER(norm_quantize_rows);
  REGISTER(norm_backward_quantize);
  REGISTER(scaled_mm);
  REGISTER(grouped_scaled_mm);
  REGISTER(grouped_scaled_mm_wgrad);
#undef REGISTER
}
