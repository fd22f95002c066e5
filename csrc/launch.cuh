// Launches a kernel on a caller's stream, with as much shared memory as it asks for, and checks for errors.
#pragma once

#include <stdexcept>
#include <string>

#include "platform.cuh"

namespace mds {

struct Grid {
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  bool all_at_once = false;  // blocks wait for each other: they must all be resident (a cooperative launch)
  unsigned rows = 1;         // blockIdx.y
  unsigned cluster = 1;      // neighbouring blocks that reach each other's shared memory
};

inline unsigned one_dimension(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("a grid of more than 2^31 - 1 blocks");
  return unsigned(blocks);
}

inline void check_rows(const Grid& grid, unsigned most) {
  if (grid.rows > most)
    throw std::runtime_error("a grid of " + std::to_string(grid.rows) + " rows of blocks, which end at " +
                             std::to_string(most));
}

#ifdef MEGATRON_DEEPSEEK_EMULATED

constexpr unsigned kMostRows = 256;  // few, so that tests reach it

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, void* stream, Arguments&&... arguments) {
  if (stream == nullptr || stream != emulation::machine().stream)
    throw std::runtime_error("a kernel was launched on another stream than that of its call");
  if (grid.blocks == 0 || grid.rows == 0) return;
  check_rows(grid, kMostRows);
  emulation::run({grid.blocks, grid.rows, grid.threads, grid.shared_bytes, grid.all_at_once, grid.cluster},
                 [&] { kernel(Parameters(arguments)...); });
}

// Few, and no power of two: persistent kernels must take several turns.
inline int multiprocessors() {
  if (emulation::machine().stream == nullptr) throw std::runtime_error("the device was asked before it was chosen");
  return 5;
}

#else

constexpr unsigned kMostRows = 65535;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, void* stream, Arguments&&... arguments) {
  if (grid.blocks == 0 || grid.rows == 0) return;
  check_rows(grid, kMostRows);
  if (grid.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes)),
          "shared memory of a kernel");
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (grid.all_at_once) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = grid.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks, grid.rows);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "launch of a kernel");
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return count;
}

#endif

}  // namespace mds
