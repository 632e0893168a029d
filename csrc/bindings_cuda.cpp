// The CUDA kernels as ops; part of the extension where nvcc built them. The extension must load where neither torch nor
// the machine knows CUDA, so what is needed of torch's CUDA library is looked up when the first tensor of a GPU comes.
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>

#include "bindings.h"
#include "rhythm/cuda.h"

#ifndef RHYTHM_EMULATE
#define RHYTHM_CUDA_LIBRARY rhythm_kernels_native
#define RHYTHM_CUDA_KEY CUDA
#endif

namespace rhythm {
namespace {

#ifdef RHYTHM_EMULATE // the tests: kernels that run on the CPU, on its tensors

struct Device {
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
};

#else

// The tensor's device made current while this lives, and the caller's stream there.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  void* stream() const {
    typedef int32_t (*CurrentStream)(int32_t, void**);
    static const auto current = reinterpret_cast<CurrentStream>([]() -> void* {
      void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    }());
    void* found = nullptr;
    STD_TORCH_CHECK(current != nullptr && current(index_, &found) == 0, "this torch gives no CUDA stream");
    return found;
  }

 private:
  const int32_t index_;
  const torch::stable::accelerator::DeviceGuard guard_;
};

#endif

void check(int code, const char* name) { STD_TORCH_CHECK(code == 0, name, ": ", rhythm_cuda_error(code)); }

// The tables lie on the device and are not read here: whoever made them has checked or clamped them.
CudaInputs inputs(const Tensor& q, const Tensor& k, const Tensor& lse, RHYTHM_RULE_PARAMETERS, bool per_head,
                  const Tensor& out) {
  CudaInputs p{};
  set_tensors(p, q, k, &lse);
  STD_TORCH_CHECK(1 <= p.head_dim && p.head_dim <= 256, "q must have D from 1 to 256, got ", p.head_dim);
  set_rule(p, q.size(2), RHYTHM_RULE);
  p.queries_per_kv = q.size(2) / k.size(2);
  p.per_head = per_head;
  p.out = result(out, p.batch * (per_head ? p.n_heads : 1) * p.tokens);
  p.out_batch = (per_head ? p.n_heads : 1) * p.tokens, p.out_head = p.tokens;
  return p;
}

void band_rows(const Tensor& q, const Tensor& k, const Tensor& lse, RHYTHM_RULE_PARAMETERS, int64_t window,
               bool per_head, const Tensor& out) {
  CudaInputs p = inputs(q, k, lse, RHYTHM_RULE, per_head, out);
  p.window = distance("window", window, 1, p);
  const Device device(q);
  check(rhythm_cuda_band_rows(&p, device.stream()), "band_rows");
}

void band_columns(const Tensor& q, const Tensor& k, const Tensor& lse, RHYTHM_RULE_PARAMETERS, int64_t lo, int64_t hi,
                  bool per_head, const Tensor& out) {
  CudaInputs p = inputs(q, k, lse, RHYTHM_RULE, per_head, out);
  p.lo = distance("lo", lo, 0, p), p.hi = distance("hi", hi, lo, p);
  const Device device(q);
  check(rhythm_cuda_band_columns(&p, device.stream()), "band_columns");
}

void credit(RHYTHM_CREDIT_PARAMETERS, const Tensor& scratch, const Tensor& out) {
  const CreditInputs p = credit_inputs(RHYTHM_CREDIT, out);
  STD_TORCH_CHECK(scratch.scalar_type() == ScalarType::Byte && scratch.is_contiguous() &&
                      scratch.numel() >= p.batch * credit_scratch(p),
                  "scratch must be contiguous uint8 with at least ", p.batch * credit_scratch(p), " elements, got ",
                  described(scratch));
  const Device device(waad);
  check(rhythm_cuda_credit(&p, scratch.mutable_data_ptr(), device.stream()), "credit");
}

STABLE_TORCH_LIBRARY_FRAGMENT(RHYTHM_CUDA_LIBRARY, m) {
  m.def("cuda_band_rows(Tensor q, Tensor k, Tensor lse, " RHYTHM_RULE_SCHEMA
        "int window, bool per_head, Tensor(a!) out) -> ()");
  m.def("cuda_band_columns(Tensor q, Tensor k, Tensor lse, " RHYTHM_RULE_SCHEMA
        "int lo, int hi, bool per_head, Tensor(a!) out) -> ()");
  m.def("cuda_credit(" RHYTHM_CREDIT_SCHEMA "Tensor(a!) scratch, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(RHYTHM_CUDA_LIBRARY, RHYTHM_CUDA_KEY, m) {
  m.impl("cuda_band_rows", TORCH_BOX(&band_rows));
  m.impl("cuda_band_columns", TORCH_BOX(&band_columns));
  m.impl("cuda_credit", TORCH_BOX(&credit));
}

} // namespace
} // namespace rhythm
