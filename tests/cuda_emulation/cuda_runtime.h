// CUDA on the host: kernels compiled by the host's compiler run block after block, so that tests need no GPU.
//
// Every thread of a block is a fiber. A barrier, a vote or a shuffle gives the turn back to the scheduler, which lets
// threads go on when all that must meet have come. In each round threads run in another order (a fixed sequence of
// permutations), so that what depends on the order within a block shows. Checked are: launches that the hardware would
// refuse, barriers that not all threads of a block reach, votes and shuffles that not all lanes of the mask reach.
//
// Not seen here: accesses out of bounds, races between blocks (they run one after the other), and time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define FASTCV_CUDA_EMULATED

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block runs at a time

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
  uint64_t count() const { return uint64_t(x) * y * z; }
};
inline uint3 threadIdx, blockIdx;  // of the thread whose turn it is
inline dim3 blockDim, gridDim;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {

enum class State { ready, at_barrier, in_warp, done };

// A stack that runs the threads of its number, block after block. Turns are changed by jumps, as swapcontext would
// ask the system each time.
struct Fiber {
  std::unique_ptr<char[]> stack;  // null: not begun
  ucontext_t context;             // where it begins
  jmp_buf turn;                   // where it goes on
  uint3 thread;
  State state;
  unsigned mask;          // of the lanes that it waits for
  uint64_t given, taken;  // to a vote or shuffle; what all lanes gave, when they had all come
};

struct Machine {
  static constexpr size_t kStack = 1 << 16, kMostShared = 227 << 10;

  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  size_t threads = 0, current = 0;
  std::vector<char> shared;
  std::function<void()> kernel;
  uint64_t launches = 0;
  uint32_t random = 1;
  std::mutex mutex;

  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  Fiber& fiber() { return fibers[current]; }

  void wait(State state) {
    fiber().state = state;
    if (!_setjmp(fiber().turn)) _longjmp(scheduler, 1);
  }

  static void enter() {
    for (;;) {
      instance().kernel();
      instance().wait(State::done);
    }
  }

  void give_turn(size_t thread) {
    current = thread;
    Fiber& f = fiber();
    threadIdx = f.thread;
    if (_setjmp(scheduler)) return;
    if (f.stack) _longjmp(f.turn, 1);
    f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = kStack, f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
    setcontext(&f.context);
  }

  void start_threads() {
    threads = blockDim.count();
    if (fibers.size() < threads) fibers.resize(threads);
    for (size_t t = 0; t < threads; ++t) {
      Fiber& f = fibers[t];
      f.thread = {unsigned(t % blockDim.x), unsigned(t / blockDim.x % blockDim.y),
                  unsigned(t / blockDim.x / blockDim.y)};
      f.state = State::ready;
    }
  }

  bool run_ready() {
    bool ran = false;
    random = random * 1664525u + 1013904223u;
    const size_t first = random % threads;
    const bool backwards = random >> 31;
    for (size_t i = 0; i < threads; ++i) {
      current = (first + (backwards ? threads - i : i)) % threads;
      if (fibers[current].state != State::ready) continue;
      give_turn(current);
      ran = true;
    }
    return ran;
  }

  // Lanes whose whole mask has come go on together.
  bool wake_warps() {
    bool woke = false;
    for (size_t warp = 0; warp < threads; warp += 32)
      for (size_t t = warp; t < threads && t < warp + 32; ++t) {
        if (fibers[t].state != State::in_warp) continue;
        const unsigned mask = fibers[t].mask;
        if (!(mask >> (t - warp) & 1)) throw std::runtime_error("a lane is not in the mask of its own vote or shuffle");
        bool all = true;
        for (size_t lane = 0; lane < 32; ++lane)
          if (mask >> lane & 1 && warp + lane < threads)
            all &= fibers[warp + lane].state == State::in_warp && fibers[warp + lane].mask == mask;
        if (!all) continue;
        for (size_t lane = 0; lane < 32; ++lane)
          if (mask >> lane & 1 && warp + lane < threads) {
            Fiber& f = fibers[warp + lane];
            f.taken = f.given, f.state = State::ready;
          }
        woke = true;
      }
    return woke;
  }

  void run_block() {
    start_threads();
    for (;;) {
      const bool ran = run_ready();
      size_t done = 0, waiting = 0;
      for (size_t t = 0; t < threads; ++t)
        done += fibers[t].state == State::done, waiting += fibers[t].state == State::at_barrier;
      if (done == threads) return;
      if (wake_warps()) continue;
      if (waiting == threads) {
        for (size_t t = 0; t < threads; ++t) fibers[t].state = State::ready;
      } else if (!ran) {
        fibers.clear();
        throw std::runtime_error("threads of a block wait for others that never come: " + std::to_string(waiting) +
                                 " at a barrier, " + std::to_string(done) + " ended");
      }
    }
  }

  void launch(const cudaLaunchConfig_t& config, std::function<void()> body) {
    const std::lock_guard lock(mutex);
    const dim3& grid = config.gridDim;
    if (config.blockDim.count() < 1 || config.blockDim.count() > 1024 || config.blockDim.z > 64 || grid.count() < 1 ||
        grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || config.dynamicSmemBytes > kMostShared)
      throw std::runtime_error("a launch that the hardware refuses");
    gridDim = grid, blockDim = config.blockDim, kernel = std::move(body), ++launches;
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          shared.assign(config.dynamicSmemBytes, char(0xa5));
          run_block();
        }
  }

  unsigned lane() const { return unsigned(current % 32); }

  // What each lane of the mask gave, by the lane that asks.
  template <class T>
  T exchange(unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    fiber().given = bits, fiber().mask = mask;
    wait(State::in_warp);
    const size_t source = current / 32 * 32 + from;
    if (from >= 32 || source >= threads || !(mask >> from & 1)) return value;
    T result;
    memcpy(&result, &fibers[source].taken, sizeof(T));
    return result;
  }
};

inline Machine& machine() { return Machine::instance(); }

}  // namespace emulation

// ---- in kernels -----------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulation::machine().wait(emulation::State::at_barrier); }
inline void __syncwarp(unsigned mask = 0xffffffff) {
  emulation::machine().exchange(mask, 0, emulation::machine().lane());
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::machine().exchange(mask, value, unsigned(lane) % 32);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return emulation::machine().exchange(mask, value, emulation::machine().lane() + delta);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = emulation::machine().lane();
  return emulation::machine().exchange(mask, value, lane < delta ? lane : lane - delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
  return emulation::machine().exchange(mask, value, emulation::machine().lane() ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulation::Machine& m = emulation::machine();
  m.exchange(mask, uint32_t(predicate != 0), m.lane());
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const size_t t = m.current / 32 * 32 + lane;
    if (mask >> lane & 1 && t < m.threads && m.fibers[t].taken) votes |= 1u << lane;
  }
  return votes;
}
template <class Reduce>
unsigned reduce_lanes(unsigned mask, unsigned value, const Reduce& reduce) {
  emulation::Machine& m = emulation::machine();
  m.exchange(mask, value, m.lane());
  for (unsigned lane = 0; lane < 32; ++lane) {
    const size_t t = m.current / 32 * 32 + lane;
    if (mask >> lane & 1 && t < m.threads) value = reduce(value, unsigned(m.fibers[t].taken));
  }
  return value;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return reduce_lanes(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return reduce_lanes(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline int __syncthreads_count(int predicate) {
  static int count, arrived;
  __syncthreads();
  count = arrived = 0;
  __syncthreads();
  count += predicate != 0;
  __syncthreads();
  return count;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32) | low) >> (shift % 32));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffsll(uint64_t x) { return __builtin_ffsll(int64_t(x)); }

// Blocks run one after the other, and the turn changes at barriers only.
template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicOr(T* p, T value) {
  const T old = *p;
  *p = old | value;
  return old;
}
template <class T>
T atomicMin(T* p, T value) {
  const T old = *p;
  *p = value < old ? value : old;
  return old;
}
template <class T>
T atomicMax(T* p, T value) {
  const T old = *p;
  *p = old < value ? value : old;
  return old;
}

// ---- on the host ----------------------------------------------------------------------------------------------------

enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  emulation::machine().launch(*config, [=] { kernel(arguments...); });
  return cudaSuccess;
}

// So that tests can see that kernels ran here.
extern "C" __attribute__((visibility("default"), weak)) uint64_t fastcv_emulated_launches() {
  return emulation::machine().launches;
}
