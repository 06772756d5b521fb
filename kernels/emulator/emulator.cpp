// Runs a kernel: see cuda_emulator.h.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#include "fibres.h"
#include "kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

extern char __start_psyche_shared[], __stop_psyche_shared[];

namespace emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned LANES = 32;
constexpr std::size_t STACK = 64 << 10;

enum class At { START, RUNNING, BARRIER, WARP, END };

struct Thread {
  Fibre fibre;
  At at;
  int line;
};

// Two generations of values: a lane may be one operation ahead of another, never two.
struct Warp {
  std::uint64_t values[2][LANES];
  unsigned arrived, generation;
  int line;
};

struct Block {
  std::unique_ptr<char[]> stacks;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Fibre scheduler;
  unsigned running;
  const Kernel* kernel;
  void** arguments;
  std::string error;
};

Block block;

void leave(At at, int line) {
  Thread& mine = block.threads[block.running];
  mine.at = at;
  mine.line = line;
  Fibre::go(mine.fibre, block.scheduler);
}

void entry() {
  block.kernel->invoke(block.arguments);
  leave(At::END, 0);
}

std::string named(unsigned thread) {
  const Thread& t = block.threads[thread];
  const std::string who = "thread " + std::to_string(thread);
  if (t.at == At::END) return who + " has ended";
  return who + " waits at " + (t.at == At::WARP ? "a warp operation" : "a barrier") + " in line " + std::to_string(t.line);
}

// All threads have stopped: go on behind the barrier they are all at. Returns whether the block has ended.
bool pass_barrier() {
  const Thread& first = block.threads[0];
  for (unsigned i = 1; i < block.threads.size(); ++i) {
    if (block.threads[i].at != first.at || block.threads[i].line != first.line) {
      block.error = named(0) + ", " + named(i);
      return true;
    }
  }
  if (first.at == At::WARP) block.error = "some lanes wait at a warp operation that others do not reach";
  if (first.at != At::BARRIER) return true;
  for (Thread& thread : block.threads) thread.at = At::RUNNING;
  return false;
}

class Order {
 public:
  explicit Order(std::uint64_t which) : which_(which), random_(which) {}

  // 0 is forwards, 1 is backwards, everything else a seed for another order every time.
  const std::vector<unsigned>& of(unsigned count) {
    order_.resize(count);
    std::iota(order_.begin(), order_.end(), 0u);
    if (which_ == 1) std::reverse(order_.begin(), order_.end());
    if (which_ > 1) std::shuffle(order_.begin(), order_.end(), random_);
    return order_;
  }
  unsigned char garbage() { return static_cast<unsigned char>(random_()); }

 private:
  std::uint64_t which_;
  std::mt19937_64 random_;
  std::vector<unsigned> order_;
};

void run_block(Order& order) {
  const auto count = static_cast<unsigned>(block.threads.size());
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(block.stacks.get(), STACK * count);  // of fibres that an error left where they were
#endif
  std::fill(__start_psyche_shared, __stop_psyche_shared, static_cast<char>(order.garbage()));
  std::fill(block.warps.begin(), block.warps.end(), Warp{});
  for (unsigned i = 0; i < count; ++i) {
    block.threads[i].fibre.start(block.stacks.get() + STACK * i, STACK, entry);
    block.threads[i].at = At::START;
  }
  for (bool ended = false; !ended;) {
    for (bool progress = true; progress;) {
      progress = false;
      for (const unsigned i : order.of(count)) {
        Thread& thread = block.threads[i];
        if (thread.at != At::START && thread.at != At::RUNNING) continue;
        progress = true;
        block.running = i;
        thread_index = Index{i, 0, 0};
        Fibre::go(block.scheduler, thread.fibre);
        if (!block.error.empty()) return;
      }
    }
    ended = pass_barrier();
  }
}

}  // namespace

void fail(const char* what, int line) {
  block.error = what;
  if (line != 0) block.error += " (line " + std::to_string(line) + ")";
  for (;;) leave(At::END, line);
}

void sync_threads(int line) { leave(At::BARRIER, line); }

unsigned lane() { return thread_index.x % LANES; }

const std::uint64_t* exchange(unsigned mask, std::uint64_t mine, int line) {
  if (mask != 0xFFFFFFFFu) fail("only operations of a whole warp are emulated", line);
  Warp& warp = block.warps[thread_index.x / LANES];
  if (warp.arrived == 0) warp.line = line;
  if (warp.line != line) fail("lanes of a warp are at warp operations in different lines", line);
  std::uint64_t* values = warp.values[warp.generation % 2];
  values[lane()] = mine;
  if (++warp.arrived < LANES) {
    leave(At::WARP, line);
    return values;
  }
  warp.arrived = 0;
  ++warp.generation;
  const unsigned first = thread_index.x / LANES * LANES;
  for (unsigned i = first; i < first + LANES; ++i) block.threads[i].at = At::RUNNING;
  return values;
}

unsigned ballot(unsigned mask, bool mine, int line) {
  const std::uint64_t* all = exchange(mask, mine ? 1 : 0, line);
  unsigned bits = 0;
  for (unsigned i = 0; i < LANES; ++i) bits |= static_cast<unsigned>(all[i]) << i;
  return bits;
}

}  // namespace emulator

// Runs `grid` blocks of `threads` threads (a multiple of 32). `arguments[i]` is the address of the kernel's i-th
// argument. Returns 0, or 1 with the reason in `error`.
extern "C" __attribute__((visibility("default"))) int psyche_emulate(const char* name, unsigned grid, unsigned threads,
                                                                     void** arguments, int count, std::uint64_t which,
                                                                     char* error, std::size_t error_bytes) {
  using namespace emulator;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  block.error.clear();
  block.kernel = kernel_named(name);
  if (block.kernel == nullptr) block.error = std::string("there is no kernel ") + name;
  else if (block.kernel->arguments != count) block.error = std::string("wrong number of arguments for ") + name;
  else if (threads % LANES != 0) block.error = "a part of a warp cannot be launched";
  else {
    if (block.threads.size() != threads) {
      block.stacks.reset(new char[STACK * threads]);
      block.threads = std::vector<Thread>(threads);
      block.warps = std::vector<Warp>(threads / LANES);
    }
    block.arguments = arguments;
    block_size = Index{threads, 1, 1};
    grid_size = Index{grid, 1, 1};
    Order of_threads(which), of_blocks(which);
    for (const unsigned number : of_blocks.of(grid)) {
      block_index = Index{number, 0, 0};
      run_block(of_threads);
      if (!block.error.empty()) break;
    }
  }
  std::snprintf(error, error_bytes, "%s", block.error.c_str());
  return block.error.empty() ? 0 : 1;
}
