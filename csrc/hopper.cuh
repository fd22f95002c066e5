// Hopper's asynchronous instructions as named functions: mbarriers, the copy engine (TMA) and warpgroup GEMMs (wgmma).
// Each is one PTX instruction; the PTX ISA's sections are named where the operands are not obvious.
//
// tests/emulation/hopper_emulation.h has the same functions for the CPU, written from the same sections.
#pragma once

#include "launch.cuh"
#include "numbers.cuh"

#ifndef MEGATRON_DEEPSEEK_EMULATED
#include <cuda.h>
#endif

namespace mds::hopper {

// A tile's row is 128 bytes, as the 128-byte swizzle requires. In every 8 rows (1,024 bytes) the 16-byte chunk c of row
// r is stored at chunk c ^ r, so that neither the copy engine nor wgmma has bank conflicts.
constexpr int kSwizzleRow = 128;
constexpr int kSwizzleAtom = 1024;

constexpr __host__ __device__ uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// Shared memory descriptor of wgmma ("Matrix descriptor"), K-major rows of 128 bytes with the 128-byte swizzle: bits
// 0-13 the address / 16, 16-29 the leading offset / 16 (no meaning with a swizzle), 32-45 the stride from 8 rows to the
// next 8 / 16, 62-63 the swizzle, 1 for 128 bytes. A step of k bytes along K adds k / 16 to the address.
constexpr __host__ __device__ uint64_t descriptor(uint32_t shared_address) {
  return uint64_t(shared_address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(kSwizzleAtom >> 4) << 32 |
         uint64_t(1) << 62;
}

constexpr int kProductM = 64, kProductN = 128, kProductK = 32;  // of one wgmma on E4M3
constexpr int kAccumulators = kProductM * kProductN / 128;      // of each thread

// The element of the 64 x 128 result that a thread's accumulator i is ("wgmma.mma_async", register fragment D): warp w
// has rows 16w .. 16w+15, lane l rows l/4 and l/4 + 8, and of every 8 columns the two at 2(l % 4).
constexpr __host__ __device__ int accumulator_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
constexpr __host__ __device__ int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

#ifndef MEGATRON_DEEPSEEK_EMULATED

using Barrier = uint64_t;
using TensorMap = CUtensorMap;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the barrier of the same place in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(Barrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Synchronises all threads of a cluster's blocks, whose warps may have diverged.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// Arrives, and the phase also waits for this many bytes from the copy engine.
__device__ __forceinline__ void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is over. On a new barrier the phase before the first (parity 1) is over already.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

__device__ __forceinline__ void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies a box of the tensor from (row, column) on; outside of it zeros arrive, which count as bytes too.
__device__ __forceinline__ void copy_tile(void* to, const TensorMap* map, int column, int row, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Copies a box to the same place in every block of the cluster whose bit is set in `blocks`, and counts its bytes at
// the barrier of the same place there.
__device__ __forceinline__ void copy_tile_to_cluster(void* to, const TensorMap* map, int column, int row,
                                                     Barrier* barrier, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(uint16_t(blocks))
      : "memory");
}

// Stores four 8 x 8 matrices of 16-bit numbers: lane l gives the place of row l % 8 of matrix l / 8, and has two
// neighbouring numbers of row l / 4 of each matrix ("stmatrix").
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&word)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}

// Makes this thread's writes to shared memory visible to the copy engine.
__device__ __forceinline__ void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies a box from shared memory to the tensor from (row, column) on, later; what is outside of it is not written.
__device__ __forceinline__ void copy_tile_out(const TensorMap* map, int column, int row, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(column), "r"(row), "r"(shared_address(from))
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all committed copies of this thread have read their shared memory.
__device__ __forceinline__ void wait_for_reads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// The compiler may not move reads or writes of the accumulators over this.
__device__ __forceinline__ void hold(float (&d)[kAccumulators]) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (+)= a b^T: 64 x 32 codes of a, 128 x 32 of b, both from shared memory; without `accumulate` d is written only.
__device__ __forceinline__ void product(float (&d)[kAccumulators], uint64_t a, uint64_t b, bool accumulate) {
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
    "+f"(d[i + 6]), "+f"(d[i + 7])
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1;\n"
      "}\n"
      : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
      : "l"(a), "l"(b), "r"(int(accumulate)));
#undef D8
}

template <int Registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Synchronises the 128 threads of a warpgroup; `id` is 1..15.
__device__ __forceinline__ void warpgroup_barrier(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

// Returns the driver's encoder of tensor maps, found without linking to the driver.
inline auto tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#endif
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// Describes bytes [rows, columns], `pitch` bytes from row to row (a multiple of 16), for boxes of `box_rows` x 128.
inline TensorMap tensor_map(const void* data, int64_t rows, int64_t columns, int64_t pitch, int box_rows) {
  TensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(pitch)};
  const cuuint32_t box[2] = {kSwizzleRow, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  static const auto encode = tensor_map_encoder();
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed: " + std::to_string(result));
  return map;
}

inline void require_hopper() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  if (major != 9) throw std::runtime_error("FP8 products by wgmma need compute capability 9.0");
}

#endif  // MEGATRON_DEEPSEEK_EMULATED

}  // namespace mds::hopper

#ifdef MEGATRON_DEEPSEEK_EMULATED
#include "hopper_emulation.h"
#endif
