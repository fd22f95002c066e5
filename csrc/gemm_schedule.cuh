// The order of tiles: which tile of which GEMM a block computes next. It is plain arithmetic, the same for the warps
// that load and those that multiply.
#pragma once

#include "kernels.h"
#include "platform.cuh"

namespace mds {

enum class Grouping {
  kNone,  // [M, N] of a [M, K] and b [N, K]
  kRows,  // a table says which rows of a go with which matrix of b: forward and dgrad of experts
  kDepth  // a table says which part of K belongs to which matrix of the result: wgrad of experts
};

constexpr int kTileN = 128;
constexpr int kRowsTogether = 8;  // tiles of M that pass over N side by side, so that both operands stay in the L2

struct Gemm {
  int64_t m, n;
  int k_tiles, m_tiles, n_tiles;
  int64_t tiles;       // of all groups
  const int* table;    // Groups::table
  const float* scale_a;
  const float* scale_b;
  int64_t pitch_a, pitch_b;  // of the scales
  int64_t scale_rows_b;      // of one matrix
};

// A tile of the result: a[a_row ..], b[b_row ..], out[out_row .., column ..] and K's tiles from `k` on.
struct Work {
  int64_t a_row, b_row, out_row;
  int column, rows, columns;  // what of the tile exists
  int matrix, k, k_tiles;
};

struct Place {
  int m, n;
};

// Orders tiles so that kRowsTogether tiles of M are computed together for all tiles of N.
constexpr __host__ __device__ Place place_of(int64_t tile, int m_tiles, int n_tiles) {
  const int64_t band = tile / (int64_t(kRowsTogether) * n_tiles), in_band = tile % (int64_t(kRowsTogether) * n_tiles);
  const int first = int(band) * kRowsTogether;
  const int height = m_tiles - first < kRowsTogether ? m_tiles - first : kRowsTogether;
  return {first + int(in_band % height), int(in_band / height)};
}

template <Grouping grouping, int TileM>
__host__ __device__ inline Work work_of(const Gemm& p, int64_t tile) {
  const int64_t of_one = int64_t(p.m_tiles) * p.n_tiles;
  const int group = grouping == Grouping::kDepth ? int(tile / of_one) : 0;
  const Place place = place_of(grouping == Grouping::kDepth ? tile % of_one : tile, p.m_tiles, p.n_tiles);
  Work work{};
  work.column = place.n * kTileN;
  work.columns = int(p.n - work.column < kTileN ? p.n - work.column : kTileN);
  work.k_tiles = p.k_tiles;
  if (grouping == Grouping::kRows) {
    work.matrix = p.table[3 * place.m];
    work.a_row = p.table[3 * place.m + 1];
    work.rows = p.table[3 * place.m + 2];
    work.out_row = work.a_row;
  } else {
    work.a_row = int64_t(place.m) * TileM;
    work.rows = int(p.m - work.a_row < TileM ? p.m - work.a_row : TileM);
    work.out_row = group * p.m + work.a_row;
  }
  if (grouping == Grouping::kDepth) {
    work.k = p.table[2 * group];
    work.k_tiles = p.table[2 * group + 1];
  }
  work.b_row = work.matrix * p.n + work.column;
  return work;
}

}  // namespace mds
