// LibTorch's stable ABI meets the kernels here, and nowhere else. One binary serves every later torch and Python.
#include <Python.h>

#include <torch/headeronly/version.h>

#include <atomic>
#include <cstdlib>
#include <memory>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/launch.h"

namespace rhythm {
namespace {

float* output(const Tensor& tensor, const CpuInputs& p, bool per_head, int64_t planes, float fill) {
  const int64_t size = planes * p.batch * (per_head ? p.n_heads : 1) * p.tokens;
  float* const data = result(tensor, size);
  std::fill_n(data, size, fill); // prompts and padding, which no task writes
  return data;
}

// Run task(i, scratch) for i from 0 to n - 1. Threads take the next task from one counter, as tasks differ in cost and
// threads in speed. scratch: `bytes` of the thread's own, aligned to 64; not cleared, since tasks write before they read.
template <typename Task>
void draw_tasks(int64_t n, int64_t bytes, const Task& task) {
  const int64_t workers = std::min<int64_t>(n, torch::stable::get_num_threads());
  if (workers == 0) return;
  const int64_t line = 64, share = (bytes + line - 1) / line * line;
  const std::unique_ptr<char[]> pool(new char[workers * share + line]);
  char* const aligned = pool.get() + (line - reinterpret_cast<uintptr_t>(pool.get()) % line) % line;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = next++; i < n; i = next++) task(i, aligned + begin * share);
  });
}

// The inputs of one call, and the kv groups that they point to.
struct Call {
  CpuInputs p{};
  std::vector<KvGroup> kv_groups;

  Call(const Tensor& q, const Tensor& k, const Tensor* lse, RHYTHM_RULE_PARAMETERS, bool per_head) {
    const int64_t lse_heads = set_tensors(p, q, k, lse), query_heads = q.size(2);
    set_rule(p, query_heads, RHYTHM_RULE);
    p.per_head = per_head;
    for (int64_t i = 0; i < p.n_seqs; ++i) {
      const Sequence& s = p.seqs[i];
      STD_TORCH_CHECK(0 <= s.batch_row && s.batch_row < p.batch && 0 <= s.start && s.start <= s.response_start &&
                          s.response_start <= s.end && s.end <= p.tokens,
                      "seqs[", i, "] must lie in q with start <= response_start <= end, got batch row ", s.batch_row,
                      ", start ", s.start, ", end ", s.end, ", response_start ", s.response_start);
    }
    for (int64_t i = 0; i < p.n_heads; ++i) {
      const Head& h = p.heads[i];
      STD_TORCH_CHECK(0 <= h.query && h.query < query_heads && 0 <= h.lse_index && h.lse_index < lse_heads,
                      "heads[", i, "] must be a head of q and one of lse, got ", h.query, " and ", h.lse_index);
    }
    kv_groups = kv_groups_of(p.heads, p.n_heads, query_heads / k.size(2));
    p.kv_groups = kv_groups.data(), p.n_kv_groups = int64_t(kv_groups.size());
  }
  Call(const Call&) = delete; // p points into kv_groups

  void run(TileTask Passes::*pass, int64_t tile_size, int64_t scratch, bool together, bool last_first) const {
    const char* const requested = std::getenv("RHYTHM_CPU_CAPABILITY");
    const Passes* const passes = choose_passes(requested);
    STD_TORCH_CHECK(passes != nullptr,
                    "RHYTHM_CPU_CAPABILITY must be one that build_info() lists as running here, got ",
                    requested == nullptr ? "" : requested);
    const TileTask task = passes->*pass;
    const Tiles tiles(p.seqs, p.n_seqs, tile_size, together && p.score.slope_stride == 0);
    const int64_t n = tiles.size();
    draw_tasks(n, scratch * 4, [&](int64_t i, char* own) {
      task(p, tiles[last_first ? n - 1 - i : i], reinterpret_cast<float*>(own));
    });
  }
};

void band_rows(const Tensor& q, const Tensor& k, const Tensor& lse, RHYTHM_RULE_PARAMETERS, int64_t window,
               bool per_head, const Tensor& out) {
  Call call(q, k, &lse, RHYTHM_RULE, per_head);
  call.p.window = distance("window", window, 1, call.p);
  call.p.out = output(out, call.p, per_head, 1, 0.0f);
  call.run(&Passes::band_rows, kBandTile, band_rows_scratch(call.p), true, false);
}

void band_columns(const Tensor& q, const Tensor& k, const Tensor& lse, RHYTHM_RULE_PARAMETERS, int64_t lo, int64_t hi,
                  bool per_head, const Tensor& out) {
  Call call(q, k, &lse, RHYTHM_RULE, per_head);
  call.p.lo = distance("lo", lo, 0, call.p), call.p.hi = distance("hi", hi, lo, call.p);
  call.p.out = output(out, call.p, per_head, 1, 0.0f);
  call.run(&Passes::band_columns, kColumnTile, band_columns_scratch(call.p), true, false);
}

void row_stats(const Tensor& q, const Tensor& k, RHYTHM_RULE_PARAMETERS, int64_t window, bool per_head,
               const Tensor& lse, const Tensor& waad, const Tensor& span) {
  Call call(q, k, nullptr, RHYTHM_RULE, per_head);
  call.p.window = distance("window", window, 1, call.p);
  call.p.out_lse = output(lse, call.p, true, 1, -std::numeric_limits<float>::infinity());
  call.p.out = output(waad, call.p, per_head, 1, 0.0f);
  call.p.out_span = output(span, call.p, per_head, 1, 0.0f);
  call.run(&Passes::row_stats, kRowTile, row_stats_scratch(call.p), false, true);
}

void column_stats(const Tensor& q, const Tensor& k, const Tensor& lse, RHYTHM_RULE_PARAMETERS, int64_t min_distance,
                  bool moments, bool per_head, const Tensor& out) {
  Call call(q, k, &lse, RHYTHM_RULE, per_head);
  call.p.min_distance = distance("min_distance", min_distance, 0, call.p), call.p.moments = moments;
  call.p.out = output(out, call.p, per_head, moments ? 5 : 1, 0.0f);
  call.run(&Passes::column_stats, kStatsTile, column_stats_scratch(call.p), false, false);
}

void credit(RHYTHM_CREDIT_PARAMETERS, const Tensor& out) {
  const CreditInputs p = credit_inputs(RHYTHM_CREDIT, out);
  draw_tasks(p.batch, credit_scratch(p), [&](int64_t batch_row, char* own) { credit_response(p, batch_row, own); });
}

STABLE_TORCH_LIBRARY(rhythm_kernels_native, m) {
  m.def("band_rows(Tensor q, Tensor k, Tensor lse, " RHYTHM_RULE_SCHEMA
        "int window, bool per_head, Tensor(a!) out) -> ()");
  m.def("band_columns(Tensor q, Tensor k, Tensor lse, " RHYTHM_RULE_SCHEMA
        "int lo, int hi, bool per_head, Tensor(a!) out) -> ()");
  m.def("row_stats(Tensor q, Tensor k, " RHYTHM_RULE_SCHEMA
        "int window, bool per_head, Tensor(a!) lse, Tensor(b!) waad, Tensor(c!) span) -> ()");
  m.def("column_stats(Tensor q, Tensor k, Tensor lse, " RHYTHM_RULE_SCHEMA
        "int min_distance, bool moments, bool per_head, Tensor(a!) out) -> ()");
  m.def("credit(" RHYTHM_CREDIT_SCHEMA "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rhythm_kernels_native, CPU, m) {
  m.impl("band_rows", TORCH_BOX(&band_rows));
  m.impl("band_columns", TORCH_BOX(&band_columns));
  m.impl("row_stats", TORCH_BOX(&row_stats));
  m.impl("column_stats", TORCH_BOX(&column_stats));
  m.impl("credit", TORCH_BOX(&credit));
}

// What was built, for rhythm_kernels.backend.extension.build_info().
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
  PyModule_AddStringConstant(module, "cuda_reason", RHYTHM_CUDA_REASON); // "" where the CUDA kernels were built
  PyModule_AddStringConstant(module, "cuda_archs", RHYTHM_CUDA_ARCHS);
  PyModule_AddStringConstant(module, "nvcc", RHYTHM_NVCC);
  return module;
}
