// band_columns: FAI of each key from the rows at distance lo .. hi after it, the log-sum-exp given.
//
// Lanes are keys. A tile of keys is transposed once a kv head, the query tokens after it once a head. For a row position
// (an offset from the tile's first key) lane i holds key i and row position + i, all at one distance; it is multiplied
// with every vector of keys for which this distance is in the horizon.
#include "rhythm/diagonal.h"
#include "rhythm/passes.h"
#include "rhythm/score.h"
#include "rhythm/tile.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// The vectors of keys [first, first + count) that the row position at `offset` from the tile's first key meets.
struct Met {
  int64_t first;
  int count;
};

RHYTHM_INLINE Met vectors_met(int64_t offset, int64_t lo, int64_t hi, int64_t n_vectors) {
  // lo <= offset - kLanes * v <= hi
  const int64_t first = offset <= hi ? 0 : (offset - hi + kLanes - 1) / kLanes;
  const int64_t last = offset < lo ? -1 : smaller((offset - lo) / kLanes, n_vectors - 1);
  return {first, last < first ? 0 : (int)(last - first + 1)};
}

// Add A of the row positions s0 + [from, to) to sums[kColumnTile]. keys [head_dim, ld_keys] and queries [head_dim,
// ld_queries] are transposed; column 0 of queries and of lse [ld_queries] is position s0 + from. ends [kColumnTile]: the
// end of each key's sequence, from which on rows belong to another one.
static void add_rows(const CpuInputs& p, const HeadRule& rule, int64_t s0, const int32_t* ends, int64_t hi,
                     int64_t from, int64_t to, int64_t n_vectors, const float* keys, int64_t ld_keys,
                     const float* queries, int64_t ld_queries, const float* lse, float* sums) {
  const Int lanes = lane_index();
  Vec dots[kAccumulators]; // [fixed vector of keys, moved position], a lane a key
  int64_t moved = 0;
  for (int64_t offset = from; offset < to; offset += moved) {
    const Met met = vectors_met(offset, p.lo, hi, n_vectors);
    moved = 1;
    if (met.count == 0) continue;
    for (; moved < kMaxMoved && offset + moved < to; ++moved) {
      const Met next = vectors_met(offset + moved, p.lo, hi, n_vectors);
      if (next.first != met.first || next.count != met.count) break;
    }
    for (int64_t v = met.first; v < met.first + met.count; v += kMaxFixed) {
      const int fixed = (int)smaller(kMaxFixed, met.first + met.count - v);
      const int64_t at_once = moved_for(fixed);
      for (int64_t base = 0; base < moved; base += at_once) {
        const int block = (int)smaller(at_once, moved - base);
        const int64_t column = offset - from + base;
        diagonal(fixed, block)(keys + v * kLanes, kLanes, ld_keys, queries + column, ld_queries, p.head_dim, dots);
        for (int f = 0; f < fixed; ++f) {
          float* const sum = sums + (v + f) * kLanes;
          const Int its_end = load_int(ends + (v + f) * kLanes);
          Vec total = load(sum);
          for (int m = 0; m < block; ++m) {
            // Lane i: the key s0 + kLanes * (v + f) + i, met by the row s0 + offset + base + m + i.
            const Vec distance = splat((float)(offset + base + m - kLanes * (v + f)));
            const Vec a = exp(logit(dots[f * block + m], distance, rule, p.score) - load(lse + column + m));
            total += keep(lanes + (int32_t)(s0 + offset + base + m) < its_end, a);
          }
          store(sum, total);
        }
      }
    }
  }
}

template <typename T>
static void run(const CpuInputs& p, const Tile& tile, float* scratch) {
  const int64_t s0 = tile.first, count = tile.last - tile.first, batch_row = tile.seq.batch_row, end = tile.seq.end;
  const int64_t ld_keys = padded(kColumnTile);
  const int64_t at_once = band_columns_positions(p);
  const int64_t ld_queries = padded(at_once + kMaxLanes);
  float* const keys = scratch;                                // [head_dim, ld_keys], transposed
  float* const queries = keys + p.head_dim * ld_keys;         // [head_dim, ld_queries], transposed
  float* const lse = queries + p.head_dim * ld_queries;       // [ld_queries]
  float* const sums = lse + ld_queries;                       // [kColumnTile], as are those below
  float* const total = sums + kColumnTile;
  float* const lost = total + kColumnTile;                    // rounding errors of total (add_to)
  float* const mean = lost + kColumnTile;
  __builtin_memset(mean, 0, kColumnTile * sizeof(float));

  // FAI divides by the rows in the horizon by position: those that a sliding window hides count, with A = 0.
  float inverse[kColumnTile];
  int32_t ends[kColumnTile];
  spread(tile, kColumnTile, INT32_MIN, ends, [](const Sequence& seq) { return seq.end; });
  for (int64_t c = 0; c < count; ++c) {
    const int64_t rows = smaller(int64_t(ends[c]) - 1, s0 + c + p.hi) - (s0 + c + p.lo) + 1;
    inverse[c] = rows > 0 ? 1.0f / (float)rows : 0.0f;
  }
  const int64_t hi = smaller(smaller(p.hi, p.score.window_left), reach_of(tile));
  const int64_t n_vectors = whole_vectors(count) / kLanes;
  // Offsets of the rows that the first lane of some vector of keys meets.
  const int64_t from = p.lo, to = hi < p.lo ? p.lo : smaller((n_vectors - 1) * kLanes + hi + 1, end - s0);

  int64_t loaded_head = -1;
  for (int64_t i = 0; i < p.n_kv_groups; ++i) {
    const KvGroup& group = p.kv_groups[i];
    if (group.kv_head != loaded_head)
      load_transposed(head_of<T>(p.k, batch_row, p.k_batch, group.kv_head, p.k_head), p.k_token, p.head_dim, s0,
                      n_vectors * kLanes, 0, p.tokens, keys, ld_keys);
    loaded_head = group.kv_head;
    for (int g = 0; g < group.count; ++g) {
      const Head head = p.heads[group.entry[g]];
      const HeadRule rule = rule_of(p, tile, head.query);
      const T* const source = head_of<T>(p.q, batch_row, p.q_batch, head.query, p.q_head);
      __builtin_memset(total, 0, 2 * kColumnTile * sizeof(float)); // total and lost
      for (int64_t offset = from; offset < to; offset += at_once) {
        const int64_t last = smaller(offset + at_once, to);
        const int64_t columns = whole_vectors(last - offset + kLanes - 1);
        load_transposed(source, p.q_token, p.head_dim, s0 + offset, columns, 0, p.tokens, queries, ld_queries);
        load_lse(p, batch_row, head, rule, s0 + offset, columns, s0, end, lse);
        __builtin_memset(sums, 0, kColumnTile * sizeof(float));
        add_rows(p, rule, s0, ends, hi, offset, last, n_vectors, keys, ld_keys, queries, ld_queries, lse, sums);
        for (int64_t c = 0; c < n_vectors * kLanes; c += kLanes) add_to(total + c, lost + c, load(sums + c));
      }
      for (int64_t c = 0; c < count; ++c) {
        const float value = inverse[c] > 0 ? total[c] * inverse[c] : 0.0f;
        mean[c] += value;
        total[c] = value;
      }
      if (!p.per_head) continue;
      float* const out = p.out + (batch_row * p.n_heads + group.entry[g]) * p.tokens;
      for_each_live(tile, s0, tile.last, [=](const Sequence&, int64_t first, int64_t last) {
        __builtin_memcpy(out + first, total + (first - s0), (last - first) * sizeof(float));
      });
    }
  }
  if (!p.per_head)
    for_each_live(tile, s0, tile.last, [=](const Sequence&, int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) p.out[batch_row * p.tokens + s] = mean[s - s0] / (float)p.n_heads;
    });
}

RHYTHM_DEFINE(band_columns)

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
