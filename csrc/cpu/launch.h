// From a sequence table to tasks: one task a tile of response tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "rhythm/passes.h"

namespace rhythm {

class Tiles {
 public:
  Tiles(const Sequence* sequences, int64_t count, int64_t tile_size);

  int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }
  Tile operator[](int64_t task) const;

 private:
  const Sequence* sequences_;
  int64_t tile_size_;
  std::vector<int64_t> ends_; // tiles up to and with each sequence
};

// The selected heads, those of one kv head side by side, so that its keys are read once for all of them.
std::vector<HeadGroup> group_heads(const Head* heads, int64_t count, int64_t queries_per_kv);

} // namespace rhythm
