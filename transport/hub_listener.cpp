#include "transport/hub_listener.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "transport/bind.h"
#include "transport/frame.h"
#include "transport/little_endian.h"
#include "transport/log.h"

namespace distro::transport {
namespace {

// Messages taken from the relay before a higher rank's frame goes to the sessions. Fewer: more
// rounds of the I/O thread; more: other channels wait.
constexpr int kBatch = 64;

// When a JOIN without an answer is said again. Shorter: a relay that has just come back is flooded;
// longer: a JOIN that a restart swallowed costs that much.
constexpr std::chrono::milliseconds kJoinAgain{1'000};
// The same after a refusal, which may end: the rank's earlier connection is noticed to be dead, or
// the relay gets this run's keys.
constexpr std::chrono::milliseconds kJoinAfterRefusal{5'000};

// Where a frame's check lies (frame.h): equal frames have equal checks.
constexpr std::size_t kCheckOffset = 32;

// Numbered frames go by their numbers, whatever the order in which the peers' sessions gave them:
// one that several share keeps its place among those of each. The others go first.
constexpr std::uint64_t kUnnumbered = 0;

std::uint64_t order_of(const zmq::message_t& frame) {
  const auto header = parse_header({frame.data<std::byte>(), frame.size()});
  return is_numbered(header.kind) ? header.sequence + 1 : kUnnumbered;
}

bool same_bytes(const zmq::message_t& a, const zmq::message_t& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
}

std::span<const std::byte> bytes_of(const zmq::message_t& message) {
  return {message.data<std::byte>(), message.size()};
}

}  // namespace

HubListener::HubListener(zmq::context_t& context, const ChannelConfig& config, Pacer& pacer)
    : RowListener(config.rank, config.world_size),
      config_(config),
      context_(context),
      pacer_(pacer),
      away_since_(Clock::now()) {
  for (int rank = 0; rank < config.world_size; ++rank) {
    ranks_.emplace(member(rank), rank);
  }
}

HubListener::~HubListener() {
  if (dialer_ && joined_) {
    auto leave = make_leave();
    dialer_->send(leave);
  }
}

std::uint16_t HubListener::member(int rank) const {
  return static_cast<std::uint16_t>(config_.members.empty()
                                        ? static_cast<std::uint32_t>(rank)
                                        : config_.members[static_cast<std::size_t>(rank)]);
}

int HubListener::rank_of_member(std::uint32_t member) const {
  const auto found = ranks_.find(member);
  return found == ranks_.end() || found->second == config_.rank ? -1 : found->second;
}

void HubListener::connect(const std::vector<PeerAddress>& /*addresses*/) {
  away_since_ = Clock::now();
  dialer_.emplace(context_, config_, Dialer::kRelay, config_.relay);
}

void HubListener::append_poll_items(std::vector<zmq::pollitem_t>& items, bool /*watch_space*/) {
  if (dialer_) {
    const bool paced = pacer_.ready_at(config_.priority, Clock::now()) > Clock::now();
    dialer_->append_poll_items(items, !outgoing_.empty() && !paced);
  }
}

std::optional<int> HubListener::authenticated(const std::string& route,
                                              const zmq::message_t& /*body*/) const {
  return peer_of(route);
}

void HubListener::all_down() {
  for (int peer = 0; peer < config_.world_size; ++peer) {
    went_down(peer);
  }
  outgoing_.clear();
  by_check_.clear();
  numbered_ = 0;
  sent_ = 0;
}

bool HubListener::take(zmq::message_t& message, std::string& from, zmq::message_t& body) {
  carried_.bytes_received += message.size();
  const auto parsed = parse_relay_message(bytes_of(message));
  if (!parsed.message) {
    log_once(LogLevel::warning, "relay message/" + config_.relay,
             fmt::format("[distro rank {}] the relay {} sent {} (logged once)", config_.rank,
                         config_.relay, parsed.error));
    return false;
  }
  const RelayMessage& what = *parsed.message;
  const auto now = Clock::now();
  switch (what.kind) {
    case RelayKind::joined:
      if (joined_) {
        return false;  // the answer to a repeated JOIN
      }
      joined_ = true;
      refusal_.clear();
      join_at_ = Deadline::max();
      log(LogLevel::info,
          fmt::format("[distro rank {}] joined the relay {}", config_.rank, config_.relay));
      return false;
    case RelayKind::present:
    case RelayKind::absent:
      if (const int rank = rank_of_member(what.member); rank >= 0 && joined_) {
        what.kind == RelayKind::present ? went_up(rank) : went_down(rank);
      }
      return false;
    case RelayKind::refused:
      refusal_.assign(reinterpret_cast<const char*>(what.rest.data()), what.rest.size());
      std::ranges::replace_if(
          refusal_, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; }, '?');
      joined_ = false;
      join_at_ = now + kJoinAfterRefusal;
      log_once(LogLevel::warning, fmt::format("refused/{}/{}", config_.relay, refusal_),
               fmt::format("[distro rank {}] the relay {} refused this rank: {}", config_.rank,
                           config_.relay, refusal_));
      return false;
    case RelayKind::deliver: {
      const int rank = rank_of_member(what.member);
      // Of one that is not up, its session sends it again.
      return rank >= 0 && is_up(rank) && sort(rank, what.rest, from, body);
    }
    default:
      return false;  // a ping, or what ranks say
  }
}

bool HubListener::receive(std::string& from, zmq::message_t& body) {
  zmq::message_t message;
  for (int count = 0; dialer_ && count < kBatch; ++count) {
    if (!dialer_->receive(message)) {
      return false;
    }
    if (take(message, from, body)) {
      return true;
    }
  }
  return false;
}

SendResult HubListener::give(int peer, zmq::message_t& body) {
  if (!accepting_) {
    return SendResult::blocked;
  }
  // Its sessions made it, so that it has a header.
  const auto check = load_le<std::uint64_t>(body.data<std::byte>() + kCheckOffset);
  const auto [begin, end] = by_check_.equal_range(check);
  for (auto entry = begin; entry != end; ++entry) {
    Outgoing& other = outgoing_[entry->second];
    if (same_bytes(other.frame, body)) {
      if (std::ranges::find(other.members, member(peer)) == other.members.end()) {
        other.members.push_back(member(peer));
      }
      return SendResult::sent;
    }
  }
  const std::uint64_t order = order_of(body);
  if (order != kUnnumbered && numbered_ >= static_cast<std::size_t>(config_.queue_frames)) {
    return SendResult::blocked;  // more, and acknowledgements and aborts wait behind it
  }
  numbered_ += order == kUnnumbered ? 0 : 1;
  by_check_.emplace(check, outgoing_.size());
  outgoing_.push_back({order, std::move(body), {member(peer)}});
  body.rebuild();
  return SendResult::sent;
}

bool HubListener::hand_over(zmq::message_t& message) {
  const std::size_t size = message.size();
  if (dialer_->send(message) != SendResult::sent) {
    return false;
  }
  carried_.bytes_sent += size;
  return true;
}

void HubListener::on_changes(Deadline now) {
  while (true) {
    switch (dialer_->next_change(now)) {
      case Link::Change::none:
        return;
      case Link::Change::opened:
        open_ = true;
        join_at_ = now;
        break;
      case Link::Change::broke:
        // What has arrived and was not read is sent again.
        log(LogLevel::info, fmt::format("[distro rank {}] connection to the relay {} broke",
                                        config_.rank, config_.relay));
        open_ = joined_ = false;
        join_at_ = Deadline::max();
        away_since_ = now;
        all_down();
        dialer_->drained(now);
        break;
    }
  }
}

Deadline HubListener::flush(Deadline now) {
  if (!dialer_) {
    return Deadline::max();
  }
  on_changes(now);
  dialer_->work(now);
  on_changes(now);
  if (open_ && now >= join_at_) {
    auto join = make_join(config_.group, member(config_.rank));
    hand_over(join);
    join_at_ = now + kJoinAgain;
  }
  Deadline wake = std::min(dialer_->next_timer(), join_at_);
  if (sent_ == 0) {
    std::ranges::stable_sort(outgoing_, {}, &Outgoing::order);
  }
  for (; sent_ < outgoing_.size(); ++sent_) {
    Outgoing& next = outgoing_[sent_];
    const bool everyone = next.members.size() + 1 == ranks_.size();
    std::ranges::sort(next.members);
    auto message = make_forward(everyone ? std::span<const std::uint16_t>{} : next.members,
                                bytes_of(next.frame));
    if (!pacer_.take(message.size(), config_.priority, now)) {
      wake = std::min(wake, pacer_.ready_at(config_.priority, now));
      break;
    }
    const std::size_t size = message.size();
    if (!hand_over(message)) {
      pacer_.give_back(size);
      break;
    }
  }
  if (sent_ == outgoing_.size()) {
    outgoing_.clear();
    by_check_.clear();
    numbered_ = 0;
    sent_ = 0;
  }
  accepting_ = outgoing_.empty();
  return wake;
}

std::string HubListener::trouble(int /*peer*/, Deadline now) const {
  if (joined_) {
    return "";
  }
  const double seconds = std::chrono::duration<double>(now - away_since_).count();
  if (const std::string handshake = dialer_ ? dialer_->refusal() : ""; !handshake.empty()) {
    return handshake;
  }
  return refusal_.empty()
             ? fmt::format(
                   "the relay {} has not been reached for {:.1f} s: see whether it runs, "
                   "and whether this host can reach it",
                   config_.relay, seconds)
             : fmt::format("the relay {} refused this rank: {}", config_.relay, refusal_);
}

}  // namespace distro::transport
