// From a sequence table to tasks: one task a tile of response tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "rhythm/passes.h"

namespace rhythm {

class Tiles {
 public:
  // `together`: short sequences that follow each other in a batch row share a tile where that saves vectors.
  Tiles(const Sequence* sequences, int64_t count, int64_t tile_size, bool together);

  int64_t size() const { return runs_.empty() ? 0 : runs_.back().tiles; }
  Tile operator[](int64_t task) const;

 private:
  // Sequences [begin, end) of the table: one of any length, or several in one tile.
  struct Run {
    int64_t begin, end, tiles; // tiles: of this run and all before
  };

  const Sequence* sequences_;
  int64_t tile_size_;
  std::vector<Run> runs_;
};

// The selected heads by kv head, at most kMaxGroup in a kv group, which reads its keys once for all of them.
std::vector<KvGroup> kv_groups_of(const Head* heads, int64_t count, int64_t queries_per_kv);

} // namespace rhythm
