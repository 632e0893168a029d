// What the CUDA runtime calls an error code.
#include "launch.h"
#include "rhythm/cuda.h"

extern "C" const char* rhythm_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
