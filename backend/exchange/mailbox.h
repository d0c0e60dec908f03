#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

#include "backend/exchange/counters.h"
#include "backend/exchange/envelope.h"
#include "transport/channel.h"

namespace distro::exchange {

/// What a message is about: a peer's message of this kind and number, of this module.
struct Subject {
  std::uint32_t module = 0;
  MessageKind kind = MessageKind::step;
  std::uint64_t exchange = 0;
};

/// A message with its bytes and the checked view of them.
struct Letter {
  transport::Bytes bytes;
  Opened opened;  ///< Borrows from bytes.
};

/// Sorts the messages of a group's channel by module and exchange number, so that several modules
/// of one process can exchange in any order. Thread-safe; a wait for one module does not hold up
/// another's.
class Mailbox {
 public:
  Mailbox(transport::Channel& channel, Counters& counters, int rank);

  /// The message of `peer` on `subject`; waits until the deadline. Throws transport::PeerError as
  /// Channel::receive does, and ExchangeError (naming the peer) when it sends what cannot be opened
  /// or is not due yet.
  Letter take(int peer, const Subject& subject, transport::Deadline deadline);

  /// Drop what has come and what will come for a module that this rank has let go.
  void forget(std::uint32_t module);

 private:
  using Key = std::tuple<int, std::uint32_t, MessageKind, std::uint64_t>;

  void sort(int peer, transport::Bytes bytes);

  transport::Channel& channel_;
  Counters& counters_;
  const int rank_;
  std::mutex mutex_;
  std::map<Key, Letter> letters_;          // guarded by mutex_
  std::vector<std::size_t> stored_bytes_;  // by peer, guarded by mutex_
  std::set<std::uint32_t> forgotten_;      // guarded by mutex_
};

}  // namespace distro::exchange
