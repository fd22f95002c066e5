// Prints what csrc/ computes for the hardware before anything runs on it: descriptors, layouts, sizes, the order of
// tiles, and how many quotients a Divider gets wrong. tests/unit/ops/backends/test_csrc_encodings.py knows what each
// must be.
#include <cstdio>
#include <random>
#include <tuple>
#include <vector>

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

// Scales of every mantissa that are not those by IEEE's division, at the exponents where the smallest scale begins, of
// one and of the largest numbers.
long wrong_scales(float max, uint32_t smallest_exponent) {
  const float smallest = bits_float(1u << 23);
  long wrong = 0;
  for (uint32_t exponent : {smallest_exponent, 127u, 254u})
    for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
      const uint32_t magnitude = exponent << 23 | mantissa;
      const float scale = bits_float(magnitude) / max;
      wrong += tile_scale(magnitude, false, max) != (scale < smallest ? smallest : scale);
    }
  return wrong;
}

Gemm dense(int64_t m, int64_t n, int blocks) {
  Gemm p{};
  p.m = m, p.n = n, p.k_tiles = 1, p.tile_m = 2 * kHalf;
  p.m_tiles = int(ceil_div<int64_t>(m, p.tile_m)), p.n_tiles = int(ceil_div<int64_t>(n, kTileN));
  p.tiles = int64_t(p.m_tiles) * p.n_tiles, p.whole = whole_tiles(p.tiles, blocks);
  return p;
}

// Every turn of persistent blocks, and the block that takes it.
template <Grouping grouping>
void print_turns(const char* name, const Gemm& p, int64_t rows, int blocks) {
  for (int64_t turn = 0; turn < turns_of(p); ++turn) {
    const Work work = work_of<grouping, 1>(p, turn, 0);
    std::printf("%s %ld %ld %d %ld %ld %d %d %d %d\n", name, long(rows), long(p.n), blocks, long(turn % blocks),
                long(work.out_row), work.rows, work.column, work.columns, work.k_tiles);
  }
}

void print_turns(int64_t m, int64_t n, int blocks) {
  print_turns<Grouping::kNone>("turn", dense(m, n, blocks), m, blocks);
}

// wgrad's result of several groups, each of one tile of K.
void print_depths(int groups, int64_t m, int64_t n, int blocks) {
  Gemm p = dense(m, n, blocks);
  p.tiles *= groups, p.whole = whole_tiles(p.tiles, blocks);
  std::vector<int> table;
  for (int group = 0; group < groups; ++group) table.insert(table.end(), {group, 1});
  p.table = table.data();
  print_turns<Grouping::kDepth>("depth", p, groups * m, blocks);
}

template <typename F>
void print_form() {
  using S = GemmShared<F>;
  std::printf("form %d %d %d %zu %zu %zu\n", F::Waves, F::kTileM, F::kStages, sizeof(S), offsetof(S, b),
              offsetof(S, full));
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
  print_form<Form<Grouping::kNone, false, 1, Store::kDirect, 1>>();
  print_form<Form<Grouping::kDepth, false, 2, Store::kDirect, 1>>();
  print_form<Form<Grouping::kNone, true, 1, Store::kDirect, 1>>();
  print_form<Form<Grouping::kNone, true, 2, Store::kDirect, 1>>();
  print_form<Form<Grouping::kNone, true, 1, Store::kCopyEngine, 1>>();
  print_form<Form<Grouping::kNone, true, 2, Store::kCopyEngine, 1>>();
  std::printf("registers %d %d %d\n", kProducerRegisters, kConsumerRegisters, kGemmThreads);
  for (auto [m, n] : {std::pair{1, 1}, {7, 3}, {8, 5}, {19, 4}})
    for (int64_t tile = 0; tile < m * n; ++tile) {
      const Place place = place_of(tile, m, n);
      std::printf("tile %d %d %d %d\n", m, n, place.m, place.n);
    }
  for (auto [m, n, blocks] : {std::tuple{100, 128, 3}, {300, 391, 3}, {520, 264, 3}, {1000, 640, 5}})
    print_turns(m, n, blocks);
  for (int n : {512, 576, 1536, 2048, 2112, 2816, 3072, 4096, 5632, 7168, 10944, 16384, 18432, 21888,
                24576, 32768, 36864})
    print_turns(4096, n, 132);
  for (auto [groups, m, n, blocks] : {std::tuple{3, 300, 136, 5}, {2, 72, 391, 3}, {4, 520, 264, 5}})
    print_depths(groups, m, n, blocks);
  for (auto [groups, m, n] : {std::tuple{1, 576, 7168}, {1, 1536, 7168}, {1, 7168, 2048}, {1, 4096, 7168},
                              {1, 24576, 1536}, {8, 7168, 2048}, {8, 4096, 7168}})
    print_depths(groups, m, n, 132);
  std::printf("wrong %ld\n", wrong_codes(4000));
  std::printf("wrong_scales %ld %ld\n", wrong_scales(kE4M3Max, 9), wrong_scales(kE5M6Max, 16));
}
