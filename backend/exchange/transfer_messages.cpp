#include "backend/exchange/transfer_messages.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "backend/exchange/error.h"

namespace distro::exchange {
namespace {

// Bytes of a message that travel before anybody wants them. Fewer costs a round trip for most
// messages; more fills the pool with what may wait for long.
constexpr std::size_t kEagerBytes = 2 * kTransferChunk;

// Of all messages to one peer that it does not want yet: the bytes that it keeps. Beyond it only
// their descriptions travel. Fewer: a sender that is ahead waits for a round trip a message; more:
// so much more memory for each peer.
constexpr std::size_t kPoolBytes = std::size_t{16} << 20;
constexpr std::size_t kCreditsPerPool = 4;

// Messages of a peer that nobody wants yet, at most, by count. No script that was seen comes near;
// a hostile peer fills some 50 MB.
constexpr std::size_t kMaxUnwanted = std::size_t{1} << 18;

// How long a rank that ends waits for a receiver to want what it has sent. Less breaks a script
// that does not wait for its last message; more holds up the end of one that sends to nobody.
constexpr std::chrono::seconds kDrain{10};

}  // namespace

TransferMessages::TransferMessages(transport::Channel& channel, Callbacks& callbacks, int rank,
                                   int world_size, std::size_t window_bytes)
    : channel_(channel),
      callbacks_(callbacks),
      rank_(rank),
      window_bytes_(window_bytes),
      peers_(static_cast<std::size_t>(world_size)) {
  for (Peer& peer : peers_) {
    peer.pool_limit = peer.pool_granted = kPoolBytes;
  }
}

void TransferMessages::tell(int peer, const TransferHeader& header) {
  try {
    channel_.send(peer,
                  std::make_shared<const transport::Bytes>(write_transfer(header, nullptr, {})));
  } catch (const transport::PeerLeft&) {
    // It sends nothing more.
  }
}

void TransferMessages::send(OutgoingMessage message, transport::Deadline now) {
  Peer& peer = peers_.at(static_cast<std::size_t>(message.to));
  Sending& sending = sending_.emplace_back();
  sending.message = std::move(message);
  sending.number = peer.next_out++;
  sending.moved = now;
  sending.progress.began = now;
  sending.progress.name = fmt::format("send to rank {}", sending.message.to);
  sending.progress.total = sending.message.bytes.size();
}

bool TransferMessages::send_part(Sending& sending, transport::Deadline now) {
  const auto& bytes = sending.message.bytes;
  Peer& peer = peers_[static_cast<std::size_t>(sending.message.to)];
  std::size_t size = std::min(kTransferChunk, bytes.size() - sending.sent);
  const bool wanted = sending.limit > sending.sent;
  if (wanted) {
    size = std::min(size, sending.limit - sending.sent);
  } else {
    const std::size_t early = sending.sent < kEagerBytes ? kEagerBytes - sending.sent : 0;
    size = std::min(size, early);
    if (peer.pool_sent + size > peer.pool_limit) {
      size = 0;
    }
  }
  if (sending.begun && size == 0) {
    return false;
  }
  const TransferDescription description{
      .total = bytes.size(), .operation = TransferOperation::send, .root = sending.message.tag};
  const TransferHeader header{.kind = TransferKind::message,
                              .pooled = !wanted && size > 0,
                              .stream = sending.message.stream,
                              .number = sending.number,
                              .offset = sending.sent};
  channel_.send(sending.message.to, std::make_shared<const transport::Bytes>(write_transfer(
                                        header, sending.begun ? nullptr : &description,
                                        bytes.subspan(sending.sent, size))));
  if (header.pooled) {
    peer.pool_sent += size;
  }
  if (sending.progress.moved == 0) {
    sending.progress.began = now;
  }
  sending.begun = true;
  sending.sent += size;
  sending.progress.moved = sending.sent;
  sending.moved = now;
  return true;
}

bool TransferMessages::pump(transport::Deadline now) {
  bool any = false;
  for (auto sending = sending_.begin(); sending != sending_.end();) {
    std::exception_ptr error;
    try {
      if (const auto& left = peers_[static_cast<std::size_t>(sending->message.to)].left) {
        throw *left;
      }
      any = send_part(*sending, now) || any;
    } catch (const transport::PeerLeft&) {
      error = std::current_exception();
    }
    if (error || (sending->begun && sending->sent == sending->message.bytes.size())) {
      callbacks_.run([done = std::move(sending->message.done), error] { done(error); });
      sending = sending_.erase(sending);
    } else {
      ++sending;
    }
  }
  return any;
}

void TransferMessages::want(WantedMessage message, transport::Deadline now) {
  const auto wanted = std::make_shared<Wanted>();
  wanted->message = std::move(message);
  wanted->moved = now;
  wanted->progress.began = now;
  wanted->progress.name = wanted->message.from
                              ? fmt::format("receive from rank {}", *wanted->message.from)
                              : std::string("receive from any rank");
  wanted->progress.total = wanted->message.into.size();
  wanted_.push_back(wanted);
  const int ranks = static_cast<int>(peers_.size());
  for (int i = 0; i < ranks; ++i) {
    const int from = wanted->message.from.value_or((next_any_ + i) % ranks);
    auto& coming = peers_.at(static_cast<std::size_t>(from)).coming;
    const auto found = std::ranges::find_if(coming, [&](const auto& entry) {
      const Coming& it = entry.second;
      return !it.wanted && !it.dropped && it.stream == wanted->message.stream &&
             it.tag == wanted->message.tag;
    });
    if (found != coming.end()) {
      if (!wanted->message.from) {
        next_any_ = (from + 1) % ranks;
      }
      --peers_[static_cast<std::size_t>(from)].unwanted;
      return accept(from, found->first, found->second, wanted);
    }
    if (wanted->message.from) {
      break;
    }
  }
}

// Somebody wants the message: what is there of it is handed over, and the rest asked for.
void TransferMessages::accept(int peer, std::uint64_t number, Coming& coming,
                              std::shared_ptr<Wanted> wanted) {
  if (coming.total != wanted->message.into.size()) {
    throw ExchangeError(fmt::format(
        "rank {} sends {} bytes to rank {} (tag {}), which is to receive {}: sender and receiver "
        "need tensors of the same size",
        peer, coming.total, rank_, static_cast<std::int32_t>(coming.tag),
        wanted->message.into.size()));
  }
  wanted->from = peer;
  coming.wanted = std::move(wanted);
  if (!coming.early.empty()) {
    std::memcpy(coming.wanted->message.into.data(), coming.early.data(), coming.early.size());
    coming.wanted->arrived = coming.wanted->progress.moved = coming.early.size();
    coming.early = {};
  }
  free_pool(peer, std::exchange(coming.pooled, 0));
  grant(peer, number, coming);
  finish_if_whole(peer, number);
}

void TransferMessages::grant(int peer, std::uint64_t number, Coming& coming) {
  const std::size_t limit = std::min(coming.total, coming.arrived + window_bytes_);
  // At half a window, so that the sender has the other half to go on with.
  if (limit <= coming.granted ||
      (coming.granted > 0 && limit < coming.total && limit - coming.granted < window_bytes_ / 2) ||
      coming.arrived == coming.total) {
    return;
  }
  coming.granted = limit;
  tell(peer, {.kind = TransferKind::message_credit, .number = number, .offset = limit});
}

void TransferMessages::free_pool(int peer, std::size_t bytes) {
  Peer& of = peers_[static_cast<std::size_t>(peer)];
  of.pool_used += bytes;
  const std::uint64_t limit = of.pool_used + kPoolBytes;
  if (limit - of.pool_granted >= kPoolBytes / kCreditsPerPool) {
    of.pool_granted = limit;
    tell(peer, {.kind = TransferKind::pool_credit, .offset = limit});
  }
}

void TransferMessages::take(int peer, const OpenedTransfer& opened, transport::Deadline now) {
  Peer& of = peers_[static_cast<std::size_t>(peer)];
  const TransferHeader& header = opened.header;
  if (header.kind == TransferKind::pool_credit) {
    of.pool_limit = std::max(of.pool_limit, header.offset);
    return;
  }
  if (header.kind == TransferKind::message_credit) {
    const auto found = std::ranges::find_if(sending_, [&](const Sending& sending) {
      return sending.message.to == peer && sending.number == header.number;
    });
    if (found != sending_.end()) {  // else all of it is under way already
      found->limit = std::max<std::size_t>(
          found->limit, std::min<std::uint64_t>(header.offset, found->message.bytes.size()));
    }
    return;
  }
  if (opened.description) {
    if (header.number != of.next_in) {
      throw Misbehaviour(peer, fmt::format("rank {}: rank {} sent message {} where {} is the next",
                                           rank_, peer, header.number, of.next_in));
    }
    ++of.next_in;
    Coming& coming = of.coming[header.number];
    coming.stream = header.stream;
    coming.tag = opened.description->root;
    coming.total = opened.description->total;
    const auto wanted = std::ranges::find_if(wanted_, [&](const auto& entry) {
      const WantedMessage& it = entry->message;
      return entry->from < 0 && it.from.value_or(peer) == peer && it.stream == coming.stream &&
             it.tag == coming.tag;
    });
    if (wanted != wanted_.end()) {
      arrive(peer, header, opened.payload, now);
      return accept(peer, header.number, coming, *wanted);
    }
    if (++of.unwanted > kMaxUnwanted) {
      throw Misbehaviour(peer, fmt::format("rank {}: rank {} has sent {} messages that nobody "
                                           "receives: more are not kept",
                                           rank_, peer, of.unwanted));
    }
  }
  arrive(peer, header, opened.payload, now);
  if (const auto found = of.coming.find(header.number);
      found != of.coming.end() && (found->second.wanted || found->second.dropped)) {
    grant(peer, header.number, found->second);
    finish_if_whole(peer, header.number);
  }
}

void TransferMessages::arrive(int peer, const TransferHeader& header,
                              std::span<const std::byte> payload, transport::Deadline now) {
  Peer& of = peers_[static_cast<std::size_t>(peer)];
  const auto found = of.coming.find(header.number);
  if (found == of.coming.end() || found->second.arrived != header.offset) {
    throw Misbehaviour(peer,
                       fmt::format("rank {}: rank {} sent byte {} of message {}, which is not "
                                   "its turn",
                                   rank_, peer, header.offset, header.number));
  }
  const bool pooled = header.pooled;
  Coming& coming = found->second;
  of.pool_arrived += pooled ? payload.size() : 0;
  if (payload.size() > coming.total - coming.arrived || of.pool_arrived > of.pool_granted ||
      (!pooled && coming.arrived + payload.size() > coming.granted)) {
    throw Misbehaviour(peer, fmt::format("rank {}: rank {} sent more of message {} than it may",
                                         rank_, peer, header.number));
  }
  if (coming.wanted) {
    Wanted& wanted = *coming.wanted;
    if (!payload.empty()) {
      std::memcpy(wanted.message.into.data() + coming.arrived, payload.data(), payload.size());
    }
    if (wanted.progress.moved == 0) {
      wanted.progress.began = now;
    }
    wanted.moved = now;
    wanted.arrived = wanted.progress.moved = coming.arrived + payload.size();
  } else if (!coming.dropped) {
    coming.early.insert(coming.early.end(), payload.begin(), payload.end());
  }
  coming.arrived += payload.size();
  if (pooled && (coming.wanted || coming.dropped)) {
    free_pool(peer, payload.size());
  } else if (pooled) {
    coming.pooled += payload.size();
  }
}

void TransferMessages::finish_if_whole(int peer, std::uint64_t number) {
  auto& all = peers_[static_cast<std::size_t>(peer)].coming;
  const auto found = all.find(number);
  if (found->second.arrived < found->second.total) {
    return;
  }
  if (const auto wanted = found->second.wanted) {
    callbacks_.run([done = std::move(wanted->message.done), peer] { done(peer, nullptr); });
    wanted_.remove(wanted);
  }
  all.erase(found);
}

// The operation fails; what comes of its message is thrown away.
void TransferMessages::give_up(const std::shared_ptr<Wanted>& wanted,
                               const std::exception_ptr& error) {
  if (wanted->from >= 0) {
    for (auto& [number, coming] : peers_[static_cast<std::size_t>(wanted->from)].coming) {
      if (coming.wanted == wanted) {
        coming.wanted.reset();
        coming.dropped = true;
      }
    }
  }
  callbacks_.run(
      [done = std::move(wanted->message.done), from = wanted->from, error] { done(from, error); });
}

transport::Deadline TransferMessages::drain(transport::Deadline since, transport::Deadline now,
                                            const std::exception_ptr& error) {
  transport::Deadline next = transport::Deadline::max();
  std::erase_if(wanted_, [&](const auto& wanted) {
    const bool in_vain = wanted->from < 0;
    if (in_vain) {
      give_up(wanted, error);
    }
    return in_vain;
  });
  std::erase_if(sending_, [&](Sending& sending) {
    const auto last = std::max(since, sending.moved) + kDrain;
    const bool in_vain = now >= last;
    if (in_vain) {
      callbacks_.run([done = std::move(sending.message.done), error] { done(error); });
    } else {
      next = std::min(next, last);
    }
    return in_vain;
  });
  return next;
}

void TransferMessages::leave(const transport::PeerLeft& peer) {
  peers_[static_cast<std::size_t>(peer.rank())].left.emplace(peer);
}

transport::Deadline TransferMessages::check(transport::Deadline now) {
  transport::Deadline next = transport::Deadline::max();
  std::erase_if(wanted_, [&](const auto& wanted) {
    const WantedMessage& message = wanted->message;
    const auto from = wanted->from >= 0 ? std::optional(wanted->from) : message.from;
    const auto& left = from ? peers_[static_cast<std::size_t>(*from)].left : std::nullopt;
    if (left) {
      give_up(wanted, std::make_exception_ptr(*left));
      return true;
    }
    if (!from && peers_.size() > 1) {
      // Of any rank: in vain once all others have left.
      const transport::PeerLeft* last = nullptr;
      bool all = true;
      for (int peer = 0; peer < static_cast<int>(peers_.size()); ++peer) {
        const auto& gone = peers_[static_cast<std::size_t>(peer)].left;
        all = all && (peer == rank_ || gone.has_value());
        last = gone ? &*gone : last;
      }
      if (all && last != nullptr) {
        give_up(wanted, std::make_exception_ptr(*last));
        return true;
      }
    }
    if (now - wanted->moved < message.timeout) {
      next = std::min(next, wanted->moved + message.timeout);
      return false;
    }
    const std::chrono::duration<double> waited = now - wanted->moved;
    const std::string who = from ? fmt::format("rank {} is late", *from) : "no rank has sent it";
    give_up(wanted,
            std::make_exception_ptr(transport::PeerTimeout(
                from.value_or(rank_),
                fmt::format("rank {}: Timed out waiting {:.0f} ms for a message with tag {}: {} "
                            "({} of {} bytes have come)",
                            rank_, 1e3 * waited.count(), static_cast<std::int32_t>(message.tag),
                            who, wanted->arrived, message.into.size()))));
    return true;
  });
  for (const Sending& sending : sending_) {
    if (now - sending.moved >= sending.message.timeout) {
      const std::chrono::duration<double> waited = now - sending.moved;
      throw transport::PeerTimeout(
          sending.message.to,
          fmt::format("rank {}: rank {} is late: for {:.1f} s (the time-out) it has not received a "
                      "message of {} bytes with tag {}, of which {} were sent",
                      rank_, sending.message.to, waited.count(), sending.message.bytes.size(),
                      static_cast<std::int32_t>(sending.message.tag), sending.sent));
    }
    next = std::min(next, sending.moved + sending.message.timeout);
  }
  return next;
}

void TransferMessages::fail(const std::exception_ptr& error) {
  for (auto& sending : sending_) {
    callbacks_.run([done = std::move(sending.message.done), error] { done(error); });
  }
  for (const auto& wanted : wanted_) {
    callbacks_.run([done = std::move(wanted->message.done), from = wanted->from, error] {
      done(from, error);
    });
  }
  sending_.clear();
  wanted_.clear();
  for (Peer& peer : peers_) {
    peer.coming.clear();
  }
}

const TransferProgress* TransferMessages::moving() const {
  for (const auto& sending : sending_) {
    if (sending.sent > 0) {
      return &sending.progress;
    }
  }
  for (const auto& wanted : wanted_) {
    if (wanted->arrived > 0) {
      return &wanted->progress;
    }
  }
  return nullptr;
}

}  // namespace distro::exchange
