#include <fmt/format.h>
#include <fmt/ranges.h>

#include <torch/csrc/distributed/c10d/exception.h>
#include <algorithm>
#include <array>
#include <cstring>
#include <future>

#include "backend/c10d/interpreter_end.h"
#include "backend/c10d/transport_backend.h"
#include "backend/exchange/error.h"

// The monitored barrier of TransportBackend: every rank tells rank 0 that it has come, and hears
// from it that all have. A message is the number of the barrier: what comes of an earlier one,
// which failed, is passed over.

namespace distro::c10d_backend {
namespace {

using std::chrono::milliseconds;

milliseconds remaining(transport::Deadline deadline) {
  const auto left = std::chrono::duration_cast<milliseconds>(deadline - transport::Clock::now());
  return std::max(left, milliseconds(1));  // what has come already is there
}

}  // namespace

// One message that is wanted; its end is waited for here.
class TransportBackend::MonitorMessage {
 public:
  std::array<std::byte, sizeof(std::uint64_t)> bytes{};
  std::promise<void> ended;

  // The number of the barrier. Throws what the message failed with.
  [[nodiscard]] std::uint64_t wait() {
    ended.get_future().get();
    std::uint64_t barrier = 0;
    std::memcpy(&barrier, bytes.data(), sizeof barrier);
    return barrier;
  }
};

std::shared_ptr<TransportBackend::MonitorMessage> TransportBackend::monitor_want(
    int rank, milliseconds timeout) {
  const auto message = std::make_shared<MonitorMessage>();
  group_->transfers()->want({.from = member(rank),
                             .stream = stream_ + kMonitorStreams,
                             .into = message->bytes,
                             .timeout = timeout,
                             .done = [message](int, const std::exception_ptr& error) {
                               error ? message->ended.set_exception(error)
                                     : message->ended.set_value();
                             }});
  return message;
}

void TransportBackend::monitor_send(int rank, std::uint64_t barrier) {
  const auto bytes = std::make_shared<std::array<std::byte, sizeof barrier>>();
  std::memcpy(bytes->data(), &barrier, sizeof barrier);
  group_->transfers()->send({.to = member(rank),
                             .stream = stream_ + kMonitorStreams,
                             .bytes = *bytes,
                             .timeout = timeout_,
                             .done = [bytes](const std::exception_ptr&) {}});
}

void TransportBackend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  struct AtEnd {
    ~AtEnd() { stay_if_interpreter_ends(); }
  };
  const AtEnd at_end;
  const std::uint64_t barrier = ++monitored_;
  if (size_ == 1) {
    return;
  }
  // Unlike elsewhere 0 is a time-out here.
  const milliseconds limit =
      options.timeout == c10d::kUnsetTimeout ? timeout_.load() : options.timeout;
  const auto deadline = transport::Clock::now() + limit;
  // Throws if the rank does not come to this barrier.
  const auto hear = [&](int rank) {
    while (monitor_want(rank, remaining(deadline))->wait() < barrier) {
    }
  };
  if (rank_ != 0) {
    try {
      monitor_send(0, barrier);
      hear(0);
    } catch (const std::exception& error) {
      C10_THROW_ERROR(DistBackendError,
                      fmt::format("Rank {} successfully reached monitoredBarrier, but received "
                                  "errors while waiting for send/recv from rank 0. Please check "
                                  "rank 0 logs for faulty rank. Original error: {}",
                                  rank_, error.what()));
    }
    return;
  }
  std::vector<int> absent;
  std::string why;
  for (int rank = 1; rank < size_ && (absent.empty() || wait_all_ranks); ++rank) {
    if (transport::Clock::now() >= deadline && !wait_all_ranks) {
      C10_THROW_ERROR(DistBackendError,
                      fmt::format("Rank 0 timed out in monitoredBarrier after {} ms, before rank "
                                  "{} and those after it had come",
                                  limit.count(), rank));
    }
    try {
      hear(rank);
    } catch (const std::exception& error) {
      absent.push_back(rank);
      why = error.what();
    }
  }
  if (!absent.empty()) {
    C10_THROW_ERROR(
        DistBackendError,
        fmt::format("[Rank 0]: {} {} failed to pass monitoredBarrier in {} ms. Original error: {}",
                    wait_all_ranks ? "Ranks" : "Rank", fmt::join(absent, ", "), limit.count(),
                    why));
  }
  for (int rank = 1; rank < size_; ++rank) {
    monitor_send(rank, barrier);
  }
}

}  // namespace distro::c10d_backend
