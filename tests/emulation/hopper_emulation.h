// csrc/hopper.cuh for the CPU: what mbarriers, the copy engine and wgmma do by the PTX ISA, as late as it allows.
//
// Copies happen some time after they were asked for, and products only when they are waited for: whoever reads a tile
// or an accumulator too early gets NaN or old numbers. Shared addresses are offsets in the block's shared memory.
#pragma once

#include <unordered_map>

namespace mds::hopper {

using Barrier = uint64_t;

struct TensorMap {
  const unsigned char* data;
  int64_t rows, columns, pitch;
  int box_rows;
};

struct BarrierState {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;

  void settle() {
    if (pending == 0 && bytes == 0) pending = arrivals, ++phase;
  }
};

inline BarrierState& state_of(Barrier* barrier) {
  static std::unordered_map<Barrier*, BarrierState> states;  // blocks initialise theirs anew
  return states[barrier];
}

inline void barrier_init(Barrier* barrier, int arrivals) { state_of(barrier) = {arrivals, arrivals, 0, 0}; }
inline void barrier_init_fence() {}

inline void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
  BarrierState& state = state_of(barrier);
  if (state.pending == 0) throw std::runtime_error("more arrivals at an mbarrier than it was made for");
  state.bytes += bytes;
  --state.pending;
  state.settle();
}
inline void barrier_arrive(Barrier* barrier) { barrier_arrive_expecting(barrier, 0); }

inline void barrier_arrive_at(Barrier* barrier, int rank) {
  barrier_arrive(emulation::in_block(emulation::self().block->cluster + rank, barrier));
}

inline void cluster_barrier() { emulation::cluster_barrier(); }

inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  BarrierState& state = state_of(barrier);
  while ((state.phase & 1) == parity) emulation::wait_until_changed(&state.phase, state.phase, "mbarrier");
}

inline void prefetch(const TensorMap*) {}

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - emulation::shared_memory());
}

inline uint32_t tile_address(const void* to) {
  const uint32_t base = shared_address(to);
  if (base % 1024) throw std::runtime_error("a swizzled tile must start at a multiple of 1,024 bytes");
  return base;
}

inline void copy_tile_later(emulation::Block* block, uint32_t base, TensorMap map, int column, int row,
                            Barrier* barrier) {
  emulation::machine().copies.push_back([=] {
    if (block->running == 0) emulation::machine().problem = "a copy came to a block that had ended";
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < 128; ++c) {
        const bool inside = row + r >= 0 && row + r < map.rows && column + c >= 0 && column + c < map.columns;
        block->shared[swizzled(base + r * 128 + c)] = inside ? map.data[(row + r) * map.pitch + column + c] : 0;
      }
    BarrierState& state = state_of(barrier);
    state.bytes -= int64_t(map.box_rows) * 128;
    state.settle();
  });
}

inline void copy_tile(void* to, const TensorMap* map, int column, int row, Barrier* barrier) {
  copy_tile_later(emulation::self().block, tile_address(to), *map, column, row, barrier);
}

// Comes to each block at its own time.
inline void copy_tile_to_cluster(void* to, const TensorMap* map, int column, int row, Barrier* barrier, int blocks) {
  for (unsigned rank = 0; rank < emulation::machine().cluster; ++rank) {
    emulation::Block* block = emulation::self().block->cluster + rank;
    if (blocks >> rank & 1)
      copy_tile_later(block, tile_address(to), *map, column, row, emulation::in_block(block, barrier));
  }
}

// What a thread writes is seen by the copy engine once that thread has fenced.
inline void store_matrices(void* row, const uint32_t (&word)[4]) {
  const int lane = int(emulation::self().thread % 32);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint64_t place = __shfl_sync(~0u, uint64_t(emulation::aligned(row, 16)), 8 * matrix + lane / 4);
    unsigned char* words = reinterpret_cast<unsigned char*>(place) + lane % 4 * 4;
    std::memcpy(words, &word[matrix], 4);
    emulation::self().unfenced.push_back(shared_address(words));
  }
}

inline void fence_for_copies() {
  emulation::Fiber& fiber = emulation::self();
  for (uint32_t place : fiber.unfenced)
    std::memcpy(&fiber.block->seen_by_copies[place], fiber.block->shared + place, 4);
  fiber.unfenced.clear();
}

// One copy happens at once, the next when it is waited for: neither may be relied upon.
inline void copy_tile_out(const TensorMap* to, int column, int row, const void* from) {
  auto copy = [block = emulation::self().block, map = *to, base = tile_address(from), column, row] {
    for (int r = 0; r < map.box_rows && row + r < map.rows; ++r)
      for (int c = 0; c < 128 && column + c < map.columns; ++c)
        const_cast<unsigned char*>(map.data)[(row + r) * map.pitch + column + c] =
            block->seen_by_copies[swizzled(base + r * 128 + c)];
  };
  auto& waiting = emulation::self().copies;
  if (waiting.size() % 2)
    copy(), waiting.push_back([] {});
  else
    waiting.push_back(copy);
}

inline void commit_copies() {
  emulation::Fiber& fiber = emulation::self();
  for (auto& copy : fiber.copies) fiber.committed.push_back(std::move(copy));
  fiber.copies.clear();
}

inline void wait_for_reads() {
  for (auto& copy : emulation::self().committed) copy();
  emulation::self().committed.clear();
}

inline void product_fence() {}
inline void product_commit() {}
inline void product_wait() {
  // Every other warp waits as long as a refill of a released stage takes; the others run ahead of it.
  const int rounds = emulation::self().thread / 32 % 2 * 4;
  for (int round = 0; round < rounds; ++round) emulation::give_way();
  for (auto& operation : emulation::self().asynchronous) operation();
  emulation::self().asynchronous.clear();
}
inline void hold(float (&)[64]) {}

// The code at (row, k) of an operand: the descriptor's address and stride, then the swizzle of the whole address.
inline float operand_code(const unsigned char* shared, uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1) throw std::runtime_error("only the 128-byte swizzle is emulated");
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  return from_e4m3(shared[swizzled(start + row / 8 * stride + row % 8 * 128 + k)]);
}

inline void product(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  const unsigned char* shared = emulation::shared_memory();
  const int thread = int(emulation::self().thread % 128);
  float* result = d;
  emulation::self().asynchronous.push_back([=] {
    float row_codes[2][32];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 32; ++k)
        row_codes[half][k] = operand_code(shared, a, accumulator_row(thread, 2 * half), k);
    for (int i = 0; i < 64; ++i) {
      float sum = 0;
      for (int k = 0; k < 32; ++k)
        sum += row_codes[i / 2 % 2][k] * operand_code(shared, b, accumulator_column(thread, i), k);
      result[i] = accumulate ? result[i] + sum : sum;
    }
  });
}

template <int Registers>
void give_registers() {}
template <int Registers>
void take_registers() {}

inline void warpgroup_barrier(int id) {
  emulation::arrive_and_wait(emulation::self().block->named[id], 128, "warpgroup barrier");
}

inline TensorMap tensor_map(const void* data, int64_t rows, int64_t columns, int64_t pitch, int box_rows) {
  return {static_cast<const unsigned char*>(data), rows, columns, pitch, box_rows};
}

inline void require_hopper() {}

}  // namespace mds::hopper
