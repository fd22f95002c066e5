// Runs what csrc/ does on the host for a launch, as nvcc compiled it, on a CUDA runtime and a driver that only print, as
// JSON, what they are asked for. The emulation has launches and tensor maps of its own (launch.cuh, hopper.cuh), so that
// nothing else without a GPU runs these lines. tests/unit/ops/backends/test_csrc_launches.py knows what each must be.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace {

struct Recorded {  // in the place of a tensor map's 128 bytes
  const void* address;
  unsigned long long sizes[2], stride;
  unsigned box[2], steps[2];
  int type, rank, interleave, swizzle, promotion, fill;
};
static_assert(sizeof(Recorded) <= sizeof(CUtensorMap), "a map has room for what was asked for");

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}
std::map<const void*, int> allowed;  // bytes of shared memory
int capability = 9;
bool has_encoder = true;
cudaError_t answer = cudaSuccess;
const char* call = "";

CUresult CUDAAPI encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                        const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                        const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                        CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  Recorded made{address, {sizes[0], sizes[1]}, strides[0], {box[0], box[1]}, {steps[0], steps[1]}, type, int(rank),
                interleave, swizzle, promotion, fill};
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

void print_map(const void* parameter) {
  Recorded map;
  std::memcpy(&map, parameter, sizeof map);
  std::printf("{\"address\": %llu, \"sizes\": [%llu, %llu], \"stride\": %llu, \"box\": [%u, %u], \"steps\": [%u, %u], "
              "\"kind\": [%d, %d, %d, %d, %d, %d]}",
              (unsigned long long)map.address, map.sizes[0], map.sizes[1], map.stride, map.box[0], map.box[1],
              map.steps[0], map.steps[1], map.type, map.rank, map.interleave, map.swizzle, map.promotion, map.fill);
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }

cudaError_t cudaGetDevice(int* device) {
  *device = 3;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 3) return cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : attribute == cudaDevAttrComputeCapabilityMajor ? capability
                                                                                                           : -1;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "as it was told to"; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) allowed[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = has_encoder && std::string(name) == "cuTensorMapEncodeTiled" && version >= 12000;
  *function = known ? reinterpret_cast<void*>(encode) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  int cluster[3] = {1, 1, 1}, cooperative = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& each = config->attrs[i];
    if (each.id == cudaLaunchAttributeCooperative) cooperative = each.val.cooperative;
    if (each.id == cudaLaunchAttributeClusterDimension)
      cluster[0] = each.val.clusterDim.x, cluster[1] = each.val.clusterDim.y, cluster[2] = each.val.clusterDim.z;
  }
  const std::string& name = names()[kernel];
  std::printf("{\"call\": \"%s\", \"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": [%u, %u, %u], \"shared\": %zu, "
              "\"allowed\": %d, \"stream\": %llu, \"cluster\": [%d, %d, %d], \"cooperative\": %d, \"maps\": [",
              call, name.c_str(), config->gridDim.x, config->gridDim.y, config->gridDim.z, config->blockDim.x,
              config->blockDim.y, config->blockDim.z, config->dynamicSmemBytes, allowed[kernel],
              (unsigned long long)config->stream, cluster[0], cluster[1], cluster[2], cooperative);
  if (name.find("gemm_kernel") != std::string::npos)
    for (int i = 0; i < 3; ++i) {
      print_map(arguments[i]);
      if (i < 2) std::printf(", ");
    }
  std::printf("]}\n");
  return answer;
}

}  // extern "C"

namespace {

template <typename T>
T* at(unsigned long long address) {
  return reinterpret_cast<T*>(address);
}

template <typename Function>
void named(const char* name, Function function) {
  call = name;
  try {
    function();
  } catch (const std::runtime_error& error) {
    std::printf("{\"call\": \"%s\", \"error\": \"%s\"}\n", name, error.what());
  }
}

}  // namespace

int main() {
  using namespace mds;
  void* stream = at<void>(0x77);
  const auto a = [](int64_t rows, int64_t columns, int64_t pitch) {
    return ScaledOperand{at<e4m3>(0x1000), at<float>(0x2000), 1, rows, columns, pitch, false, (columns + 127) / 128};
  };
  const auto b = [](int matrices, int64_t rows, int64_t columns, int64_t pitch, bool blocks) {
    return ScaledOperand{at<e4m3>(0x3000), at<float>(0x4000), matrices, rows, columns, pitch, blocks,
                         (columns + 127) / 128};
  };
  const GemmOutput narrow{at<void>(0x5000), false}, wide{at<void>(0x5000), true};
  const auto dense = [&](const char* name, GemmOutput out, bool tma_store, bool clusters) {
    named(name, [&] { scaled_mm(a(16400, 600, 640), b(1, 400, 600, 656, true), out, {tma_store, clusters}, stream); });
  };
  has_encoder = false;
  dense("without the driver's encoder", narrow, false, false);
  has_encoder = true;
  dense("dense", narrow, false, false);
  dense("float32", wide, true, false);
  dense("tma_store", narrow, true, false);
  dense("clusters", narrow, false, true);
  named("small", [&] { scaled_mm(a(100, 128, 128), b(1, 64, 128, 128, true), narrow, {}, stream); });
  named("unaligned", [&] { scaled_mm(a(100, 128, 128), b(1, 391, 128, 128, true), narrow, {true, false}, stream); });
  named("grouped", [&] {
    grouped_scaled_mm(a(1000, 256, 256), b(3, 200, 256, 256, true), {at<int>(0x6000), 9}, false, narrow, {}, stream);
  });
  named("wgrad", [&] {
    grouped_scaled_mm_wgrad(a(300, 1024, 1024), b(1, 136, 1024, 1024, false), {at<int>(0x6000), 3}, wide, false, stream);
  });
  named("no tiles", [&] {
    grouped_scaled_mm(a(0, 256, 256), b(3, 200, 256, 256, true), {at<int>(0x6000), 0}, false, narrow, {}, stream);
  });
  capability = 8;
  dense("Ampere", narrow, false, false);
  capability = 10;
  dense("Blackwell", narrow, false, false);
  capability = 9;
  answer = cudaErrorInvalidValue;
  dense("refused", narrow, false, false);
  answer = cudaSuccess;

  const Codes codes{at<e4m3>(0x1000), at<float>(0x2000)}, columns{at<e4m3>(0x3000), at<float>(0x4000)};
  const RowTiles tiles{nullptr, 3};
  named("quantize_rows", [&] { quantize_rows({at<void>(0x7000), true, 520}, 300, 520, codes, true, stream); });
  named("quantize_columns", [&] {
    quantize_columns({at<void>(0x7000), true, 520}, 300, 520, codes, columns, tiles, true, stream);
  });
  named("quantize_blocks", [&] {
    quantize_blocks({at<void>(0x7000), false, 520}, 4, 300, 520, codes, columns, false, stream);
  });
  named("too many blocks", [&] {
    quantize_rows({at<void>(0x7000), true, 8}, int64_t(1) << 31, 8, codes, true, stream);
  });
  named("norm_weight", [&] {
    norm_weight_gradient(at<bf16>(0x1000), at<bf16>(0x1000), at<float>(0x1000), at<float>(0x1000), 5000, 7168, stream);
  });
  named("e5m6", [&] { quantize_e5m6({at<void>(0x7000), false, 520}, 300, 520, at<uint32_t>(0x1000), at<float>(0x1000), stream); });
  const RouteShape few = route_shape(1000, 8, 128), many = route_shape(4096 * 8, 256, 1), most = route_shape(1 << 20, 256, 1);
  for (const RouteShape& shape : {few, many, most})
    named("route", [&] {
      route(at<int64_t>(0x1000), shape, at<int>(1), at<int>(1), at<int>(1), at<int>(1), at<int>(1), stream);
    });
  named("gather", [&] { gather_rows(at<void>(0x1000), at<int>(1), 8, at<void>(0x1000), 1000, 7168, stream); });
  named("gather of scales", [&] { gather_rows(at<void>(0x1000), at<int>(1), 8, at<void>(0x1000), 1001, 224, stream); });
  named("combine", [&] { combine_rows(at<bf16>(16), at<int>(1), nullptr, 77, 8, at<bf16>(16), 7168, stream); });
  named("combine_backward", [&] {
    combine_backward(at<bf16>(16), at<bf16>(16), at<int>(1), at<float>(16), 77, 8, at<bf16>(16), at<float>(16), 7168, stream);
  });
  const RopeShape rope{77, 11, 16, 128, 64, 128};
  named("rope", [&] { rope_tail({at<bf16>(16), 1, 1, 1}, at<float>(16), at<bf16>(16), rope, false, stream); });
  named("keys_values", [&] {
    keys_values_backward({at<bf16>(16), 1, 1, 1}, {at<bf16>(16), 1, 1, 1}, nullptr, at<bf16>(16), at<bf16>(16), rope, stream);
  });
  named("cross_entropy", [&] {
    cross_entropy_statistics(at<bf16>(16), at<int64_t>(16), 0, 77, 1000, at<float>(16), at<float>(16), at<float>(16), stream);
  });
}
