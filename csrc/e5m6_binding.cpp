// E5M6 (e5m6.cu, quantize.cu).
#include "binding.h"

namespace {

using namespace mds::binding;

struct Packed {
  const uint32_t* words;
  int64_t rows;
  int columns;
};

int64_t bytes_of(int64_t columns) { return columns / 2 * 3; }

Packed check_packed(const Tensor& packed, const Tensor& scales) {
  check_dense(packed, ScalarType::Byte, "packed");
  check_dense(scales, ScalarType::Float, "scales");
  STD_TORCH_CHECK(packed.dim() == 2 && packed.size(1) % 12 == 0, "packed must have rows of a multiple of 12 bytes");
  const int64_t rows = packed.size(0), columns = packed.size(1) / 3 * 2;
  STD_TORCH_CHECK(scales.dim() == 2 && scales.size(0) == rows && scales.size(1) == tiles_of(columns),
                  "scales must be those of 1x128 tiles");
  return {pointer<uint32_t>(packed), rows, int(columns)};
}

// Returns packed codes [M, 3 K / 2] and scales [M, k].
Tensors2 quantize_e5m6(const Tensor& x) {
  const bool is_float = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(x.dim() == 2 && (is_float || x.scalar_type() == ScalarType::BFloat16),
                  "x must be a bfloat16 or float32 matrix");
  check_vectors(x.size(1), "the columns of a quantised matrix");
  STD_TORCH_CHECK(x.stride(1) == 1 && x.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0,
                  "x must have contiguous rows that start at multiples of 16 bytes");
  const Launch launch(x);
  const Tensor packed = make(x, {x.size(0), bytes_of(x.size(1))}, ScalarType::Byte);
  const Tensor scales = make(x, {x.size(0), tiles_of(x.size(1))}, ScalarType::Float);
  mds::quantize_e5m6({x.data_ptr(), is_float, x.stride(0)}, x.size(0), int(x.size(1)), pointer<uint32_t>(packed),
                     pointer<float>(scales), launch.stream());
  return {packed, scales};
}

Tensor dequantize_e5m6(const Tensor& packed, const Tensor& scales, bool fp32) {
  const auto x = check_packed(packed, scales);
  const Launch launch(packed);
  const Tensor out = make(packed, {x.rows, x.columns}, fp32 ? ScalarType::Float : ScalarType::BFloat16);
  mds::dequantize_e5m6(x.words, pointer<float>(scales), x.rows, x.columns, {out.data_ptr(), fp32}, launch.stream());
  return out;
}

// Returns 128x1 tiles in E4M3: codes [K, T * 128] and scales [K, T].
Tensors2 retile_e5m6(const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& tiles,
                     bool power_of_two) {
  const auto x = check_packed(packed, scales);
  if (tiles) {
    check_dense(*tiles, ScalarType::Int, "tiles");
    STD_TORCH_CHECK(tiles->dim() == 2 && tiles->size(1) == 2, "tiles must be [T, 2]");
  }
  const mds::RowTiles table{tiles ? pointer<int>(*tiles) : nullptr, int(tiles ? tiles->size(0) : tiles_of(x.rows))};
  const Launch launch(packed);
  const Tensor q = make(packed, {x.columns, int64_t(table.count) * mds::kTile}, ScalarType::Float8_e4m3fn);
  const Tensor s = make(packed, {x.columns, table.count}, ScalarType::Float);
  mds::retile_e5m6(x.words, pointer<float>(scales), x.rows, x.columns, {pointer<mds::e4m3>(q), pointer<float>(s)},
                   table, power_of_two, launch.stream());
  return {q, s};
}

}  // namespace

OPERATORS(m) {
  m.def("quantize_e5m6(Tensor x) -> (Tensor, Tensor)");
  m.def("dequantize_e5m6(Tensor packed, Tensor scales, bool fp32) -> Tensor");
  m.def("retile_e5m6(Tensor packed, Tensor scales, Tensor? tiles, bool power_of_two) -> (Tensor, Tensor)");
}

KERNELS(m) {
  KERNEL(m, quantize_e5m6);
  KERNEL(m, dequantize_e5m6);
  KERNEL(m, retile_e5m6);
}
