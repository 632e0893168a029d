// How the compiler lays CudaInputs out, for its mirror in passes.py.
#include "rhythm/cuda.h"

using rhythm::CudaInputs;

static int offset_of(const CudaInputs& p, const void* field) {
  return static_cast<int>(static_cast<const char*>(field) - reinterpret_cast<const char*>(&p));
}

extern "C" void cuda_inputs_layout(int (&sizes)[3]) {
  const CudaInputs p{};
  sizes[0] = sizeof(p), sizes[1] = offset_of(p, &p.window), sizes[2] = offset_of(p, &p.out_head);
}
