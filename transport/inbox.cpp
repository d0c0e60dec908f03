#include "transport/inbox.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace distro::transport {
namespace {

// Waiting "until Deadline::max()" overflows inside some implementations of condition variables.
constexpr auto kLongestWait = std::chrono::hours(24 * 365);

// How much longer than for its neighbours' answers a rank waits for what they find out of theirs.
// Less: it blames a neighbour that is well; more: an error that names nobody comes later.
constexpr int kPatienceBeyond = 2;

std::string seconds(Clock::duration duration) {
  return fmt::format("{:.1f} s", std::chrono::duration<double>(duration).count());
}

std::string_view name(PeerState state) noexcept {
  switch (state) {
    case PeerState::connecting:
      return "never connected";
    case PeerState::connected:
      return "connected";
    case PeerState::away:
      return "connection lost, reconnecting";
    case PeerState::left:
      return "left";
    case PeerState::lost:
      return "lost";
    case PeerState::beyond:
      return "no neighbour";
  }
  return "unknown";
}

}  // namespace

ChannelCounters LiveCounters::read() const noexcept {
  ChannelCounters counters;
  const bool carried = carrier_counts.load(std::memory_order_acquire);
  counters.socket_bytes_sent =
      (carried ? carried_sent : socket_bytes_sent).load(std::memory_order_relaxed);
  counters.socket_bytes_received =
      (carried ? carried_received : socket_bytes_received).load(std::memory_order_relaxed);
  counters.resent_frames = resent_frames.load(std::memory_order_relaxed);
  counters.reconnects = reconnects.load(std::memory_order_relaxed);
  counters.rejected_frames = rejected_frames.load(std::memory_order_relaxed);
  counters.duplicate_frames = duplicate_frames.load(std::memory_order_relaxed);
  counters.rejected_connections = rejected_connections.load(std::memory_order_relaxed);
  return counters;
}

Inbox::Inbox(int rank, int world_size, std::size_t limit_bytes)
    : rank_(rank), limit_bytes_(limit_bytes), boxes_(static_cast<std::size_t>(world_size)) {}

bool Inbox::deliver(int peer, Bytes message) {
  const std::lock_guard lock(mutex_);
  Box& to = box(peer);
  to.bytes += message.size();
  to.messages.push_back(std::move(message));
  to.over_limit = to.over_limit || to.bytes > limit_bytes_;
  changed_.notify_all();
  return to.over_limit;
}

void Inbox::set_state(int peer, PeerState state, Deadline now) {
  const std::lock_guard lock(mutex_);
  if (box(peer).state == PeerState::lost) {
    return;  // a caller gave it up
  }
  box(peer).state = state;
  box(peer).state_since = now;
  changed_.notify_all();
}

void Inbox::heard(int peer, Deadline now) {
  const std::lock_guard lock(mutex_);
  box(peer).last_heard = now;
  if (listening_ > 0) {
    changed_.notify_all();
  }
}

bool Inbox::lose(int rank, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  box(rank).state = PeerState::lost;
  if (first_lost_) {
    return false;
  }
  first_lost_.emplace(rank, reason);
  changed_.notify_all();
  return true;
}

void Inbox::set_closed() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  changed_.notify_all();
}

Inbox::Taken Inbox::take(int peer) {
  Box& box = this->box(peer);
  Taken taken{peer, std::move(box.messages.front()), false};
  box.messages.pop_front();
  box.bytes -= taken.message.size();
  if (box.over_limit && box.bytes <= limit_bytes_ / 2) {
    box.over_limit = false;
    taken.has_room_again = true;
  }
  return taken;
}

void Inbox::throw_if_in_vain(int peer) const {
  if (first_lost_) {
    throw *first_lost_;
  }
  if (box(peer).state == PeerState::left) {
    throw left(peer);
  }
  if (closed_) {
    throw ClosedError(fmt::format("rank {}: this process group has been destroyed", rank_));
  }
}

PeerLeft Inbox::left(int peer) const {
  return {peer, fmt::format("rank {} left the group {} ago, while rank {} still needs it: its "
                            "script ended or destroyed the group, and so did not run the same "
                            "collectives",
                            peer, seconds(Clock::now() - box(peer).state_since), rank_)};
}

PeerTimeout Inbox::timeout(int peer, Deadline began) const {
  const auto now = Clock::now();
  const Box& late = box(peer);
  const std::string heard =
      late.last_heard == Deadline::min()
          ? "never heard of"
          : fmt::format("last heard of {} ago", seconds(now - late.last_heard));
  std::string state(name(late.state));
  if (late.state == PeerState::away) {
    state += fmt::format(" for {}", seconds(now - late.state_since));
  }
  return {peer, fmt::format(
                    "rank {} did not deliver within {} ({}; {}): see whether it hangs or is slow, "
                    "or raise the group's timeout",
                    peer, seconds(now - began), state, heard)};
}

Inbox::Taken Inbox::receive(int peer, Deadline deadline) {
  const auto began = Clock::now();
  const Deadline until = std::min(deadline, began + kLongestWait);
  std::unique_lock lock(mutex_);
  Box& from = box(peer);
  while (from.messages.empty()) {
    throw_if_in_vain(peer);
    if (Clock::now() >= until) {
      throw timeout(peer, began);
    }
    changed_.wait_until(lock, until);
  }
  return take(peer);
}

std::optional<Inbox::Taken> Inbox::try_receive(int peer) {
  const std::lock_guard lock(mutex_);
  Box& from = box(peer);
  if (from.messages.empty()) {
    throw_if_in_vain(peer);
    return std::nullopt;
  }
  return take(peer);
}

std::optional<Inbox::Taken> Inbox::take_any() {
  const int peers = static_cast<int>(boxes_.size());
  for (int i = 0; i < peers; ++i) {
    const int peer = (next_ + i) % peers;
    if (!box(peer).messages.empty()) {
      next_ = (peer + 1) % peers;
      return take(peer);
    }
  }
  return std::nullopt;
}

std::optional<Inbox::Taken> Inbox::receive_any(Deadline deadline) {
  const Deadline until = std::min(deadline, Clock::now() + kLongestWait);
  std::unique_lock lock(mutex_);
  for (;;) {
    if (auto taken = take_any()) {
      return taken;
    }
    if (first_lost_) {
      throw *first_lost_;
    }
    for (int peer = 0; peer < static_cast<int>(boxes_.size()); ++peer) {
      if (box(peer).state == PeerState::left && !std::exchange(box(peer).leave_told, true)) {
        throw left(peer);
      }
    }
    if (closed_) {
      throw ClosedError(fmt::format("rank {}: this process group has been destroyed", rank_));
    }
    if (std::exchange(woken_, false) || Clock::now() >= until) {
      return std::nullopt;
    }
    changed_.wait_until(lock, until);
  }
}

void Inbox::wake() {
  const std::lock_guard lock(mutex_);
  woken_ = true;
  changed_.notify_all();
}

void Inbox::check_can_send(int peer) const {
  const std::lock_guard lock(mutex_);
  const PeerState state = box(peer).state;
  if (state == PeerState::lost) {
    // Often it only followed the first, which is to blame.
    throw first_lost_.value_or(
        PeerLost(peer, fmt::format("rank {} is lost; nothing can be sent to it", peer)));
  }
  if (state == PeerState::left) {
    throw left(peer);
  }
}

std::optional<PeerLost> Inbox::lost() const {
  const std::lock_guard lock(mutex_);
  return first_lost_;
}

void Inbox::set_trouble(std::string trouble) {
  const std::lock_guard lock(mutex_);
  trouble_ = std::move(trouble);
}

std::string Inbox::how_broken(int peer) const {
  return trouble_.empty()
             ? fmt::format(
                   "the connection to rank {} broke {} ago: its process or its host is "
                   "down, or its network",
                   peer, seconds(Clock::now() - box(peer).state_since))
             : trouble_;
}

std::string Inbox::trouble(int peer) const {
  const std::lock_guard lock(mutex_);
  if (box(peer).state == PeerState::lost && first_lost_) {
    return first_lost_->what();
  }
  return box(peer).state == PeerState::away ? how_broken(peer) : "";
}

bool Inbox::silent(const Box& peer, Deadline since) {
  return peer.state == PeerState::connected && peer.last_heard < since;
}

void Inbox::await_answers(Deadline asked, Deadline until) {
  const auto unanswered = [&](const Box& peer) { return silent(peer, asked); };
  std::unique_lock lock(mutex_);
  ++listening_;
  while (!closed_ && Clock::now() < until && std::ranges::any_of(boxes_, unanswered)) {
    changed_.wait_until(lock, until);
  }
  --listening_;
}

std::optional<PeerError> Inbox::suspect(Deadline asked, Deadline until) {
  const auto in_doubt = [&](const Box& peer) {
    return silent(peer, asked) || peer.state == PeerState::away || peer.state == PeerState::left;
  };
  const auto beyond = [](const Box& peer) { return peer.state == PeerState::beyond; };
  std::unique_lock lock(mutex_);
  ++listening_;
  const auto wait = [&](Deadline end, const auto& doubt) {
    while (!first_lost_ && !closed_ && Clock::now() < end && std::ranges::any_of(boxes_, doubt)) {
      changed_.wait_until(lock, end);
    }
  };
  wait(until, in_doubt);
  if (std::ranges::none_of(boxes_, in_doubt)) {
    // Whose neighbour a rank beyond is may have to ask it first, just as long.
    wait(until + kPatienceBeyond * (until - asked), beyond);
  }
  --listening_;
  if (first_lost_ || closed_) {
    return first_lost_;
  }
  for (const PeerState state : {PeerState::away, PeerState::left}) {
    // Whoever went first is to blame: others may have followed.
    std::optional<int> first;
    for (int peer = 0; peer < static_cast<int>(boxes_.size()); ++peer) {
      if (box(peer).state == state && (!first || box(peer).state_since < box(*first).state_since)) {
        first = peer;
      }
    }
    if (first && state == PeerState::left) {
      return left(*first);
    }
    if (first) {
      return PeerLost(*first, how_broken(*first));
    }
  }
  for (int peer = 0; peer < static_cast<int>(boxes_.size()); ++peer) {
    if (silent(box(peer), asked)) {
      return PeerTimeout(
          peer,
          fmt::format(
              "rank {} is connected but has not answered for {}: it is stopped, or "
              "its host or network is overloaded",
              peer, seconds(Clock::now() - std::max(box(peer).last_heard, box(peer).state_since))));
    }
  }
  return std::nullopt;
}

bool Inbox::wait_closed(Deadline deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, std::min(deadline, Clock::now() + kLongestWait),
                             [this] { return closed_; });
}

}  // namespace distro::transport
