// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA block on one thread of the CPU: each thread of the block is a fiber, and a seeded scheduler picks which
// warp goes on. It skips warps at random and can make one slow, so that waits meet in every order. No fiber runs while
// another does: what is tested is the order of events and the arithmetic of indices, not the memory model.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <utility>
#include <vector>

namespace emulator {

constexpr int kSharedBytes = 232448;
constexpr int kWarp = 32;
constexpr int kStackBytes = 128 * 1024;
constexpr int kPatience = 3000;  // turns of the scheduler without any progress that count as a deadlock

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  std::vector<char> stack;
  bool started = false;
  bool done = false;
};

struct Warp {
  int arrived = 0;
  uint64_t meetings = 0;
  uint32_t given[kWarp];
  uint32_t all[kWarp];
};

struct Event {
  uint64_t turn;
  std::function<void()> run;
};

inline uint8_t* shared_memory;
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
inline uint64_t block_meetings;

[[noreturn]] inline void fail(const char* what) {
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

inline void yield() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

// A copy that lands within the next turns.
inline void later(std::function<void()> run) { events.push_back({turn + 1 + random_engine() % 3, std::move(run)}); }

// All lanes of a warp meet; each gives a value and sees all of them.
inline void meet(uint32_t mine, uint32_t (&all)[kWarp]) {
  Warp& warp = warps[current / kWarp];
  warp.given[current % kWarp] = mine;
  const uint64_t before = warp.meetings;
  if (++warp.arrived == kWarp) {
    std::copy(warp.given, warp.given + kWarp, warp.all);
    warp.arrived = 0;
    ++warp.meetings;
    ++progress;
  } else {
    while (warp.meetings == before) yield();
  }
  std::copy(warp.all, warp.all + kWarp, all);
}

template <typename V>
V meet_and_take(V mine, int lane) {
  static_assert(sizeof(V) % 4 == 0);
  V taken;
  for (size_t i = 0; i < sizeof(V); i += 4) {
    uint32_t word;
    uint32_t all[kWarp];
    std::memcpy(&word, reinterpret_cast<const char*>(&mine) + i, 4);
    meet(word, all);
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
  if (_setjmp(scheduler)) return;
  if (fibers[fiber].started) _longjmp(fibers[fiber].at, 1);
  fibers[fiber].started = true;
  setcontext(&fibers[fiber].start);
}

// Runs `block` on `threads` threads; false if they wait for ever. Warp `slow_warp` runs one turn in `slowness`.
inline bool run_block(int threads, std::function<void()> block, int slow_warp, int slowness) {
  body = std::move(block);
  fibers.assign(threads, {});
  warps.assign(threads / kWarp, {});
  events.clear();
  block_arrived = 0;
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(kStackBytes);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.start, run_fiber, 0);
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
      if (skipped) continue;
      for (int fiber = warp * kWarp; fiber < (warp + 1) * kWarp; ++fiber) {
        if (!fibers[fiber].done) resume(fiber);
      }
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.done; })) return true;
    idle = progress == seen ? idle + 1 : 0;
    seen = progress;
    if (idle > kPatience + 40 * slowness) return false;
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
#define __trap std::abort

inline void __syncthreads() {
  const uint64_t before = emulator::block_meetings;
  if (++emulator::block_arrived == static_cast<int>(emulator::fibers.size())) {
    emulator::block_arrived = 0;
    ++emulator::block_meetings;
    ++emulator::progress;
  } else {
    while (emulator::block_meetings == before) emulator::yield();
  }
}

inline void __syncwarp() {
  uint32_t all[emulator::kWarp];
  emulator::meet(0, all);
}

template <typename V>
V __shfl_sync(unsigned, V mine, int lane) {
  return emulator::meet_and_take(mine, lane % emulator::kWarp);
}

template <typename V>
V __shfl_xor_sync(unsigned, V mine, int mask) {
  return emulator::meet_and_take(mine, emulator::current % emulator::kWarp ^ mask);
}

template <typename V>
V __shfl_up_sync(unsigned, V mine, int by) {
  const int lane = emulator::current % emulator::kWarp;
  return emulator::meet_and_take(mine, lane >= by ? lane - by : lane);
}

inline bool __any_sync(unsigned, bool mine) {
  uint32_t all[emulator::kWarp];
  emulator::meet(mine, all);
  return std::any_of(all, all + emulator::kWarp, [](uint32_t x) { return x != 0; });
}

inline bool __all_sync(unsigned, bool mine) {
  uint32_t all[emulator::kWarp];
  emulator::meet(mine, all);
  return std::all_of(all, all + emulator::kWarp, [](uint32_t x) { return x != 0; });
}

inline unsigned __ballot_sync(unsigned, bool mine) {
  uint32_t all[emulator::kWarp];
  emulator::meet(mine, all);
  unsigned bits = 0;
  for (int i = 0; i < emulator::kWarp; ++i) bits |= static_cast<unsigned>(all[i] != 0) << i;
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
