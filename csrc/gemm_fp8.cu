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

// Divides a product into the turns of clusters that are as wide as Cluster blocks: tall tiles, of which those of the last
// wave may be halved. Where all are, the kernel with one half does it, whose ring is deeper.
template <Grouping grouping, bool BlocksB, int Cluster>
void start_turns(const ScaledOperand& a, const ScaledOperand& b, Gemm product, int groups, GemmOutput out,
                 bool tma_store, void* stream) {
  product.n_tiles = int(ceil_div<int64_t>(product.n, Cluster * kTileN));
  product.tiles = product.whole = int64_t(product.m_tiles) * product.n_tiles * groups;
  if (product.tile_m > kHalf) product.whole = whole_tiles(product.tiles, multiprocessors() / Cluster);
  if (product.tile_m > kHalf && product.whole > 0)
    start<grouping, BlocksB, 2, Cluster>(a, b, product, out, tma_store, stream);
  else
    start<grouping, BlocksB, 1, Cluster>(a, b, product, out, tma_store, stream);
}

template <Grouping grouping, bool BlocksB>
void start_product(const ScaledOperand& a, const ScaledOperand& b, const Gemm& product, int groups, GemmOutput out,
                   GemmOptions options, void* stream) {
  if (options.clusters)
    start_turns<grouping, BlocksB, 2>(a, b, product, groups, out, options.tma_store, stream);
  else
    start_turns<grouping, BlocksB, 1>(a, b, product, groups, out, options.tma_store, stream);
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
  const Gemm product = product_of(a, b, 2 * kHalf);
  if (b.blocks)
    start_product<Grouping::kNone, true>(a, b, product, 1, out, options, stream);
  else
    start_product<Grouping::kNone, false>(a, b, product, 1, out, options, stream);
}

void grouped_scaled_mm(ScaledOperand a, ScaledOperand b, Groups tiles, bool tall, GemmOutput out, GemmOptions options,
                       void* stream) {
  Gemm product = product_of(a, b, tall ? 2 * kHalf : kHalf);
  product.table = tiles.table, product.m_tiles = tiles.count;
  start_product<Grouping::kRows, true>(a, b, product, 1, out, options, stream);
}

void grouped_scaled_mm_wgrad(ScaledOperand a, ScaledOperand b, Groups groups, GemmOutput out, bool clusters,
                             void* stream) {
  Gemm product = product_of(a, b, 2 * kHalf);
  product.table = groups.table;
  start_product<Grouping::kDepth, false>(a, b, product, groups.count, out, {false, clusters}, stream);
}

}  // namespace mds
