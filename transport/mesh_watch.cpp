// How a Mesh finds out that a peer is lost.

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "transport/host.h"
#include "transport/log.h"
#include "transport/mesh.h"

namespace distro::transport {
namespace {

using std::chrono::milliseconds;

// How often the processes of disconnected peers are looked at. Shorter: costs a read of /proc each;
// longer: a killed rank is noticed later.
constexpr milliseconds kWatch{100};
// The same while all are connected, and how long one must be silent to be looked at: its children
// may keep the sockets of a killed process open.
constexpr milliseconds kSlowWatch{1'000};
// A peer counts as disconnected after so many keepalives without a frame even if ZeroMQ does not
// say so: inproc never says so.
constexpr int kMissedKeepalives = 6;

}  // namespace

std::string Mesh::death_of(const Peer& peer, Deadline now) const {
  const auto quiet = now - peer.quiet_since;
  const PeerAddress& address = peer.address;
  const bool other_process_here =
      address.host == own_.host && address.pid != own_.pid && address.pid > 0;
  if (other_process_here && quiet >= (peer.up ? kSlowWatch : kWatch) &&
      !is_alive({address.pid, address.pid_start})) {
    return fmt::format("rank {}'s process (pid {}) ended {}", peer.rank, address.pid,
                       peer.ever_up ? "without a goodbye" : "before it connected");
  }
  const auto allowed =
      timeout_ + (peer.up ? kMissedKeepalives * config_.keepalive : milliseconds(0));
  if (quiet > allowed) {
    const double seconds = std::chrono::duration<double>(quiet).count();
    if (const std::string trouble = acceptor_->trouble(peer.rank, now); !trouble.empty()) {
      return fmt::format("rank {} was out of reach for {:.1f} s, the group's timeout: {}",
                         peer.rank, seconds, trouble);
    }
    // Whoever was connected once has the right key: what failed since is not its handshake.
    const std::string refusal = peer.ever_up             ? ""
                                : peer.dialer != nullptr ? peer.dialer->refusal()
                                                         : acceptor_->refusal();
    if (!refusal.empty()) {
      return fmt::format("rank {} could not be connected within {:.1f} s, the group's timeout: {}",
                         peer.rank, seconds, refusal);
    }
    return peer.ever_up ? fmt::format(
                              "rank {} stayed disconnected for {:.1f} s, the group's timeout: its "
                              "host or its "
                              "network is down, or it hangs",
                              peer.rank, seconds)
                        : fmt::format(
                              "rank {} never connected within {:.1f} s, the group's timeout: see "
                              "whether it runs, "
                              "and whether {} can be reached between the two hosts",
                              peer.rank, seconds,
                              peer.rank < config_.rank ? address.endpoint : own_.endpoint);
  }
  return "";
}

void Mesh::watch(Deadline now) {
  if (now < watch_at_) {
    return;
  }
  struct Death {
    Deadline quiet_since;
    Peer* peer;
    std::string reason;
  };
  std::vector<Death> deaths;
  bool all_up = true;
  std::string trouble;
  for (const auto& peer : peers_) {
    if (peer == nullptr || peer->finished()) {
      continue;
    }
    all_up = all_up && peer->up;
    if (!peer->up && trouble.empty()) {
      trouble = acceptor_->trouble(peer->rank, now);
    }
    if (std::string reason = death_of(*peer, now); !reason.empty()) {
      deaths.push_back({peer->quiet_since, peer.get(), std::move(reason)});
    }
  }
  inbox_.set_trouble(std::move(trouble));
  // Survivors exit soon after the culprit: whoever went first is to blame.
  std::sort(deaths.begin(), deaths.end(),
            [](const Death& a, const Death& b) { return a.quiet_since < b.quiet_since; });
  for (const Death& death : deaths) {
    lose(*death.peer, death.reason, true);
  }
  watch_at_ = peers_.empty() ? Deadline::max() : now + (all_up ? kSlowWatch : kWatch);
}

void Mesh::lose(Peer& peer, const std::string& reason, bool tell_others) {
  if (peer.finished()) {
    return;
  }
  const auto now = Clock::now();
  const bool first = inbox_.lose(peer.rank, reason);
  log(first ? LogLevel::warning : LogLevel::info,
      fmt::format("[distro rank {}] lost: {}", config_.rank, reason));
  down(peer, now);
  peer.session.discard_outgoing();
  if (peer.dialer != nullptr) {
    peer.dialer->forget();
    peer.dialer.reset();
  }
  set_state(peer, PeerState::lost, now);
  if (first && tell_others && !closing_) {
    tell_lost(peer.rank, reason);
  }
}

}  // namespace distro::transport
