// The passes as the launcher sees them: what a task needs, and one table of functions a capability.
#pragma once

#include "rhythm/inputs.h"

namespace rhythm {

// One task: all selected heads of one tile of tokens. `scratch` holds what the pass's *_scratch says, aligned to 64.
typedef void (*TileTask)(const CpuInputs&, const Tile&, float* scratch);

struct Passes {
  const char* capability;
  int lanes;
  TileTask band_rows, band_columns, row_stats, column_stats;
};

// Scratch of a task in floats, the buffers of the pass's run() one after the other, the same for every capability; one
// vector more than a tile where loads are unaligned. (static: see padded.)

// Rows of a strip, which band_rows takes through all heads at a time. It reads strip + W - 1 keys: strips are long for a
// large W, and where few heads share a kv head (measured: 0.83 to 0.98 of the time).
static inline int64_t band_rows_strip(const CpuInputs& p) {
  if (p.n_heads < 2 * p.n_kv_groups) return kMaxStrip;
  const int64_t wanted = (p.window - 1 + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  return wanted < kMaxLanes ? kMaxLanes : wanted > kMaxStrip ? kMaxStrip : wanted;
}
static inline int64_t band_rows_key_columns(const CpuInputs& p) {
  return padded(band_rows_strip(p) + (p.window < kBandChunk ? p.window : kBandChunk) + kMaxLanes);
}
static inline int64_t band_rows_scratch(const CpuInputs& p) {
  return p.head_dim * (kMaxGroup * kMaxLanes + band_rows_key_columns(p)) + (3 * kMaxGroup + 1) * kMaxStrip;
}

static inline int64_t band_columns_positions(const CpuInputs& p) {
  const int64_t all = kColumnTile + (p.hi - p.lo);
  return all < 2 * kBandChunk ? all : 2 * kBandChunk;
}

static inline int64_t band_columns_scratch(const CpuInputs& p) {
  const int64_t positions = padded(band_columns_positions(p) + kMaxLanes);
  return p.head_dim * (padded(kColumnTile) + positions) + positions + 4 * kColumnTile;
}

static inline int64_t row_stats_scratch(const CpuInputs& p) {
  return p.head_dim * (kMaxGroup * padded(kRowTile) + kChunk) + kChunk * kRowTile +
         (7 * kMaxGroup + 2) * kRowTile;
}

static inline int64_t column_stats_scratch(const CpuInputs& p) {
  return p.head_dim * (padded(kStatsTile) + kChunk) + kChunk * kStatsTile + kChunk + 11 * kStatsTile;
}

// Defines the task `pass` of this capability from `run<T>(inputs, tile, scratch)`, T the element type of q and k.
#define RHYTHM_DEFINE(pass)                                         \
  void pass(const CpuInputs& p, const Tile& tile, float* scratch) { \
    switch (p.dtype) {                                              \
      case Dtype::kFloat32: return run<float>(p, tile, scratch);    \
      case Dtype::kBFloat16: return run<BFloat16>(p, tile, scratch);\
      case Dtype::kFloat16: return run<Float16>(p, tile, scratch);  \
    }                                                               \
  }

#define RHYTHM_DECLARE(capability)                                  \
  namespace capability {                                            \
  void band_rows(const CpuInputs&, const Tile&, float* scratch);    \
  void band_columns(const CpuInputs&, const Tile&, float* scratch); \
  void row_stats(const CpuInputs&, const Tile&, float* scratch);    \
  void column_stats(const CpuInputs&, const Tile&, float* scratch); \
  }

} // namespace rhythm
