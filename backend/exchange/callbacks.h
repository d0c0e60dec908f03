#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace distro::exchange {

/// Runs callbacks on threads of its own, beginning them in order. A callback may wait for one that
/// comes after it (a communication hook's, that reduces something else and waits for that): then
/// another thread takes the next. Thread-safe.
class Callbacks {
 public:
  Callbacks() = default;
  ~Callbacks();
  Callbacks(const Callbacks&) = delete;
  Callbacks& operator=(const Callbacks&) = delete;

  /// `callback` must not throw. Runs it here, in the caller's thread, after close().
  void run(std::function<void()> callback);

  /// Run what is queued, end the threads. Not from a callback. Idempotent.
  void close() noexcept;

 private:
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;  // guarded by mutex_, as all below
  std::vector<std::thread> threads_;
  std::size_t idle_ = 0;
  bool stopping_ = false;
};

}  // namespace distro::exchange
