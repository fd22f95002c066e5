// Cross-entropy over a part of the vocabulary (cross_entropy.cu).
#include "binding.h"

namespace {

using namespace mds::binding;

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

}  // namespace

OPERATORS(m) {
  m.def("cross_entropy_statistics(Tensor logits, Tensor labels, int first_id) -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, int first_id, Tensor max, Tensor sum, Tensor grad) "
        "-> ()");
}

KERNELS(m) {
  KERNEL(m, cross_entropy_statistics);
  KERNEL(m, cross_entropy_gradient_);
}
