// The threads of a block as fibers: scheduling, waiting, and what a wait that cannot end looks like. See emulation.h.
#include "emulation.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

dim3 gridDim, blockDim;
uint3 blockIdx, threadIdx;

namespace {

using emulation_detail::Resolve;
using emulation_detail::Site;

enum class State { kReady, kAtBarrier, kMeeting, kLeft };
enum Order { kForward, kReverse, kShuffled };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  Site site; // where it waits
  const char* operation;
  unsigned mask;
  void* payload;
};

constexpr int kLaunchFailure = 719; // cudaErrorLaunchFailure
constexpr int kInvalidConfiguration = 9;

Order order = kForward;
std::mt19937 random_source;
std::string error;

// One launch at a time, its threads' fibers kept for the next.
std::vector<std::unique_ptr<Thread>> threads;
size_t block_size;
Thread* running;
unsigned running_index;
size_t at_barrier;
const std::function<void()>* body;
std::vector<std::pair<void*, size_t>> shared; // variables, filled with 0xff before each block

std::string place(const Site& site) {
  const std::string path = site.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

void set_error(const std::string& text) {
  if (error.empty())
    error = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
            std::to_string(blockIdx.z) + "): " + text;
}

void wait(State state, const Site& site) {
  running->state = state, running->site = site;
  running->fiber.leave();
}

// Who waits for what, in runs of threads that do the same.
std::string describe() {
  std::string text;
  for (size_t i = 0; i < block_size;) {
    const auto what = [](const Thread& t) -> std::string {
      switch (t.state) {
        case State::kAtBarrier: return "wait at __syncthreads (" + place(t.site) + ")";
        case State::kMeeting: {
          char mask[16];
          std::snprintf(mask, sizeof mask, "%#x", t.mask);
          return std::string("wait in ") + t.operation + " (" + place(t.site) + ") for the lanes " + mask;
        }
        case State::kLeft: return "have left the kernel";
        case State::kReady: return "are ready";
      }
      return "";
    };
    size_t j = i + 1;
    while (j < block_size && what(*threads[j]) == what(*threads[i])) ++j;
    text += (i ? "; threads " : "threads ") + std::to_string(i) + " to " + std::to_string(j - 1) + " ";
    text += what(*threads[i]);
    i = j;
  }
  return text;
}

void arrange(std::vector<size_t>& indices) {
  std::iota(indices.begin(), indices.end(), size_t(0));
  if (order == kReverse) std::reverse(indices.begin(), indices.end());
  if (order == kShuffled) std::shuffle(indices.begin(), indices.end(), random_source);
}

void run_block() {
  for (const auto& variable : shared) std::memset(variable.first, 0xff, variable.second);
  at_barrier = 0;
  for (size_t i = 0; i < block_size; ++i) {
    Thread& t = *threads[i];
    t.state = State::kReady;
    const unsigned linear = unsigned(i);
    t.index = {linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y};
    t.fiber.start([] {
      (*body)();
      running->state = State::kLeft;
    });
  }
  std::vector<size_t> sequence(block_size);
  size_t left = 0;
  while (left < block_size) {
    bool progress = false;
    arrange(sequence);
    for (const size_t first : sequence) {
      // A warp goes as far ahead of the others as barriers let it.
      for (bool ran = true; ran;) {
        ran = false;
        for (const size_t i : sequence) {
          if (i / 32 != first / 32 || threads[i]->state != State::kReady) continue;
          progress = ran = true;
          running = threads[i].get(), running_index = unsigned(i);
          threadIdx = running->index;
          running->fiber.enter();
          if (!error.empty()) return;
          left += running->state == State::kLeft;
        }
      }
    }
    if (!progress) return set_error("nobody can go on: " + describe());
  }
}

} // namespace

namespace emulation_detail {

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  set_error(std::string("thread ") + std::to_string(running_index) + ": " + text);
  running->fiber.leave(); // the launch ends here: nobody enters again
  __builtin_unreachable();
}

unsigned lane() { return running_index % 32; }

void barrier(const Site& site) {
  if (++at_barrier < block_size) return wait(State::kAtBarrier, site);
  for (size_t i = 0; i < block_size; ++i) {
    Thread& t = *threads[i];
    if (&t == running) continue;
    if (t.site.line != site.line || std::strcmp(t.site.file, site.file))
      fail("__syncthreads at %s, while thread %zu waits at another, %s", place(site).c_str(), i, place(t.site).c_str());
    t.state = State::kReady;
  }
  at_barrier = 0;
}

void meet(const char* operation, unsigned mask, void* payload, Resolve resolve, const Site& site) {
  const unsigned own = lane(), first = running_index - own;
  const std::string here = std::string(operation) + " at " + place(site);
  if (!(mask >> own & 1)) fail("%s: the mask %#x lacks the calling lane %u", here.c_str(), mask, own);
  void* payloads[32];
  bool complete = true;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1) || i == own) continue;
    if (first + i >= block_size) fail("%s: the mask %#x holds lane %u, which the block lacks", here.c_str(), mask, i);
    const Thread& other = *threads[first + i];
    if (other.state == State::kLeft) fail("%s: lane %u of the mask %#x has left the kernel", here.c_str(), i, mask);
    if (other.state != State::kMeeting) {
      complete = false;
      continue;
    }
    if (other.mask != mask || other.site.line != site.line || std::strcmp(other.operation, operation))
      fail("%s for the lanes %#x, while lane %u waits in %s at %s for the lanes %#x", here.c_str(), mask, i,
           other.operation, place(other.site).c_str(), other.mask);
    payloads[i] = other.payload;
  }
  running->operation = operation, running->mask = mask, running->payload = payload;
  if (!complete) return wait(State::kMeeting, site);
  payloads[own] = payload;
  resolve(payloads, mask);
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) threads[first + i]->state = State::kReady;
}

} // namespace emulation_detail

const char* cudaGetErrorString(cudaError_t code) { return code == 0 ? "no error" : error.c_str(); }

namespace rhythm {
namespace emulation {

int launch(dim3 grid, dim3 block, void* stream, const std::function<void()>& kernel) {
  error.clear();
  block_size = size_t(block.x) * block.y * block.z;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  if (stream != nullptr || block_size == 0 || block_size > 1024 || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535) {
    error = "invalid configuration: " + std::to_string(blocks) + " blocks of " + std::to_string(block_size) +
            " threads";
    return kInvalidConfiguration;
  }
  while (threads.size() < block_size) threads.push_back(std::make_unique<Thread>());
  gridDim = grid, blockDim = block, body = &kernel;
  std::vector<size_t> sequence(blocks);
  arrange(sequence);
  for (const size_t i : sequence) {
    blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    run_block();
    if (!error.empty()) {
      threads.clear(); // their stacks hold what the fibers left behind
      return kLaunchFailure;
    }
  }
  return 0;
}

float from_float16(unsigned bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(float(fraction), -24)
                                : std::ldexp(float(fraction + 1024), exponent - 25);
  return bits >> 15 ? -value : value;
}

namespace {

float from_bfloat16(unsigned bits) { return __uint_as_float(bits << 16); }

struct Fragments {
  float (*c)[4];
  const unsigned (*a)[4];
  const unsigned (*b)[2];
};

// Element (row, k) of a is in half `i` of lane 4 (row % 8) + k % 8 / 2, and so on: section "Matrix Fragments for
// mma.m16n8k16 with floating point type" of the PTX manual.
template <float (*convert)(unsigned)>
void resolve_mma(void* const* payloads, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(payloads[lane]);
    const int group = lane >> 2, within = lane & 3;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int column = within * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[row][column] = convert((*f.a)[i / 2] >> 16 * (i & 1) & 0xffff);
    }
    for (int i = 0; i < 4; ++i)
      b[within * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = convert((*f.b)[i / 2] >> 16 * (i & 1) & 0xffff);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(payloads[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = (lane & 3) * 2 + (i & 1);
      float sum = (*f.c)[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      (*f.c)[i] = sum;
    }
  }
}

} // namespace

void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool bfloat16, Site site) {
  Fragments fragments{&c, &a, &b};
  emulation_detail::meet("mma.sync", 0xffffffffu, &fragments,
                         bfloat16 ? resolve_mma<from_bfloat16> : resolve_mma<from_float16>, site);
}

} // namespace emulation
} // namespace rhythm

// The order in which threads and blocks run: 0 forward, 1 reverse, 2 shuffled by `seed`.
extern "C" void emulation_set_order(int which, unsigned seed) {
  order = Order(which);
  random_source.seed(seed);
}

// Tell of a __shared__ variable: a compiler gives no list of them.
extern "C" void emulation_add_shared(void* address, size_t size) { shared.emplace_back(address, size); }

// What was wrong with the last launch.
extern "C" const char* emulation_error() { return error.c_str(); }
