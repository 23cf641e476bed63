#pragma once

// Cooperative threads of one block, with barriers.

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

namespace fibers {

constexpr size_t kStack = 1 << 16;
constexpr unsigned kMost = 1024, kWarp = 32;

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false, done = false;
  unsigned waits_for = 0, generation = 0;  // barrier + 1, 0 for none, and its count when the wait began
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

inline Fiber all[kMost];
inline Barrier barriers[1 + kMost / kWarp];
inline std::unique_ptr<char[]> stacks{new char[kStack * kMost]};
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline unsigned current;
inline const std::function<void()>* body;

inline void enter() {
  (*body)();
  all[current].done = true;
  _longjmp(scheduler, 1);
}

// Waits until `count` fibers have arrived at barrier `id`.
inline void barrier(unsigned id, unsigned count) {
  Barrier& b = barriers[id];
  if (++b.arrived == count) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  Fiber& f = all[current];
  f.waits_for = id + 1;
  f.generation = b.generation;
  if (_setjmp(f.place) == 0) _longjmp(scheduler, 1);
}

inline bool waits(const Fiber& f) { return f.waits_for && barriers[f.waits_for - 1].generation == f.generation; }

inline void resume(Fiber& f) {
  if (_setjmp(scheduler) != 0) return;
  f.waits_for = 0;
  if (f.started) _longjmp(f.place, 1);
  f.started = true;
  swapcontext(&scheduler_context, &f.start);
}

// Runs `count` fibers of `work` until all are done; `turn(i)` is called whenever fiber i goes on. A warp goes as far as
// it can before the next one, so that what lacks a barrier shows.
inline void run(unsigned count, bool backwards, const std::function<void(unsigned)>& turn,
                const std::function<void()>& work) {
  body = &work;
  for (Barrier& b : barriers) b = Barrier{};
  for (unsigned i = 0; i < count; ++i) {
    Fiber& f = all[i];
    f.started = f.done = false;
    f.waits_for = 0;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks.get() + i * kStack;
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    makecontext(&f.start, enter, 0);
  }
  unsigned left = count;
  const auto step_warp = [&](unsigned first) {
    bool moved = false;
    for (unsigned step = first; step < first + kWarp && step < count; ++step) {
      const unsigned i = backwards ? count - 1 - step : step;
      if (all[i].done || waits(all[i])) continue;
      current = i;
      turn(i);
      resume(all[i]);
      moved = true;
      left -= all[i].done;
    }
    return moved;
  };
  while (left > 0) {
    bool moved = false;
    for (unsigned first = 0; first < count; first += kWarp)
      while (step_warp(first)) moved = true;
    if (!moved) {
      std::fputs("a barrier or shuffle is not reached by all of its threads\n", stderr);
      std::abort();
    }
  }
}

}  // namespace fibers
