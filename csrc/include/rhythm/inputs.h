// The inputs of one call of a pass: plain pointers, strides and numbers. No LibTorch here.
//
// The canonical form of the package, as the kernels see it: q (B, T, H, D), k (B, T, H_kv, D) with a contiguous last
// dimension, lse float32 (B, X, T), a sequence table (S, 4) of (batch row, start, end, response_start) and a head
// table (Hs, 2) of (query head, its index in lse). All strides count elements.
#pragma once

#include <cstdint>

namespace rhythm {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// A tile is a run of tokens that one task owns. It computes all heads of them, kv group by kv group, and sums in this
// order: results depend neither on the number of threads nor on which thread took the tile.
constexpr int64_t kBandTile = 128;   // rows of band_rows
constexpr int64_t kRowTile = 64;     // rows of row_stats
constexpr int64_t kColumnTile = 64;  // keys of band_columns
constexpr int64_t kStatsTile = 64;   // keys of column_stats
constexpr int64_t kChunk = 48;       // keys (rows) that row_stats (column_stats) streams at a time
constexpr int64_t kBandChunk = 128;  // distances of a wide band (band_columns: half the row positions) at a time
constexpr int64_t kMaxStrip = 64;    // rows that band_rows takes through all heads at a time
constexpr int64_t kMaxLanes = 16;    // the widest vector of any capability
constexpr int kMaxGroup = 4;         // query heads that share one reading of a kv head

// A range of tokens that see each other: [start, end) of a batch row, the response from response_start on.
struct Sequence {
  int32_t batch_row, start, end, response_start;
};

// Selected query heads that share one kv head: at most kMaxGroup, `entry` indexing the head table.
struct KvGroup {
  int32_t kv_head;
  int32_t count;
  int32_t entry[kMaxGroup];
};

struct Head {
  int32_t query, lse_index;
};

// x = scale * (q . k), softcapped, less slope * (t - s); visible iff start <= s <= t and t - s <= window_left.
// The formula is in one file a device: score.h, score.cuh.
struct ScoreRule {
  float scale;
  float softcap;        // 0: none
  int64_t window_left;  // T where there is no sliding window
  const float* sinks;   // (H,) or null
  const float* slopes;  // ALiBi: (H,), or (S, H) for the S sequences of the table, or null
  int64_t slope_stride; // H, or 0 where all sequences share one (H,)
};

// What a call on any device takes. Pointers are the device's; no distance is larger than `tokens`, which is below 2^31.
struct Inputs {
  Dtype dtype;
  const void* q;
  const void* k;
  int64_t q_batch, q_token, q_head; // strides
  int64_t k_batch, k_token, k_head;
  int64_t head_dim, batch, tokens;

  const float* lse; // null for row_stats
  int64_t lse_batch, lse_head, lse_token;

  // Those of a batch row follow each other in the order of their tokens and do not overlap.
  const Sequence* seqs;
  int64_t n_seqs, max_seqlen; // max_seqlen: no sequence is longer
  const Head* heads;
  int64_t n_heads;

  ScoreRule score;
  bool per_head;
  int64_t window; // W of band_rows and row_stats
  int64_t lo, hi; // the horizon of band_columns, lo <= hi

  // (B, T) float32, the mean over the heads, or (B, n_heads, T) with per_head; column_stats: (planes, B, ...).
  float* out;
};

// What a CPU pass takes besides.
struct CpuInputs : Inputs {
  const KvGroup* kv_groups;
  int64_t n_kv_groups;
  int64_t min_distance; // column_stats
  bool moments;         // column_stats: five planes instead of the mean alone
  float* out_lse;       // row_stats: (B, n_heads, T)
  float* out_span;      // row_stats: like out
};

// The tokens [first, last) of a batch row that one task measures, as far as they are of responses: part of one sequence's
// response, or several short sequences whole, which share vectors that each alone would leave nearly empty.
struct Tile {
  Sequence seq;              // the sequence; of several, from the first one's beginning to the last one's end
  int64_t first, last;
  const Sequence* sequences; // `count` of them, in order; some may have no response
  int64_t count;
};

// call(sequence, from, to) for each piece [from, to) of a response inside [first, last).
template <typename Call>
static inline void for_each_live(const Tile& tile, int64_t first, int64_t last, const Call& call) {
  for (int64_t i = 0; i < tile.count; ++i) {
    const Sequence& seq = tile.sequences[i];
    const int64_t from = first > seq.response_start ? first : seq.response_start;
    const int64_t to = last < seq.end ? last : seq.end;
    if (from < to) call(seq, from, to);
  }
}

// The largest distance between two tokens of one sequence of the tile.
static inline int64_t reach_of(const Tile& tile) {
  int64_t longest = 1;
  for_each_live(tile, tile.first, tile.last, [&](const Sequence& seq, int64_t, int64_t) {
    if (seq.end - seq.start > longest) longest = seq.end - seq.start;
  });
  return longest - 1;
}

// Floats from one dimension of a transposed tile to the next: an odd number of cache lines, as an even one would map the
// same token's dimensions onto few cache sets.
// (static: these headers are compiled for several instruction sets, whose copies must not be merged.)
static inline int64_t padded(int64_t columns) {
  const int64_t lines = (columns + kMaxLanes - 1) / kMaxLanes;
  return (lines | 1) * kMaxLanes;
}

} // namespace rhythm
