#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "transport/channel.h"

namespace distro::transport {

/// A peer as callers may know it. The order is that of a life, except that `away` goes back to
/// `connected`.
enum class PeerState : std::uint8_t {
  connecting,  ///< Not yet reached.
  connected,
  away,  ///< The connection broke; it is being made again.
  left,  ///< Said goodbye.
  lost,
  beyond,  ///< Not a neighbour: what becomes of it others tell.
};

/// ChannelCounters while they are counted: the I/O thread adds, any thread reads.
struct LiveCounters {
  std::atomic<std::uint64_t> socket_bytes_sent{0};
  std::atomic<std::uint64_t> socket_bytes_received{0};
  std::atomic<std::uint64_t> resent_frames{0};
  std::atomic<std::uint64_t> reconnects{0};
  std::atomic<std::uint64_t> rejected_frames{0};
  std::atomic<std::uint64_t> duplicate_frames{0};
  std::atomic<std::uint64_t> rejected_connections{0};
  // A carrier that counts by itself knows more than the sizes of frames: its numbers take the place
  // of socket_bytes.
  std::atomic<std::uint64_t> carried_sent{0};
  std::atomic<std::uint64_t> carried_received{0};
  std::atomic<bool> carrier_counts{false};

  [[nodiscard]] ChannelCounters read() const noexcept;
};

/// Where the I/O thread and the callers of one channel meet: messages that arrived, and what is
/// known of the peers. Thread-safe.
class Inbox {
 public:
  Inbox(int rank, int world_size, std::size_t limit_bytes);

  // For the I/O thread.

  /// True if the peer's messages exceed the limit now.
  bool deliver(int peer, Bytes message);
  void set_state(int peer, PeerState state, Deadline now);
  void heard(int peer, Deadline now);
  /// The rank is lost, and to blame if it is the first. False if another was known already.
  bool lose(int rank, const std::string& reason);
  void set_closed();
  /// What keeps this rank from all others, beside their connections; empty: nothing.
  void set_trouble(std::string trouble);

  // For callers.

  struct Taken {
    int peer;
    Bytes message;
    bool has_room_again =
        false;  ///< Above the limit before, well below it now: the peer may go on.
  };
  Taken receive(int peer, Deadline deadline);
  std::optional<Taken> try_receive(int peer);
  /// As Channel::receive_any.
  std::optional<Taken> receive_any(Deadline deadline);
  void wake();
  /// Throws PeerLost (of the first rank that was) or PeerLeft if nothing can be sent to the peer.
  void check_can_send(int peer) const;
  [[nodiscard]] std::optional<PeerLost> lost() const;
  /// As Channel::trouble.
  [[nodiscard]] std::string trouble(int peer) const;
  /// As Channel::suspect, of peers that were to answer a question put at `asked`.
  [[nodiscard]] std::optional<PeerError> suspect(Deadline asked, Deadline until);
  /// As Channel::await_answers, to a question put at `asked`.
  void await_answers(Deadline asked, Deadline until);
  /// Until set_closed, or false at the deadline.
  bool wait_closed(Deadline deadline);

  LiveCounters counters;

 private:
  struct Box {
    std::deque<Bytes> messages;
    std::size_t bytes = 0;
    bool over_limit = false;
    bool leave_told = false;  // receive_any() has thrown PeerLeft of it
    PeerState state = PeerState::connecting;
    Deadline state_since{};
    Deadline last_heard = Deadline::min();
  };

  /// Connected, and nothing was heard of it since.
  [[nodiscard]] static bool silent(const Box& peer, Deadline since);
  Taken take(int peer);
  std::optional<Taken> take_any();
  void throw_if_in_vain(int peer) const;
  [[nodiscard]] PeerLeft left(int peer) const;
  [[nodiscard]] PeerTimeout timeout(int peer, Deadline began) const;
  [[nodiscard]] std::string how_broken(int peer) const;
  [[nodiscard]] const Box& box(int peer) const { return boxes_[static_cast<std::size_t>(peer)]; }
  [[nodiscard]] Box& box(int peer) { return boxes_[static_cast<std::size_t>(peer)]; }

  const int rank_;
  const std::size_t limit_bytes_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Box> boxes_;
  std::optional<PeerLost> first_lost_;
  std::string trouble_;
  int next_ = 0;  // the peer at which receive_any() looks first
  bool woken_ = false;
  int listening_ = 0;  // threads that want to know of every frame
  bool closed_ = false;
};

}  // namespace distro::transport
