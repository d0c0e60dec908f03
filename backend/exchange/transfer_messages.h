#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/exchange/callbacks.h"
#include "backend/exchange/transfer_message.h"
#include "backend/exchange/transfer_streams.h"
#include "transport/channel.h"

namespace distro::exchange {

/// A message from this rank to another.
struct OutgoingMessage {
  int to = 0;
  std::uint32_t stream = 0;  ///< Messages of different streams do not meet.
  std::uint32_t tag = 0;
  std::span<const std::byte> bytes;  ///< Untouched until `done`, which says that they were sent.
  std::chrono::milliseconds timeout{};
  TransferDone done;
};

/// Where a message is wanted.
struct WantedMessage {
  std::optional<int> from;  ///< Empty: of any rank.
  std::uint32_t stream = 0;
  std::uint32_t tag = 0;
  std::span<std::byte> into;  ///< The message must have as many bytes.
  std::chrono::milliseconds timeout{};
  /// As TransferDone; says who sent it.
  std::function<void(int from, const std::exception_ptr& error)> done;
};

/// Messages from rank to rank as a state machine, without threads. Those of one sender, stream and
/// tag are received in the order in which they were sent. The first bytes of a message travel at
/// once, the rest when the receiver wants it; of all that nobody wants yet, each sender has at most
/// a pool in the receiver's memory.
///
/// Members throw as those of TransferStreams do. That a wanted message does not come in time, or
/// cannot come because the sender left, fails the one operation only.
class TransferMessages {
 public:
  TransferMessages(transport::Channel& channel, Callbacks& callbacks, int rank, int world_size,
                   std::size_t window_bytes);
  TransferMessages(const TransferMessages&) = delete;
  TransferMessages& operator=(const TransferMessages&) = delete;

  void send(OutgoingMessage message, transport::Deadline now);
  void want(WantedMessage message, transport::Deadline now);
  /// A message's part, or a credit, that `peer` sent.
  void take(int peer, const OpenedTransfer& opened, transport::Deadline now);
  void leave(const transport::PeerLeft& peer);
  bool pump(transport::Deadline now);
  transport::Deadline check(transport::Deadline now);
  /// This rank ends, since `since`: fail what is wanted and does not come, and what was sent and is
  /// not wanted for so long that it never will be. Returns when to look again.
  transport::Deadline drain(transport::Deadline since, transport::Deadline now,
                            const std::exception_ptr& error);
  void fail(const std::exception_ptr& error);
  [[nodiscard]] bool idle() const { return sending_.empty() && wanted_.empty(); }
  [[nodiscard]] const TransferProgress* moving() const;

 private:
  struct Sending {
    OutgoingMessage message;
    std::uint64_t number = 0;
    std::size_t sent = 0;
    std::size_t limit = 0;  // up to which the receiver wants it
    bool begun = false;
    transport::Deadline moved{};
    TransferProgress progress;
  };

  struct Wanted {
    WantedMessage message;
    int from = -1;  // once it comes
    std::size_t arrived = 0;
    transport::Deadline moved{};
    TransferProgress progress;
  };

  // A message that comes.
  struct Coming {
    std::uint32_t stream = 0;
    std::uint32_t tag = 0;
    std::size_t total = 0;
    std::size_t arrived = 0;
    std::size_t granted = 0;
    std::size_t pooled = 0;  // bytes of the pool that it takes
    transport::Bytes early;  // what came before it was wanted
    std::shared_ptr<Wanted> wanted;
    bool dropped = false;  // whoever wanted it has given up
  };

  struct Peer {
    std::uint64_t next_out = 0;
    std::uint64_t pool_sent = 0;
    std::uint64_t pool_limit = 0;
    std::uint64_t next_in = 0;
    std::uint64_t pool_arrived = 0;
    std::uint64_t pool_used = 0;
    std::uint64_t pool_granted = 0;
    std::map<std::uint64_t, Coming> coming;  // by number
    std::size_t unwanted = 0;                // of them
    std::optional<transport::PeerLeft> left;
  };

  [[nodiscard]] bool send_part(Sending& sending, transport::Deadline now);
  void accept(int peer, std::uint64_t number, Coming& coming, std::shared_ptr<Wanted> wanted);
  void grant(int peer, std::uint64_t number, Coming& coming);
  void free_pool(int peer, std::size_t bytes);
  void arrive(int peer, const TransferHeader& header, std::span<const std::byte> payload,
              transport::Deadline now);
  void finish_if_whole(int peer, std::uint64_t number);
  void tell(int peer, const TransferHeader& header);
  void give_up(const std::shared_ptr<Wanted>& wanted, const std::exception_ptr& error);

  transport::Channel& channel_;
  Callbacks& callbacks_;
  const int rank_;
  const std::size_t window_bytes_;
  std::vector<Peer> peers_;
  std::list<Sending> sending_;
  std::list<std::shared_ptr<Wanted>> wanted_;  // in the order in which they were asked for; those
                                               // that come as well
  int next_any_ = 0;  // the peer at which a message of any rank is looked for first
};

}  // namespace distro::exchange
