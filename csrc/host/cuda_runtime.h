// Stands in for CUDA's headers where csrc/cuda/*.cu are compiled by the host's compiler, so that
// tests run the kernels without a GPU. A block's threads are fibers of one OS thread, each run up
// to its next barrier; blocks run one after another. Warps are not modelled. Every block has an OS
// thread of its own, so that its __shared__ begins as zeros: what an earlier block left would hide
// a missing barrier.
#pragma once

#include <math.h>  // as CUDA's own does
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local
#define __syncthreads() cuda_host::barrier(__LINE__)
#define __syncthreads_or(value) cuda_host::any(value, __LINE__)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr int kFinished = 0;
constexpr size_t kStack = 256 << 10;  // arguments take up to 32 KB of it

struct Thread {
  ucontext_t context;
  int line;  // of the barrier at which it waits
};
inline ucontext_t scheduler;
inline Thread* running;
inline const std::function<void()>* body;

inline void barrier(int line) {
  running->line = line;
  swapcontext(&running->context, &scheduler);
}

// Whether `value` is not 0 in any thread of the block.
inline int any(int value, int line) {
  static thread_local int found;
  barrier(line);  // the last call's answer has been read
  found = 0;
  barrier(line);
  found = found || value;
  barrier(line);
  return found;
}

inline void enter() {
  (*body)();
  barrier(kFinished);
}

inline void prepare(Thread& thread, char* stack) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack;
  thread.context.uc_stack.ss_size = kStack;
  makecontext(&thread.context, enter, 0);
}

inline void run_block(std::vector<Thread>& threads,
                      char* stacks,
                      const std::function<std::vector<unsigned>(size_t)>& in_order) {
  for (size_t t = 0; t < threads.size(); ++t) prepare(threads[t], stacks + t * kStack);
  do {
    for (const unsigned t : in_order(threads.size())) {
      threadIdx.x = t;
      running = &threads[t];
      swapcontext(&scheduler, &running->context);
    }
    for (const Thread& thread : threads)
      if (thread.line != threads[0].line)
        throw std::runtime_error("the threads of a block do not meet: lines " +
                                 std::to_string(threads[0].line) + " and " +
                                 std::to_string(thread.line) + " (0: the end)");
  } while (threads[0].line != kFinished);
}

// Runs `kernel` for every thread of every block. TDKERN_HOST_ORDER, a number, seeds a random order
// of the blocks, and of a block's threads anew after each barrier; without it they run by index. A
// result that depends on the order is a race: a barrier is missing.
inline void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  static std::mutex one_launch;  // all of this is static
  const std::lock_guard lock(one_launch);
  const char* seed = std::getenv("TDKERN_HOST_ORDER");
  std::mt19937 random(seed ? std::atoi(seed) : 0);
  const auto in_order = [&](size_t count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (seed) std::shuffle(order.begin(), order.end(), random);
    return order;
  };
  std::vector<Thread> block(threads);
  const std::unique_ptr<char[]> stacks(new char[threads * kStack]);
  body = &kernel;
  gridDim.x = blocks;
  blockDim.x = threads;
  for (const unsigned b : in_order(blocks)) {
    blockIdx.x = b;
    std::async(std::launch::async, [&] { run_block(block, stacks.get(), in_order); }).get();
  }
}

}  // namespace cuda_host
