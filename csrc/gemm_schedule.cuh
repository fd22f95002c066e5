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
constexpr int kHalf = 128;        // rows that a block's consumers multiply at once; tall tiles have two such halves
constexpr int kRowsTogether = 8;  // tiles of M that pass over N side by side, so that both operands stay in the L2

struct Gemm {
  int64_t m, n;
  int k_tiles, m_tiles;
  int n_tiles;         // of a cluster's width
  int tile_m;          // rows of a tile: kHalf, or 2 * kHalf of tall ones
  int64_t tiles;       // of all groups
  int64_t whole;       // tiles that are one turn of a block; of those behind them each half is a turn
  const int* table;    // Groups::table
  const float* scale_a;
  const float* scale_b;
  int64_t pitch_a, pitch_b;  // of the scales
  int64_t scale_rows_b;      // of one matrix
};

// Returns how many of the tall tiles are computed whole by persistent blocks. Reading bounds a turn: 48 KB a step of K
// for a tall tile, 32 KB for its half. So the last wave of turns is halved where all halves fit into one wave.
constexpr __host__ __device__ int64_t whole_tiles(int64_t tiles, int blocks) {
  const int64_t last = tiles % blocks;
  return 2 * last <= blocks ? tiles - last : tiles;
}

constexpr __host__ __device__ int64_t turns_of(const Gemm& p) { return p.whole + 2 * (p.tiles - p.whole); }

// One turn of a block: a[a_row ..], b[b_row ..], out[out_row .., column ..] and K's tiles from `k` on.
struct Work {
  int64_t a_row, b_row, out_row;
  int column, rows, columns;  // what of the turn's tile exists; without rows there are no k_tiles either
  int matrix, k, k_tiles;
  bool stored;  // else the block only keeps in step with its cluster, with the tile of another one
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

// Leaves of a tall tile's work one half.
__host__ __device__ inline void take_half(Work& work, int half) {
  work.a_row += half * kHalf;
  work.out_row += half * kHalf;
  work.rows -= half * kHalf;
  if (work.rows > kHalf) work.rows = kHalf;
  if (work.rows <= 0) work.rows = work.k_tiles = 0;
}

// The work of block `rank` of a cluster, whose blocks have neighbouring tiles of N.
template <Grouping grouping, int Cluster>
__host__ __device__ inline Work work_of(const Gemm& p, int64_t turn, int rank) {
  const bool halved = turn >= p.whole;
  const int64_t tile = halved ? p.whole + (turn - p.whole) / 2 : turn;
  const int64_t of_one = int64_t(p.m_tiles) * p.n_tiles;
  const int group = grouping == Grouping::kDepth ? int(tile / of_one) : 0;
  const Place place = place_of(grouping == Grouping::kDepth ? tile % of_one : tile, p.m_tiles, p.n_tiles);
  Work work{};
  work.column = (place.n * Cluster + rank) * kTileN;
  work.stored = work.column < p.n;
  if (!work.stored) work.column = place.n * Cluster * kTileN;
  work.columns = int(p.n - work.column < kTileN ? p.n - work.column : kTileN);
  work.k_tiles = p.k_tiles;
  if (grouping == Grouping::kRows) {
    work.matrix = p.table[3 * place.m];
    work.a_row = p.table[3 * place.m + 1];
    work.rows = p.table[3 * place.m + 2];
    work.out_row = work.a_row;
  } else {
    work.a_row = int64_t(place.m) * p.tile_m;
    work.rows = int(p.m - work.a_row < p.tile_m ? p.m - work.a_row : p.tile_m);
    work.out_row = group * p.m + work.a_row;
  }
  if (grouping == Grouping::kDepth) {
    work.k = p.table[2 * group];
    work.k_tiles = p.table[2 * group + 1];
  }
  work.b_row = work.matrix * p.n + work.column;
  if (halved) take_half(work, int((turn - p.whole) % 2));
  return work;
}

}  // namespace mds
