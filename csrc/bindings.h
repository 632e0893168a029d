// What the bindings of every device share: tensors of the stable ABI are checked and become plain pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "rhythm/credit.h"
#include "rhythm/inputs.h"

namespace rhythm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What an error says of a tensor: its dtype and shape, and whether it is contiguous.
inline std::string described(const Tensor& tensor) {
  std::string text = torch::headeronly::toString(tensor.scalar_type());
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i == 0 ? " (" : ", ") + std::to_string(tensor.size(i));
  return text + (tensor.dim() == 0 ? " ()" : ")") + (tensor.is_contiguous() ? "" : ", not contiguous");
}

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "q must be float32, bfloat16 or float16, got ", described(tensor));
  }
}

// Check an (n, width) int32 table and return its entries.
template <typename Entry>
const Entry* table(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) * 4 == int64_t(sizeof(Entry)) &&
                      tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous(),
                  name, " must be a contiguous int32 table with ", sizeof(Entry) / 4, " columns, got ",
                  described(tensor));
  return static_cast<const Entry*>(tensor.const_data_ptr());
}

// The memory of a contiguous float32 result of `size` elements.
inline float* result(const Tensor& tensor, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == size,
                  "an output must be contiguous float32 with ", size, " elements, got ", described(tensor));
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// q, k and lse of a call; the heads that lse has (unbounded without one).
inline int64_t set_tensors(Inputs& p, const Tensor& q, const Tensor& k, const Tensor* lse) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must be (B, T, H, D), got ", described(q), " and ",
                  described(k));
  p.batch = q.size(0), p.tokens = q.size(1), p.head_dim = q.size(3);
  STD_TORCH_CHECK(p.tokens < std::numeric_limits<int32_t>::max(), "q must have T below 2^31 - 1, got ", p.tokens);
  STD_TORCH_CHECK(k.size(0) == p.batch && k.size(1) == p.tokens && k.size(3) == p.head_dim && k.size(2) > 0 &&
                      q.size(2) % k.size(2) == 0,
                  "k must be (B, T, H_kv, D), H a multiple of H_kv, got ", described(k), " with q ", described(q));
  p.dtype = dtype_of(q);
  STD_TORCH_CHECK(dtype_of(k) == p.dtype, "k must have the same dtype as q, got ", described(k), " with q ",
                  described(q));
  STD_TORCH_CHECK(p.head_dim <= 1 || (q.stride(3) == 1 && k.stride(3) == 1),
                  "q and k must have stride 1 in the last dimension, got ", q.stride(3), " and ", k.stride(3));
  p.q = q.const_data_ptr(), p.q_batch = q.stride(0), p.q_token = q.stride(1), p.q_head = q.stride(2);
  p.k = k.const_data_ptr(), p.k_batch = k.stride(0), p.k_token = k.stride(1), p.k_head = k.stride(2);
  if (lse == nullptr) return std::numeric_limits<int64_t>::max();
  STD_TORCH_CHECK(lse->dim() == 3 && lse->size(0) == p.batch && lse->size(2) == p.tokens &&
                      lse->scalar_type() == ScalarType::Float,
                  "lse must be float32 (B, X, T), got ", described(*lse), " with q ", described(q));
  p.lse = static_cast<const float*>(lse->const_data_ptr());
  p.lse_batch = lse->stride(0), p.lse_head = lse->stride(1), p.lse_token = lse->stride(2);
  return lse->size(1);
}

// The rule as every op of either device has it: in its schema, as parameters, and handed on to set_rule().
#define RHYTHM_RULE_SCHEMA                                                                                          \
  "Tensor seqs, Tensor heads, int max_seqlen, float scale, float softcap, int window_left, Tensor? sinks, "          \
  "Tensor? alibi_slopes, "
#define RHYTHM_RULE_PARAMETERS                                                                                      \
  const Tensor &seqs, const Tensor &heads, int64_t max_seqlen, double scale, double softcap, int64_t window_left,    \
      const std::optional<Tensor>&sinks, const std::optional<Tensor>&alibi_slopes
#define RHYTHM_RULE seqs, heads, max_seqlen, scale, softcap, window_left, sinks, alibi_slopes

// A distance of a call: the ops of rhythm_kernels limit them to the length, and the kernels count in 32 bits.
inline int64_t distance(const char* name, int64_t value, int64_t least, const Inputs& p) {
  STD_TORCH_CHECK(least <= value && value <= p.tokens, name, " must be from ", least, " to T, got ", value);
  return value;
}

// Numbers of the query heads, (H,) or (entries, H); null where there are none.
inline const float* head_numbers(const std::optional<Tensor>& numbers, int64_t entries, int64_t query_heads,
                                 const char* name) {
  if (!numbers.has_value()) return nullptr;
  STD_TORCH_CHECK(numbers->numel() == entries * query_heads && numbers->is_contiguous() &&
                      numbers->scalar_type() == ScalarType::Float,
                  name, " must be contiguous float32 with ", entries, " times H elements, got ", described(*numbers));
  return static_cast<const float*>(numbers->const_data_ptr());
}

// Fold the flat rule of a call for `query_heads` heads into its inputs, whose tensors are set.
inline void set_rule(Inputs& p, int64_t query_heads, RHYTHM_RULE_PARAMETERS) {
  p.seqs = table<Sequence>(seqs, "seqs"), p.n_seqs = seqs.size(0);
  p.heads = table<Head>(heads, "heads"), p.n_heads = heads.size(0);
  STD_TORCH_CHECK(p.n_heads > 0, "heads must select at least one head, got none");
  p.max_seqlen = distance("max_seqlen", max_seqlen, 0, p);
  p.score.scale = static_cast<float>(scale), p.score.softcap = static_cast<float>(softcap);
  p.score.window_left = window_left < 0 ? p.tokens : distance("window_left", window_left, 0, p);
  p.score.sinks = head_numbers(sinks, 1, query_heads, "sinks");
  const bool each = alibi_slopes.has_value() && alibi_slopes->dim() == 2 && alibi_slopes->size(0) != 1;
  p.score.slopes = head_numbers(alibi_slopes, each ? p.n_seqs : 1, query_heads, "alibi_slopes");
  p.score.slope_stride = each ? query_heads : 0;
}

inline CreditMode mode_of(const std::string& mode) {
  if (mode == "local") return CreditMode::kLocal;
  if (mode == "global") return CreditMode::kGlobal;
  if (mode == "coupled") return CreditMode::kCoupled;
  STD_TORCH_CHECK(mode == "random" || mode == "entropy", "mode must be local, global, coupled, random or entropy, got ",
                  mode);
  return CreditMode::kScore;
}

// What the credit ops of either device begin with: in the schema, as parameters, and handed on to credit_inputs().
#define RHYTHM_CREDIT_SCHEMA                                                                                          \
  "Tensor waad, Tensor fai, Tensor? score, Tensor mask, str mode, float top, int neighbors, bool bottom, "            \
  "float? tau_waad, float? tau_delta, float[] levels, "
#define RHYTHM_CREDIT_PARAMETERS                                                                                      \
  const Tensor &waad, const Tensor &fai, std::optional<Tensor> score, const Tensor &mask, std::string mode,           \
      double top, int64_t neighbors, bool bottom, std::optional<double> tau_waad, std::optional<double> tau_delta,     \
      std::vector<double> levels
#define RHYTHM_CREDIT waad, fai, score, mask, mode, top, neighbors, bottom, tau_waad, tau_delta, levels

inline CreditInputs credit_inputs(RHYTHM_CREDIT_PARAMETERS, const Tensor& out) {
  CreditInputs p{};
  STD_TORCH_CHECK(waad.dim() == 2, "waad must be (B, T), got ", described(waad));
  p.batch = waad.size(0), p.tokens = waad.size(1);
  STD_TORCH_CHECK(p.tokens <= std::numeric_limits<int32_t>::max(), "waad must have T below 2^31, got ", p.tokens);
  p.wide = waad.scalar_type() == ScalarType::Double;
  const auto measure = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == p.batch && x.size(1) == p.tokens && x.is_contiguous() &&
                        x.scalar_type() == (p.wide ? ScalarType::Double : ScalarType::Float),
                    name, " must be contiguous float32 or float64 like waad, got ", described(x), " with waad ",
                    described(waad));
    return x.const_data_ptr();
  };
  p.waad = measure(waad, "waad"), p.fai = measure(fai, "fai");
  p.mode = mode_of(mode);
  STD_TORCH_CHECK(score.has_value() == (p.mode == CreditMode::kScore),
                  "score must be given in the modes random and entropy and in no other, got ",
                  score.has_value() ? "one" : "none", " in mode ", mode);
  p.score = score.has_value() ? measure(*score, "score") : nullptr;
  STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == p.batch && mask.size(1) == p.tokens && mask.is_contiguous() &&
                      mask.scalar_type() == ScalarType::Bool,
                  "mask must be contiguous bool (B, T) like waad, got ", described(mask));
  p.mask = static_cast<const bool*>(mask.const_data_ptr());
  STD_TORCH_CHECK(top > 0 && top <= 1 && neighbors >= 1, "top must be in (0, 1] and neighbors at least 1, got ", top,
                  " and ", neighbors);
  p.top = top, p.neighbors = neighbors, p.lowest = bottom;
  p.given_tau_waad = tau_waad.has_value(), p.given_tau_delta = tau_delta.has_value();
  p.tau_waad = tau_waad.value_or(0.0), p.tau_delta = tau_delta.value_or(0.0);
  STD_TORCH_CHECK(levels.size() == 6, "levels must hold six numbers, got ", levels.size());
  for (int i = 0; i < 6; ++i) p.levels[i] = static_cast<float>(levels[i]);
  p.out = result(out, p.batch * p.tokens);
  return p;
}

} // namespace rhythm
