// FP8 quantisation, alone and fused with norm and SwiGLU (quantize.cu).
#include "binding.h"

namespace {

using namespace mds::binding;

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

// Rows may be further apart than their width, as halves of a GEMM's output are.
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

// Returns codes and scales of w [M, K] or [E, M, K], and those of its transpose [E, K, tiles of M * 128] if asked for.
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

// Returns the tiles of the gradients of gate and up side by side, [M, 2 I].
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

mds::KeptGateUp kept_gate_up(const Tensor& gate_q, const Tensor& gate_s, const Tensor& up_q, const Tensor& up_s) {
  const auto [rows, columns] = check_matrix(gate_q, ScalarType::Float8_e4m3fn, "gate");
  const auto other = check_matrix(up_q, ScalarType::Float8_e4m3fn, "up");
  STD_TORCH_CHECK(other.rows == rows && other.columns == columns, "gate and up must have one shape");
  for (const Tensor& scales : {gate_s, up_s}) {
    check_dense(scales, ScalarType::Float, "scales");
    STD_TORCH_CHECK(scales.numel() == rows * tiles_of(columns), "scales must be those of 1x128 tiles");
  }
  return {{pointer<mds::e4m3>(gate_q), pointer<float>(gate_s)}, {pointer<mds::e4m3>(up_q), pointer<float>(up_s)}};
}

Tensors2 kept_swiglu_quantize_columns(const Tensor& gate_q, const Tensor& gate_s, const Tensor& up_q,
                                      const Tensor& up_s, const std::optional<Tensor>& tiles, bool power_of_two) {
  const auto x = kept_gate_up(gate_q, gate_s, up_q, up_s);
  const int64_t rows = gate_q.size(0), columns = gate_q.size(1);
  const auto table = row_tiles(tiles, rows);
  const Launch launch(gate_q);
  const Quantized out = make_columns(gate_q, columns, table.count);
  mds::kept_swiglu_quantize_columns(x, rows, int(columns), out.codes(), table, power_of_two, launch.stream());
  return {out.q, out.scales};
}

// Returns the tiles of the gradients of gate and up side by side, [M, 2 I].
Tensors4 kept_swiglu_backward_quantize(const Tensor& grad, const Tensor& gate_q, const Tensor& gate_s,
                                       const Tensor& up_q, const Tensor& up_s, const std::optional<Tensor>& tiles,
                                       bool power_of_two) {
  const auto x = kept_gate_up(gate_q, gate_s, up_q, up_s);
  const int64_t rows = gate_q.size(0), columns = gate_q.size(1);
  check_dense(grad, ScalarType::BFloat16, "grad");
  STD_TORCH_CHECK(grad.size(0) == rows && grad.size(1) == columns, "grad must have gate's shape");
  const auto table = row_tiles(tiles, rows);
  const Launch launch(grad);
  const Quantized by_row = make_rows(grad, rows, 2 * columns), by_column = make_columns(grad, 2 * columns, table.count);
  mds::kept_swiglu_backward_quantize(pointer<mds::bf16>(grad), x, rows, int(columns), by_row.codes(),
                                     by_column.codes(), table, power_of_two, launch.stream());
  return {by_row.q, by_row.scales, by_column.q, by_column.scales};
}

void check_norm(const Tensor& weight, int columns) {
  check_dense(weight, ScalarType::Float, "weight");
  STD_TORCH_CHECK(weight.numel() == columns, "weight must have a number for each column");
}

// Returns codes, scales, rstd [M], and the normalised rows themselves if `keep`, else none.
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

// Returns codes and scales by row and by column of the gradient of a norm's input, and the weight's gradient.
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

}  // namespace

OPERATORS(m) {
  m.def("quantize_rows(Tensor x, bool power_of_two) -> (Tensor, Tensor)");
  m.def("quantize_columns(Tensor x, Tensor? tiles, bool power_of_two) -> (Tensor, Tensor)");
  m.def("quantize_both(Tensor x, Tensor? tiles, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("quantize_blocks(Tensor w, bool transpose, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("retile_columns(Tensor q, Tensor scales, Tensor? tiles, bool power_of_two) -> (Tensor, Tensor)");
  m.def("swiglu_quantize_rows(Tensor gate, Tensor up, bool power_of_two) -> (Tensor, Tensor)");
  m.def("swiglu_quantize_columns(Tensor gate, Tensor up, Tensor? tiles, bool power_of_two) -> (Tensor, Tensor)");
  m.def("swiglu_backward_quantize(Tensor grad, Tensor gate, Tensor up, Tensor? tiles, bool power_of_two) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("kept_swiglu_quantize_columns(Tensor gate_q, Tensor gate_s, Tensor up_q, Tensor up_s, Tensor? tiles, "
        "bool power_of_two) -> (Tensor, Tensor)");
  m.def("kept_swiglu_backward_quantize(Tensor grad, Tensor gate_q, Tensor gate_s, Tensor up_q, Tensor up_s, "
        "Tensor? tiles, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("norm_quantize_rows(Tensor x, Tensor weight, float eps, bool keep, bool power_of_two) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("norm_backward_quantize(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? tiles, bool power_of_two) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

KERNELS(m) {
  KERNEL(m, quantize_rows);
  KERNEL(m, quantize_columns);
  KERNEL(m, quantize_both);
  KERNEL(m, quantize_blocks);
  KERNEL(m, retile_columns);
  KERNEL(m, swiglu_quantize_rows);
  KERNEL(m, swiglu_quantize_columns);
  KERNEL(m, swiglu_backward_quantize);
  KERNEL(m, kept_swiglu_quantize_columns);
  KERNEL(m, kept_swiglu_backward_quantize);
  KERNEL(m, norm_quantize_rows);
  KERNEL(m, norm_backward_quantize);
}
