// How a Mesh takes frames: the half that meets untrusted bytes.

#include <fmt/format.h>

#include <utility>

#include "transport/log.h"
#include "transport/mesh.h"

namespace distro::transport {
namespace {

// Frames taken from one socket before others have their turn. Fewer: more rounds; more: one peer's
// flood delays the rest.
constexpr int kBatch = 64;

}  // namespace

void Mesh::reject(std::string_view kind, std::string_view why) {
  inbox_.counters.rejected_frames.fetch_add(1, std::memory_order_relaxed);
  log_once(LogLevel::warning, fmt::format("reject/{}/{}", config_.group, kind),
           fmt::format(
               "[distro rank {}] rejected a frame: {} (logged once; rejected_frames counts them)",
               config_.rank, why));
}

std::optional<Frame> Mesh::parse(const zmq::message_t& body) {
  inbox_.counters.socket_bytes_received.fetch_add(body.size(), std::memory_order_relaxed);
  const auto parsed = parse_frame({body.data<std::byte>(), body.size()}, config_.chunk_bytes);
  if (!parsed.frame) {
    reject(parsed.error);
  }
  return parsed.frame;
}

bool Mesh::receive_from_acceptor(Deadline now) {
  std::string route;
  zmq::message_t body;
  for (int count = 0; count < kBatch; ++count) {
    if (!acceptor_->receive(route, body)) {
      return false;
    }
    const auto frame = parse(body);
    if (!frame) {
      continue;
    }
    const auto authenticated = acceptor_->authenticated(route, body);
    if (frame->header.kind == FrameKind::hello) {
      on_hello(route, *frame, authenticated, now);
      continue;
    }
    const auto known = routes_.find(route);
    if (known == routes_.end()) {
      reject("it came over a connection without a valid HELLO");
    } else if (authenticated && *authenticated != known->second) {
      reject("it came over a connection of another rank");
    } else if (frame->header.kind == FrameKind::welcome) {
      reject("a WELCOME from a rank that dials");
    } else {
      on_frame(*peers_[static_cast<std::size_t>(known->second)], *frame, now);
    }
  }
  return true;
}

bool Mesh::receive_from_dialer(Peer& peer, Deadline now) {
  zmq::message_t body;
  for (int count = 0; count < kBatch; ++count) {
    if (peer.dialer == nullptr || !peer.dialer->receive(body)) {
      return false;
    }
    const auto frame = parse(body);
    if (!frame) {
      continue;
    }
    if (frame->header.kind == FrameKind::hello) {
      reject("a HELLO from a rank that is dialled");
    } else if (frame->header.kind == FrameKind::welcome) {
      on_welcome(peer, *frame, now);
    } else {
      on_frame(peer, *frame, now);
    }
  }
  return true;
}

std::string Mesh::greeting_error(const Frame& frame, const Peer* peer) const {
  const Greeting greeting = parse_greeting(frame.payload);
  if (greeting.min_version > kProtocolVersion || greeting.max_version < kProtocolVersion) {
    return fmt::format(
        "a greeting for versions {} to {} of the session protocol, this rank speaks {}",
        greeting.min_version, greeting.max_version, kProtocolVersion);
  }
  if (greeting.group != config_.group) {
    return "a greeting of another group";
  }
  if (peer == nullptr || static_cast<std::uint32_t>(peer->rank) != greeting.rank) {
    return fmt::format("a greeting in the name of rank {}, which cannot be on this connection",
                       greeting.rank);
  }
  if (frame.header.session != peer->address.session) {
    return fmt::format("a greeting in the name of rank {} with another session than it published",
                       greeting.rank);
  }
  if (greeting.addressee != own_.session) {
    return fmt::format("a greeting of rank {} to an earlier session of this rank", greeting.rank);
  }
  if (greeting.world_size != static_cast<std::uint32_t>(config_.world_size)) {
    return fmt::format("a greeting of rank {}, whose group has {} ranks, not {}", greeting.rank,
                       greeting.world_size, config_.world_size);
  }
  if (greeting.chunk_bytes != config_.chunk_bytes) {
    return fmt::format(
        "a greeting of rank {}, whose chunks have {} bytes, not {}: configure all ranks alike",
        greeting.rank, greeting.chunk_bytes, config_.chunk_bytes);
  }
  return peer->state == PeerState::lost
             ? fmt::format("a greeting of rank {}, which is lost", peer->rank)
             : "";
}

void Mesh::on_hello(const std::string& route, const Frame& frame, std::optional<int> authenticated,
                    Deadline now) {
  const std::uint32_t rank = parse_greeting(frame.payload).rank;
  if (authenticated && static_cast<std::uint32_t>(*authenticated) != rank) {
    reject("greeting/key",
           fmt::format("a greeting in the name of rank {} over a connection of rank {}", rank,
                       *authenticated));
    return;
  }
  Peer* peer = rank > static_cast<std::uint32_t>(config_.rank) ? find(rank) : nullptr;
  if (const std::string error = greeting_error(frame, peer); peer == nullptr || !error.empty()) {
    reject("greeting", error);
    return;
  }
  if (peer->route != route) {
    // Another routing id is another connection: the old one is dead, whether ZeroMQ has noticed or
    // not.
    if (!peer->session.connected(frame.header, now)) {
      reject(fmt::format("a greeting of rank {} that acknowledges what was never sent", rank));
      return;
    }
    if (peer->up) {
      down(*peer, now);
      peer->session.connected(frame.header, now);
    }
    peer->route = route;
    routes_[route] = peer->rank;
    acceptor_->recognise();
    up(*peer, now);
  }
  inbox_.heard(peer->rank, now);
  peer->owes_greeting = true;
}

void Mesh::on_welcome(Peer& peer, const Frame& frame, Deadline now) {
  if (const std::string error = greeting_error(frame, &peer); !error.empty()) {
    reject("greeting", error);
    return;
  }
  inbox_.heard(peer.rank, now);
  if (peer.up) {
    return;  // the answer to a repeated HELLO
  }
  if (!peer.session.connected(frame.header, now)) {
    reject(fmt::format("a greeting of rank {} that acknowledges what was never sent", peer.rank));
    return;
  }
  up(peer, now);
}

void Mesh::on_frame(Peer& peer, const Frame& frame, Deadline now) {
  if (peer.state == PeerState::lost) {
    return;
  }
  if (frame.header.session != peer.address.session) {
    reject(fmt::format("a frame of rank {} with another session than it published", peer.rank));
    return;
  }
  if (frame.header.kind == FrameKind::abort) {
    on_abort(peer, frame);
    return;
  }
  switch (peer.session.accept(frame, now)) {
    case Verdict::accepted:
      break;
    case Verdict::duplicate:
    case Verdict::gap:
      inbox_.counters.duplicate_frames.fetch_add(1, std::memory_order_relaxed);
      break;
    case Verdict::stale:
      reject(fmt::format("a number from rank {} that it cannot have sent", peer.rank));
      return;
    case Verdict::violation:
      reject(peer.session.violation());
      lose(peer,
           fmt::format("rank {} broke the session protocol: {}", peer.rank,
                       peer.session.violation()),
           true);
      return;
  }
  if (peer.up) {
    peer.quiet_since = now;
  }
  inbox_.heard(peer.rank, now);
  while (auto message = peer.session.take()) {
    if (inbox_.deliver(peer.rank, std::move(*message))) {
      peer.session.hold_peer(true, now);
    }
  }
  if (peer.session.said_goodbye() && peer.state != PeerState::left) {
    peer.session.discard_outgoing();
    set_state(peer, PeerState::left, now);
    if (peer.dialer != nullptr) {
      peer.dialer->linger_briefly();
    }
    log(LogLevel::debug,
        fmt::format("[distro rank {}] rank {} said goodbye", config_.rank, peer.rank));
  }
}

void Mesh::on_abort(Peer& peer, const Frame& frame) {
  const AbortNote note = parse_abort(frame.payload);
  if (note.culprit >= peers_.size()) {
    reject(fmt::format("an abort by rank {} that blames a rank outside the group", peer.rank));
    return;
  }
  const std::string reason = fmt::format("{} (told by rank {})", note.reason, peer.rank);
  Peer* const culprit = find(note.culprit);
  if (config_.neighbours.empty() && culprit != nullptr) {
    lose(*culprit, reason, false);
  } else if (inbox_.lose(static_cast<int>(note.culprit), reason) && !config_.neighbours.empty()) {
    // There are ranks that hear of it from here only, perhaps the culprit among them.
    tell_lost(static_cast<int>(note.culprit), note.reason);
  }
}

}  // namespace distro::transport
