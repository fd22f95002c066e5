// RoPE, and the keys and values of MLA (rope.cu).
#include "binding.h"

namespace {

using namespace mds::binding;

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

}  // namespace

OPERATORS(m) {
  m.def("rope_tail(Tensor x, Tensor table, int nope, bool inverse) -> Tensor");
  m.def("keys_values(Tensor kv, Tensor k_rope, Tensor? table, int nope) -> (Tensor, Tensor)");
  m.def("keys_values_backward(Tensor grad_k, Tensor grad_v, Tensor? table, int nope) -> (Tensor, Tensor)");
}

KERNELS(m) {
  KERNEL(m, rope_tail);
  KERNEL(m, keys_values);
  KERNEL(m, keys_values_backward);
}
