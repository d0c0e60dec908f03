#include "transport/peer.h"

#include <algorithm>
#include <utility>

namespace distro::transport {
namespace {

// Frames handed over at once for one peer. Fewer: more rounds of the I/O thread; more: other peers
// and arriving frames wait longer.
constexpr int kBatch = 64;

constexpr auto kFirstGreetWait = std::chrono::milliseconds(250);
// Longer: a HELLO lost without an event costs that much; shorter: HELLOs pile up at a rank that is
// not ready.
constexpr auto kMaxGreetWait = std::chrono::milliseconds(4'000);

}  // namespace

Peer::Peer(int rank_of_peer, PeerAddress its_address, const ChannelConfig& config,
           std::uint64_t own_session, Deadline now)
    : rank(rank_of_peer),
      address(std::move(its_address)),
      session(config, own_session, address.session),
      quiet_since(now),
      greeting_(kGreetingBytes) {}

void Peer::went_up(Deadline now) noexcept {
  up = true;
  ever_up = true;
  quiet_since = now;
  greet_at = Deadline::max();
  greet_wait = {};
}

void Peer::went_down(Deadline now) noexcept {
  up = false;
  quiet_since = now;
  session.disconnected();
  staged_.reset();
  paced_until_ = Deadline::min();
  more_to_send_ = false;
  owes_greeting = false;
  greet_at = Deadline::max();
  greet_wait = {};
}

Frame Peer::greeting_frame(const ChannelConfig& config) {
  Greeting greeting;
  greeting.rank = static_cast<std::uint32_t>(config.rank);
  greeting.world_size = static_cast<std::uint32_t>(config.world_size);
  greeting.chunk_bytes = static_cast<std::uint32_t>(config.chunk_bytes);
  greeting.group = config.group;
  greeting.addressee = address.session;
  encode_greeting(greeting, std::span(greeting_).first<kGreetingBytes>());
  return {session.header(dialer != nullptr ? FrameKind::hello : FrameKind::welcome), greeting_};
}

bool Peer::flush(const Round& round) {
  const std::size_t size = staged_->size();
  paced_until_ = Deadline::min();
  if (round.pacer != nullptr && !round.pacer->take(size, round.config.priority, round.now)) {
    paced_until_ = round.pacer->ready_at(round.config.priority, round.now);
    return true;
  }
  const SendResult result =
      dialer != nullptr ? dialer->send(*staged_) : round.acceptor.send(route, *staged_);
  if (result == SendResult::sent) {
    staged_.reset();
    round.counters.socket_bytes_sent.fetch_add(size, std::memory_order_relaxed);
  } else if (round.pacer != nullptr) {
    round.pacer->give_back(size);
  }
  return result != SendResult::gone;
}

bool Peer::transmit(const Frame& frame, const Round& round) {
  staged_.emplace(kHeaderBytes + frame.payload.size());
  encode_frame(frame, {staged_->data<std::byte>(), staged_->size()});
  return flush(round);
}

bool Peer::paced_here(const ChannelConfig& config) const noexcept {
  return config.relay.empty() && !is_near(config, rank);
}

bool Peer::pump(Listener& acceptor, Pacer& pacer, const ChannelConfig& config,
                LiveCounters& counters, Deadline now) {
  const Round round{acceptor, paced_here(config) ? &pacer : nullptr, config, counters, now};
  more_to_send_ = false;
  if (dialer == nullptr && route.empty()) {
    return true;
  }
  if (staged_ && !flush(round)) {
    return false;
  }
  if (dialer != nullptr && now >= greet_at) {
    owes_greeting = true;
  }
  if (owes_greeting && !staged_) {
    owes_greeting = false;
    if (dialer != nullptr) {
      greet_wait = greet_wait == Clock::duration::zero()
                       ? kFirstGreetWait
                       : std::min<Clock::duration>(2 * greet_wait, kMaxGreetWait);
      greet_at = now + greet_wait;
    }
    if (!transmit(greeting_frame(config), round)) {
      return false;
    }
  }
  if (!up) {
    return true;
  }
  if (owed_abort && !staged_) {
    const std::string payload = *std::exchange(owed_abort, std::nullopt);
    if (!transmit({session.header(FrameKind::abort), std::as_bytes(std::span(payload))}, round)) {
      return false;
    }
  }
  for (int count = 0; !staged_; ++count) {
    const auto frame = session.next_frame(now);
    if (!frame) {
      return true;
    }
    if (count == kBatch) {
      more_to_send_ = true;
      return true;
    }
    const bool reached = transmit(*frame, round);
    if (session.sent(*frame, now)) {  // also when staged: it goes as it is, or the session rewinds
      counters.resent_frames.fetch_add(1, std::memory_order_relaxed);
    }
    if (!reached) {
      return false;
    }
  }
  return true;
}

Deadline Peer::next_timer(Deadline now) const noexcept {
  Deadline next = dialer != nullptr ? dialer->next_timer() : Deadline::max();
  if (more_to_send_) {
    return now;
  }
  if (staged_ && paced_until_ != Deadline::min()) {
    return std::min(next, paced_until_);
  }
  if (!staged_) {  // otherwise the carrier's word that there is space comes first
    next = std::min({next, greet_at, up ? session.next_timer() : Deadline::max()});
  }
  return next;
}

}  // namespace distro::transport
