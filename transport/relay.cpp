#include "transport/relay.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "transport/bind.h"
#include "transport/log.h"

namespace distro::transport {
namespace {

using std::chrono::milliseconds;

// Messages taken at once. Fewer: more rounds; more: a broken connection is noticed later.
constexpr int kBatch = 256;

// How often a clogged member is tried again. Shorter: costs a message each; longer: a slow line
// stands idle so long.
constexpr milliseconds kRetry{20};

// Connections of ranks that have not joined yet, and of strangers. Fewer: of many ranks that come
// at once some are refused for a moment; more: strangers take more memory and descriptors.
constexpr std::size_t kSpareConnections = 256;

// Of each member: one, and its next while the death of the first is not noticed.
constexpr std::size_t kConnectionsPerRank = 2;

// How long what a member that has gone sent before is waited for while others send without a pause.
// Shorter: its goodbye is lost on a busy relay; longer: the others hear later that it has gone.
constexpr milliseconds kLastWords{1'000};

// Connections remembered after their members were removed, for what may still come over them.
// Fewer: that is logged as a stranger's.
constexpr std::size_t kMaxFormer = 4096;

// The longest wait, so that `stop` is seen.
constexpr milliseconds kLongestWait{100};

constexpr int kNoRank = -1;

ChannelConfig socket_config(const RelayConfig& config) {
  ChannelConfig result;
  result.rank = kNoRank;
  result.bind_address = config.bind_address;
  result.advertise = config.bind_address;
  result.first_port = result.last_port = config.port;
  result.keepalive = config.keepalive;
  result.queue_frames = config.queue_frames;
  result.chunk_bytes = config.chunk_bytes + kRelayAllowance;
  if (!config.runs.empty()) {
    result.keys = config.runs.front();  // the relay's own pair; who may come is the users' affair
  } else if (!config.insecure && is_open(result)) {
    throw ConfigError(
        fmt::format("the relay was refused to bind to {}: without keys, whoever reaches that "
                    "address can read the training and inject gradients. Give --secret and --peers "
                    "(`torch-distro keygen --relay` makes them), or --insecure if the network is "
                    "trusted (a private network or a tunnel)",
                    config.bind_address));
  }
  result.insecure = true;
  return result;
}

// A user of ZeroMQ's authentication: the run, and the rank in it.
constexpr int kRanksOfARun = 65536;
static_assert(kMaxMember < kRanksOfARun);

ZapUsers users_of(const std::vector<Keys>& runs) {
  ZapUsers users;
  for (std::size_t run = 0; run < runs.size(); ++run) {
    const auto& keys = runs[run].public_by_rank;
    if (keys.size() > kMaxMember + 1) {
      throw ConfigError(fmt::format(
          "the relay: a peers file with a rank above {}, the most there can be", kMaxMember));
    }
    for (std::size_t rank = 0; rank < keys.size(); ++rank) {
      if (!keys[rank].empty() &&
          !users.emplace(keys[rank], std::to_string(run * kRanksOfARun + rank)).second) {
        throw ConfigError(
            fmt::format("the relay: the key {} is in the peers files of two runs: make keys for "
                        "each run of their own",
                        keys[rank]));
      }
    }
  }
  return users;
}

}  // namespace

Relay::Relay(const RelayConfig& config)
    : config_(config),
      socket_config_(socket_config(config)),
      zap_(config.runs.empty() ? std::nullopt : std::optional<ZapHandler>(std::in_place, context_)),
      acceptor_(std::make_unique<Acceptor>(context_, socket_config_, zap_ ? &*zap_ : nullptr,
                                           users_of(config.runs))) {
  acceptor_->limit_connections(kSpareConnections);
}

Relay::~Relay() = default;

void Relay::run(const std::atomic<bool>& stop) {
  std::vector<zmq::pollitem_t> items;
  Deadline wake = Clock::now();
  while (!stop) {
    items.clear();
    acceptor_->append_poll_items(items, false);
    if (zap_) {
      zap_->append_poll_items(items);
    }
    const auto wait =
        std::clamp<Clock::duration>(wake - Clock::now(), milliseconds(0), kLongestWait);
    // A signal may end the wait; `stop` says what it meant.
    ::zmq_poll(items.data(), static_cast<int>(items.size()),
               std::chrono::ceil<milliseconds>(wait).count());
    wake = work(Clock::now());
  }
}

Deadline Relay::work(Deadline now) {
  if (zap_) {
    zap_->work(now, {});
  }
  std::string route;
  zmq::message_t body;
  int taken = 0;
  while (taken < kBatch && acceptor_->receive(route, body)) {
    ++taken;
    take(route, body);
  }
  if (acceptor_->take_disconnects()) {
    probes_.begin(now);
  }
  probe(now);
  if (now >= retry_at_) {
    retry_at_ = Deadline::max();
    for (auto& [number, group] : groups_) {
      settle(group);
    }
  }
  if (taken < kBatch || now - kLastWords > gone_since_) {
    remove_gone();
  }
  live_.rejected_connections.fetch_add(acceptor_->take_rejected(), std::memory_order_relaxed);
  count();
  return taken == kBatch ? now : std::min(retry_at_, probes_.next());
}

void Relay::reject(std::string_view why) {
  live_.rejected_frames.fetch_add(1, std::memory_order_relaxed);
  log_once(LogLevel::warning, fmt::format("relay/{}", why),
           fmt::format("[distro relay] rejected a message: {} (logged once; counted)", why));
}

void Relay::refuse(const std::string& route, std::string_view reason) {
  live_.refused_joins.fetch_add(1, std::memory_order_relaxed);
  log_once(LogLevel::warning, fmt::format("relay refused/{}", reason),
           fmt::format("[distro relay] refused a rank: {} (logged once; counted)", reason));
  auto message = make_refused(reason);
  send(route, message);
}

void Relay::take(const std::string& route, const zmq::message_t& body) {
  live_.bytes_received.fetch_add(body.size(), std::memory_order_relaxed);
  const std::span bytes(body.data<std::byte>(), body.size());
  const auto parsed = parse_relay_message(bytes);
  if (!parsed.message) {
    if (const auto version = version_of_join(bytes); version && *version != kRelayVersion) {
      refuse(route, fmt::format("it speaks version {} of the relay's protocol, and this relay {}: "
                                "install the same torch-distro on both",
                                *version, kRelayVersion));
    }
    reject(parsed.error);
    return;
  }
  const auto known = routes_.find(route);
  switch (parsed.message->kind) {
    case RelayKind::join:
      on_join(route, *parsed.message, acceptor_->authenticated(route, body));
      break;
    case RelayKind::leave:
      if (known != routes_.end()) {
        mark_gone(*known->second);
      }
      break;
    case RelayKind::forward:
      if (known != routes_.end()) {
        on_forward(*known->second, *parsed.message);
      } else if (!former_.contains(route)) {
        reject("a frame over a connection that has joined no group");
      }
      break;
    default:
      reject("a kind that only relays send");
      break;
  }
}

void Relay::on_join(const std::string& route, const RelayMessage& join, std::optional<int> user) {
  const auto member = static_cast<std::uint16_t>(join.member);
  const GroupName name{user ? *user / kRanksOfARun : 0, join.group};
  if (user && *user % kRanksOfARun != member) {
    refuse(route, fmt::format("it joins as rank {} with the key of rank {}", member,
                              *user % kRanksOfARun));
    return;
  }
  if (const auto known = routes_.find(route); known != routes_.end()) {
    if (known->second->number != member || known->second->group->name != name) {
      refuse(route, "this connection has joined as another rank already");
      return;
    }
    auto again = make_notice(RelayKind::joined);
    pass(*known->second, again);
    return;
  }
  const auto found = groups_.find(name);
  const bool returns = found != groups_.end() && found->second.members.contains(member);
  if (!returns && routes_.size() >= config_.max_ranks) {
    refuse(route, fmt::format("the relay serves at most {} ranks", config_.max_ranks));
    return;
  }
  if (!returns && found != groups_.end() && found->second.members.size() >= kMaxGroup) {
    refuse(route, fmt::format("a group has at most {} ranks", kMaxGroup));
    return;
  }
  auto joined = make_notice(RelayKind::joined);
  if (send(route, joined) != SendResult::sent) {
    return;
  }
  acceptor_->recognise();
  Group& group = groups_[name];
  group.name = name;
  Member& self = group.members[member];
  if (returns) {
    routes_.erase(self.route);  // dead, whether ZeroMQ has noticed or not
    remember(self.route);
  }
  self = {&group, member, route, false, false};
  routes_[route] = &self;
  log(LogLevel::info, fmt::format("[distro relay] rank {} {} group {:016x}", member,
                                  returns ? "came back to" : "joined", join.group));
  for (auto& [number, other] : group.members) {
    if (number == member) {
      continue;
    }
    Reset& news = group.resets[{std::min(number, member), std::max(number, member)}];
    auto& of_self = member < number ? news.low : news.high;
    auto& of_other = member < number ? news.high : news.low;
    of_self = {false, true};
    of_other = {of_other.absent_due || returns, true};
  }
  settle(group);
}

void Relay::on_forward(Member& from, const RelayMessage& forward) {
  Group& group = *from.group;
  auto message = make_deliver(from.number, forward.rest);
  const auto deliver = [&](Member& to) {
    const Pair pair{std::min(from.number, to.number), std::max(from.number, to.number)};
    zmq::message_t copy;
    copy.copy(message);
    if (to.gone || group.resets.contains(pair)) {
      live_.dropped_frames.fetch_add(1, std::memory_order_relaxed);
    } else if (pass(to, copy)) {
      live_.frames.fetch_add(1, std::memory_order_relaxed);
    } else {
      live_.dropped_frames.fetch_add(1, std::memory_order_relaxed);
      if (!to.gone) {
        reset(group, from.number, to.number);
      }
    }
  };
  if (forward.everyone) {
    for (auto& [number, member] : group.members) {
      if (number != from.number) {
        deliver(member);
      }
    }
  }
  for (const std::uint16_t number : forward.others) {
    const auto to = group.members.find(number);
    if (to != group.members.end() && number != from.number) {
      deliver(to->second);
    }
  }
}

SendResult Relay::send(const std::string& route, zmq::message_t& message) {
  const std::size_t size = message.size();
  const SendResult result = acceptor_->send(route, message);
  if (result == SendResult::sent) {
    live_.bytes_sent.fetch_add(size, std::memory_order_relaxed);
  }
  return result;
}

bool Relay::pass(Member& to, zmq::message_t& message) {
  if (to.clogged || to.gone) {
    return false;
  }
  switch (send(to.route, message)) {
    case SendResult::sent:
      return true;
    case SendResult::blocked:
      to.clogged = true;
      retry_at_ = std::min(retry_at_, Clock::now() + kRetry);
      return false;
    case SendResult::gone:
      mark_gone(to);
      return false;
  }
  return false;
}

void Relay::mark_gone(Member& member) {
  if (!std::exchange(member.gone, true)) {
    gone_.push_back(member.route);
    gone_since_ = std::min(gone_since_, Clock::now());
  }
}

void Relay::remember(const std::string& route) {
  if (former_.size() >= kMaxFormer) {
    former_.clear();
  }
  former_.insert(route);
}

void Relay::reset(Group& group, std::uint16_t a, std::uint16_t b) {
  group.resets[{std::min(a, b), std::max(a, b)}] = {{true, true}, {true, true}};
  retry_at_ = std::min(retry_at_, Clock::now() + kRetry);
}

bool Relay::notify(Group& group, std::uint16_t whom, RelayKind kind, std::uint16_t about,
                   bool& due) {
  if (due) {
    const auto to = group.members.find(whom);
    auto notice = make_notice(kind, about);
    due = to != group.members.end() && !pass(to->second, notice);
  }
  return !due;
}

bool Relay::advance(Group& group, const Pair& pair, Reset& reset) {
  const auto [low, high] = pair;
  const bool low_knows = notify(group, low, RelayKind::absent, high, reset.low.absent_due);
  const bool high_knows = notify(group, high, RelayKind::absent, low, reset.high.absent_due);
  if (!low_knows || !high_knows) {
    return false;
  }
  // The lower first, which the higher one greets as soon as it hears.
  if (!notify(group, low, RelayKind::present, high, reset.low.present_due)) {
    return false;
  }
  return notify(group, high, RelayKind::present, low, reset.high.present_due);
}

void Relay::settle(Group& group) {
  for (auto& [number, member] : group.members) {
    if (member.clogged) {
      member.clogged = false;
      auto ping = make_notice(RelayKind::ping);
      pass(member, ping);
    }
  }
  for (auto entry = group.resets.begin(); entry != group.resets.end();) {
    const bool done = advance(group, entry->first, entry->second);
    entry = done ? group.resets.erase(entry) : std::next(entry);
  }
  if (!group.resets.empty()) {
    retry_at_ = std::min(retry_at_, Clock::now() + kRetry);
  }
}

void Relay::remove_gone() {
  while (!gone_.empty()) {
    const std::string route = std::move(gone_.back());
    gone_.pop_back();
    const auto known = routes_.find(route);
    if (known == routes_.end()) {
      continue;
    }
    Group& group = *known->second->group;
    const std::uint16_t left = known->second->number;
    routes_.erase(known);
    remember(route);
    group.members.erase(left);
    log(LogLevel::info,
        fmt::format("[distro relay] rank {} left group {:016x}", left, group.name.number));
    for (auto& [number, other] : group.members) {
      Reset& news = group.resets[{std::min(number, left), std::max(number, left)}];
      (number < left ? news.low : news.high) = {true, false};
      (number < left ? news.high : news.low) = {};
    }
    if (group.members.empty()) {
      groups_.erase(GroupName(group.name));
    } else {
      settle(group);  // which may find more that have gone
    }
  }
  gone_since_ = Deadline::max();
}

void Relay::probe(Deadline now) {
  if (!probes_.take(now)) {
    return;
  }
  for (const auto& [route, member] : routes_) {
    auto ping = make_notice(RelayKind::ping);
    pass(*member, ping);
  }
}

void Relay::count() {
  live_.groups.store(groups_.size(), std::memory_order_relaxed);
  live_.ranks.store(routes_.size(), std::memory_order_relaxed);
  acceptor_->limit_connections(kConnectionsPerRank * routes_.size() + kSpareConnections);
}

RelayCounters Relay::counters() const noexcept {
  RelayCounters counters;
  counters.bytes_received = live_.bytes_received.load(std::memory_order_relaxed);
  counters.bytes_sent = live_.bytes_sent.load(std::memory_order_relaxed);
  counters.frames = live_.frames.load(std::memory_order_relaxed);
  counters.dropped_frames = live_.dropped_frames.load(std::memory_order_relaxed);
  counters.rejected_frames = live_.rejected_frames.load(std::memory_order_relaxed);
  counters.refused_joins = live_.refused_joins.load(std::memory_order_relaxed);
  counters.rejected_connections = live_.rejected_connections.load(std::memory_order_relaxed);
  counters.groups = live_.groups.load(std::memory_order_relaxed);
  counters.ranks = live_.ranks.load(std::memory_order_relaxed);
  return counters;
}

}  // namespace distro::transport
