// CUDA's functions of threads, as emulation.h runs them.
#pragma once

#include "emulation.h"

inline void __syncthreads() {
  emulation::arrive_and_wait(emulation::self().block->named[0], int(blockDim.x), "__syncthreads");
}
inline void __syncwarp() { emulation::arrive_and_wait(emulation::own_warp().barrier, 32, "__syncwarp"); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::exchange(mask, value, [&](const T* all, int lane) { return all[lane ^ lanes]; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  return emulation::exchange(mask, value, [&](const T* all, int lane) { return all[std::max(lane - distance, 0)]; });
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::exchange(mask, value, [&](const T* all, int) { return all[source % 32]; });
}
inline unsigned __match_any_sync(unsigned mask, int value) {
  return emulation::exchange(mask, value, [](const int* all, int lane) {
    unsigned same = 0;
    for (int other = 0; other < 32; ++other) same |= unsigned(all[other] == all[lane]) << other;
    return same;
  });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int atomicAdd(int* address, int value) {
  int before = *address;
  *address += value;
  return before;
}
