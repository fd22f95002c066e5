// Runs CUDA kernels on a CPU, one fiber for each thread of a block, so that csrc/ can be tested without a GPU.
//
// A fiber runs until it waits at a barrier or a warp's exchange; then the next one runs. Which one is next is the
// environment's EMULATION_ORDER: forward, reverse or a number that seeds a random order. A kernel whose result depends
// on the order lacks a barrier. Blocks, or clusters of them, run in that order too, one after the other; of a cluster's
// blocks the first starts before the others. Shared memory and results start as NaN in every format (of integers as a
// number that is no index) and end in guards that are checked. A block whose fibers all wait is an error that says where
// they wait. What this cannot show: speed, and mistakes about the hardware that the emulation shares (see
// hopper_emulation.h).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 64;
constexpr unsigned char kGuard = 0x5a;
constexpr int kHeadStart = 50;

struct Shape {
  unsigned blocks, rows, threads;
  size_t shared_bytes;
  bool all_at_once;
  unsigned cluster;
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slot[32];
};

struct Block {
  dim3 index;
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<unsigned char> seen_by_copies;  // shared memory as the copy engine reads it: what was fenced
  Barrier named[16];  // 0 is __syncthreads
  Block* cluster = nullptr;  // its first block, whose barrier is the cluster's
  Barrier cluster_barrier;
  unsigned running = 0;  // threads that have not ended
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Block* block = nullptr;
  unsigned thread = 0;
  bool done = true;
  const uint64_t* watched = nullptr;  // runs again when *watched is no longer `seen`
  uint64_t seen = 0;
  const char* place = "";
  std::vector<std::function<void()>> asynchronous;  // this thread's wgmma that nobody has waited for
  std::vector<uint32_t> unfenced;                   // words of shared memory that the copy engine does not see yet
  std::vector<std::function<void()>> copies, committed;  // its copies from shared memory that have not happened

  bool ready() const { return !done && (watched == nullptr || *watched != seen); }
};

struct Machine {
  ucontext_t scheduler;
  Fiber* running = nullptr;
  const std::function<void()>* kernel = nullptr;
  Barrier grid;
  unsigned cluster = 1;  // blocks of one
  std::deque<std::function<void()>> copies;  // bulk copies that have been issued and not yet happened
  bool random_order = false;
  const char* problem = nullptr;             // that a fiber found at its end
  const void* stream = nullptr;              // of the operator's call that is under way; none between calls
  std::vector<const unsigned char*> guards;  // of that call's results: kGuardBytes behind each
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline Fiber& self() { return *machine().running; }
inline unsigned char* shared_memory() { return self().block->shared; }

// Makes a result of `bytes` that nobody has written yet, before a guard that is checked after each kernel of the call.
inline void guard_result(void* data, size_t bytes, bool is_integer) {
  unsigned char* guard = static_cast<unsigned char*>(data) + bytes;
  std::memset(data, is_integer ? 0x7e : 0xff, bytes);
  std::memset(guard, kGuard, kGuardBytes);
  machine().guards.push_back(guard);
}

inline bool is_whole(const unsigned char* guard) {
  return std::all_of(guard, guard + kGuardBytes, [](unsigned char byte) { return byte == kGuard; });
}

inline const void* aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) std::abort();  // a GPU would fault
  return address;
}
inline void* aligned(void* address, size_t bytes) {
  return const_cast<void*>(aligned(static_cast<const void*>(address), bytes));
}

inline void wait_until_changed(const uint64_t* watched, uint64_t seen, const char* place) {
  Fiber& fiber = self();
  fiber.watched = watched, fiber.seen = seen, fiber.place = place;
  swapcontext(&fiber.context, &machine().scheduler);
}

// Lets every other thread run on, and the copy engine, before this one goes on. Only in a random order: in the others
// threads run as far as they can, which shows what lacks a barrier.
inline void give_way() {
  if (machine().random_order) swapcontext(&self().context, &machine().scheduler);
}

inline void arrive_and_wait(Barrier& barrier, int expected, const char* place) {
  uint64_t seen = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    wait_until_changed(&barrier.generation, seen, place);
  }
}

inline void grid_barrier() {
  arrive_and_wait(machine().grid, int(gridDim.x * gridDim.y * blockDim.x), "grid barrier");
}

inline void cluster_barrier() {
  Block* first = self().block->cluster;
  arrive_and_wait(first->cluster_barrier, int(blockDim.x * machine().cluster), "cluster barrier");
}

// Returns what is at the same place of another block's shared memory, to which this block does something.
template <typename T>
T* in_block(Block* block, T* own) {
  if (block->running == 0) machine().problem = "a block reached into the shared memory of one that had ended";
  return reinterpret_cast<T*>(block->shared + (reinterpret_cast<unsigned char*>(own) - self().block->shared));
}

inline Warp& own_warp() { return self().block->warps[self().thread / 32]; }

// Every lane puts a value down; `take` makes each lane's result of all 32.
template <typename T, typename Take>
auto exchange(unsigned mask, T value, Take take) {
  if (mask != 0xffffffffu) std::abort();
  Warp& warp = own_warp();
  static_assert(sizeof(T) <= 8, "one slot is 8 bytes");
  std::memcpy(&warp.slot[self().thread % 32], &value, sizeof(T));
  arrive_and_wait(warp.barrier, 32, "warp exchange");
  T all[32];
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&all[lane], &warp.slot[lane], sizeof(T));
  auto result = take(all, int(self().thread % 32));
  arrive_and_wait(warp.barrier, 32, "warp exchange, second half");
  return result;
}

inline void start_fiber() {
  (*machine().kernel)();
  if (self().copies.size() + self().committed.size() > 0)
    machine().problem = "a thread ended before its copies had read shared memory";
  self().done = true;
  --self().block->running;
  swapcontext(&self().context, &machine().scheduler);
}

inline void prepare(Fiber& fiber, Block& block, unsigned thread) {
  fiber.block = &block, fiber.thread = thread, fiber.done = false, fiber.watched = nullptr;
  fiber.copies.clear(), fiber.committed.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start_fiber, 0);
}

inline void resume(Fiber& fiber) {
  machine().running = &fiber;
  threadIdx = {fiber.thread, 0, 0};
  blockIdx = fiber.block->index;
  fiber.watched = nullptr;
  swapcontext(&machine().scheduler, &fiber.context);
}

struct Order {
  std::vector<size_t> sequence;
  std::mt19937 random;
  bool shuffled = false;

  explicit Order(size_t size) : sequence(size) {
    for (size_t i = 0; i < size; ++i) sequence[i] = i;
    const char* name = std::getenv("EMULATION_ORDER");
    std::string order = name ? name : "forward";
    if (order == "reverse") std::reverse(sequence.begin(), sequence.end());
    if (order != "reverse" && order != "forward") shuffled = true, random.seed(unsigned(std::stoul(order)));
  }
  // The copy engine works at its own pace: one copy for each round of the threads, or in bursts, so that threads run
  // far ahead of others.
  size_t copies(size_t waiting) { return waiting == 0 ? 0 : shuffled ? 1 + random() % waiting : 1; }
  const std::vector<size_t>& next() {
    if (shuffled) std::shuffle(sequence.begin(), sequence.end(), random);
    return sequence;
  }
};

inline void make_block(Block& block, dim3 index, const Shape& shape) {
  block.index = index;
  block.shared_bytes = shape.shared_bytes;
  block.running = shape.threads;
  block.storage.reset(new unsigned char[shape.shared_bytes + 1024 + kGuardBytes]);
  uintptr_t base = reinterpret_cast<uintptr_t>(block.storage.get());
  block.shared = reinterpret_cast<unsigned char*>((base + 1023) / 1024 * 1024);
  std::memset(block.shared, 0xff, shape.shared_bytes);
  block.seen_by_copies.assign(shape.shared_bytes, 0xff);
  std::memset(block.shared + shape.shared_bytes, kGuard, kGuardBytes);
  block.warps = std::vector<Warp>((shape.threads + 31) / 32);
}

inline void check_guard(const Block& block) {
  if (!is_whole(block.shared + block.shared_bytes)) throw std::runtime_error("a kernel wrote past its shared memory");
}

inline void run_fibers(std::vector<Fiber>& fibers) {
  Order order(fibers.size());
  machine().random_order = order.shuffled;
  int head_start = kHeadStart;  // rounds in which only the first block of each cluster runs
  for (bool progress = true; progress;) {
    progress = false;
    for (size_t i : order.next()) {
      const bool waits = head_start > 0 && fibers[i].block != fibers[i].block->cluster;
      if (fibers[i].ready() && !waits) resume(fibers[i]), progress = true;
    }
    if (head_start > 0 && !progress) head_start = 0, progress = true;
    if (head_start > 0) --head_start;
    for (size_t copies = order.copies(machine().copies.size()); copies > 0; --copies) {
      machine().copies.front()();
      machine().copies.pop_front();
      progress = true;
    }
  }
  for (const Fiber& fiber : fibers)
    if (!fiber.done)
      throw std::runtime_error("deadlock: thread " + std::to_string(fiber.thread) + " of block " +
                               std::to_string(fiber.block->index.x) + " waits at " + fiber.place);
  for (const Fiber& fiber : fibers)
    if (!fiber.asynchronous.empty()) throw std::runtime_error("a kernel ended with wgmma in flight");
  if (const char* problem = std::exchange(machine().problem, nullptr)) throw std::runtime_error(problem);
}

// One block or cluster after the other, or all at once where blocks wait for each other.
inline void run(const Shape& shape, const std::function<void()>& kernel) {
  machine().kernel = &kernel;
  gridDim = {shape.blocks, shape.rows, 1};
  blockDim = {shape.threads, 1, 1};
  machine().cluster = shape.cluster;
  const size_t total = size_t(shape.blocks) * shape.rows, together = shape.all_at_once ? total : shape.cluster;
  if (total % together) throw std::runtime_error("a grid that does not end with a whole cluster");
  std::vector<Fiber> fibers(together * shape.threads);
  Order order(total / together);
  for (size_t turn : order.next()) {
    const size_t first = turn * together;
    std::vector<Block> blocks(together);
    for (size_t b = 0; b < together; ++b) {
      make_block(blocks[b], {unsigned((first + b) % shape.blocks), unsigned((first + b) / shape.blocks), 0}, shape);
      blocks[b].cluster = &blocks[b / shape.cluster * shape.cluster];
      for (unsigned t = 0; t < shape.threads; ++t) prepare(fibers[b * shape.threads + t], blocks[b], t);
    }
    run_fibers(fibers);
    for (const Block& block : blocks) check_guard(block);
  }
  if (!std::all_of(machine().guards.begin(), machine().guards.end(), is_whole))
    throw std::runtime_error("a kernel wrote past a result");
}

}  // namespace emulation

#include "intrinsics.h"
