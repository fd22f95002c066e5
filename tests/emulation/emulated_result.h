// What csrc/binding.h gives kernels to write in the emulation: nobody's numbers yet, before a guard (emulation.h).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "emulation.h"

inline torch::stable::Tensor emulated_result(const torch::stable::Tensor& like,
                                             torch::headeronly::IntHeaderOnlyArrayRef shape,
                                             torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t numbers = 1, stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1), numbers *= shape[i])
    strides[i] = stride;
  const int64_t guard = emulation::kGuardBytes;  // in numbers, which have a byte at least
  const int64_t with_guard = numbers + guard;
  const torch::stable::Tensor whole =
      torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(&with_guard, 1), dtype);
  const int64_t size = int64_t(whole.element_size());
  using torch::headeronly::ScalarType;
  emulation::guard_result(whole.data_ptr(), numbers * size,
                          dtype == ScalarType::Int || dtype == ScalarType::Byte);
  AtenTensorHandle inner = nullptr;  // no view to autograd, as a result on a GPU is none
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(whole.get(), int64_t(shape.size()), shape.data(),
                                                        strides.data(), 0, &inner));
  return torch::stable::Tensor(inner);
}
