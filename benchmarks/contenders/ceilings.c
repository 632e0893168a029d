// What a CPU can do at most: multiply-adds that never leave the registers, and a buffer read once by all threads.
// Compiled for this very machine (-march=native) when a benchmark needs it.
#include <pthread.h>
#include <stdint.h>

#define ACCUMULATORS 12 // enough chains to hide the latency of two units
#define MAX_THREADS 256

typedef float Vector __attribute__((vector_size(64), aligned(64)));
typedef float Loaded __attribute__((vector_size(64), aligned(4)));

typedef struct {
  const float* x;
  int64_t n; // iterations, or floats
  float result;
} Task;

static void* multiply_add(void* argument) {
  Task* task = argument;
  Vector sum[ACCUMULATORS];
  const Vector a = {0.999999f}, b = {1e-6f};
  for (int i = 0; i < ACCUMULATORS; ++i) sum[i] = a + (float)i;
  for (int64_t n = 0; n < task->n; ++n)
#pragma GCC unroll 12
    for (int i = 0; i < ACCUMULATORS; ++i) sum[i] = sum[i] * a + b;
  for (int i = 1; i < ACCUMULATORS; ++i) sum[0] += sum[i];
  task->result = sum[0][0];
  return 0;
}

static void* read_floats(void* argument) {
  Task* task = argument;
  Vector sum[4] = {{0}};
  for (int64_t n = 0; n + 64 <= task->n; n += 64)
    for (int i = 0; i < 4; ++i) sum[i] += *(const Loaded*)(task->x + n + 16 * i);
  task->result = (sum[0] + sum[1] + sum[2] + sum[3])[0];
  return 0;
}

static float on_threads(void* (*run)(void*), Task* tasks, int threads) {
  pthread_t others[MAX_THREADS];
  for (int i = 1; i < threads; ++i)
    if (pthread_create(&others[i], 0, run, &tasks[i])) others[i] = 0, run(&tasks[i]);
  run(&tasks[0]);
  float result = tasks[0].result;
  for (int i = 1; i < threads; ++i) {
    if (others[i]) pthread_join(others[i], 0);
    result += tasks[i].result;
  }
  return result;
}

// `iterations` of ACCUMULATORS vectors of 16 multiply-adds in each thread.
float fma_loop(int64_t iterations, int threads) {
  Task tasks[MAX_THREADS] = {{0}};
  for (int i = 0; i < threads; ++i) tasks[i] = (Task){0, iterations, 0};
  return on_threads(multiply_add, tasks, threads);
}

float read_once(const float* x, int64_t floats, int threads) {
  Task tasks[MAX_THREADS] = {{0}};
  for (int i = 0; i < threads; ++i) {
    const int64_t first = floats / threads * i, last = i + 1 == threads ? floats : floats / threads * (i + 1);
    tasks[i] = (Task){x + first, last - first, 0};
  }
  return on_threads(read_floats, tasks, threads);
}
