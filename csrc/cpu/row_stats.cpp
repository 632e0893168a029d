// row_stats: log-sum-exp, WAAD and span of each row in one pass over its keys (online softmax).
//
// Lanes are rows: maximum, sum and rescaling stay inside a lane. Keys are streamed kChunk at a time and read once for
// all query heads of a kv group.
#include "rhythm/outer.h"
#include "rhythm/passes.h"
#include "rhythm/score.h"
#include "rhythm/tile.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// What the online softmax of one head carries from chunk to chunk, a float a row: the maximum so far (it starts at the
// sink, where there is one), and over the keys without the sink sum = sum e with e = exp(x - maximum), distance =
// sum e (t - s) (t sum e - sum e s would cancel) and band = sum e max(W - (t - s), 0). A chunk is summed first and added
// at once, its rounding error kept (*_lost): single keys would vanish beside one that has nearly all of the row.
struct Running {
  float maximum[kRowTile], sum[kRowTile], distance[kRowTile], band[kRowTile];
  float sum_lost[kRowTile], distance_lost[kRowTile], band_lost[kRowTile];

  void rescale(int64_t r, Vec factor) {
    float* const sums[] = {sum, distance, band, sum_lost, distance_lost, band_lost};
    for (float* values : sums) store(values + r, load(values + r) * factor);
  }
};
static_assert(sizeof(Running) == 7 * kRowTile * sizeof(float), "row_stats_scratch counts these");

// Take in the keys s0 .. s0 + count - 1 for the rows t .. t + kLanes - 1. dots: their q.k, [count, kRowTile] from the
// vector's column r on, overwritten with logits.
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
    // Logits are stored once rounded, so that the maximum is exactly one of them and x - maximum <= 0 below. Computed
    // anew with the subtraction fused in, they would differ from it by a rounding: by 128 for logits of 2^31.
    store(dots + n * kRowTile, x);
    maximum = max_or_nan(maximum, x);
  }
  // Rows that have seen no key keep the maximum -inf; 0 in its place makes their exponentials exp(-inf) = 0, not NaN.
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
      // Keys after the row have e = 0 and weights above W: finite, so the product is 0.
      band += e * select(weight > Vec{}, weight, Vec{});
    }
    distance -= 1.0f;
  }
  store(state.maximum + r, maximum);
  add_to(state.sum + r, state.sum_lost + r, sum);
  add_to(state.distance + r, state.distance_lost + r, far);
  if (near) add_to(state.band + r, state.band_lost + r, band);
}

// lse, WAAD and span of one head's rows, from the sums over all keys; means [kRowTile] are summed over the heads.
static void finish(const CpuInputs& p, const HeadRule& rule, const Tile& tile, int32_t entry, const Running& state,
                   float* waad_mean, float* span_mean) {
  const int64_t rows = tile.last - tile.first, batch_row = tile.seq.batch_row;
  const int64_t at = (batch_row * p.n_heads + entry) * p.tokens + tile.first;
  float whole[kRowTile], waad[kRowTile], span[kRowTile];
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vec sum = load(state.sum + r);
    Vec all = sum;
    if (rule.sink != -__builtin_inff()) all += exp(rule.sink - load(state.maximum + r));
    // rowsum is not 1 - the sink's share: where the sink has nearly all, that difference would cancel.
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
  float* const queries = scratch;                               // [kMaxGroup, head_dim, ld_rows], transposed
  float* const keys = queries + kMaxGroup * step;               // [kChunk, head_dim]
  float* const dots = keys + kChunk * p.head_dim;               // [kChunk, kRowTile]
  Running* const states = (Running*)(dots + kChunk * kRowTile); // [kMaxGroup]
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
      const int64_t seeing = s > t0 ? (s - t0) / kLanes * kLanes : 0; // rows before this column see none of these keys
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
