#include "backend/exchange/group.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "backend/exchange/error.h"
#include "backend/exchange/reductions.h"
#include "backend/exchange/transfers.h"

namespace distro::exchange {
namespace {

// Entries kept per 4096 up to which an exchange may travel during a step without harm: 10 and 32
// were measured to train well, 128 worse than both (integration/studies/grids/k.json). Lower warns
// of what works, higher is silent about what does not.
constexpr std::uint32_t kLargestDelayedK = 48;

// How long a rank that fails waits for the others to have heard why: its process may end the moment
// it is told itself. Shorter: on a slow link they blame this rank instead of the culprit; longer:
// beside a rank that hangs, the error comes so much later.
constexpr std::chrono::milliseconds kTellTime{500};

int threads(const Options& options, int local_ranks) {
  if (options.threads > 0) {
    return options.threads;
  }
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / local_ranks);
}

}  // namespace

std::shared_ptr<Group> Group::join(const Identity& identity, const Options& options,
                                   BlobStore& store) {
  transport::set_log_level(options.log_level);
  if (identity.rank == 0 && identity.world_size > 1 && options.delay == 1 &&
      (options.mode == Mode::automatic || options.mode == Mode::weights) &&
      options.k > kLargestDelayedK) {
    transport::log_once(transport::LogLevel::warning, "delayed k",
                        fmt::format("DISTRO_K={} with DISTRO_DELAY=1: what many entries tell comes "
                                    "a step late, and trainings in which "
                                    "more than {} of 4096 travelled so ended worse than with "
                                    "fewer. Use DISTRO_DELAY=0, or fewer entries.",
                                    options.k, kLargestDelayedK));
  }
  Meeting meeting;
  if (identity.world_size > 1) {
    meeting = meet(store, identity, options);
  }
  std::shared_ptr<Group> group(new Group(
      identity, options,
      std::move(meeting)));  // NOLINT(cppcoreguidelines-owning-memory): private constructor
  if (identity.rank == 0 && group->sites().participants() < identity.world_size) {
    group->log(transport::LogLevel::info, fmt::format("participants: {}", group->sites().text()));
  }
  if (group->exact_channel_) {
    group->open_transfers();
  }
  if (exchanges_gradients(options.mode) && identity.world_size > 1) {
    group->reductions_ = std::make_unique<Reductions>(*group);
  }
  return group;
}

Group::Group(const Identity& identity, const Options& options, Meeting meeting)
    : identity_(identity),
      options_(options),
      bind_address_(std::move(meeting.bind_address)),
      round_(meeting.round),
      own_devices_(meeting.own_devices),
      site_own_devices_(meeting.site_own_devices),
      sites_(std::move(meeting.sites)),
      channel_(std::move(meeting.channel)),
      exact_channel_(std::move(meeting.exact_channel)),
      arena_(threads(options, meeting.local_ranks)),
      timeout_(identity.timeout) {
  if (channel_) {
    post_.emplace(*channel_, counters_, sites_, identity_.rank, options_.hub);
    mailbox_.emplace(*channel_, counters_, *post_, identity_.rank, identity_.world_size);
  }
}

Group::~Group() = default;

void Group::LeaveInChild::operator()(Transfers* transfers) const noexcept {
  if (::getpid() == owner) {
    delete transfers;  // NOLINT(cppcoreguidelines-owning-memory): a deleter
  }
}

void Group::open_transfers() {
  Transfers::Config config;
  config.rank = rank();
  config.world_size = world_size();
  config.lost = [this] { return channel_->lost(); };
  config.on_failure = [this](int culprit, std::string_view reason) { abort(culprit, reason); };
  transfers_ = std::unique_ptr<Transfers, LeaveInChild>(
      std::make_unique<Transfers>(*exact_channel_, std::move(config)).release(),
      LeaveInChild{::getpid()});
}

transport::ChannelCounters Group::channel_counters() const {
  transport::ChannelCounters counters;
  for (const auto* const channel : {channel_.get(), exact_channel_.get()}) {
    if (channel != nullptr) {
      counters += channel->counters();
    }
  }
  return counters;
}

void Group::set_timeout(std::chrono::milliseconds timeout) {
  timeout_ = timeout;
  const std::lock_guard lock(channel_mutex_);
  if (channel_ && !closed_) {
    channel_->set_timeout(timeout);
    if (exact_channel_) {
      exact_channel_->set_timeout(timeout);
    }
  }
}

std::uint32_t Group::next_module() {
  const std::lock_guard lock(mutex_);
  return modules_++;
}

void Group::check_open() const {
  if (closed_) {
    throw ExchangeError(fmt::format(
        "rank {}: this process group has been destroyed; nothing can be exchanged in it any more",
        rank()));
  }
}

void Group::broadcast(transport::Bytes message) {
  check_open();
  post_->spread(rank(), std::make_shared<const transport::Bytes>(std::move(message)));
}

void Group::send(int neighbour, transport::Bytes message) {
  check_open();
  post_->send(neighbour, std::make_shared<const transport::Bytes>(std::move(message)));
}

Letter Group::take(int peer, const Subject& subject, transport::Deadline deadline) {
  return mailbox_->take(peer, subject, deadline);
}

void Group::forget(std::uint32_t module) {
  if (mailbox_) {
    mailbox_->forget(module);
  }
}

void Group::interrupt() noexcept {
  if (mailbox_) {
    mailbox_->interrupt();
  }
}

void Group::abort(int culprit, std::string_view reason) noexcept {
  // Called from catch handlers, also of the inner backend's threads while the script's thread
  // closes: it must neither replace the error that is being handled nor meet a channel that is
  // going away.
  const std::lock_guard lock(channel_mutex_);
  if (!channel_ || closed_) {
    return;
  }
  try {
    channel_->abort(culprit, reason);
    if (exact_channel_) {
      exact_channel_->abort(culprit, reason);
    }
    if (!told_) {
      told_ = true;
      channel_->await_answers(transport::Clock::now() + kTellTime);
    }
  } catch (const std::exception& error) {
    log(transport::LogLevel::debug, error.what());
  }
}

std::optional<transport::PeerLost> Group::lost() const {
  auto lost = channel_ ? channel_->lost() : std::nullopt;
  return !lost && exact_channel_ ? exact_channel_->lost() : lost;
}

std::optional<transport::PeerError> Group::suspect(std::chrono::milliseconds patience) {
  if (!channel_) {
    return std::nullopt;
  }
  // When one collective fails, those behind it fail as well; each would wait in vain.
  constexpr std::chrono::seconds kMoment{5};
  const auto now = transport::Clock::now();
  const bool lately = asked_in_vain_.load() > now - kMoment;
  if (auto known = lost()) {
    return known;
  }
  const auto found = channel_->suspect(lately ? now : now + patience);
  if (!found) {
    asked_in_vain_ = transport::Clock::now();
  }
  return found;
}

void Group::close() noexcept {
  if (reductions_) {
    reductions_->close();  // it sends and takes until it has ended
  }
  if (transfers_) {
    transfers_->close();  // likewise
  }
  {
    const std::lock_guard lock(channel_mutex_);
    if (closed_.exchange(true)) {
      return;
    }
  }
  if (channel_) {
    channel_->close(deadline());
  }
  if (exact_channel_) {
    exact_channel_->close(deadline());
  }
  if (const auto last_act = std::move(last_act_)) {
    last_act();
  }
}

void Group::leave(std::string_view reason) noexcept {
  abort(rank(), reason);
  close();
}

void Group::log(transport::LogLevel level, std::string_view message) const noexcept {
  try {
    transport::log(level, fmt::format("[distro rank {}] {}", rank(), message));
  } catch (...) {
    transport::log(level, message);
  }
}

}  // namespace distro::exchange
