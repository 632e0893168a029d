// LibTorch's stable ABI meets the kernels here, and nowhere else. One binary serves every later torch and Python.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/launch.h"

namespace rhythm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "q and k must be float32, bfloat16 or float16");
  }
}

// Check an (n, width) int32 table and return its rows.
template <typename Row>
const Row* table(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) * 4 == int64_t(sizeof(Row)) &&
                      tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous(),
                  name, " must be a contiguous int32 table with ", sizeof(Row) / 4, " columns");
  return static_cast<const Row*>(tensor.const_data_ptr());
}

float* output(const Tensor& tensor, const Problem& p, bool per_head, int64_t planes, float fill) {
  const int64_t size = planes * p.batch * (per_head ? p.n_heads : 1) * p.tokens;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == size,
                  "an output must be contiguous float32 with ", size, " elements");
  float* const data = static_cast<float*>(tensor.mutable_data_ptr());
  std::fill_n(data, size, fill); // what no task owns: prompts, padding
  return data;
}

// The call's problem and the tables it points into.
struct Call {
  Problem p{};
  const Sequence* sequences;
  int64_t n_sequences;
  std::vector<HeadGroup> groups;

  Call(const Tensor& q, const Tensor& k, const Tensor* lse, const Tensor& seqs, const Tensor& heads, double scale,
       double softcap, int64_t window_left, const std::optional<Tensor>& sinks, bool per_head) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must be (B, T, H, D)");
    p.batch = q.size(0), p.tokens = q.size(1), p.head_dim = q.size(3);
    const int64_t query_heads = q.size(2), kv_heads = k.size(2);
    STD_TORCH_CHECK(k.size(0) == p.batch && k.size(1) == p.tokens && k.size(3) == p.head_dim && kv_heads > 0 &&
                        query_heads % kv_heads == 0,
                    "k must be (B, T, H_kv, D) like q, H a multiple of H_kv");
    p.dtype = dtype_of(q);
    STD_TORCH_CHECK(dtype_of(k) == p.dtype, "q and k must have the same dtype");
    STD_TORCH_CHECK(p.head_dim <= 1 || (q.stride(3) == 1 && k.stride(3) == 1),
                    "the last dimension of q and k must be contiguous");
    p.q = q.const_data_ptr(), p.q_row = q.stride(0), p.q_token = q.stride(1), p.q_head = q.stride(2);
    p.k = k.const_data_ptr(), p.k_row = k.stride(0), p.k_token = k.stride(1), p.k_head = k.stride(2);

    int64_t lse_rows = std::numeric_limits<int64_t>::max();
    if (lse != nullptr) {
      STD_TORCH_CHECK(lse->dim() == 3 && lse->size(0) == p.batch && lse->size(2) == p.tokens &&
                          lse->scalar_type() == ScalarType::Float,
                      "lse must be float32 (B, X, T)");
      p.lse = static_cast<const float*>(lse->const_data_ptr());
      p.lse_row = lse->stride(0), p.lse_head = lse->stride(1), p.lse_token = lse->stride(2);
      lse_rows = lse->size(1);
    }
    sequences = table<Sequence>(seqs, "seqs");
    n_sequences = seqs.size(0);
    for (int64_t i = 0; i < n_sequences; ++i) {
      const Sequence& s = sequences[i];
      STD_TORCH_CHECK(0 <= s.row && s.row < p.batch && 0 <= s.start && s.start <= s.response_start &&
                          s.response_start <= s.end && s.end <= p.tokens,
                      "sequence ", i, " is outside q");
    }
    p.heads = table<Head>(heads, "heads");
    p.n_heads = heads.size(0);
    STD_TORCH_CHECK(p.n_heads > 0, "no heads are selected");
    for (int64_t i = 0; i < p.n_heads; ++i) {
      const Head& h = p.heads[i];
      STD_TORCH_CHECK(0 <= h.query && h.query < query_heads && 0 <= h.lse_row && h.lse_row < lse_rows, "head ", i,
                      " is out of range");
    }
    groups = group_heads(p.heads, p.n_heads, query_heads / kv_heads);
    p.groups = groups.data(), p.n_groups = int64_t(groups.size());

    p.score.scale = float(scale), p.score.softcap = float(softcap);
    p.score.window_left = window_left < 0 ? std::numeric_limits<int64_t>::max() : window_left;
    if (sinks.has_value()) {
      STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == query_heads && sinks->is_contiguous() &&
                          sinks->scalar_type() == ScalarType::Float,
                      "sinks must be contiguous float32 (H,)");
      p.score.sinks = static_cast<const float*>(sinks->const_data_ptr());
    }
    p.per_head = per_head;
  }
  Call(const Call&) = delete; // p points into groups

  // Tasks are drawn from one counter: the tiles of a causal pass differ in cost, and threads in speed.
  void run(TileTask Passes::*pass, int64_t tile_size, int64_t scratch, bool last_first) const {
    const char* const requested = std::getenv("RHYTHM_CPU_CAPABILITY");
    const Passes* const passes = choose_passes(requested);
    STD_TORCH_CHECK(passes != nullptr, "RHYTHM_CPU_CAPABILITY names what this machine or build does not have: ",
                    requested == nullptr ? "" : requested);
    const TileTask task = passes->*pass;
    const Tiles tiles(sequences, n_sequences, tile_size);
    const int64_t n = tiles.size();
    const int64_t workers = std::min<int64_t>(n, torch::stable::get_num_threads());
    if (workers == 0) return;
    const int64_t line = 16; // floats of a cache line
    const int64_t share = (scratch + line - 1) / line * line;
    const std::unique_ptr<float[]> pool(new float[workers * share + line]); // not cleared: tasks write what they read
    float* const aligned = pool.get() + (line - reinterpret_cast<uintptr_t>(pool.get()) / 4 % line) % line;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) {
      float* const own = aligned + begin * share;
      for (int64_t i = next++; i < n; i = next++) task(p, tiles[last_first ? n - 1 - i : i], own);
    });
  }
};

void band_rows(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& seqs, const Tensor& heads,
               double scale, double softcap, int64_t window_left, std::optional<Tensor> sinks, int64_t window,
               bool per_head, const Tensor& out) {
  Call call(q, k, &lse, seqs, heads, scale, softcap, window_left, sinks, per_head);
  STD_TORCH_CHECK(window >= 1, "window must be at least 1");
  call.p.window = window;
  call.p.out = output(out, call.p, per_head, 1, 0.0f);
  call.run(&Passes::band_rows, kBandTile, band_rows_scratch(call.p), false);
}

void band_columns(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& seqs, const Tensor& heads,
                  double scale, double softcap, int64_t window_left, std::optional<Tensor> sinks, int64_t lo,
                  int64_t hi, bool per_head, const Tensor& out) {
  Call call(q, k, &lse, seqs, heads, scale, softcap, window_left, sinks, per_head);
  STD_TORCH_CHECK(0 <= lo && lo <= hi, "the horizon must satisfy 0 <= lo <= hi");
  // No row is farther than the row is long.
  call.p.lo = std::min(lo, call.p.tokens), call.p.hi = std::min(hi, call.p.tokens);
  call.p.out = output(out, call.p, per_head, 1, 0.0f);
  call.run(&Passes::band_columns, kColumnTile, band_columns_scratch(call.p), false);
}

void row_stats(const Tensor& q, const Tensor& k, const Tensor& seqs, const Tensor& heads, double scale,
               double softcap, int64_t window_left, std::optional<Tensor> sinks, int64_t window, bool per_head,
               const Tensor& lse, const Tensor& waad, const Tensor& span) {
  Call call(q, k, nullptr, seqs, heads, scale, softcap, window_left, sinks, per_head);
  STD_TORCH_CHECK(window >= 1, "window must be at least 1");
  call.p.window = window;
  call.p.out_lse = output(lse, call.p, true, 1, -std::numeric_limits<float>::infinity());
  call.p.out = output(waad, call.p, per_head, 1, 0.0f);
  call.p.out_span = output(span, call.p, per_head, 1, 0.0f);
  call.run(&Passes::row_stats, kRowTile, row_stats_scratch(call.p), true);
}

void column_stats(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& seqs, const Tensor& heads,
                  double scale, double softcap, int64_t window_left, std::optional<Tensor> sinks,
                  int64_t min_distance, bool moments, bool per_head, const Tensor& out) {
  Call call(q, k, &lse, seqs, heads, scale, softcap, window_left, sinks, per_head);
  STD_TORCH_CHECK(min_distance >= 0, "min_distance must not be negative");
  call.p.min_distance = min_distance, call.p.moments = moments;
  call.p.out = output(out, call.p, per_head, moments ? 5 : 1, 0.0f);
  call.run(&Passes::column_stats, kStatsTile, column_stats_scratch(call.p), false);
}

#define RHYTHM_SCORE "Tensor seqs, Tensor heads, float scale, float softcap, int window_left, Tensor? sinks, "

STABLE_TORCH_LIBRARY(rhythm_kernels_native, m) {
  m.def("band_rows(Tensor q, Tensor k, Tensor lse, " RHYTHM_SCORE "int window, bool per_head, Tensor(a!) out) -> ()");
  m.def("band_columns(Tensor q, Tensor k, Tensor lse, " RHYTHM_SCORE
        "int lo, int hi, bool per_head, Tensor(a!) out) -> ()");
  m.def("row_stats(Tensor q, Tensor k, " RHYTHM_SCORE
        "int window, bool per_head, Tensor(a!) lse, Tensor(b!) waad, Tensor(c!) span) -> ()");
  m.def("column_stats(Tensor q, Tensor k, Tensor lse, " RHYTHM_SCORE
        "int min_distance, bool moments, bool per_head, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels_native, CPU, m) {
  m.impl("band_rows", TORCH_BOX(&band_rows));
  m.impl("band_columns", TORCH_BOX(&band_columns));
  m.impl("row_stats", TORCH_BOX(&row_stats));
  m.impl("column_stats", TORCH_BOX(&column_stats));
}

// What was built, for rhythm_kernels.native.build_info().
PyObject* capabilities(PyObject*, PyObject*) {
  PyObject* const found = PyDict_New();
  if (found == nullptr) return nullptr;
  for (const Passes* passes : compiled_passes()) {
    PyObject* const runs = PyBool_FromLong(runs_here(*passes));
    PyDict_SetItemString(found, passes->capability, runs);
    Py_DECREF(runs);
  }
  return found;
}

PyMethodDef kMethods[] = {
    {"capabilities", capabilities, METH_NOARGS, "capability -> whether this processor can run it, the best last"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

} // namespace
} // namespace rhythm

// Importing the module loads the library, whose static initialisers register the ops.
#define RHYTHM_STRING(x) #x
#define RHYTHM_VERSION(major, minor, patch) RHYTHM_STRING(major) "." RHYTHM_STRING(minor) "." RHYTHM_STRING(patch)

PyMODINIT_FUNC PyInit__C() {
  PyObject* const module = PyModule_Create(&rhythm::kModule);
  if (module == nullptr) return nullptr;
  PyModule_AddStringConstant(module, "torch_version",
                             RHYTHM_VERSION(TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR, TORCH_VERSION_PATCH));
  PyModule_AddStringConstant(module, "compiler", RHYTHM_COMPILER);
  return module;
}
