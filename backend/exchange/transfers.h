#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "backend/exchange/callbacks.h"
#include "backend/exchange/transfer_messages.h"
#include "backend/exchange/transfer_progress.h"
#include "backend/exchange/transfer_streams.h"
#include "transport/channel.h"

namespace distro::exchange {

/// The exact collectives and messages of a group over a channel of their own (docs/adr/0016): a
/// queue and one thread that moves bytes between the channel and the memory of the operations.
/// What is issued returns at once, and ends on threads of its own.
///
/// A failed collective, and any error of the channel, is the end: everything under way, and all
/// that is issued later, fails with the same error, and the other ranks are told. Thread-safe.
class Transfers {
 public:
  struct Config {
    int rank = 0;
    int world_size = 1;
    /// Bytes to one peer in one stream, or in one message, that were sent and not used by the
    /// receiver's operation. Less than what is under way on a line (100 Mbit/s and 200 ms: 2.5 MB)
    /// leaves it idle; more is memory, for each peer.
    std::size_t window_bytes = std::size_t{4} << 20;
    /// How long an operation moves before a warning tells how far it is.
    std::chrono::milliseconds first_report = std::chrono::seconds(10);
    /// A rank that is known to be lost from elsewhere (the group's other channel); asked now and
    /// then while something is under way.
    std::function<std::optional<transport::PeerLost>()> lost = {};
    /// Called once, with the rank to blame and why, when this rank finds out that the group cannot
    /// go on because of one. Must not throw.
    std::function<void(int culprit, std::string_view reason)> on_failure = {};
  };

  /// `channel` is connected, and lives until close() has returned.
  Transfers(transport::Channel& channel, Config config);
  ~Transfers();
  Transfers(const Transfers&) = delete;
  Transfers& operator=(const Transfers&) = delete;

  [[nodiscard]] int rank() const noexcept { return config_.rank; }

  /// Have the stream carry collectives of these ranks, which are in the same order on all of them
  /// and contain this one. Before the first collective on it. What comes of other ranks before is
  /// kept.
  void open(std::uint32_t stream, std::vector<int> members);

  /// Begin an operation; a Collective's stream is open. Throws what everything fails with after a
  /// failure, ExchangeError after close(); then `done` is not called.
  void issue(Collective collective);
  void send(OutgoingMessage message);
  void want(WantedMessage message);

  /// Fail everything, now and from now on, on this rank.
  void fail(const std::exception_ptr& error) noexcept;

  /// Let everything under way come to its end (its time-outs bound it, but for messages that nobody
  /// sends or wants), then end the threads. Not
  /// from a callback. Idempotent. In a forked child it does nothing, and the object must not be
  /// destroyed there.
  void close() noexcept;

 private:
  using Task = std::function<void(transport::Deadline now)>;

  void post(Task task);
  [[nodiscard]] Task next_task();  // empty: there is none
  void run() noexcept;
  void work();
  [[nodiscard]] transport::Deadline step(transport::Deadline now);
  void take(int peer, transport::Bytes message, transport::Deadline now);
  void give_up(const std::exception_ptr& error);
  void blame(const std::exception_ptr& error) noexcept;
  void tell_fault(std::string_view reason) noexcept;
  [[nodiscard]] bool stopping();
  [[nodiscard]] std::optional<transport::Deadline> closing();
  [[nodiscard]] std::string destroyed() const;
  [[nodiscard]] bool foreign() const noexcept;

  const Config config_;
  transport::Channel& channel_;
  Callbacks callbacks_;
  TransferStreams streams_;  // the thread's, as the next two
  TransferMessages messages_;
  TransferReports reports_;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::deque<Task> tasks_;                      // guarded by mutex_, as all below
  std::exception_ptr failure_;                  // what everything from now on fails with
  bool busy_ = false;                           // the thread has something in hand
  std::optional<transport::Deadline> closing_;  // since when nothing new is taken
  bool stopping_ = false;                       // the thread ends
  const pid_t owner_;
  std::mutex joining_;  // guards thread_ against two that close
  std::thread thread_;
};

}  // namespace distro::exchange
