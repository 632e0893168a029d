// How the compiler lays DeviceProblem out, for its mirror in passes.py.
#include "rhythm/cuda.h"

using rhythm::DeviceProblem;

static int offset_of(const DeviceProblem& p, const void* field) {
  return static_cast<int>(static_cast<const char*>(field) - reinterpret_cast<const char*>(&p));
}

extern "C" void device_problem_layout(int (&sizes)[3]) {
  const DeviceProblem p{};
  sizes[0] = sizeof(p), sizes[1] = offset_of(p, &p.window), sizes[2] = offset_of(p, &p.out_head);
}
