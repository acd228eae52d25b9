// Runs a generated CUDA kernel on a CPU: block after block, and in a block a fiber per thread.
//
// What the kernels use of CUDA C is a dozen names. Threads of a block take turns at barriers and
// shuffles; shared memory and the stacks of fibers begin as NaN bits in every block, and every second
// block runs its threads backwards, so that a missing barrier reads what is not there yet. A thread
// that ends while others wait at a barrier, which would hang a GPU, ends the run with an error.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ __attribute__((section("emulated_shared"))) static

struct Index {
  int x, y, z;
};
static Index blockIdx, threadIdx, gridDim, blockDim;

namespace emulated {

constexpr int kWarp = 32, kStack = 1 << 18;

struct Barrier {  // how many of a group wait, and how often the group has passed
  int waiting = 0, passed = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current, threads, alive;
static Barrier block_barrier;
static std::vector<Barrier> warp_barriers;
static std::vector<int> warp_alive;
static std::vector<uint64_t> slots;
static bool stuck;

static void yield() {
  int me = current;
  swapcontext(&fibers[me].context, &scheduler);
  current = me;
  threadIdx.x = me;
}

static void wait(Barrier& barrier, int members) {
  int mine = barrier.passed;
  if (++barrier.waiting == members) {
    barrier.waiting = 0;
    ++barrier.passed;
    return;
  }
  while (barrier.passed == mine) yield();
}

static void warp_wait() {
  int warp = current / kWarp;
  wait(warp_barriers[warp], std::min(kWarp, threads - warp * kWarp));
}

template <typename T>
static T shuffle(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a register");
  std::memcpy(&slots[current], &value, sizeof(T));
  warp_wait();
  T found;
  std::memcpy(&found, &slots[current / kWarp * kWarp + source % kWarp], sizeof(T));
  warp_wait();
  return found;
}

}  // namespace emulated

static void __syncthreads() { emulated::wait(emulated::block_barrier, emulated::threads); }
static void __syncwarp(unsigned = 0xffffffffu) { emulated::warp_wait(); }

template <typename T>
static T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulated::shuffle(value, emulated::current % emulated::kWarp ^ distance);
}

static int __dp4a(int a, int b, int total) {
  for (int i = 0; i < 4; ++i) total += (int)(int8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i));
  return total;
}

// CUDA's minimum and maximum of floats return the number where the other operand is NaN.
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

namespace emulated {

static void (*body)();

static void enter() {
  body();
  fibers[current].done = true;
  --alive;
  swapcontext(&fibers[current].context, &scheduler);
}

static void start_block(bool barriers) {
  if (__start_emulated_shared)
    std::memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
  block_barrier = Barrier();
  warp_barriers.assign((threads + kWarp - 1) / kWarp, Barrier());
  if (!barriers) return;
  alive = threads;
  for (Fiber& fiber : fibers) {
    std::memset(fiber.stack.data(), 0xff, kStack);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
}

// Runs every unfinished thread until it waits or ends; false if nothing moved.
static bool round(bool backwards) {
  std::vector<int> before{block_barrier.passed, block_barrier.waiting, alive};
  for (Barrier& b : warp_barriers) before.insert(before.end(), {b.passed, b.waiting});
  for (int k = 0; k < threads; ++k) {
    current = backwards ? threads - 1 - k : k;
    if (fibers[current].done) continue;
    threadIdx.x = current;
    swapcontext(&scheduler, &fibers[current].context);
  }
  std::vector<int> after{block_barrier.passed, block_barrier.waiting, alive};
  for (Barrier& b : warp_barriers) after.insert(after.end(), {b.passed, b.waiting});
  return before != after;
}

// Runs a grid; false if threads of a block waited for one that never came.
static bool run(void (*kernel)(), int blocks_x, int blocks_y, int block_threads, bool barriers) {
  body = kernel;
  threads = block_threads;
  slots.assign(threads, 0);
  gridDim = {blocks_x, blocks_y, 1};
  blockDim = {threads, 1, 1};
  if (barriers) {
    fibers.resize(threads);
    for (Fiber& fiber : fibers) fiber.stack.resize(kStack);
  }
  for (int y = 0; y < blocks_y; ++y)
    for (int x = 0; x < blocks_x; ++x) {
      blockIdx = {x, y, 0};
      start_block(barriers);
      bool backwards = (x + y) % 2;
      if (!barriers) {
        for (int k = 0; k < threads; ++k) {
          threadIdx = {backwards ? threads - 1 - k : k, 0, 0};
          kernel();
        }
        continue;
      }
      while (alive)
        if (!round(backwards)) return false;
    }
  return true;
}

}  // namespace emulated
