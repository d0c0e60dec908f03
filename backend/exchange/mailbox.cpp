#include "backend/exchange/mailbox.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "backend/exchange/error.h"
#include "backend/exchange/text.h"

namespace distro::exchange {
namespace {

// How error texts name what a message is about.
std::string name_of(const Subject& subject) {
  static constexpr std::string_view kNames[] = {
      "", "first training forward", "exchange", "average()", "description", "", "exchange"};
  if (subject.kind == MessageKind::reduction) {
    return fmt::format("gradient reduction {}", subject.exchange);
  }
  if (subject.module >= kReductionAnswers) {
    return "description of a gradient reduction";
  }
  const bool of_exchange = subject.kind == MessageKind::step || subject.kind == MessageKind::check;
  const auto done = of_exchange ? subject.exchange - 1 : subject.exchange;
  return fmt::format("{} (after exchange {}) of module {}",
                     kNames[static_cast<std::size_t>(subject.kind)], done, subject.module);
}

// A thread that waits for its own message looks again after this time whether another thread has
// sorted it in. Longer delays such a thread, shorter wakes it for nothing.
constexpr std::chrono::milliseconds kLookAgain{20};

// How long other ranks are given to answer when one is late. Shorter than a round trip blames ranks
// that are well; longer delays the error.
constexpr std::chrono::milliseconds kPatience{2000};

// The rank that does not answer at all, if it is not the late one itself: that one may be waiting
// for it, too. `has_left`: whether a rank ended normally, which nobody is to blame for.
template <typename HasLeft>
std::optional<transport::PeerError> silent(const transport::Channel& channel, int late,
                                           HasLeft&& has_left) {
  auto found = channel.suspect(transport::Clock::now() + kPatience);
  return found && found->rank() != late && !has_left(found->rank()) ? found : std::nullopt;
}

bool fits(const Envelope& got, const Subject& subject) {
  if (subject.kind != MessageKind::average) {
    return got.kind == subject.kind && got.exchange == subject.exchange;
  }
  const std::uint64_t behind = subject.exchange - std::min<std::uint64_t>(subject.exchange, 1);
  return (got.kind == MessageKind::average || got.kind == MessageKind::step) &&
         got.exchange >= (got.kind == MessageKind::step ? subject.exchange : behind) &&
         got.exchange <= subject.exchange + 1;
}

}  // namespace

Mailbox::Mailbox(transport::Channel& channel, Counters& counters, const Post& post, int rank,
                 int world_size)
    : channel_(channel),
      counters_(counters),
      post_(post),
      rank_(rank),
      fetching_(static_cast<std::size_t>(world_size)),
      stored_bytes_(static_cast<std::size_t>(world_size)) {}

void Mailbox::sort(int neighbour, transport::Bytes bytes) {
  if (!post_.is_near(neighbour)) {
    counters_.payload_bytes_received.fetch_add(bytes.size(), std::memory_order_relaxed);
  }
  Letter letter(std::move(bytes));
  try {
    letter.opened = open(letter.bytes);
  } catch (const EnvelopeError& error) {
    throw Misbehaviour(neighbour, fmt::format("rank {}: malformed message from rank {}: {}", rank_,
                                              neighbour, error.what()));
  }
  const std::uint32_t writer = letter.opened.envelope.origin;
  if (!post_.may_bring(neighbour, letter.opened.envelope)) {
    throw Misbehaviour(
        neighbour,
        fmt::format("rank {}: rank {} sent a message of kind {} in the name of rank {}, which is "
                    "not for it to send",
                    rank_, neighbour, static_cast<int>(letter.opened.envelope.kind), writer));
  }
  const int peer = static_cast<int>(writer);
  if (letter.opened.envelope.kind != MessageKind::check && post_.passes_on(peer)) {
    post_.spread(peer, std::make_shared<const transport::Bytes>(letter.bytes));
  }
  const std::uint32_t module = letter.opened.envelope.module;
  const std::lock_guard lock(mutex_);
  if (forgotten_.contains(module)) {
    counters_.orphaned_records.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  auto& stored = stored_bytes_[static_cast<std::size_t>(peer)];
  stored += letter.bytes.size() + sizeof(Letter);
  if (stored > kMaxStoredBytes) {
    throw Misbehaviour(
        peer, fmt::format("rank {}: rank {} has sent more than {} bytes that are not due yet",
                          rank_, peer, kMaxStoredBytes));
  }
  letters_[{peer, module}].push_back(std::move(letter));
}

// What others wait for must not lie here until this rank needs it itself. Whether there was
// anything.
bool Mailbox::pass_on() {
  bool any = false;
  for (const int neighbour : post_.brings_for_others()) {
    try {
      while (fetch(neighbour, nullptr)) {
        any = true;
      }
    } catch (const transport::PeerLeft&) {
      // It brings no more.
    }
  }
  return any;
}

bool Mailbox::fetch(int neighbour, const transport::Deadline* until) {
  const std::lock_guard lock(fetching_[static_cast<std::size_t>(neighbour)]);
  if (until != nullptr) {
    sort(neighbour, channel_.receive(neighbour, *until));
    return true;
  }
  auto bytes = channel_.try_receive(neighbour);
  if (bytes) {
    sort(neighbour, std::move(*bytes));
  }
  return bytes.has_value();
}

std::string Mailbox::mismatch(int peer, const Subject& subject, const Envelope& got) const {
  return fmt::format(
      "rank {}: rank {} is at its {} where this rank is at its {}. All ranks must do the same "
      "training forwards, gradient reductions and calls of average() in the same order; what one "
      "rank does alone, such as an evaluation, belongs under torch.no_grad().",
      rank_, peer, name_of({subject.module, got.kind, got.exchange}), name_of(subject));
}

Letter Mailbox::take(int peer, const Subject& subject, transport::Deadline deadline) {
  const auto start = transport::Clock::now();
  const int neighbour = post_.way_to(peer);
  for (;;) {
    if (interrupted_) {
      throw Interrupted(fmt::format(
          "rank {}: this process group was destroyed while this rank waited for rank {}'s {}",
          rank_, peer, name_of(subject)));
    }
    {
      const std::lock_guard lock(mutex_);
      if (const auto found = letters_.find({peer, subject.module}); found != letters_.end()) {
        const Envelope& got = found->second.front().opened.envelope;
        if (!fits(got, subject)) {
          throw ExchangeError(mismatch(peer, subject, got));
        }
        Letter letter = std::move(found->second.front());
        found->second.pop_front();
        if (found->second.empty()) {
          letters_.erase(found);
        }
        stored_bytes_[static_cast<std::size_t>(peer)] -= letter.bytes.size() + sizeof(Letter);
        return letter;
      }
    }
    if (pass_on() || fetch(neighbour, nullptr)) {
      continue;
    }
    const auto slice = std::min(deadline, transport::Clock::now() + kLookAgain);
    try {
      fetch(neighbour, &slice);
    } catch (const transport::PeerTimeout&) {
      if (slice == deadline) {
        const std::chrono::duration<double> waited = transport::Clock::now() - start;
        const auto has_left = [&](int other) {
          if (other == rank_) {
            return false;  // others blame this rank
          }
          try {
            while (fetch(post_.way_to(other), nullptr)) {
            }
          } catch (const transport::PeerLeft&) {
            return true;
          } catch (const transport::PeerError&) {
          }
          return false;
        };
        if (const auto culprit = silent(channel_, peer, has_left)) {
          throw transport::PeerTimeout(
              culprit->rank(),
              fmt::format(
                  "rank {}: waited {:.1f} s (the group's time-out) for rank {}'s {}, and {}", rank_,
                  waited.count(), peer, name_of(subject), culprit->what()));
        }
        throw transport::PeerTimeout(
            peer,
            fmt::format("rank {}: rank {} is late: waited {:.1f} s (the group's time-out) "
                        "for its {}{}",
                        rank_, peer, waited.count(), name_of(subject), why_late(channel_, peer)));
      }
    }
  }
}

void Mailbox::forget(std::uint32_t module) {
  const std::lock_guard lock(mutex_);
  forgotten_.insert(module);
  std::erase_if(letters_, [&](const auto& entry) {
    if (entry.first.second != module) {
      return false;
    }
    for (const auto& letter : entry.second) {
      stored_bytes_[static_cast<std::size_t>(entry.first.first)] -=
          letter.bytes.size() + sizeof(Letter);
      counters_.orphaned_records.fetch_add(1, std::memory_order_relaxed);
    }
    return true;
  });
}

}  // namespace distro::exchange
