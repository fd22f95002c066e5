// Prints what csrc/ computes for the hardware before anything runs on it: descriptors, layouts, sizes, the order of
// tiles, and how many quotients a Divider gets wrong. tests/unit/ops/backends/test_csrc_encodings.py knows what each must be.
#include <cstdio>
#include <random>

#include "gemm_fp8.cu"

using namespace mds;

// Random tiles and numbers in them, a quarter of these next to where E4M3 rounds the other way.
long wrong_codes(long tiles) {
  std::mt19937_64 random(1);
  long wrong = 0;
  for (long t = 0; t < tiles; ++t) {
    const uint32_t largest = uint32_t(random() % 0x7f800000u) & (t % 2 ? 0xffff0000u : ~0u);
    const float scale = tile_scale(largest, t % 3 == 0);
    const Divider divide(scale);
    for (int i = 0; i < 256; ++i) {
      uint32_t bits = uint32_t(random() % (uint64_t(largest) + 1));
      if (i % 4 == 1) bits &= 0xffff0000u;
      if (i % 4 == 2) bits = largest - uint32_t(random() % (1u << 26)) % (largest + 1);
      if (i % 4 == 3) bits = float_bits((8.5f + float(random() % 8)) * std::ldexp(scale, int(random() % 18) - 13)) +
                             uint32_t(random() % 5) - 2;
      const float x = bits_float((bits > largest ? largest : bits) | uint32_t(random() % 2) << 31);
      wrong += to_e4m3_portable(divide(x)) != to_e4m3_portable(x / scale);
    }
  }
  return wrong;
}

template <int Waves>
void print_shape() {
  using S = Shape<Waves>;
  std::printf("shape %d %d %d %u %zu %zu %zu\n", Waves, S::kTileM, S::kStages, S::kStageBytes, sizeof(Shared<Waves>),
              offsetof(Shared<Waves>, b), offsetof(Shared<Waves>, full));
}

int main() {
  for (uint32_t address : {0u, 0x400u, 0x8000u, 0x38c00u})
    std::printf("descriptor %u %llu\n", address, static_cast<unsigned long long>(hopper::descriptor(address)));
  for (uint32_t offset = 0; offset < 2048; offset += 16)
    std::printf("swizzle %u %u\n", offset, hopper::swizzled(offset));
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int i = 0; i < hopper::kAccumulators; ++i)
      std::printf("accumulator %d %d %d %d\n", thread, i, hopper::accumulator_row(thread, i),
                  hopper::accumulator_column(thread, i));
  print_shape<1>();
  print_shape<2>();
  std::printf("registers %d %d %d\n", kProducerRegisters, kConsumerRegisters, kThreads);
  for (auto [m, n] : {std::pair{1, 1}, {7, 3}, {8, 5}, {19, 4}})
    for (int64_t tile = 0; tile < m * n; ++tile) {
      const Place place = place_of(tile, m, n);
      std::printf("tile %d %d %d %d\n", m, n, place.m, place.n);
    }
  std::printf("wrong %ld\n", wrong_codes(4000));
}
