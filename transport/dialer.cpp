#include "transport/dialer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <utility>

#include "transport/log.h"

namespace distro::transport {
namespace {

// ZeroMQ announces its next try at once when it means to make one; without that for so long, the
// socket is dead. Shorter: a healthy socket is thrown away on a busy machine; longer: the pair
// stays apart.
constexpr std::chrono::milliseconds kPatience{1'000};

// Pause before a broken connection is dialled anew; doubles while it keeps breaking. Shorter: a
// peer that accepts and hangs up is hammered; longer: each blip of a link costs that much.
constexpr std::chrono::milliseconds kFirstPause{200};
constexpr unsigned kMaxDoublings = 5;  // 6.4 s

constexpr int kEvents = ZMQ_EVENT_CONNECT_DELAYED | ZMQ_EVENT_CONNECT_RETRIED |
                        ZMQ_EVENT_CONNECTED | ZMQ_EVENT_HANDSHAKE_SUCCEEDED | kHandshakeFailed |
                        ZMQ_EVENT_DISCONNECTED;

}  // namespace

Dialer::Dialer(zmq::context_t& context, const ChannelConfig& config, int peer, std::string endpoint)
    : context_(context),
      config_(config),
      peer_(peer),
      endpoint_(std::move(endpoint)),
      jitter_(static_cast<std::uint32_t>(std::hash<std::string>{}(endpoint_)) +
              static_cast<std::uint32_t>(config.rank)) {
  renew(Clock::now());
  at_ = Clock::now();
}

Dialer::~Dialer() {
  const bool monitored = monitor_.has_value();
  monitor_.reset();
  // Without a connection a lingering socket would keep dialling a peer that has gone.
  if (phase_ == Phase::open || (!monitored && phase_ == Phase::dialling)) {
    close_lingering(dealer_, linger_);
  }
}

void Dialer::renew(Deadline now) {
  monitor_.reset();
  dealer_ = zmq::socket_t(context_, zmq::socket_type::dealer);
  set_socket_options(dealer_, config_, endpoint_.find('[') != std::string::npos);
  if (config_.keys) {
    secure_client(dealer_, config_.keys->own, key_of_peer());
  }
  if (config_.carrier != Carrier::inproc) {
    monitor_.emplace(context_, dealer_, kEvents);
  }
  const auto pause = kFirstPause * (1 << std::min(renewals_, kMaxDoublings));
  ++renewals_;
  at_ = now + pause +
        std::chrono::milliseconds(static_cast<std::int64_t>(jitter_()) % (pause.count() / 4));
  phase_ = Phase::waiting;
}

void Dialer::append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) {
  const auto events = static_cast<short>(ZMQ_POLLIN | (watch_space ? ZMQ_POLLOUT : 0));
  items.push_back({dealer_.handle(), 0, events, 0});
  if (monitor_) {
    items.push_back({monitor_->handle(), 0, ZMQ_POLLIN, 0});
  }
}

Dialer::Change Dialer::next_change(Deadline now) {
  if (!monitor_) {
    return phase_ == Phase::waiting || std::exchange(inproc_opened_, true) ? Change::none
                                                                           : Change::opened;
  }
  while (const auto event = monitor_->next()) {
    switch (event->kind) {
      case ZMQ_EVENT_HANDSHAKE_SUCCEEDED:
        phase_ = Phase::open;
        renewals_ = 0;
        refusal_.clear();
        at_ = Deadline::max();
        return Change::opened;
      case ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL:
      case ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL:
      case ZMQ_EVENT_HANDSHAKE_FAILED_AUTH:
        on_handshake_failed(*event);
        [[fallthrough]];
      case ZMQ_EVENT_DISCONNECTED:
        if (phase_ == Phase::open) {
          return Change::broke;
        }
        phase_ = Phase::doubtful;
        at_ = now + kPatience;
        break;
      default:  // it tries again
        if (phase_ == Phase::doubtful) {
          phase_ = Phase::dialling;
          at_ = Deadline::max();
        }
        break;
    }
  }
  return Change::none;
}

std::string Dialer::name_of_peer() const {
  return peer_ == kRelay ? "the relay" : fmt::format("rank {}", peer_);
}

const std::string& Dialer::key_of_peer() const {
  const Keys& keys = *config_.keys;
  return peer_ == kRelay ? keys.relay_public_key
                         : keys.public_by_rank[static_cast<std::size_t>(peer_)];
}

void Dialer::on_handshake_failed(const SocketMonitor::Event& event) {
  ++newly_rejected_;
  const bool broken = event.kind == ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL;
  if (broken && !config_.keys) {
    return;  // the network's affair
  }
  // Whoever has another key than the one dialled for cannot read the greeting, and hangs up.
  refusal_ = fmt::format(
      "the handshake with {} failed: {}. {}", endpoint_,
      handshake_error(event, config_.keys.has_value()),
      broken ? fmt::format("If it is {0}: its key is another than that of {0} in the peers file of "
                           "this rank, or the network broke",
                           name_of_peer())
             : fmt::format("Compare the peers files and the secret keys of rank {} and {}",
                           config_.rank, name_of_peer()));
  log_once(LogLevel::warning,
           fmt::format("handshake/{}/{}/{}", config_.group, endpoint_, event.kind),
           fmt::format("[distro rank {}] {}: {} (tried again; logged once)", config_.rank,
                       name_of_peer(), refusal_));
}

bool Dialer::receive(zmq::message_t& body) {
  body.rebuild();
  if (!dealer_.recv(body, zmq::recv_flags::dontwait)) {
    return false;
  }
  if (body.more()) {
    zmq::message_t rest;
    do {
      rest.rebuild();
    } while (dealer_.recv(rest, zmq::recv_flags::dontwait) && rest.more());
    body.rebuild();
  }
  return true;
}

SendResult Dialer::send(zmq::message_t& body) {
  return dealer_.send(body, zmq::send_flags::dontwait) ? SendResult::sent : SendResult::blocked;
}

void Dialer::drained(Deadline now) { renew(now); }

void Dialer::work(Deadline now) {
  if (now < at_) {
    return;
  }
  if (phase_ == Phase::doubtful) {
    log(LogLevel::info,
        fmt::format("[distro rank {}] ZeroMQ gave up the connection to {}: dialling anew",
                    config_.rank, endpoint_));
    renew(now);
    return;
  }
  phase_ = Phase::dialling;
  at_ = Deadline::max();
  try {
    dealer_.connect(endpoint_);
  } catch (const zmq::error_t& error) {
    // One peer's endpoint must not end the channel to all: the peer is lost after the time-out.
    log_once(
        LogLevel::warning, "dial/" + endpoint_,
        fmt::format("[distro rank {}] cannot dial {}: {}", config_.rank, endpoint_, error.what()));
    renew(now);
  }
}

}  // namespace distro::transport
