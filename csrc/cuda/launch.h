// How a kernel is launched: under nvcc by the CUDA runtime, in the tests (RHYTHM_EMULATE) by a header that runs a
// block's threads one after the other on the CPU. Sources of kernels include this and no other CUDA header.
#pragma once

#ifndef RHYTHM_EMULATE
#include <cuda_runtime.h>
#endif

namespace rhythm {

// Launch `kernel(arguments...)` on a grid of blocks; 0 or the cudaError_t. Shared memory is static in every kernel.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Arguments... arguments) {
#ifdef RHYTHM_EMULATE
  return emulation::launch(grid, block, stream, [=] { kernel(arguments...); });
#else
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
#endif
}

} // namespace rhythm
