// row_stats: log-sum-exp, WAAD and span of each row in one pass over its keys (online softmax).
//
// Lanes are rows: maximum, sum and rescaling stay inside a lane. Keys are streamed kChunk at a time and read once for
// all query heads of a group.
#include "rhythm/outer.h"
#include "rhythm/passes.h"
#include "rhythm/score.h"
#include "rhythm/tile.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// What the online softmax of one head of the tile carries, a float a row: the running maximum (from the sink on, where
// there is one), and over the keys alone the sums of e = exp(x - maximum), of e (t - s) (distances, as t - sum e s would
// cancel) and of e max(W - (t - s), 0). A chunk is summed by itself and then added at once, and what that rounds away is
// kept: single keys would vanish beside a first key, or a sink, that has nearly all of the row.
struct Running {
  float maximum[kRowTile], sum[kRowTile], distance[kRowTile], band[kRowTile];
  float sum_lost[kRowTile], distance_lost[kRowTile], band_lost[kRowTile];

  void rescale(int64_t r, Vec factor) {
    float* const sums[] = {sum, distance, band, sum_lost, distance_lost, band_lost};
    for (float* values : sums) store(values + r, load(values + r) * factor);
  }
};
static_assert(sizeof(Running) == 7 * kRowTile * sizeof(float), "row_stats_scratch counts these");

// Take in the keys s0 .. s0 + count - 1 of one vector of rows starting at token t: dots[n * kRowTile + lane].
static void take_keys(const CpuInputs& p, const HeadRule& rule, int64_t t, int64_t s0, int64_t count, float* dots,
                      Running& state, int64_t r) {
  const Int lanes = lane_index();
  const Vec minus_inf = splat(-__builtin_inff());
  const bool all_visible = s0 + count - 1 <= t && t + kLanes - 1 - s0 <= p.score.window_left;
  const Int window = splat_int((int32_t)p.score.window_left);
  const Vec before = load(state.maximum + r);
  Vec maximum = before;
  for (int64_t n = 0; n < count; ++n) {
    const Int distance = lanes + (int32_t)(t - (s0 + n));
    Vec x = logit(load(dots + n * kRowTile), number(distance), rule, p.score);
    if (!all_visible) x = select((distance >= splat_int(0)) & (distance <= window), x, minus_inf);
    // Kept as rounded: the largest is one of these, so that no exponent below is above 0. Scaled anew there, in one
    // step with the subtraction, it would be off by half a unit of the largest: by 128 for logits of 2^31.
    store(dots + n * kRowTile, x);
    maximum = max_or_nan(maximum, x);
  }
  // A row that has seen no key yet keeps -inf; its exponentials are taken from 0 and are all 0.
  const Vec origin = select(maximum == minus_inf, Vec{}, maximum);
  state.rescale(r, exp(before - origin));
  Vec sum = Vec{}, far = Vec{}, band = Vec{};
  Vec distance = lane_number() + (float)(t - s0);
  const bool near = t - (s0 + count - 1) < p.window;
  for (int64_t n = 0; n < count; ++n) {
    const Vec e = exp_to_88(load(dots + n * kRowTile) - origin);
    sum += e;
    far += e * distance;
    if (near) {
      const Vec weight = (float)p.window - distance;
      // Keys after the row have e = 0 and a weight above W, both finite.
      band += e * select(weight > Vec{}, weight, Vec{});
    }
    distance -= 1.0f;
  }
  store(state.maximum + r, maximum);
  add_to(state.sum + r, state.sum_lost + r, sum);
  add_to(state.distance + r, state.distance_lost + r, far);
  if (near) add_to(state.band + r, state.band_lost + r, band);
}

// lse, WAAD and span of `rows` rows of one head, from what was carried.
static void finish(const CpuInputs& p, const HeadRule& rule, const Tile& tile, int32_t entry, const Running& state,
                   float* waad_mean, float* span_mean) {
  const int64_t rows = tile.last - tile.first, batch_row = tile.seq.batch_row;
  const int64_t at = (batch_row * p.n_heads + entry) * p.tokens + tile.first;
  float whole[kRowTile], waad[kRowTile], span[kRowTile];
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vec sum = load(state.sum + r);
    Vec all = sum;
    if (rule.sink != -__builtin_inff()) all += exp(rule.sink - load(state.maximum + r));
    // Not 1 - the sink's share: that would be known to 1e-7 of the row, and not of what the sink leaves.
    const Vec w = waad_from_band(sum / all, load(state.band + r) / all, (float)p.window);
    const Vec d = load(state.distance + r) / all;
    store(whole + r, all);
    store(waad + r, w);
    store(span + r, d);
    store(waad_mean + r, load(waad_mean + r) + w);
    store(span_mean + r, load(span_mean + r) + d);
  }
  for (int64_t r = 0; r < rows; ++r) p.out_lse[at + r] = state.maximum[r] + __builtin_logf(whole[r]);
  if (p.per_head) {
    __builtin_memcpy(p.out + at, waad, rows * sizeof(float));
    __builtin_memcpy(p.out_span + at, span, rows * sizeof(float));
  }
}

template <typename T>
static void run(const CpuInputs& p, const Tile& tile, float* scratch) {
  const int64_t t0 = tile.first, rows = tile.last - tile.first, batch_row = tile.seq.batch_row;
  const int64_t ld_rows = padded(kRowTile), step = p.head_dim * ld_rows;
  float* const queries = scratch;
  float* const keys = queries + kMaxGroup * step;
  float* const dots = keys + kChunk * p.head_dim;
  Running* const states = (Running*)(dots + kChunk * kRowTile);
  float* const waad_mean = (float*)(states + kMaxGroup);
  float* const span_mean = waad_mean + kRowTile;
  __builtin_memset(waad_mean, 0, 2 * kRowTile * sizeof(float));

  const int64_t width = whole_vectors(rows);
  const int64_t first_key =
      p.score.window_left < t0 - tile.seq.start ? t0 - p.score.window_left : tile.seq.start;
  for (int64_t i = 0; i < p.n_kv_groups; ++i) {
    const KvGroup& group = p.kv_groups[i];
    HeadRule rules[kMaxGroup];
    for (int g = 0; g < group.count; ++g) {
      const Head head = p.heads[group.entry[g]];
      load_transposed(head_of<T>(p.q, batch_row, p.q_batch, head.query, p.q_head), p.q_token, p.head_dim, t0, width, t0,
                      tile.last, queries + g * step, ld_rows);
      __builtin_memset(&states[g], 0, sizeof(Running));
      rules[g] = rule_of(p, tile, head.query);
      for (int64_t r = 0; r < kRowTile; ++r) states[g].maximum[r] = rules[g].sink;
    }
    const T* const kv = head_of<T>(p.k, batch_row, p.k_batch, group.kv_head, p.k_head);
    for (int64_t s = first_key; s < tile.last; s += kChunk) {
      const int64_t count = smaller(kChunk, tile.last - s);
      const int64_t whole = (count + kOuterTokens - 1) / kOuterTokens * kOuterTokens;
      load_tokens(kv, p.k_token, p.head_dim, s, whole, tile.last, keys);
      const int64_t seeing = s > t0 ? (s - t0) / kLanes * kLanes : 0; // the vectors of rows before see none of these
      for (int g = 0; g < group.count; ++g) {
        outer_product(queries + g * step + seeing, ld_rows, width - seeing, keys, whole, p.head_dim, dots + seeing,
                      kRowTile);
        for (int64_t r = seeing; r < width; r += kLanes)
          take_keys(p, rules[g], t0 + r, s, count, dots + r, states[g], r);
      }
    }
    for (int g = 0; g < group.count; ++g) finish(p, rules[g], tile, group.entry[g], states[g], waad_mean, span_mean);
  }
  if (!p.per_head)
    for (int64_t r = 0; r < rows; ++r) {
      p.out[batch_row * p.tokens + t0 + r] = waad_mean[r] / (float)p.n_heads;
      p.out_span[batch_row * p.tokens + t0 + r] = span_mean[r] / (float)p.n_heads;
    }
}

RHYTHM_DEFINE(row_stats)

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
