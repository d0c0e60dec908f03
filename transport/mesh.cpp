#include "transport/mesh.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "transport/acceptor.h"
#include "transport/hub_listener.h"
#include "transport/log.h"
#include "transport/plugin_listener.h"
#include "transport/split_listener.h"

namespace distro::transport {
namespace {

using std::chrono::milliseconds;

// Batches read from the ROUTER before a vanished peer's routing id is forgotten. Fewer: its last
// frames, a goodbye for instance, are taken for a stranger's; more: a flood of strangers delays the
// peers.
constexpr int kDrainRounds = 64;

// How long aborts get at the end of a channel. Shorter: on a slow link peers blame this rank
// instead of the culprit; longer: a failed training takes that long to exit.
constexpr milliseconds kAbortTime{1'000};

// A peer that said goodbye and vanished is dialled for so long, in case it still waits for an
// acknowledgement.
constexpr milliseconds kAfterGoodbye{5'000};

std::unique_ptr<Listener> listen(IoService& service, const ChannelConfig& config) {
  if (config.carrier == Carrier::plugin) {
    return std::make_unique<PluginListener>(config);
  }
  ZapHandler* const zap = config.keys ? &service.zap() : nullptr;
  if (!config.relay.empty()) {
    auto hub = std::make_unique<HubListener>(service.context(), config, service.pacer());
    if (config.near.empty()) {
      return hub;
    }
    return std::make_unique<SplitListener>(
        config, std::make_unique<Acceptor>(service.context(), config, zap), std::move(hub));
  }
  return std::make_unique<Acceptor>(service.context(), config, zap);
}

}  // namespace

Mesh::Mesh(IoService& service, const ChannelConfig& config, const PeerAddress& own, Inbox& inbox)
    : config_(config),
      timeout_(config.timeout),
      own_(own),
      inbox_(inbox),
      pacer_(service.pacer()),
      acceptor_(listen(service, config)) {
  pacer_.set_rate(config.rate_limit_bytes, Clock::now());
}

void Mesh::connect(std::vector<PeerAddress> addresses) {
  const auto now = Clock::now();
  acceptor_->connect(addresses);
  for (int rank = 0; rank < config_.world_size; ++rank) {
    auto& peer = peers_.emplace_back();
    if (!is_neighbour(config_, rank)) {
      continue;
    }
    peer = std::make_unique<Peer>(rank, std::move(addresses[static_cast<std::size_t>(rank)]),
                                  config_, own_.session, now);
    if (rank < config_.rank) {
      peer->dialer = acceptor_->dial(rank, peer->address.endpoint);
    }
  }
  watch_at_ = now;
}

Peer* Mesh::find(std::uint32_t rank) noexcept {
  return rank < peers_.size() ? peers_[rank].get() : nullptr;
}

void Mesh::send(int peer, const SharedBytes& message) {
  Peer* to = find(static_cast<std::uint32_t>(peer));
  if (to != nullptr && !to->finished() && !closing_) {
    to->session.queue(message);
  }
}

void Mesh::multicast(std::span<const Letter> letters) {
  // The same numbers for all make the same frames, which a hub uploads once. They part where one
  // peer alone was sent something.
  std::uint64_t number = 0;
  const auto open = [this](const Letter& letter) {
    Peer* to = find(static_cast<std::uint32_t>(letter.peer));
    return to == nullptr || to->finished() || closing_ ? nullptr : to;
  };
  for (const Letter& letter : letters) {
    if (const Peer* to = open(letter)) {
      number = std::max(number, to->session.next_number());
    }
  }
  for (const Letter& letter : letters) {
    if (Peer* to = open(letter)) {
      if (!config_.relay.empty()) {
        to->session.skip_to(number);
      }
      to->session.queue(letter.message);
    }
  }
}

void Mesh::resume(int peer) {
  if (Peer* from = find(static_cast<std::uint32_t>(peer))) {
    from->session.hold_peer(false, Clock::now());
  }
}

void Mesh::ask() {
  const auto now = Clock::now();
  for (const auto& peer : peers_) {
    if (peer != nullptr && !peer->finished()) {
      peer->session.ask(now);
    }
  }
}

void Mesh::owe_abort(Peer& peer, int culprit, std::string_view reason) {
  if (!peer.finished()) {
    peer.owed_abort = encode_abort(static_cast<std::uint32_t>(culprit), reason);
  }
}

void Mesh::tell_lost(int culprit, std::string_view reason) {
  for (const auto& peer : peers_) {
    if (peer != nullptr) {
      owe_abort(*peer, culprit, reason);
    }
  }
}

void Mesh::append_poll_items(std::vector<zmq::pollitem_t>& items) {
  if (done_) {
    return;
  }
  if (peers_.empty()) {
    acceptor_->append_early_items(items);
    return;
  }
  const std::size_t begin = items.size();
  const bool route_blocked = std::any_of(peers_.begin(), peers_.end(), [](const auto& peer) {
    return peer != nullptr && peer->dialer == nullptr && peer->blocked();
  });
  acceptor_->append_poll_items(items, route_blocked);
  for (const auto& peer : peers_) {
    if (peer != nullptr && peer->dialer != nullptr) {
      peer->poll_index = items.size() - begin;
      peer->dialer->append_poll_items(items, peer->blocked());
    }
  }
}

Deadline Mesh::work(Deadline now, std::span<const zmq::pollitem_t> items) {
  if (done_) {
    return Deadline::max();
  }
  if (!items.empty()) {
    // Frames before events: what a peer sent before its connection broke counts.
    if (peers_.empty()) {
      acceptor_->sort_early();
    } else {
      receive_from_acceptor(now);
    }
    if (acceptor_->take_disconnects()) {
      probes_.begin(now);
    }
  }
  for (const auto& peer : peers_) {
    if (peer == nullptr || peer->dialer == nullptr) {
      continue;
    }
    const bool told = peer->poll_index != 0 && peer->poll_index < items.size() &&
                      items[peer->poll_index].revents != 0;
    if (told || peer->dialer->pending()) {
      receive_from_dialer(*peer, now);
    }
    if (peer->dialer != nullptr) {
      on_dialer_changes(*peer, now);
    }
    if (peer->dialer != nullptr) {
      peer->dialer->work(now);
      on_dialer_changes(*peer, now);
    }
    if (peer->dialer != nullptr) {
      count_rejected(peer->dialer->take_rejected());
    }
  }
  while (const auto lost = acceptor_->take_lost()) {
    if (Peer* peer = find(static_cast<std::uint32_t>(lost->peer))) {
      lose(*peer, lost->reason, true);
    }
  }
  probe(now);
  watch(now);
  count_carried();
  count_rejected(acceptor_->take_rejected());
  Deadline wake = std::min(watch_at_, probes_.next());
  acceptor_->flush(now);
  bool blocked = false;
  ++first_to_send_;
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    const auto& peer = peers_[(first_to_send_ + i) % peers_.size()];
    if (peer == nullptr || peer->state == PeerState::lost) {
      continue;
    }
    const std::string route = peer->route;
    if (!peer->pump(*acceptor_, pacer_, config_, inbox_.counters, now)) {
      // Gone for sending, but what came before is still to be read.
      for (int round = 0; round < kDrainRounds && receive_from_acceptor(now); ++round) {
      }
      if (peer->up && peer->route == route) {  // else it has come back meanwhile
        down(*peer, now);
      }
    }
    blocked = blocked || (peer->blocked() && !is_near(config_, peer->rank));
    wake = std::min(wake, peer->next_timer(now));
  }
  wake = std::min(wake, acceptor_->flush(now));
  if (blocked && !config_.relay.empty() && acceptor_->flushed()) {
    wake = now;  // what was in the way of the blocked has gone
  }
  if (closing_) {
    if (close_if_done(now)) {
      return Deadline::max();
    }
    wake = std::min({wake, closing_->deadline, now + milliseconds(50)});
  }
  return wake;
}

void Mesh::up(Peer& peer, Deadline now) {
  if (peer.ever_up && !peer.up) {
    inbox_.counters.reconnects.fetch_add(1, std::memory_order_relaxed);
  }
  peer.went_up(now);
  if (!peer.finished()) {
    set_state(peer, PeerState::connected, now);
  }
  log(LogLevel::debug,
      fmt::format("[distro rank {}] connected to rank {}", config_.rank, peer.rank));
}

void Mesh::down(Peer& peer, Deadline now) {
  if (!peer.route.empty()) {
    routes_.erase(peer.route);
    peer.route.clear();
  }
  const bool was_up = peer.up;
  peer.went_down(was_up ? now : peer.quiet_since);
  if (was_up && !peer.finished()) {
    set_state(peer, PeerState::away, now);
    watch_at_ = std::min(watch_at_, now + milliseconds(100));
    log(LogLevel::info,
        fmt::format("[distro rank {}] connection to rank {} broke", config_.rank, peer.rank));
  }
}

void Mesh::set_state(Peer& peer, PeerState state, Deadline now) {
  peer.state = state;
  inbox_.set_state(peer.rank, state, now);
}

void Mesh::on_dialer_changes(Peer& peer, Deadline now) {
  while (true) {
    switch (peer.dialer->next_change(now)) {
      case Link::Change::none:
        if (peer.state == PeerState::left && !peer.up && now - peer.quiet_since > kAfterGoodbye) {
          peer.dialer.reset();
        }
        return;
      case Link::Change::opened:
        peer.owes_greeting = true;
        break;
      case Link::Change::broke:
        while (peer.dialer != nullptr && receive_from_dialer(peer, now)) {
        }
        if (peer.dialer == nullptr) {
          return;
        }
        peer.dialer->drained(now);
        down(peer, now);
        break;
    }
  }
}

void Mesh::probe(Deadline now) {
  if (!probes_.take(now)) {
    return;
  }
  for (const auto& peer : peers_) {
    if (peer != nullptr && peer->dialer == nullptr && peer->up) {
      peer->session.request_ack(now);
    }
  }
}

void Mesh::start_closing(Deadline deadline, bool goodbye) {
  const auto now = Clock::now();
  const auto lost = inbox_.lost();
  if (lost) {
    // Receives fail on all ranks, so nobody waits for what is still under way; and a rank that
    // others have given up gets no acknowledgement.
    deadline = std::min(deadline, now + kAbortTime);
    goodbye = goodbye && lost->rank() != config_.rank;
  }
  if (!goodbye) {
    deadline = now + kAbortTime;
    tell_lost(
        lost ? lost->rank() : config_.rank,
        lost ? lost->what()
             : fmt::format(
                   "rank {} closed its channel without a goodbye (it failed; see its own output)",
                   config_.rank));
  } else {
    for (const auto& peer : peers_) {
      if (peer != nullptr && !peer->finished()) {
        peer->session.queue_goodbye();
      }
    }
  }
  closing_ = Closing{now, deadline, goodbye};
}

bool Mesh::settled(const Peer& peer, Deadline now) const {
  if (peer.state == PeerState::lost) {
    return true;
  }
  // inproc does not say that a peer has gone: its full queue is the only sign.
  const bool vanished = config_.carrier == Carrier::inproc && peer.blocked() &&
                        (peer.state == PeerState::left || !closing_->goodbye);
  if (peer.must_flush() && !vanished && now - closing_->began < kAbortTime) {
    return false;
  }
  const auto lost = inbox_.lost();
  const bool is_culprit = lost && lost->rank() == peer.rank;
  return !closing_->goodbye || is_culprit || peer.state == PeerState::left ||
         peer.session.all_acknowledged();
}

bool Mesh::close_if_done(Deadline now) {
  bool all = acceptor_->flushed() || now - closing_->began >= kAbortTime;
  for (const auto& peer : peers_) {
    all = all && (peer == nullptr || settled(*peer, now));
  }
  if (!all && now < closing_->deadline) {
    return false;
  }
  for (const auto& peer : peers_) {
    if (closing_->goodbye && peer != nullptr && !settled(*peer, now)) {
      log(LogLevel::warning, fmt::format("[distro rank {}] closed before rank {} had acknowledged "
                                         "all that was sent to it: it may miss the "
                                         "last messages",
                                         config_.rank, peer->rank));
    }
  }
  finish();
  return true;
}

void Mesh::count_carried() {
  if (const auto carried = acceptor_->carried()) {
    inbox_.counters.carried_sent.store(carried->bytes_sent, std::memory_order_relaxed);
    inbox_.counters.carried_received.store(carried->bytes_received, std::memory_order_relaxed);
    inbox_.counters.carrier_counts.store(true, std::memory_order_release);
  }
}

void Mesh::count_rejected(std::uint64_t connections) noexcept {
  inbox_.counters.rejected_connections.fetch_add(connections, std::memory_order_relaxed);
}

void Mesh::finish() {
  count_carried();  // what the last round has sent
  done_ = true;
  routes_.clear();
  peers_.clear();
  acceptor_.reset();
  inbox_.set_closed();
}

void Mesh::fail(const std::string& reason) noexcept {
  try {
    log(LogLevel::error, fmt::format("[distro rank {}] I/O thread: {}", config_.rank, reason));
    inbox_.lose(config_.rank,
                fmt::format("rank {}: its I/O thread failed: {}", config_.rank, reason));
    finish();
  } catch (...) {
    inbox_.set_closed();
  }
}

}  // namespace distro::transport
