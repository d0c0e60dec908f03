#include "backend/exchange/callbacks.h"

#include <utility>

namespace distro::exchange {
namespace {

// Callbacks that wait at the same time, at most; what comes then waits in the queue. Fewer: hooks
// that wait for each other hang; more: a script that makes thousands gets as many threads.
constexpr std::size_t kMaxThreads = 64;

}  // namespace

Callbacks::~Callbacks() { close(); }

void Callbacks::run(std::function<void()> callback) {
  {
    const std::lock_guard lock(mutex_);
    if (!stopping_) {
      queue_.push_back(std::move(callback));
      if (queue_.size() > idle_ && threads_.size() < kMaxThreads) {
        ++idle_;  // it counts at once, or the next call would start another one
        threads_.emplace_back([this] { work(); });
      }
      changed_.notify_one();
      return;
    }
  }
  callback();
}

void Callbacks::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) {
      return;
    }
    {
      const std::function<void()> callback = std::move(queue_.front());
      queue_.pop_front();
      --idle_;
      lock.unlock();
      callback();
    }
    lock.lock();
    ++idle_;
  }
}

void Callbacks::close() noexcept {
  std::vector<std::thread> threads;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    threads.swap(threads_);
    changed_.notify_all();
  }
  for (auto& thread : threads) {
    thread.join();
  }
}

}  // namespace distro::exchange
