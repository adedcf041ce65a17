// A library that runs csrc/cuda/whiten_group.h on the CPU, for test_whiten_block.py.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>
#include "whiten_group.h"

using namespace ck;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Threads that take turns: each runs until its next sync, alone, the first or the last one first. A
// sync that is missing, or two bodies of one phase that meet, shows in the result, every time.
struct Turns {
  int threads;
  bool last_first;
  long turn = 0;
  std::mutex mutex = {};
  std::vector<std::condition_variable> ready{size_t(threads)};  // one for each: others sleep on
};

struct Team {
  Turns& turns;
  int index;
  long round = 0;
  std::vector<std::pair<float*, const float*>> pending = {};

  void begin() {
    const int slot = turns.last_first ? turns.threads - 1 - index : index;
    std::unique_lock lock(turns.mutex);
    turns.ready[slot].wait(lock, [&] { return turns.turn == round * turns.threads + slot; });
  }
  void end() {
    std::scoped_lock lock(turns.mutex);
    ++turns.turn;
    ++round;
    turns.ready[turns.turn % turns.threads].notify_one();
  }
  template <class Body>
  void for_each(int count, const Body& body) {
    for (int i = index; i < count; i += turns.threads) body(i);
  }
  void sync() {
    end();
    begin();
  }
  // Nobody may use the target from here on, and it is there as late as it may be.
  void fetch(float* target, const float* source) {
    *target = kNan;
    pending.emplace_back(target, source);
  }
  void fetch_four(float* target, const float* source) {
    for (int e = 0; e < 4; ++e) fetch(target + e, source + e);
  }
  void arrive() {
    for (auto [target, source] : pending) *target = *source;
    pending.clear();
    sync();
  }
};

// body(team) by `threads` threads, the last one first if there are fewer than none; whether all
// copies were waited for
template <class Body>
bool run(int threads, Body body) {
  Turns turns{std::abs(threads), threads < 0};
  std::atomic<bool> complete = true;
  std::vector<std::thread> running;
  for (int i = 0; i < turns.threads; ++i) {
    running.emplace_back([&, i] {
      Team team{turns, i};
      team.begin();
      body(team);
      team.end();
      if (!team.pending.empty()) complete = false;
    });
  }
  for (std::thread& thread : running) thread.join();
  return complete;
}

// Shared memory of the stated size, of NaN, and canaries behind it.
struct Memory {
  std::vector<Four> data;
  size_t size;

  explicit Memory(int bytes) : data(bytes / 16 + 4), size(bytes / 4) {
    std::fill_n(begin(), 4 * data.size(), kNan);
    std::fill(begin() + size, begin() + 4 * data.size(), 7.0f);
  }
  float* begin() { return data[0].v; }
  bool intact() {
    return std::all_of(begin() + size, begin() + 4 * data.size(), [](float f) { return f == 7; });
  }
};

extern "C" bool forward(int threads, int groups, int rows, int dim, int panel_rows, bool aligned,
                        float eps, const float* x, float* z, float* inverse, int* info) {
  const GroupShape shape{rows, dim, panel_rows, aligned};
  for (int g = 0; g < groups; ++g) {
    Memory memory(shared_bytes(dim, 1, panel_rows));
    const bool complete = run(threads, [&](Team& team) {
      whiten_group(team, shape, eps, x + g * rows * dim, z + g * rows * dim,
                   inverse + g * dim * dim, info + g, memory.begin());
    });
    if (!memory.intact() || !complete) return false;
  }
  return true;
}

extern "C" bool backward(int threads, int groups, int rows, int dim, int panel_rows, bool aligned,
                         float eps, const float* grad, const float* z, const float* inverse,
                         float* dx) {
  const GroupShape shape{rows, dim, panel_rows, aligned};
  for (int g = 0; g < groups; ++g) {
    Memory memory(shared_bytes(dim, 2, panel_rows));
    const int at = g * rows * dim;
    const bool complete = run(threads, [&](Team& team) {
      whiten_group_backward(team, shape, eps, grad + at, z + at, inverse + g * dim * dim, dx + at,
                            memory.begin());
    });
    if (!memory.intact() || !complete) return false;
  }
  return true;
}

extern "C" int panel_rows(int rows, int dim, int matrices, int bytes) {
  return choose_panel_rows(rows, dim, matrices, bytes);
}

extern "C" int bytes(int dim, int matrices, int panel_rows) {
  return shared_bytes(dim, matrices, panel_rows);
}
