#include "backend/exchange/mailbox.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "backend/exchange/error.h"

namespace distro::exchange {
namespace {

// Messages of one peer that nobody has asked for yet. An honest peer is at most two exchanges a
// module ahead; less than one record's size would refuse it, more lets a hostile one fill the
// memory.
constexpr std::size_t kMaxStoredBytes = std::size_t{1} << 30;

// A thread that waits for its own message looks again after this time whether another thread has
// sorted it in. Longer delays such a thread, shorter wakes it for nothing.
constexpr std::chrono::milliseconds kLookAgain{20};

// "average() (after exchange 7)": what the script was doing.
std::string place(MessageKind kind, std::uint64_t exchange) {
  static constexpr std::string_view kNames[] = {"", "first training forward", "exchange",
                                                "average()", "description"};
  return fmt::format("{} (after exchange {})", kNames[static_cast<std::size_t>(kind)],
                     kind == MessageKind::step ? exchange - 1 : exchange);
}

}  // namespace

Mailbox::Mailbox(transport::Channel& channel, Counters& counters, int rank, int world_size)
    : channel_(channel),
      counters_(counters),
      rank_(rank),
      fetching_(static_cast<std::size_t>(world_size)),
      stored_bytes_(static_cast<std::size_t>(world_size)) {}

void Mailbox::sort(int peer, transport::Bytes bytes) {
  counters_.payload_bytes_received.fetch_add(bytes.size(), std::memory_order_relaxed);
  Letter letter(std::move(bytes));
  try {
    letter.opened = open(letter.bytes);
  } catch (const EnvelopeError& error) {
    throw ExchangeError(
        fmt::format("rank {}: malformed message from rank {}: {}", rank_, peer, error.what()));
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
    throw ExchangeError(
        fmt::format("rank {}: rank {} has sent more than {} bytes that are not due yet", rank_,
                    peer, kMaxStoredBytes));
  }
  letters_[{peer, module}].push_back(std::move(letter));
}

bool Mailbox::fetch(int peer, const transport::Deadline* until) {
  const std::lock_guard lock(fetching_[static_cast<std::size_t>(peer)]);
  if (until != nullptr) {
    sort(peer, channel_.receive(peer, *until));
    return true;
  }
  auto bytes = channel_.try_receive(peer);
  if (bytes) {
    sort(peer, std::move(*bytes));
  }
  return bytes.has_value();
}

std::string Mailbox::mismatch(int peer, const Subject& subject, const Envelope& got) const {
  return fmt::format(
      "rank {}: rank {} is at its {} of module {} where this rank is at its {}. All ranks must do "
      "the same training forwards "
      "and calls of average() in the same order.",
      rank_, peer, place(got.kind, got.exchange), subject.module,
      place(subject.kind, subject.exchange));
}

Letter Mailbox::take(int peer, const Subject& subject, transport::Deadline deadline) {
  const auto start = transport::Clock::now();
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (const auto found = letters_.find({peer, subject.module}); found != letters_.end()) {
        const Envelope& got = found->second.front().opened.envelope;
        if (got.kind != subject.kind || got.exchange != subject.exchange) {
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
    if (fetch(peer, nullptr)) {
      continue;
    }
    const auto slice = std::min(deadline, transport::Clock::now() + kLookAgain);
    try {
      fetch(peer, &slice);
    } catch (const transport::PeerTimeout&) {
      if (slice == deadline) {
        const std::chrono::duration<double> waited = transport::Clock::now() - start;
        throw transport::PeerTimeout(
            peer, fmt::format("rank {}: rank {} is late: waited {:.1f} s (the group's time-out) "
                              "for its {} of module {}. It hangs, or computes, or its "
                              "script does something else; look at its log.",
                              rank_, peer, waited.count(), place(subject.kind, subject.exchange),
                              subject.module));
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
