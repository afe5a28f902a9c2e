// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA thread block on one thread of the CPU. Each thread of the block is a fiber, and a seeded scheduler picks
// the warp that runs next. It skips warps at random and can make one slow, so that waits end in every order. Fibers
// never run at the same time: what is tested is the order of events and the arithmetic of indices, not the memory
// model.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

constexpr int kSharedBytes = 232448;
constexpr int kWarp = 32;
constexpr int kStackBytes = 128 * 1024;
constexpr int kMaxIdleTurns = 3000;  // turns of the scheduler without any progress that count as a deadlock
constexpr int kIdleTurns = 16;  // so many, and all but the slow warp are waiting: they are asked each 64th turn only

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  bool started = false;
  bool done = false;
};

struct Warp {
  int arrived = 0;
  uint64_t syncs = 0;
  uint32_t given[kWarp];
  uint32_t all[kWarp];
};

struct Event {
  uint64_t turn;
  std::function<void()> run;
};

alignas(1024) inline uint8_t shared_memory[kSharedBytes];
inline std::mt19937 random_engine;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<Event> events;  // copies in flight
inline std::function<void()> body;
inline jmp_buf scheduler;
inline int current;
inline uint64_t turn;
inline uint64_t progress;
inline int block_arrived;
inline uint64_t block_syncs;
inline bool in_fiber;
inline std::string failure;
// Kept from block to block: only the pages that fibers have touched take memory.
inline std::vector<std::unique_ptr<char[]>> stacks;

// Ends the block: run_block throws std::runtime_error. The objects on the fibers' stacks are not destroyed.
[[noreturn]] inline void fail(const char* what) {
  failure = what;
  if (in_fiber) _longjmp(scheduler, 1);
  throw std::runtime_error(failure);
}

inline void yield() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

// A copy that completes within the next turns.
inline void later(std::function<void()> run) { events.push_back({turn + 1 + random_engine() % 3, std::move(run)}); }

// Synchronizes a warp: each lane gives a value and gets those of all lanes.
inline void exchange(uint32_t mine, uint32_t (&all)[kWarp]) {
  Warp& warp = warps[current / kWarp];
  warp.given[current % kWarp] = mine;
  const uint64_t before = warp.syncs;
  if (++warp.arrived == kWarp) {
    std::copy(warp.given, warp.given + kWarp, warp.all);
    warp.arrived = 0;
    ++warp.syncs;
    ++progress;
  } else {
    while (warp.syncs == before) yield();
  }
  std::copy(warp.all, warp.all + kWarp, all);
}

template <typename V>
V value_of_lane(V mine, int lane) {
  static_assert(sizeof(V) % 4 == 0);
  V taken;
  for (size_t i = 0; i < sizeof(V); i += 4) {
    uint32_t word;
    uint32_t all[kWarp];
    std::memcpy(&word, reinterpret_cast<const char*>(&mine) + i, 4);
    exchange(word, all);
    std::memcpy(reinterpret_cast<char*>(&taken) + i, &all[lane], 4);
  }
  return taken;
}

inline void run_fiber() {
  body();
  fibers[current].done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

inline void resume(int fiber) {
  current = fiber;
  in_fiber = true;
  if (_setjmp(scheduler)) {
    in_fiber = false;
    return;
  }
  if (fibers[fiber].started) _longjmp(fibers[fiber].at, 1);
  fibers[fiber].started = true;
  setcontext(&fibers[fiber].start);
}

// Runs `block` on `threads` threads. Warp `slow_warp` (-1: none) runs in one turn of `slowness`. Throws
// std::runtime_error on a deadlock, and where `fail` was called.
inline void run_block(int threads, std::function<void()> block, int slow_warp, int slowness) {
  body = std::move(block);
  fibers.assign(threads, {});
  warps.assign(threads / kWarp, {});
  events.clear();
  block_arrived = 0;
  failure.clear();
  while (static_cast<int>(stacks.size()) < threads) stacks.emplace_back(new char[kStackBytes]);
  for (int i = 0; i < threads; ++i) {
    ucontext_t& start = fibers[i].start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks[i].get();
    start.uc_stack.ss_size = kStackBytes;
    makecontext(&start, run_fiber, 0);
  }
  std::vector<int> order(threads / kWarp);
  for (int i = 0; i < threads / kWarp; ++i) order[i] = i;
  uint64_t seen = progress;
  int idle = 0;
  for (turn = 0;; ++turn) {
    for (size_t i = 0; i < events.size();) {
      if (events[i].turn > turn) {
        ++i;
        continue;
      }
      const auto run = std::move(events[i].run);
      events.erase(events.begin() + i);
      run();
      ++progress;
    }
    std::shuffle(order.begin(), order.end(), random_engine);
    for (int warp : order) {
      const bool skipped = warp == slow_warp ? random_engine() % slowness != 0 : random_engine() % 5 == 0;
      const bool is_waiting = warp != slow_warp && progress == seen && idle >= kIdleTurns && idle % 64 != 0;
      if (skipped || is_waiting) continue;
      for (int fiber = warp * kWarp; fiber < (warp + 1) * kWarp; ++fiber) {
        if (!fibers[fiber].done) resume(fiber);
        if (!failure.empty()) throw std::runtime_error(failure);
      }
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.done; })) return;
    idle = progress == seen ? idle + 1 : 0;
    seen = progress;
    if (idle > kMaxIdleTurns + 40 * slowness) fail("deadlock");
  }
}

}  // namespace emulator

// ---- What a kernel takes from CUDA ----------------------------------------------------------------------------------

struct EmulatedIndex {
  uint32_t x, y, z;
};

inline EmulatedIndex emulated_block, emulated_grid;

#define threadIdx (EmulatedIndex{static_cast<uint32_t>(emulator::current), 0, 0})
#define blockIdx emulated_block
#define gridDim emulated_grid
#define __trap() emulator::fail("trap")

inline void __syncthreads() {
  const uint64_t before = emulator::block_syncs;
  if (++emulator::block_arrived == static_cast<int>(emulator::fibers.size())) {
    emulator::block_arrived = 0;
    ++emulator::block_syncs;
    ++emulator::progress;
  } else {
    while (emulator::block_syncs == before) emulator::yield();
  }
}

inline void __syncwarp() {
  uint32_t all[emulator::kWarp];
  emulator::exchange(0, all);
}

template <typename V>
V __shfl_sync(unsigned, V mine, int lane) {
  return emulator::value_of_lane(mine, lane % emulator::kWarp);
}

template <typename V>
V __shfl_xor_sync(unsigned, V mine, int mask) {
  return emulator::value_of_lane(mine, emulator::current % emulator::kWarp ^ mask);
}

template <typename V>
V __shfl_up_sync(unsigned, V mine, int by) {
  const int lane = emulator::current % emulator::kWarp;
  return emulator::value_of_lane(mine, lane >= by ? lane - by : lane);
}

inline bool __any_sync(unsigned, bool mine) {
  uint32_t all[emulator::kWarp];
  emulator::exchange(mine, all);
  return std::any_of(all, all + emulator::kWarp, [](uint32_t x) { return x != 0; });
}

inline bool __all_sync(unsigned, bool mine) {
  uint32_t all[emulator::kWarp];
  emulator::exchange(mine, all);
  return std::all_of(all, all + emulator::kWarp, [](uint32_t x) { return x != 0; });
}

inline unsigned __ballot_sync(unsigned, bool mine) {
  uint32_t all[emulator::kWarp];
  emulator::exchange(mine, all);
  unsigned bits = 0;
  for (int i = 0; i < emulator::kWarp; ++i) bits |= static_cast<unsigned>(all[i] != 0) << i;
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
