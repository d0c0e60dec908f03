#include "backend/exchange/reductions.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <set>
#include <utility>

#include "backend/exchange/error.h"

namespace distro::exchange {
namespace {

// How much may be sent before the oldest reduction is decoded. More than a backward's buckets need
// gains nothing; without a bound a script that never waits fills its peers' memory.
constexpr std::size_t kMaxOpen = 64;
constexpr std::size_t kMaxOpenBytes = std::size_t{64} << 20;

// How long a closing group waits for reductions in flight. The other ranks have them in flight too,
// or have failed; less would break a script that does not wait for its last one, more holds up the
// end of a script that failed in the middle of a backward.
constexpr std::chrono::seconds kDrain{10};

}  // namespace

Reductions::Reductions(Group& group)
    : group_(group), exchange_(group), thread_([this] { run(); }) {}

Reductions::~Reductions() { close(); }

void Reductions::submit(Reduction reduction) {
  std::exception_ptr failure;
  {
    const std::lock_guard lock(mutex_);
    failure = failure_;
    if (!failure) {
      queue_.push_back(std::move(reduction));
      changed_.notify_all();
      return;
    }
  }
  reduction.complete(failure);
}

bool Reductions::may_open(const Reduction& reduction) const {
  std::set<const plugins::Residual*> in_use;
  std::size_t bytes = 0;
  for (const auto& open : open_) {
    bytes += open.sent_bytes;
    for (const auto& residual : open.residuals) {
      in_use.insert(residual.get());
    }
  }
  if (open_.size() >= kMaxOpen || bytes >= kMaxOpenBytes) {
    return false;
  }
  return reduction.exact ||
         std::ranges::none_of(reduction.residuals(reduction.slot), [&](const auto& residual) {
           return in_use.contains(residual.get());
         });
}

bool Reductions::await_work() {
  std::unique_lock lock(mutex_);
  busy_ = !arrivals_.empty() || !open_.empty();
  changed_.notify_all();
  changed_.wait(lock, [&] { return stopping_ || busy_ || !queue_.empty(); });
  busy_ = true;
  for (auto& reduction : queue_) {
    arrivals_.push_back(std::move(reduction));
  }
  queue_.clear();
  return !stopping_;
}

void Reductions::work() {
  for (; !arrivals_.empty() && may_open(arrivals_.front()); arrivals_.pop_front()) {
    open_.emplace_back().reduction = std::move(arrivals_.front());
    exchange_.open(open_.back());
  }
  const bool written = exchange_.finish(open_.front());
  const OpenReduction done = std::move(open_.front());
  open_.pop_front();
  if (written) {
    done.reduction.complete(nullptr);
  }
}

void Reductions::fail(std::exception_ptr error) {
  std::deque<Reduction> failed;
  for (auto& open : open_) {
    failed.push_back(std::move(open.reduction));
  }
  for (auto& reduction : std::exchange(arrivals_, {})) {
    failed.push_back(std::move(reduction));
  }
  open_.clear();
  {
    const std::lock_guard lock(mutex_);
    failure_ = failure_ ? failure_ : error;
    for (auto& reduction : std::exchange(queue_, {})) {
      failed.push_back(std::move(reduction));
    }
  }
  for (auto& reduction : failed) {
    if (reduction.complete) {  // else it is the one that opening has moved from
      reduction.complete(error);
    }
  }
}

void Reductions::run() {
  while (await_work()) {
    try {
      work();
    } catch (const ExchangeError&) {
      fail(std::current_exception());
    } catch (const transport::PeerError&) {
      fail(std::current_exception());
    } catch (const std::exception& error) {
      // This rank's own trouble: the others would wait for it in vain.
      group_.abort(group_.rank(), error.what());
      fail(std::current_exception());
    }
  }
  fail(std::make_exception_ptr(Interrupted(
      fmt::format("rank {}: this process group was destroyed while gradient reductions were under "
                  "way",
                  group_.rank()))));
}

void Reductions::close() noexcept {
  const std::lock_guard joining(joining_);
  if (!thread_.joinable()) {
    return;
  }
  bool idle = false;
  {
    std::unique_lock lock(mutex_);
    if (!failure_) {
      failure_ = std::make_exception_ptr(ExchangeError(fmt::format(
          "rank {}: this process group has been destroyed; no gradients can be reduced in it any "
          "more",
          group_.rank())));
    }
    idle = changed_.wait_for(lock, kDrain, [&] { return !busy_ && queue_.empty(); });
    stopping_ = true;
    changed_.notify_all();
  }
  if (!idle) {
    group_.interrupt();
  }
  thread_.join();
}

}  // namespace distro::exchange
