#pragma once

#include <oneapi/tbb/task_arena.h>
#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "backend/exchange/counters.h"
#include "backend/exchange/mailbox.h"
#include "backend/exchange/options.h"
#include "backend/exchange/post.h"
#include "backend/exchange/rendezvous.h"
#include "transport/channel.h"

namespace distro::exchange {

class Reductions;
class Transfers;

/// One process group of this rank: its options, its channel, its mailbox and its counters.
/// Thread-safe.
class Group {
 public:
  /// Meet the other ranks in the store (a group of one rank needs none and opens no socket). Throws
  /// as meet() does.
  static std::shared_ptr<Group> join(const Identity& identity, const Options& options,
                                     BlobStore& store);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  [[nodiscard]] int rank() const noexcept { return identity_.rank; }
  [[nodiscard]] int world_size() const noexcept { return identity_.world_size; }
  [[nodiscard]] const Options& options() const noexcept { return options_; }
  [[nodiscard]] Counters& counters() noexcept { return counters_; }
  [[nodiscard]] transport::ChannelCounters channel_counters() const;

  /// Threads of encode and apply: DISTRO_THREADS, else cores / local ranks.
  [[nodiscard]] tbb::task_arena& arena() noexcept { return arena_; }

  /// Address or interface of this host that the group's peers may reach; empty in a group of one
  /// rank.
  [[nodiscard]] const std::string& bind_address() const noexcept { return bind_address_; }

  /// Every rank can have an accelerator for itself; the same on all ranks, and false in a group of
  /// one.
  [[nodiscard]] bool own_devices() const noexcept { return own_devices_; }

  /// The same of the ranks of this rank's site.
  [[nodiscard]] bool site_own_devices() const noexcept { return site_own_devices_; }

  /// How many groups these ranks have made before on the same store and prefix; part of the keys
  /// they use there.
  [[nodiscard]] std::uint64_t round() const noexcept { return round_; }

  /// Now plus the group's time-out.
  [[nodiscard]] transport::Deadline deadline() const { return transport::Clock::now() + timeout(); }

  /// How long to wait for other ranks. What waits already keeps the deadline it began with.
  [[nodiscard]] std::chrono::milliseconds timeout() const noexcept { return timeout_; }
  void set_timeout(std::chrono::milliseconds timeout);

  /// Ordinal of the next module: the same on all ranks, which make their modules in the same order.
  std::uint32_t next_module();

  /// The engine of gradient reductions; null but in modes ef and demo with more than one rank.
  [[nodiscard]] Reductions* reductions() noexcept { return reductions_.get(); }

  /// The engine of exact collectives over the group's own transport; null where those run in Gloo
  /// (Options::own_transport), and in a group of one rank.
  [[nodiscard]] Transfers* transfers() noexcept { return transfers_.get(); }

  /// Which ranks act as one.
  [[nodiscard]] const Sites& sites() const noexcept { return sites_; }

  /// Send to every other rank (those of other sites by way of leaders), or to a neighbour; counts
  /// the payload.
  void broadcast(transport::Bytes message);
  void send(int neighbour, transport::Bytes message);

  Letter take(int peer, const Subject& subject, transport::Deadline deadline);
  void forget(std::uint32_t module);

  /// End every take() by throwing Interrupted.
  void interrupt() noexcept;

  /// Tell all ranks that the group cannot go on because of `culprit`. Does nothing once the group
  /// is closed.
  void abort(int culprit, std::string_view reason) noexcept;

  /// The rank that is known to be lost.
  [[nodiscard]] std::optional<transport::PeerLost> lost() const;

  /// The rank to blame when the inner backend fails with an error that names none
  /// (Channel::suspect), waiting up to `patience` for the news; not at all if it was asked in vain
  /// a moment ago.
  [[nodiscard]] std::optional<transport::PeerError> suspect(std::chrono::milliseconds patience);

  /// Run `last_act` when the group is closed, after its goodbye. Before close(), from one thread.
  void on_close(std::function<void()> last_act) { last_act_ = std::move(last_act); }

  /// Called with the reason of every error from which the group does not recover, by the thread
  /// that met it. Must not throw. One observer; set it before the group is used.
  using FailureObserver = std::function<void(std::string_view reason)>;
  void observe_failure(FailureObserver observer) { failure_observer_ = std::move(observer); }
  void report_failure(std::string_view reason) const noexcept {
    if (failure_observer_ && !closed_) {  // a use after the end is no failure of the group
      failure_observer_(reason);
    }
  }

  /// Deliver what was sent, say goodbye, close. Idempotent.
  void close() noexcept;

  /// Close because this rank has failed: the others are told why instead of a goodbye.
  void leave(std::string_view reason) noexcept;
  [[nodiscard]] bool closed() const noexcept { return closed_; }

  /// "[distro rank 2] message" to the log.
  void log(transport::LogLevel level, std::string_view message) const noexcept;

 private:
  Group(const Identity& identity, const Options& options, Meeting meeting);
  void check_open() const;
  void open_transfers();

  // In a forked child the threads are the parent's: it is left alone.
  struct LeaveInChild {
    pid_t owner;
    void operator()(Transfers* transfers) const noexcept;
  };

  const Identity identity_;
  const Options options_;
  const std::string bind_address_;
  const std::uint64_t round_;
  const bool own_devices_;
  const bool site_own_devices_;
  const Sites sites_;
  Counters counters_;
  const std::unique_ptr<transport::Channel> channel_;        // null in a group of one rank
  const std::unique_ptr<transport::Channel> exact_channel_;  // null where there are no transfers
  std::optional<Post> post_;
  std::optional<Mailbox> mailbox_;
  tbb::task_arena arena_;
  std::mutex channel_mutex_;  // guards abort() and set_timeout() against close()
  std::mutex mutex_;
  std::uint32_t modules_ = 0;  // guarded by mutex_
  std::function<void()> last_act_;
  std::atomic<bool> closed_{false};
  bool told_ = false;  // the others have been told of a failure; guarded by channel_mutex_
  std::atomic<transport::Deadline> asked_in_vain_{transport::Deadline::min()};
  std::atomic<std::chrono::milliseconds> timeout_;
  FailureObserver failure_observer_;
  std::unique_ptr<Transfers, LeaveInChild> transfers_{nullptr, {}};  // its threads use the above
  std::unique_ptr<Reductions> reductions_;  // last: its thread uses all of the above
};

}  // namespace distro::exchange
