// What both band passes share: which tokens and heads a warp has, how heads are summed, and which kernel is launched.
//
// A warp owns a slab of 16 or 32 tokens and a run of the head table. A block has `slabs` neighbouring slabs, whose bands
// overlap and so share loads in the L1 cache, and `lanes` runs of heads, whose sums are added in shared memory in index
// order: the mean over the heads needs neither atomics nor a second kernel, and has the same bits every time.
#pragma once

#include "launch.h"
#include "products.cuh"
#include "rhythm/cuda.h"
#include "score.cuh"

namespace rhythm {

constexpr int kMaxWarps = 16; // of a block

struct Band {
  CudaInputs p;
  int tiles; // of a sequence, a block each
  int slabs, lanes;
};

struct Work {
  int sequence; // of the table
  Sequence seq;
  int first; // of the slab's tokens; at or past seq.end where the warp has none
  int slab, lane;
  int heads_from, heads_to;
};

// Tokens of a slab. A lane has kHalves of them: first + lane.row + 8 half.
template <int kHalves>
constexpr int kSlab = 8 * kHalves;

// Write zeros where there is no result: from the end of the sequence before this one in its batch row to this one's
// response, and after the last sequence of a batch row. The sequence's blocks share the work; the output may be unset.
__device__ inline void clear_others(const Band& band, const Sequence& seq, int index, int part, int64_t tile_tokens) {
  const CudaInputs& p = band.p;
  const bool first = index == 0 || p.seqs[index - 1].batch_row != seq.batch_row;
  const bool last = index + 1 == p.n_seqs || p.seqs[index + 1].batch_row != seq.batch_row;
  const int64_t reached = seq.response_start + band.tiles * tile_tokens;
  const int64_t ranges[2][2] = {{first ? 0 : p.seqs[index - 1].end, seq.response_start},
                                {reached < seq.end ? reached : seq.end, last ? p.tokens : seq.end}};
  const int planes = p.per_head ? static_cast<int>(p.n_heads) : 1;
#pragma unroll
  for (const auto& range : ranges)
#pragma unroll 1
    for (int64_t t = range[0] + part * blockDim.x + threadIdx.x; t < range[1]; t += int64_t(band.tiles) * blockDim.x)
#pragma unroll 1
      for (int plane = 0; plane < planes; ++plane) p.out[seq.batch_row * p.out_batch + plane * p.out_head + t] = 0.0f;
}

// Tiles vary fastest, so that neighbouring blocks share tokens in the L2 cache. Everything is on grid x: y and z end at
// 65,535. False where the whole block has no results.
template <int kHalves>
__device__ inline bool locate(const Band& band, Work& work) {
  const int part = blockIdx.x % band.tiles;
  const int64_t tile_tokens = band.slabs * kSlab<kHalves>;
  work.sequence = blockIdx.x / band.tiles;
  work.seq = band.p.seqs[work.sequence];
  clear_others(band, work.seq, work.sequence, part, tile_tokens);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); // of all lanes
  work.slab = warp % band.slabs, work.lane = warp / band.slabs;
  const int64_t tile = work.seq.response_start + part * tile_tokens;
  if (tile >= work.seq.end) return false;
  work.first = static_cast<int>(tile) + work.slab * kSlab<kHalves>;
  const int n_heads = static_cast<int>(band.p.n_heads);
  work.heads_from = n_heads * work.lane / band.lanes;
  work.heads_to = n_heads * (work.lane + 1) / band.lanes;
  return true;
}

// The sum over the four lanes (columns) that share a resident token.
__device__ inline float over_columns(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <typename T>
__device__ inline Tokens<T> tokens_of(const void* base, int64_t batch_row, int64_t batch_stride, int64_t head,
                                      int64_t head_stride, int64_t stride, int last, int head_dim) {
  const T* const from = static_cast<const T*>(base) + batch_row * batch_stride + head * head_stride;
  return {reinterpret_cast<const char*>(from), static_cast<uint64_t>(stride) * sizeof(T), last, head_dim};
}

// The log-sum-exp of an entry of the head table, as tokens of one number.
__device__ inline Tokens<float> lse_of(const CudaInputs& p, const Work& work, Head head, int last) {
  return tokens_of<float>(p.lse, work.seq.batch_row, p.lse_batch, head.lse_index, p.lse_head, p.lse_token, last, 1);
}

// All four columns of a row hold the same value[kHalves]; column h gives value[h], so that they share the stores.
template <int kHalves>
__device__ inline float of_column(const float (&value)[kHalves], Lane lane) {
  float chosen = value[0];
#pragma unroll
  for (int half = 1; half < kHalves; ++half) chosen = lane.column == half ? value[half] : chosen;
  return chosen;
}

// One head's values of a slab, where every head is an output.
template <int kHalves>
__device__ inline void store_head(const Band& band, const Work& work, Lane lane, int entry,
                                  const float (&value)[kHalves]) {
  float* const out = band.p.out + work.seq.batch_row * band.p.out_batch + entry * band.p.out_head;
  const int token = work.first + lane.row + 8 * lane.column;
  if (lane.column < kHalves && token < work.seq.end) out[token] = of_column(value, lane);
}

// The mean over all heads, from each warp's sum over its own. Every thread of the block comes here.
template <int kHalves>
__device__ inline void store_mean(const Band& band, const Work& work, Lane lane, const float (&total)[kHalves]) {
  constexpr int kTokens = kSlab<kHalves>;
  __shared__ float sums[kMaxWarps][kTokens]; // [lane of heads, slab; token]
  const int warp = work.lane * band.slabs + work.slab;
  if (lane.column < kHalves) sums[warp][lane.row + 8 * lane.column] = of_column(total, lane);
  __syncthreads();
  for (int i = threadIdx.x; i < band.slabs * kTokens; i += blockDim.x) {
    const int slab = i / kTokens, token = work.first + (slab - work.slab) * kTokens + i % kTokens;
    float sum = 0.0f;
    for (int l = 0; l < band.lanes; ++l) sum += sums[l * band.slabs + slab][i % kTokens];
    if (token < work.seq.end)
      band.p.out[work.seq.batch_row * band.p.out_batch + token] = sum / static_cast<float>(band.p.n_heads);
  }
}

// Whether rows of q and k can be read 16 bytes at a time.
inline bool aligned_to_sixteen(const CudaInputs& p) {
  const int64_t size = p.dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t all = reinterpret_cast<intptr_t>(p.q) | reinterpret_cast<intptr_t>(p.k) |
                      size * (p.q_batch | p.q_token | p.q_head | p.k_batch | p.k_token | p.k_head | p.head_dim);
  return all % 16 == 0;
}

// Multiprocessors of the device that widths are chosen for; an H100 has 132.
constexpr int64_t kMultiprocessors = 128;

template <typename Instance>
int launch_instance(const CudaInputs& p, void* stream) {
  Band band{p, 0, 4, 1};
  const auto blocks = [&] {
    const int64_t tokens = band.slabs * kSlab<Instance::kHalves>;
    band.tiles = static_cast<int>((p.max_seqlen + tokens - 1) / tokens);
    return band.tiles * p.n_seqs;
  };
  // Blocks of more slabs load fewer tokens twice; where there are too few blocks, heads are split into more runs instead.
  while (blocks() < kMultiprocessors * Instance::kBlocks && band.slabs > 1) band.slabs /= 2;
  const int64_t runs = Instance::kWarps / band.slabs;
  band.lanes = static_cast<int>(p.n_heads < runs ? p.n_heads : runs);
  int64_t grid = blocks();
  if (grid == 0) return 0;
  grid = grid < 0xffffffff ? grid : 0xffffffff; // more than 2^31 - 1 are refused by the launch
  return launch(Instance::kernel(), dim3(static_cast<unsigned>(grid)), dim3(32 * band.slabs * band.lanes), stream,
                band);
}

// Pick the instance of a pass, `Pass<Variant, T, kChunks, kWhole>`; whole: the head fills its chunks.
template <template <typename, typename, int, bool> class Pass, typename Variant>
int launch_variant(const CudaInputs& p, void* stream) {
  const bool aligned = aligned_to_sixteen(p);
  const auto chunks = [&](auto type, auto number) {
    using T = decltype(type);
    constexpr int kChunks = decltype(number)::value;
    if (p.head_dim == 32 * kChunks) return launch_instance<Pass<Variant, T, kChunks, true>>(p, stream);
    return launch_instance<Pass<Variant, T, kChunks, false>>(p, stream);
  };
  const auto sixteen_bits = [&](auto type) {
    if (!aligned) return launch_instance<Pass<Variant, decltype(type), kUnaligned, false>>(p, stream);
    if (p.head_dim <= 64) return chunks(type, std::integral_constant<int, 2>());
    if (p.head_dim <= 128) return chunks(type, std::integral_constant<int, 4>());
    return chunks(type, std::integral_constant<int, 8>());
  };
  switch (p.dtype) {
    case Dtype::kBFloat16: return sixteen_bits(BFloat16{});
    case Dtype::kFloat16: return sixteen_bits(Float16{});
    default: break;
  }
  if (aligned) return launch_instance<Pass<Variant, float, kAligned, false>>(p, stream);
  return launch_instance<Pass<Variant, float, kUnaligned, false>>(p, stream);
}

template <template <typename, typename, int, bool> class Pass>
int launch_band(const CudaInputs& p, void* stream) {
  return for_variant(p.score, [&](auto variant) { return launch_variant<Pass, decltype(variant)>(p, stream); });
}

} // namespace rhythm
