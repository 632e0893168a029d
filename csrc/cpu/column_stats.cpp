// column_stats: the mean of the attention that each key receives from all later rows, or its first four moments.
//
// Lanes are keys. Rows are streamed kChunk at a time; each chunk's central moments are taken around its own mean and
// merged into those of the rows before (Chan, Golub and LeVeque; Pébay for the third and fourth), since sums of raw
// powers would cancel. Rows that see no key of the tile (sliding window) are not read: they are merged as zeros at once.
#include "rhythm/outer.h"
#include "rhythm/passes.h"
#include "rhythm/score.h"
#include "rhythm/tile.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// A is scaled before its powers are taken: the fourth power of an attention of 1e-10 would leave the range of float32.
constexpr float kUnit = 16777216.0f;

// Of each key: the rows counted, the mean of their A (their sum where the mean alone is wanted), and the sums of
// (A - mean)^2, ^3 and ^4. The mean is a long sum of small steps, whose rounding errors `lost` keeps (add_to).
struct Moments {
  float count[kStatsTile], mean[kStatsTile], lost[kStatsTile], m2[kStatsTile], m3[kStatsTile], m4[kStatsTile];
};
static_assert(sizeof(Moments) == 6 * kStatsTile * sizeof(float), "column_stats_scratch counts these");

RHYTHM_INLINE void merge(Moments& into, int64_t c, Vec count, Vec mean, Vec m2, Vec m3, Vec m4) {
  const Vec na = load(into.count + c), nb = count;
  const Vec n = na + nb;
  const Vec share = select(n > Vec{}, nb / select(n > Vec{}, n, splat(1.0f)), Vec{}); // nb / n
  const Vec rest = 1.0f - share;                                                     // na / n
  const Vec a2 = load(into.m2 + c), a3 = load(into.m3 + c);
  const Vec delta = mean - load(into.mean + c) + load(into.lost + c);
  const Vec step = delta * share; // what the mean moves by
  const Vec cross = delta * na * step;
  store(into.m4 + c, load(into.m4 + c) + m4 + cross * delta * delta * (rest * rest - rest * share + share * share) +
                         6.0f * delta * delta * (share * share * a2 + rest * rest * m2) +
                         4.0f * delta * (rest * m3 - share * a3));
  store(into.m3 + c, a3 + m3 + cross * delta * (rest - share) + 3.0f * delta * (rest * m2 - share * a2));
  store(into.m2 + c, a2 + m2 + cross);
  add_to(into.mean + c, into.lost + c, step);
  store(into.count + c, n);
}

// Take in the rows t0 .. t0 + count - 1 for the keys s .. s + kLanes - 1. maps: their q.k, [count, kStatsTile] from the
// vector's column c on, overwritten with A; lse [count].
static void take_rows(const CpuInputs& p, const HeadRule& rule, int64_t s, int64_t t0, int64_t count, float* maps,
                      const float* lse, Moments& state, int64_t c) {
  const Int lanes = lane_index();
  const Int nearest = splat_int((int32_t)p.min_distance);
  const Int window = splat_int((int32_t)p.score.window_left);
  Vec sum = Vec{};
  Int counted = splat_int(0);
  for (int64_t n = 0; n < count; ++n) {
    const Int distance = (int32_t)(t0 + n - s) - lanes;
    const Int counts = distance >= nearest;
    const Vec a = exp(logit(load(maps + n * kStatsTile), number(distance), rule, p.score) - lse[n]) * kUnit;
    const Vec kept = keep(counts & (distance <= window) & (distance >= splat_int(0)), a);
    counted -= counts; // a true lane is -1
    sum += kept;
    store(maps + n * kStatsTile, kept);
  }
  const Vec rows = number(counted);
  if (!p.moments) {
    add_to(state.mean + c, state.lost + c, sum);
    store(state.count + c, load(state.count + c) + rows);
    return;
  }
  const Vec mean = sum / select(rows > Vec{}, rows, splat(1.0f));
  Vec m2 = Vec{}, m3 = Vec{}, m4 = Vec{};
  for (int64_t n = 0; n < count; ++n) {
    const Int distance = (int32_t)(t0 + n - s) - lanes;
    const Vec left = keep(distance >= nearest, load(maps + n * kStatsTile) - mean);
    const Vec square = left * left;
    m2 += square;
    m3 += square * left;
    m4 += square * square;
  }
  merge(state, c, rows, mean, m2, m3, m4);
}

// Take in rows stop .. end - 1, whose A is 0 for the keys s .. s + kLanes - 1, whatever their log-sum-exp.
__attribute__((noinline)) static void take_hidden(const CpuInputs& p, int64_t s, int64_t stop, int64_t end,
                                                  Moments& state, int64_t c) {
  // A key's own rows begin at s + lane + min_distance, which may lie behind `stop`.
  const Vec later = (float)(end - s - smaller(p.min_distance, end - s)) - lane_number();
  const Vec all = splat((float)(end - stop));
  const Vec rows = select(later < all, later, all);
  const Vec hidden = select(rows > Vec{}, rows, Vec{});
  if (p.moments) {
    // merge() moves the mean to mean - mean * hidden / whole, which cancels where most rows are hidden: scale it instead.
    const Vec n = load(state.count + c), mean = load(state.mean + c), lost = load(state.lost + c);
    merge(state, c, hidden, Vec{}, Vec{}, Vec{}, Vec{});
    const Vec whole = n + hidden, share = n / select(whole > Vec{}, whole, splat(1.0f));
    store(state.mean + c, mean * share);
    store(state.lost + c, lost * share);
  } else {
    store(state.count + c, load(state.count + c) + hidden);
  }
}

// Where results of key tile.first + c go: into plane `plane` of p.out with per_head, and into the sum over heads.
struct Output {
  const CpuInputs& p;
  const Tile& tile;
  int32_t entry;
  float* mean; // [planes, kStatsTile]

  void put(int plane, int64_t c, float value) const {
    mean[plane * kStatsTile + c] += value;
    if (p.per_head)
      p.out[((plane * p.batch + tile.seq.batch_row) * p.n_heads + entry) * p.tokens + tile.first + c] = value;
  }
};

static void finish(const Output& out, const Moments& state, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    const float n = state.count[c];
    if (!out.p.moments) {
      out.put(0, c, n > 0 ? state.mean[c] / n / kUnit : 0.0f);
      continue;
    }
    const float variance = n >= 2 ? state.m2[c] / n : 0.0f;
    const float square = variance * variance;
    // Too flat for float32 (A spread by less than 4e-17); a NaN is not flat and comes out.
    const bool flat = n < 2 || square < 1e-36f;
    out.put(0, c, n);
    out.put(1, c, n > 0 ? state.mean[c] / kUnit : 0.0f);
    out.put(2, c, variance / (kUnit * kUnit));
    out.put(3, c, flat ? 0.0f : state.m3[c] / n / (variance * __builtin_sqrtf(variance)));
    out.put(4, c, flat ? 0.0f : state.m4[c] / n / square);
  }
}

template <typename T>
static void run(const CpuInputs& p, const Tile& tile, float* scratch) {
  const int64_t s0 = tile.first, count = tile.last - tile.first, batch_row = tile.seq.batch_row, end = tile.seq.end;
  const int64_t ld_keys = padded(kStatsTile);
  float* const keys = scratch;                         // [head_dim, ld_keys], transposed
  float* const rows = keys + p.head_dim * ld_keys;     // q, [kChunk, head_dim]
  float* const maps = rows + kChunk * p.head_dim;      // q.k, then A: [kChunk, kStatsTile]
  float* const lse = maps + kChunk * kStatsTile;       // [kChunk]
  Moments* const state = (Moments*)(lse + kChunk);
  float* const mean = (float*)(state + 1);             // [planes, kStatsTile], the sum over heads
  const int planes = p.moments ? 5 : 1;
  __builtin_memset(mean, 0, planes * kStatsTile * sizeof(float));

  const int64_t width = whole_vectors(count);
  const int64_t from = s0 + smaller(p.min_distance, end - s0);
  // Rows from here on see no key of the tile.
  const int64_t stop = p.score.window_left < end - tile.last ? tile.last + p.score.window_left : end;
  int64_t loaded_head = -1;
  for (int64_t i = 0; i < p.n_kv_groups; ++i) {
    const KvGroup& group = p.kv_groups[i];
    if (group.kv_head != loaded_head)
      load_transposed(head_of<T>(p.k, batch_row, p.k_batch, group.kv_head, p.k_head), p.k_token, p.head_dim, s0, width,
                      s0, end, keys, ld_keys);
    loaded_head = group.kv_head;
    for (int g = 0; g < group.count; ++g) {
      const Head head = p.heads[group.entry[g]];
      const HeadRule rule = rule_of(p, tile, head.query);
      const T* const source = head_of<T>(p.q, batch_row, p.q_batch, head.query, p.q_head);
      __builtin_memset(state, 0, sizeof(Moments));
      for (int64_t t = from; t < stop; t += kChunk) {
        const int64_t n = smaller(kChunk, stop - t);
        const int64_t whole = (n + kOuterTokens - 1) / kOuterTokens * kOuterTokens;
        load_tokens(source, p.q_token, p.head_dim, t, whole, end, rows);
        load_lse(p, batch_row, head, rule, t, n, s0, end, lse);
        outer_product(keys, ld_keys, width, rows, whole, p.head_dim, maps, kStatsTile);
        for (int64_t c = 0; c < width; c += kLanes) take_rows(p, rule, s0 + c, t, n, maps + c, lse, *state, c);
      }
      if (stop < end)
        for (int64_t c = 0; c < width; c += kLanes) take_hidden(p, s0 + c, stop, end, *state, c);
      finish(Output{p, tile, group.entry[g], mean}, *state, count);
    }
  }
  if (!p.per_head)
    for (int plane = 0; plane < planes; ++plane)
      for (int64_t c = 0; c < count; ++c)
        p.out[(plane * p.batch + batch_row) * p.tokens + s0 + c] = mean[plane * kStatsTile + c] / (float)p.n_heads;
}

RHYTHM_DEFINE(column_stats)

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
