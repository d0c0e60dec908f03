#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "backend/exchange/reduction_exchange.h"

namespace distro::exchange {

/// The engine of a group's gradient reductions (modes ef and demo): a queue and one thread that
/// encodes, exchanges and decodes, so that backward goes on meanwhile. What has been submitted is
/// encoded and sent before the thread waits for the oldest, so that the network's delay is paid
/// once for all of them and not for each.
///
/// After a failure everything queued, and all that is submitted later, fails with the same error.
/// Thread-safe.
class Reductions {
 public:
  explicit Reductions(Group& group);
  ~Reductions();
  Reductions(const Reductions&) = delete;
  Reductions& operator=(const Reductions&) = delete;

  /// Queue a reduction; returns at once. Its `complete` is called from the engine's thread, or from
  /// here if the engine has failed or is closed.
  void submit(Reduction reduction);

  /// Finish what is queued, fail what cannot be finished soon, end the thread. Idempotent.
  void close() noexcept;

 private:
  void run();
  bool await_work();  // false: the thread is to end
  void work();
  void fail(std::exception_ptr error);
  [[nodiscard]] bool may_open(const Reduction& reduction) const;

  Group& group_;
  ReductionExchange exchange_;      // the thread's, as the next two
  std::deque<Reduction> arrivals_;  // taken from the queue, not open yet
  std::deque<OpenReduction> open_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Reduction> queue_;  // guarded by mutex_, as all below
  bool busy_ = false;            // the thread has something in hand
  bool stopping_ = false;        // the thread ends
  std::exception_ptr failure_;   // what everything from now on fails with
  std::mutex joining_;           // guards thread_ against two that close
  std::thread thread_;
};

}  // namespace distro::exchange
