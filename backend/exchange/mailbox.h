#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "backend/exchange/counters.h"
#include "backend/exchange/envelope.h"
#include "backend/exchange/post.h"
#include "transport/channel.h"

namespace distro::exchange {

/// Messages of one peer that nobody has asked for yet, at most, in bytes. An honest peer is at most
/// two exchanges a module ahead; less than one record's size would refuse it, more lets a hostile
/// one fill the memory.
inline constexpr std::size_t kMaxStoredBytes = transport::kMaxBytesAhead + (std::size_t{1} << 20);

/// What a message is about: a peer's message of this kind and number, of this module. Where an
/// average is awaited, the peer may be one exchange behind or ahead, and its exchanges before come
/// as well.
struct Subject {
  std::uint32_t module = 0;
  MessageKind kind = MessageKind::step;
  std::uint64_t exchange = 0;
};

/// A message with its bytes and the checked view of them.
struct Letter {
  Letter() = default;
  explicit Letter(transport::Bytes message) : bytes(std::move(message)) {}
  Letter(Letter&&) noexcept = default;  // a vector's memory moves along, and the view with it
  Letter& operator=(Letter&&) noexcept = default;
  Letter(const Letter&) = delete;
  Letter& operator=(const Letter&) = delete;
  ~Letter() = default;

  transport::Bytes bytes;
  Opened opened;  ///< Borrows from bytes.
};

/// Sorts the messages of a group's channel by writer and module, so that several modules of one
/// process can exchange in any order; those of one module come in the order in which they were
/// written. What a leader of a site fetches it passes on to whom it concerns (post.h). Thread-safe;
/// a wait for one module does not hold up another's.
class Mailbox {
 public:
  Mailbox(transport::Channel& channel, Counters& counters, const Post& post, int rank,
          int world_size);

  /// The next message that `peer` wrote about the module, which must be on `subject`; waits until
  /// the deadline. Throws transport::PeerError as Channel::receive does, and ExchangeError (naming
  /// the peer) when what it sends cannot be opened or is about something else: the ranks then do
  /// not do the same things in the same order.
  Letter take(int peer, const Subject& subject, transport::Deadline deadline);

  /// End every take(), now and from now on, by throwing Interrupted: the group is being closed.
  void interrupt() noexcept { interrupted_ = true; }

  /// Drop what has come and what will come for a module that this rank has let go.
  void forget(std::uint32_t module);

 private:
  using Key = std::pair<int, std::uint32_t>;  // who wrote it, module

  // Fetch one message of the neighbour and sort it in; waits until `until` (null: not at all).
  // Whether there was one.
  bool fetch(int neighbour, const transport::Deadline* until);
  void sort(int neighbour, transport::Bytes bytes);
  bool pass_on();
  [[nodiscard]] std::string mismatch(int peer, const Subject& subject, const Envelope& got) const;

  transport::Channel& channel_;
  Counters& counters_;
  const Post& post_;
  const int rank_;
  std::atomic<bool> interrupted_{false};
  std::vector<std::mutex>
      fetching_;  // by neighbour: keeps its messages in order between two threads
  std::mutex mutex_;
  std::map<Key, std::deque<Letter>> letters_;  // guarded by mutex_
  std::vector<std::size_t> stored_bytes_;      // by writer, guarded by mutex_
  std::set<std::uint32_t> forgotten_;          // guarded by mutex_
};

}  // namespace distro::exchange
