// The slots of token copies sorted by expert (route.cu), and moving rows there and back (permute.cu).
#include "binding.h"

namespace {

using namespace mds::binding;

Tensors4 route(const Tensor& experts, int64_t num_experts, int64_t align) {
  check_dense(experts, ScalarType::Long, "experts");
  STD_TORCH_CHECK(num_experts > 0 && num_experts <= mds::kMaxExperts, "at most ", mds::kMaxExperts, " experts");
  STD_TORCH_CHECK(align > 0 && experts.numel() + num_experts * align < (int64_t(1) << 31), "slots are int32");
  const Launch launch(experts);
  const auto shape = mds::route_shape(experts.numel(), int(num_experts), int(align));
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
  Tensor grad_weights = make(weights, {weights.size(0), weights.size(1)}, ScalarType::Float);
  torch::stable::zero_(grad_weights);  // copies without a slot have none
  mds::combine_backward(pointer<mds::bf16>(grad), pointer<mds::bf16>(y), pointer<int>(copy_of_slot),
                        pointer<float>(weights), y.size(0), int(weights.size(1)), pointer<mds::bf16>(grad_y),
                        pointer<float>(grad_weights), int(y.size(1)), launch.stream());
  return {grad_y, grad_weights};
}

}  // namespace

OPERATORS(m) {
  m.def("route(Tensor experts, int num_experts, int align) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gather_rows(Tensor x, Tensor copy_of_slot, Tensor slot_of_copy) -> Tensor");
  m.def("combine_rows(Tensor y, Tensor copy_of_slot, Tensor slot_of_copy, Tensor? weights) -> Tensor");
  m.def("combine_backward(Tensor grad, Tensor y, Tensor copy_of_slot, Tensor weights) -> (Tensor, Tensor)");
}

KERNELS(m) {
  KERNEL(m, route);
  KERNEL(m, gather_rows);
  KERNEL(m, combine_rows);
  KERNEL(m, combine_backward);
}
