// Block-scaled GEMMs (gemm_fp8.cu).
#include "binding.h"

namespace {

using namespace mds::binding;

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

Tensor scaled_mm(const Tensor& a_q, const Tensor& a_s, const Tensor& b_q, const Tensor& b_s, bool fp32,
                 bool tma_store, bool clusters) {
  const auto a = operand(a_q, a_s, "a"), b = operand(b_q, b_s, "b");
  check_product(a, b);
  STD_TORCH_CHECK(a.matrices == 1 && b.matrices == 1, "a and b must be matrices");
  const Launch launch(a_q);
  Tensor out = make(a_q, {a.rows, b.rows}, result_type(fp32));
  mds::scaled_mm(a, b, {out.data_ptr(), fp32}, {tma_store, clusters}, launch.stream());
  return out;
}

Tensor grouped_scaled_mm(const Tensor& a_q, const Tensor& a_s, const Tensor& b_q, const Tensor& b_s,
                         const Tensor& tiles, bool tall, bool fp32, bool tma_store, bool clusters) {
  const auto a = operand(a_q, a_s, "a"), b = operand(b_q, b_s, "b");
  check_product(a, b);
  check_dense(tiles, ScalarType::Int, "tiles");
  STD_TORCH_CHECK(tiles.dim() == 2 && tiles.size(1) == 3, "tiles must be [T, 3]");
  STD_TORCH_CHECK(a.matrices == 1, "a must be a matrix");
  const Launch launch(a_q);
  Tensor out = make(a_q, {a.rows, b.rows}, result_type(fp32));
  mds::grouped_scaled_mm(a, b, {pointer<int>(tiles), int(tiles.size(0))}, tall, {out.data_ptr(), fp32},
                         {tma_store, clusters}, launch.stream());
  return out;
}

Tensor grouped_scaled_mm_wgrad(const Tensor& a_q, const Tensor& a_s, const Tensor& b_q, const Tensor& b_s,
                               const Tensor& groups, bool fp32, bool clusters) {
  const auto a = operand(a_q, a_s, "a"), b = operand(b_q, b_s, "b");
  check_product(a, b);
  check_dense(groups, ScalarType::Int, "groups");
  STD_TORCH_CHECK(groups.dim() == 2 && groups.size(1) == 2, "groups must be [E, 2]");
  STD_TORCH_CHECK(a.matrices == 1 && b.matrices == 1 && !b.blocks, "a and b must be matrices with 1x128 scales");
  STD_TORCH_CHECK(a.columns % mds::kTile == 0, "groups must be padded to tiles of 128");
  const Launch launch(a_q);
  Tensor out = make(a_q, {groups.size(0), a.rows, b.rows}, result_type(fp32));
  mds::grouped_scaled_mm_wgrad(a, b, {pointer<int>(groups), int(groups.size(0))}, {out.data_ptr(), fp32}, clusters,
                               launch.stream());
  return out;
}

}  // namespace

OPERATORS(m) {
  m.def("scaled_mm(Tensor a_q, Tensor a_s, Tensor b_q, Tensor b_s, bool fp32, bool tma_store=False, "
        "bool clusters=False) -> Tensor");
  m.def("grouped_scaled_mm(Tensor a_q, Tensor a_s, Tensor b_q, Tensor b_s, Tensor tiles, bool tall, bool fp32, "
        "bool tma_store=False, bool clusters=False) -> Tensor");
  m.def("grouped_scaled_mm_wgrad(Tensor a_q, Tensor a_s, Tensor b_q, Tensor b_s, Tensor groups, bool fp32, "
        "bool clusters=False) -> Tensor");
}

KERNELS(m) {
  KERNEL(m, scaled_mm);
  KERNEL(m, grouped_scaled_mm);
  KERNEL(m, grouped_scaled_mm_wgrad);
}
