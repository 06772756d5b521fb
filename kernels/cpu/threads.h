// Work on chunks, shared between threads. No result depends on who does what.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "codec.h"

namespace psyche {

// Pieces of one piece of work. Threads take the next one when they are free, and only those that took one are waited
// for: a thread that a busy machine starts late finds nothing left to do and touches nothing but this.
template <class Work>
class Pieces {
 public:
  Pieces(i64 chunks, i64 piece, const Work& work) : chunks_(chunks), piece_(piece), work_(&work) {}

  void take() {
    i64 done = 0;
    for (i64 first; (first = next_.fetch_add(piece_, std::memory_order_relaxed)) < chunks_;) {
      const i64 last = std::min(first + piece_, chunks_);
      (*work_)(first, last);
      done += last - first;
    }
    if (done == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    done_ += done;
    if (done_ == chunks_) all_done_.notify_one();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == chunks_; });
  }

 private:
  const i64 chunks_, piece_;
  const Work* const work_;  // valid until all chunks are done
  std::atomic<i64> next_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
  i64 done_ = 0;
};

// Calls work(first, last) until all of `chunks` chunks are done, from `threads` threads at most, this one included.
template <class Work>
void share_chunks(i64 chunks, int threads, const Work& work) {
  constexpr i64 WORTH_A_THREAD = 4;  // chunks: starting one takes about as long as encoding them
  constexpr i64 PIECES_PER_THREAD = 8;
  constexpr i64 LARGEST_PIECE = 64;  // 1 MiB of fp32
  const i64 wanted = std::min<i64>(threads, chunks / WORTH_A_THREAD);
  if (wanted <= 1) {
    work(i64{0}, chunks);
    return;
  }
  const i64 piece = std::clamp<i64>(chunks / (wanted * PIECES_PER_THREAD), 1, LARGEST_PIECE);
  const auto pieces = std::make_shared<Pieces<Work>>(chunks, piece, work);
  for (i64 i = 1; i < wanted; ++i) {
    try {
      std::thread([pieces] { pieces->take(); }).detach();
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those there are do it all
    }
  }
  pieces->take();
  pieces->wait();
}

}  // namespace psyche
