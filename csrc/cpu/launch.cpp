#include "launch.h"

#include <algorithm>
#include <numeric>

namespace rhythm {

static int64_t response_of(const Sequence& seq) { return int64_t(seq.end) - seq.response_start; }
static int64_t vectors(int64_t tokens) { return (tokens + kMaxLanes - 1) / kMaxLanes; }

Tiles::Tiles(const Sequence* sequences, int64_t count, int64_t tile_size, bool together)
    : sequences_(sequences), tile_size_(tile_size) {
  runs_.reserve(count);
  int64_t total = 0;
  for (int64_t i = 0; i < count;) {
    const Sequence& first = sequences[i];
    if (response_of(first) == 0) {
      ++i;
      continue;
    }
    int64_t stop = i + 1, end = first.end, alone = vectors(response_of(first)); // stop: behind the last that joined
    for (int64_t next = i + 1; together && next < count; ++next) {
      const Sequence& seq = sequences[next];
      if (response_of(seq) == 0) continue;
      const int64_t tokens = int64_t(seq.end) - first.response_start;
      alone += vectors(response_of(seq));
      // Prompts between responses take lanes too: with long ones, separate tiles take fewer vectors.
      if (seq.batch_row != first.batch_row || seq.start < end || tokens > tile_size || vectors(tokens) > alone) break;
      if (next - i > 2 * tile_size) break; // every tile and head walks over the empty responses between
      end = seq.end;
      stop = next + 1;
    }
    total += (end - first.response_start + tile_size - 1) / tile_size;
    runs_.push_back({i, stop, total});
    i = stop;
  }
}

Tile Tiles::operator[](int64_t task) const {
  const auto run = std::upper_bound(runs_.begin(), runs_.end(), task,
                                    [](int64_t wanted, const Run& r) { return wanted < r.tiles; });
  const int64_t within = task - (run == runs_.begin() ? 0 : (run - 1)->tiles);
  Sequence seq = sequences_[run->begin];
  for (int64_t i = run->begin + 1; i < run->end; ++i)
    if (response_of(sequences_[i]) > 0) seq.end = sequences_[i].end;
  const int64_t first = seq.response_start + within * tile_size_;
  return {seq, first, std::min<int64_t>(first + tile_size_, seq.end), sequences_ + run->begin, run->end - run->begin};
}

std::vector<KvGroup> kv_groups_of(const Head* heads, int64_t count, int64_t queries_per_kv) {
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto kv_head = [&](int32_t entry) { return int32_t(heads[entry].query / queries_per_kv); };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return kv_head(a) < kv_head(b); });
  std::vector<KvGroup> groups;
  for (const int32_t entry : order) {
    if (groups.empty() || groups.back().kv_head != kv_head(entry) || groups.back().count == kMaxGroup)
      groups.push_back({kv_head(entry), 0, {}});
    KvGroup& group = groups.back();
    group.entry[group.count++] = entry;
  }
  return groups;
}

} // namespace rhythm
