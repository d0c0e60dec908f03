#include "transport/zmq_channel.h"

#include <fmt/format.h>
#include <sodium.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <string>
#include <utility>

#include "transport/bind.h"
#include "transport/host.h"
#include "transport/log.h"

namespace distro::transport {
namespace {

// A message on its way to one peer. It is counted until the last of its chunks is acknowledged, or
// given up, and its memory let go.
class Counted {
 public:
  Counted(SharedBytes message, std::shared_ptr<std::atomic<std::size_t>> outstanding)
      : message_(std::move(message)), outstanding_(std::move(outstanding)) {}
  ~Counted() { outstanding_->fetch_sub(message_->size(), std::memory_order_relaxed); }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;
  [[nodiscard]] const Bytes* bytes() const noexcept { return message_.get(); }

 private:
  SharedBytes message_;
  std::shared_ptr<std::atomic<std::size_t>> outstanding_;
};

// Beyond its deadline, how long close() waits for the I/O thread to do it. Only a thread that hangs
// needs it.
constexpr auto kCloseGrace = std::chrono::seconds(5);

}  // namespace

ZmqChannel::ZmqChannel(const ChannelConfig& config)
    : owner_(::getpid()), parts_(std::make_unique<Parts>(config)) {
  if (::sodium_init() < 0) {
    throw ConfigError("libsodium cannot be initialised: no source of random numbers");
  }
  Parts& parts = *parts_;
  const ProcessId process = this_process();
  while (parts.own.session == 0) {
    ::randombytes_buf(&parts.own.session, sizeof parts.own.session);
  }
  for (int rank = 0; rank < config.world_size; ++rank) {
    if (rank != config.rank && !is_neighbour(config, rank)) {
      parts.inbox.set_state(rank, PeerState::beyond, Clock::now());
    }
  }
  parts.own.protocol = kProtocolVersion;
  parts.own.host = host_identity();
  parts.own.pid = process.pid;
  parts.own.pid_start = process.start;
  parts.service = IoService::acquire();
  parts.service->run([&parts] {
    parts.mesh = std::make_unique<Mesh>(*parts.service, parts.config, parts.own, parts.inbox);
    parts.own.endpoint = parts.mesh->endpoint();
    parts.service->add(*parts.mesh);
  });
}

ZmqChannel::~ZmqChannel() {
  if (foreign()) {
    (void)parts_.release();
    return;
  }
  shut(Clock::now(), false);
}

bool ZmqChannel::foreign() const noexcept { return ::getpid() != owner_; }

void ZmqChannel::check_use(const char* what) const {
  const int rank = parts_->config.rank;
  if (closed_) {
    throw ClosedError(
        fmt::format("rank {}: {} on a process group that has been destroyed", rank, what));
  }
  if (foreign()) {
    throw ClosedError(
        fmt::format("rank {}: {} in a forked process: only the process that made the process group "
                    "can use it",
                    rank, what));
  }
}

void ZmqChannel::check_peer(const char* what, int peer) const {
  check_use(what);
  const ChannelConfig& config = parts_->config;
  if (peer < 0 || peer >= config.world_size || !is_neighbour(config, peer)) {
    throw ConfigError(fmt::format("rank {}: {} with rank {}, which is no peer in a group of {}",
                                  config.rank, what, peer, config.world_size));
  }
  if (!connected_) {
    throw ConfigError(fmt::format("rank {}: {} before connect", config.rank, what));
  }
}

void ZmqChannel::connect(std::vector<PeerAddress> peers) {
  check_use("connect");
  const ChannelConfig& config = parts_->config;
  if (peers.size() != static_cast<std::size_t>(config.world_size)) {
    throw ConfigError(fmt::format("rank {}: connect with {} addresses in a group of {}",
                                  config.rank, peers.size(), config.world_size));
  }
  for (int rank = 0; rank < config.world_size; ++rank) {
    PeerAddress& peer = peers[static_cast<std::size_t>(rank)];
    if (config.keys && !config.keys->endpoint_by_rank.empty()) {
      const auto& given = config.keys->endpoint_by_rank[static_cast<std::size_t>(rank)];
      peer.endpoint = endpoint_to_dial(given, peer.endpoint);
    }
    if (rank != config.rank && peer.protocol != kProtocolVersion) {
      throw ProtocolError(fmt::format(
          "rank {} speaks version {} of the session protocol, rank {} version {}: install the "
          "same torch-distro on all ranks",
          rank, peer.protocol, config.rank, kProtocolVersion));
    }
    if (rank < config.rank && is_neighbour(config, rank) && config.carrier != Carrier::plugin &&
        (config.relay.empty() || is_near(config, rank))) {
      check_endpoint(config, rank, peer.endpoint);
    }
  }
  if (connected_.exchange(true)) {
    throw ConfigError(fmt::format("rank {}: connect was called twice", config.rank));
  }
  parts_->service->run([this, &peers] { parts_->mesh->connect(std::move(peers)); });
}

void ZmqChannel::check_send(int peer, const SharedBytes& message) const {
  check_peer("send", peer);
  if (message == nullptr || message->size() > parts_->config.max_message_bytes) {
    throw ConfigError(fmt::format(
        "rank {}: send of {} bytes to rank {}, at most {} are allowed (max_message_bytes)",
        parts_->config.rank, message == nullptr ? 0 : message->size(), peer,
        parts_->config.max_message_bytes));
  }
  parts_->inbox.check_can_send(peer);
}

void ZmqChannel::send(int peer, SharedBytes message) {
  check_send(peer, message);
  parts_->service->post([mesh = parts_->mesh.get(), peer,
                         message = count(peer, std::move(message))] { mesh->send(peer, message); });
}

std::vector<int> ZmqChannel::multicast(std::span<const int> peers, const SharedBytes& message) {
  std::vector<Mesh::Letter> letters;
  std::vector<int> left;
  std::exception_ptr error;
  for (const int peer : peers) {
    try {
      check_send(peer, message);
      letters.push_back({peer, count(peer, message)});
    } catch (const PeerLeft&) {
      left.push_back(peer);
    } catch (...) {
      error = error ? error : std::current_exception();
    }
  }
  parts_->service->post(
      [mesh = parts_->mesh.get(), letters = std::move(letters)] { mesh->multicast(letters); });
  if (error) {
    std::rethrow_exception(error);
  }
  return left;
}

SharedBytes ZmqChannel::count(int peer, SharedBytes message) {
  const auto& outstanding = parts_->outstanding[static_cast<std::size_t>(peer)];
  const std::size_t size = message->size();
  const std::size_t before = outstanding->fetch_add(size, std::memory_order_relaxed);
  const auto counted = std::make_shared<const Counted>(std::move(message), outstanding);
  if (before > 0 && before + size > parts_->config.outbox_bytes) {
    throw PeerBacklog(
        peer,
        fmt::format("rank {}: rank {} has not acknowledged {} bytes that were sent to it, and "
                    "{} more exceed the limit of {}: its link is much slower than its own "
                    "sending, or the ranks do not run the same steps",
                    parts_->config.rank, peer, before, size, parts_->config.outbox_bytes));
  }
  return {counted, counted->bytes()};
}

Bytes ZmqChannel::unpack(int peer, Inbox::Taken taken) {
  if (taken.has_room_again) {
    parts_->service->post([mesh = parts_->mesh.get(), peer] { mesh->resume(peer); });
  }
  return std::move(taken.message);
}

Bytes ZmqChannel::receive(int peer, Deadline deadline) {
  check_peer("receive", peer);
  return unpack(peer, parts_->inbox.receive(peer, deadline));
}

std::optional<Bytes> ZmqChannel::try_receive(int peer) {
  check_peer("receive", peer);
  auto taken = parts_->inbox.try_receive(peer);
  if (!taken) {
    return std::nullopt;
  }
  return unpack(peer, std::move(*taken));
}

std::optional<Channel::Arrival> ZmqChannel::receive_any(Deadline deadline) {
  check_use("receive");
  if (!connected_) {
    throw ConfigError(fmt::format("rank {}: receive before connect", parts_->config.rank));
  }
  auto taken = parts_->inbox.receive_any(deadline);
  if (!taken) {
    return std::nullopt;
  }
  return Arrival{taken->peer, unpack(taken->peer, std::move(*taken))};
}

void ZmqChannel::wake() {
  if (!foreign()) {
    parts_->inbox.wake();
  }
}

void ZmqChannel::abort(int culprit, std::string_view reason) {
  check_use("abort");
  Parts& parts = *parts_;
  if (culprit < 0 || culprit >= parts.config.world_size) {
    throw ConfigError(fmt::format("rank {}: abort blames rank {}, which is not in a group of {}",
                                  parts.config.rank, culprit, parts.config.world_size));
  }
  // Whoever was lost first stays to blame: an error after that is its consequence.
  parts.inbox.lose(culprit, std::string(reason));
  const PeerLost first = *parts.inbox.lost();
  parts.service->post(
      [mesh = parts.mesh.get(), first] { mesh->tell_lost(first.rank(), first.what()); });
}

void ZmqChannel::await_answers(Deadline until) noexcept {
  if (closed_ || foreign() || !connected_) {
    return;
  }
  Parts& parts = *parts_;
  const auto asked = Clock::now();
  try {
    parts.service->post([mesh = parts.mesh.get()] { mesh->ask(); });
    parts.inbox.await_answers(asked, until);
  } catch (const std::exception& error) {
    log(LogLevel::debug,
        fmt::format("[distro rank {}] await answers: {}", parts.config.rank, error.what()));
  }
}

std::optional<PeerLost> ZmqChannel::lost() const {
  return foreign() ? std::nullopt : parts_->inbox.lost();
}

std::optional<PeerError> ZmqChannel::suspect(Deadline until) const {
  if (closed_ || foreign() || !connected_) {
    return std::nullopt;
  }
  Parts& parts = *parts_;
  const auto asked = Clock::now();
  parts.service->post([mesh = parts.mesh.get()] { mesh->ask(); });
  return parts.inbox.suspect(asked, until);
}

void ZmqChannel::set_timeout(std::chrono::milliseconds timeout) {
  if (!closed_ && !foreign()) {
    parts_->service->post([mesh = parts_->mesh.get(), timeout] { mesh->set_timeout(timeout); });
  }
}

ChannelCounters ZmqChannel::counters() const { return parts_->inbox.counters.read(); }

void ZmqChannel::close(Deadline deadline) noexcept {
  try {
    if (!closed_ && !foreign()) {
      shut(deadline, true);
    }
  } catch (const std::exception& error) {
    log(LogLevel::error,
        fmt::format("[distro rank {}] close: {}", parts_->config.rank, error.what()));
  }
}

void ZmqChannel::shut(Deadline deadline, bool goodbye) {
  if (closed_.exchange(true)) {
    return;
  }
  Parts& parts = *parts_;
  parts.service->run([&] { parts.mesh->start_closing(deadline, goodbye); });
  parts.inbox.wait_closed(std::max(deadline, Clock::now()) + kCloseGrace);
  parts.service->run([&] {
    parts.service->remove(*parts.mesh);
    parts.mesh.reset();
  });
  parts.service.reset();
}

}  // namespace distro::transport
