#include "launch.h"

#include <algorithm>
#include <numeric>

namespace rhythm {

Tiles::Tiles(const Sequence* sequences, int64_t count, int64_t tile_size)
    : sequences_(sequences), tile_size_(tile_size) {
  ends_.reserve(count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tokens = int64_t(sequences[i].end) - sequences[i].response_start;
    total += (tokens + tile_size - 1) / tile_size;
    ends_.push_back(total);
  }
}

Tile Tiles::operator[](int64_t task) const {
  const int64_t i = std::upper_bound(ends_.begin(), ends_.end(), task) - ends_.begin();
  const Sequence& seq = sequences_[i];
  const int64_t within = task - (i > 0 ? ends_[i - 1] : 0);
  const int64_t first = seq.response_start + within * tile_size_;
  return {seq, first, std::min<int64_t>(first + tile_size_, seq.end)};
}

std::vector<HeadGroup> group_heads(const Head* heads, int64_t count, int64_t queries_per_kv) {
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto kv_head = [&](int32_t entry) { return int32_t(heads[entry].query / queries_per_kv); };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return kv_head(a) < kv_head(b); });
  std::vector<HeadGroup> groups;
  for (const int32_t entry : order) {
    if (groups.empty() || groups.back().kv_head != kv_head(entry) || groups.back().count == kMaxGroup)
      groups.push_back({kv_head(entry), 0, {}});
    HeadGroup& group = groups.back();
    group.entry[group.count++] = entry;
  }
  return groups;
}

} // namespace rhythm
