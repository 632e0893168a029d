// How a kernel is launched: under nvcc by the CUDA runtime, in the tests (RHYTHM_EMULATE) by a header that runs a
// block's threads one after the other on the CPU. Sources of kernels include this and no other CUDA header.
#pragma once

#ifndef RHYTHM_EMULATE
#include <cuda_runtime.h>
#endif

#include <cstddef>

namespace rhythm {

// Launch `kernel(arguments...)` on a grid of blocks with `shared_bytes` of dynamic shared memory; 0 or the cudaError_t.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments... arguments) {
#ifdef RHYTHM_EMULATE
  return emulation::launch(grid, block, shared_bytes, stream, [=] { kernel(arguments...); });
#else
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
#endif
}

// The block's dynamic shared memory, aligned to 16 bytes; uninitialised.
__device__ inline void* dynamic_shared() {
#ifdef RHYTHM_EMULATE
  return emulation::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char rhythm_dynamic_shared[];
  return rhythm_dynamic_shared;
#endif
}

} // namespace rhythm
