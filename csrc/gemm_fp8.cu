// Block-scaled FP8 GEMMs on Hopper (sm_90a), with the arithmetic of ops/fp8/gemm.py:
//
//   out[m, n] = sum over blocks j of 128 of K:  (sum over k in j of a[m, k] b[n, k]) * (scale_a[m, j] * scale_b[n, j])
//
// wgmma computes the inner sums; the outer one is float32 in registers. Hopper's tensor cores keep about 14 bits of a
// sum, so their result is promoted after every 128 of K (DeepSeek-V3 report, section 3.3.2; DeepGEMM).
#include <algorithm>

#include "gemm_kernel.cuh"

namespace mds {
namespace {

template <typename F, typename Out>
void start(const ScaledOperand& a, const ScaledOperand& b, const Gemm& product, Out* out, void* stream) {
  hopper::require_hopper();
  if (product.tiles == 0) return;
  const TensorMap map_a = hopper::tensor_map(a.q, a.matrices * a.rows, a.columns, a.pitch, kHalf);
  const TensorMap map_b = hopper::tensor_map(b.q, b.matrices * b.rows, b.columns, b.pitch, kTileN);
  TensorMap out_map{};
  if constexpr (F::store == Store::kCopyEngine) {
    const int64_t row_bytes = product.n * int64_t(sizeof(Out));
    out_map = hopper::tensor_map(out, a.matrices * a.rows, row_bytes, row_bytes, OutputBoxes::kRows);
  }
  const int64_t clusters = std::min<int64_t>(turns_of(product), multiprocessors() / F::Cluster);
  Grid grid{unsigned(clusters * F::Cluster), kGemmThreads, sizeof(GemmShared<F>)};
  grid.cluster = F::Cluster;
  launch(gemm_kernel<F, Out>, grid, stream, map_a, map_b, out_map, product, out);
}

// The copy engine writes rows of bfloat16 that begin at multiples of 16 bytes; others are stored directly.
template <Grouping grouping, bool BlocksB, int Waves, int Cluster>
void start(const ScaledOperand& a, const ScaledOperand& b, const Gemm& product, GemmOutput out, bool tma_store,
           void* stream) {
  using Direct = Form<grouping, BlocksB, Waves, Store::kDirect, Cluster>;
  if constexpr (BlocksB) {
    if (tma_store && !out.is_float && product.n % 8 == 0) {
      using Copied = Form<grouping, BlocksB, Waves, Store::kCopyEngine, Cluster>;
      start<Copied>(a, b, product, static_cast<bf16*>(out.data), stream);
      return;
    }
  }
  if (out.is_float)
    start<Direct>(a, b, product, static_cast<float*>(out.data), stream);
  else
    start<Direct>(a, b, product, static_cast<bf16*>(out.data), stream);
}

// A product whose m_tiles are given, in turns of clusters that are as wide as Cluster blocks.
template <int Cluster>
Gemm in_turns(Gemm product, int groups = 1) {
  product.n_tiles = int(ceil_div<int64_t>(product.n, Cluster * kTileN));
  product.tiles = product.whole = int64_t(product.m_tiles) * product.n_tiles * groups;
  return product;
}

// Where all tiles are halved, the kernel with one half does it, whose ring is deeper.
template <Grouping grouping, int Cluster>
void start_blocks(const ScaledOperand& a, const ScaledOperand& b, Gemm product, GemmOutput out, bool tma_store,
                  void* stream) {
  product = in_turns<Cluster>(product);
  if (product.tile_m > kHalf) product.whole = whole_tiles(product.tiles, multiprocessors() / Cluster);
  if (product.tile_m > kHalf && product.whole > 0)
    start<grouping, true, 2, Cluster>(a, b, product, out, tma_store, stream);
  else
    start<grouping, true, 1, Cluster>(a, b, product, out, tma_store, stream);
}

template <Grouping grouping>
void start_blocks(const ScaledOperand& a, const ScaledOperand& b, const Gemm& product, GemmOutput out,
                  GemmOptions options, void* stream) {
  if (options.clusters)
    start_blocks<grouping, 2>(a, b, product, out, options.tma_store, stream);
  else
    start_blocks<grouping, 1>(a, b, product, out, options.tma_store, stream);
}

template <Grouping grouping>
void start_rows(const ScaledOperand& a, const ScaledOperand& b, const Gemm& product, int groups, GemmOutput out,
                bool clusters, void* stream) {
  if (clusters)
    start<grouping, false, 1, 2>(a, b, in_turns<2>(product, groups), out, false, stream);
  else
    start<grouping, false, 1, 1>(a, b, in_turns<1>(product, groups), out, false, stream);
}

Gemm product_of(const ScaledOperand& a, const ScaledOperand& b, int tile_m) {
  Gemm p{};
  p.m = a.rows, p.n = b.rows, p.tile_m = tile_m;
  p.k_tiles = int(ceil_div<int64_t>(a.columns, kTile));
  p.m_tiles = int(ceil_div<int64_t>(p.m, tile_m));
  p.scale_a = a.scales, p.scale_b = b.scales, p.pitch_a = a.scale_pitch, p.pitch_b = b.scale_pitch;
  p.scale_rows_b = b.blocks ? ceil_div<int64_t>(b.rows, kTile) : b.rows;
  return p;
}

}  // namespace

void scaled_mm(ScaledOperand a, ScaledOperand b, GemmOutput out, GemmOptions options, void* stream) {
  if (b.blocks)
    start_blocks<Grouping::kNone>(a, b, product_of(a, b, 2 * kHalf), out, options, stream);
  else
    start_rows<Grouping::kNone>(a, b, product_of(a, b, kHalf), 1, out, options.clusters, stream);
}

void grouped_scaled_mm(ScaledOperand a, ScaledOperand b, Groups tiles, bool tall, GemmOutput out, GemmOptions options,
                       void* stream) {
  Gemm product = product_of(a, b, tall ? 2 * kHalf : kHalf);
  product.table = tiles.table, product.m_tiles = tiles.count;
  start_blocks<Grouping::kRows>(a, b, product, out, options, stream);
}

void grouped_scaled_mm_wgrad(ScaledOperand a, ScaledOperand b, Groups groups, GemmOutput out, bool clusters,
                             void* stream) {
  Gemm product = product_of(a, b, kHalf);
  product.table = groups.table;
  start_rows<Grouping::kDepth>(a, b, product, groups.count, out, clusters, stream);
}

}  // namespace mds
