#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/exchange/callbacks.h"
#include "backend/exchange/transfer_message.h"
#include "backend/exchange/transfer_progress.h"
#include "transport/channel.h"

namespace distro::exchange {

/// How an operation ended: null, or why it failed. Called once, on a thread of its own
/// (callbacks.h); must not throw.
using TransferDone = std::function<void(const std::exception_ptr& error)>;

/// One exact collective of this rank. Memory that it refers to must live, and not be touched by
/// others, until `done`. Ranks are those of the group.
struct Collective {
  /// Bytes to send, the same to all of `to`; each rank is in one of these at most.
  struct Outgoing {
    std::span<const std::byte> bytes;
    std::vector<int> to;
  };
  /// Bytes to take of one rank: into memory; or, where `growing` is given, as many as come, at most
  /// `bytes`; or, in a reduction, by the piece.
  struct Incoming {
    int from = 0;
    std::size_t bytes = 0;
    std::byte* into = nullptr;
    transport::Bytes* growing = nullptr;
  };
  /// Combine what comes with this rank's own, in the order of the ranks.
  struct Reduction {
    std::span<const std::byte> own;
    std::byte* result = nullptr;
  };

  std::uint32_t stream = 0;
  TransferDescription what = {};  ///< `total` is ignored.
  std::vector<Outgoing> outgoing = {};
  std::vector<Incoming> incoming = {};
  std::optional<Reduction> reduction = std::nullopt;
  std::chrono::milliseconds timeout{};
  TransferDone done = {};
};

/// The collectives of a group as a state machine, without threads. All ranks of a stream issue
/// the same collectives on it in the same order. Each tells each other what it is about to do; of
/// what it has to send, at most a window is under way and not yet used by the receiver's operation,
/// so that memory is bounded and streams do not hold up each other.
///
/// Members throw Misbehaviour (a peer broke the protocol), ExchangeError (ranks differ, see
/// Disagreement), transport::PeerError (somebody is late or has left): the group cannot go on then.
class TransferStreams {
 public:
  TransferStreams(transport::Channel& channel, Callbacks& callbacks, int rank,
                  std::size_t window_bytes);
  TransferStreams(const TransferStreams&) = delete;
  TransferStreams& operator=(const TransferStreams&) = delete;

  void open(std::uint32_t stream, std::vector<int> members);
  void issue(Collective collective, transport::Deadline now);
  /// A message that `peer` sent: a collective's part, or a credit.
  void take(int peer, transport::Bytes message, const OpenedTransfer& opened,
            transport::Deadline now);
  void leave(const transport::PeerLeft& peer);
  /// Send one chunk of each operation that may. False: nothing can be sent.
  bool pump(transport::Deadline now);
  /// Throws what has become due; returns when to look again.
  transport::Deadline check(transport::Deadline now);
  void fail(const std::exception_ptr& error);
  [[nodiscard]] bool idle() const;
  /// The collective that moves, for the log; null where none does.
  [[nodiscard]] const TransferProgress* moving() const;

 private:
  // A part that has come and is not used yet.
  struct Part {
    transport::Bytes message;
    std::size_t begin = 0;  // of its payload in the message
    std::uint64_t number = 0;
    std::uint64_t offset = 0;
    std::optional<TransferDescription> description;

    [[nodiscard]] std::span<const std::byte> payload() const {
      return std::span(message).subspan(begin);
    }
  };

  // Between this rank and one other, in one stream.
  struct Flow {
    std::uint64_t sending = 0;  // number of the operation whose bytes go out
    std::uint64_t sent = 0;     // bytes of messages
    std::uint64_t limit = 0;    // up to which they may be sent
    std::uint64_t used = 0;     // bytes of messages that came and were used
    std::uint64_t granted = 0;
    std::uint64_t arriving = 0;          // number of the operation whose bytes come
    std::uint64_t arrived = 0;           // how many of them have
    std::uint64_t arrived_messages = 0;  // bytes of all messages that came
    std::optional<std::uint64_t> arriving_total;
    std::deque<Part> parts;
  };

  struct Outgoing {
    std::span<const std::byte> bytes;
    std::vector<int> to;
    std::size_t sent = 0;
    bool begun = false;

    [[nodiscard]] bool done() const { return begun && sent == bytes.size(); }
  };

  struct Incoming {
    std::size_t bytes = 0;
    std::byte* into = nullptr;
    transport::Bytes* growing = nullptr;
    std::size_t arrived = 0;
    std::size_t used = 0;
    std::optional<TransferDescription> told;  // what the rank says it does
    std::deque<Part> pieces;                  // of a reduction: in hand

    // Nothing of it is still to come; and, of a reduction, what came was combined.
    [[nodiscard]] bool is_there() const { return arrived == bytes && (growing == nullptr || told); }
    [[nodiscard]] bool done() const { return used == bytes && (growing == nullptr || told); }
  };

  struct Active {
    TransferDescription what;
    std::vector<Outgoing> outgoing;
    std::map<int, Incoming> incoming;  // of every other member
    std::optional<Collective::Reduction> reduction;
    std::size_t reduced = 0;
    std::chrono::milliseconds timeout{};
    TransferDone done;
    transport::Deadline issued{};
    bool finished = false;
    std::optional<transport::Deadline> differs_since;
    std::string sizes_differ;  // where only what is sent and what is taken do
    TransferProgress progress;
  };

  struct Stream {
    std::vector<int> members;
    std::map<int, Flow> flows;  // by peer
    std::deque<Active> active;  // begins with number `first`; finished ones whose description some
                                // rank has not yet told stay
    std::uint64_t first = 0;
    transport::Deadline moved = transport::Deadline::min();

    [[nodiscard]] bool is_open() const { return !members.empty(); }
  };

  Flow& flow(Stream& stream, int peer);
  [[nodiscard]] bool send_chunk(std::uint32_t number, Stream& stream, Active& active,
                                std::uint64_t operation, Outgoing& outgoing,
                                transport::Deadline now);
  void use(std::uint32_t number, Stream& stream, int peer, transport::Deadline now);
  void use(std::uint32_t number, Stream& stream, int peer, Active& active, Part part,
           transport::Deadline now);
  void used(std::uint32_t number, Flow& flow, int peer, std::size_t bytes);
  void reduce(std::uint32_t number, Stream& stream, Active& active);
  void settle(Stream& stream);
  static bool complete(const Active& active);
  void compare(Active& active, int peer, const TransferDescription& told,
               transport::Deadline now) const;
  // Check that a part is the next of its flow.
  void follow(Flow& flow, int peer, const Part& part, std::size_t message_bytes) const;
  [[noreturn]] void throw_difference(const Stream& stream, const Active& active,
                                     std::uint64_t operation) const;
  [[noreturn]] void throw_late(const Active& active, const std::vector<int>& awaited,
                               transport::Deadline since, transport::Deadline now) const;
  [[nodiscard]] std::vector<int> awaited(const Active& active) const;
  [[nodiscard]] static bool all_told(const Active& active);

  transport::Channel& channel_;
  Callbacks& callbacks_;
  const int rank_;
  const std::size_t window_bytes_;
  std::vector<Stream> streams_;
  std::map<int, transport::PeerLeft> left_;
};

}  // namespace distro::exchange
