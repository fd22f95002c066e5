// Shared by every *_binding.cpp. They register the kernels as torch.ops.megatron_deepseek.*, by LibTorch's stable ABI:
// one build serves every torch from the one it names on, and every Python. The bindings check tensors, allocate results
// and call the functions of kernels.h on the current stream; derivatives and the shapes of results are in
// megatron_deepseek/ops/backends/kernels.py.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "kernels.h"
#ifdef MEGATRON_DEEPSEEK_EMULATED
#include "emulated_result.h"
#endif

// OPERATORS(m) { m.def("name(Tensor x) -> Tensor"); }    declares operators with their arguments
// KERNELS(m) { KERNEL(m, name); }                        binds them to the functions of this file
#define OPERATORS(m) STABLE_TORCH_LIBRARY_FRAGMENT(megatron_deepseek, m)
#ifdef MEGATRON_DEEPSEEK_EMULATED
#define KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(megatron_deepseek, CPU, m)
#else
#define KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(megatron_deepseek, CUDA, m)
#endif
#define KERNEL(m, name) m.impl(#name, TORCH_BOX(&name))

namespace mds::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The device that a call works on and its current stream. In the emulation each call has a stream of its own, so that a
// kernel on another one, or without a guard of the device, is an error there (launch.cuh).
class Launch {
 public:
#ifdef MEGATRON_DEEPSEEK_EMULATED
  explicit Launch(const Tensor&) {
    emulation::machine().stream = this;
    emulation::machine().guards.clear();
  }
  ~Launch() { emulation::machine().stream = nullptr; }
  Launch(const Launch&) = delete;
  void* stream() const { return const_cast<Launch*>(this); }
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

inline const float* floats(const std::optional<Tensor>& x) { return x ? pointer<float>(*x) : nullptr; }

// Integer tensors are read one number at a time, all others 16 bytes at a time.
inline void check_dense(const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has another dtype than the kernel takes");
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  if (dtype == ScalarType::Int || dtype == ScalarType::Long) return;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name, " must start at a multiple of 16 bytes");
}

inline void check_vectors(int64_t size, const char* name) {
  STD_TORCH_CHECK(size % 8 == 0, name, " must be a multiple of 8, is ", size);
}

inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.begin(), sizes.size());
#ifdef MEGATRON_DEEPSEEK_EMULATED
  return emulated_result(like, shape, dtype);
#else
  return torch::stable::new_empty(like, shape, dtype);
#endif
}

inline int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

}  // namespace mds::binding
