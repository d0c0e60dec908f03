#include "backend/exchange/mailbox.h"

#include <fmt/format.h>

#include <algorithm>

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

}  // namespace

Mailbox::Mailbox(transport::Channel& channel, Counters& counters, int rank)
    : channel_(channel), counters_(counters), rank_(rank) {}

void Mailbox::sort(int peer, transport::Bytes bytes) {
  counters_.payload_bytes_received.fetch_add(bytes.size(), std::memory_order_relaxed);
  Letter letter{std::move(bytes), {}};
  try {
    letter.opened = open(letter.bytes);
  } catch (const EnvelopeError& error) {
    throw ExchangeError(
        fmt::format("rank {}: malformed message from rank {}: {}", rank_, peer, error.what()));
  }
  const Envelope& envelope = letter.opened.envelope;
  const std::lock_guard lock(mutex_);
  if (forgotten_.contains(envelope.module)) {
    counters_.orphaned_records.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  const auto index = static_cast<std::size_t>(peer);
  if (stored_bytes_.size() <= index) {
    stored_bytes_.resize(index + 1);
  }
  if (stored_bytes_[index] + letter.bytes.size() > kMaxStoredBytes) {
    throw ExchangeError(
        fmt::format("rank {}: rank {} has sent more than {} bytes that are not due yet", rank_,
                    peer, kMaxStoredBytes));
  }
  const Key key{peer, envelope.module, envelope.kind, envelope.exchange};
  const std::size_t size = letter.bytes.size();
  if (!letters_.emplace(key, std::move(letter)).second) {
    throw ExchangeError(fmt::format("rank {}: rank {} has sent exchange {} of module {} twice",
                                    rank_, peer, std::get<3>(key), std::get<1>(key)));
  }
  stored_bytes_[index] += size;
}

Letter Mailbox::take(int peer, const Subject& subject, transport::Deadline deadline) {
  const Key key{peer, subject.module, subject.kind, subject.exchange};
  const auto start = transport::Clock::now();
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (const auto found = letters_.find(key); found != letters_.end()) {
        Letter letter = std::move(found->second);
        letters_.erase(found);
        stored_bytes_[static_cast<std::size_t>(peer)] -= letter.bytes.size();
        return letter;
      }
    }
    if (auto bytes = channel_.try_receive(peer)) {
      sort(peer, std::move(*bytes));
      continue;
    }
    const auto slice = std::min(deadline, transport::Clock::now() + kLookAgain);
    try {
      sort(peer, channel_.receive(peer, slice));
    } catch (const transport::PeerTimeout& late) {
      if (slice == deadline) {
        const std::chrono::duration<double> waited = transport::Clock::now() - start;
        throw transport::PeerTimeout(
            peer, fmt::format("rank {}: waited {:.1f} s (the group's time-out) for rank {}, for "
                              "exchange {} of module {}: {}",
                              rank_, waited.count(), peer, subject.exchange, subject.module,
                              late.what()));
      }
    }
  }
}

void Mailbox::forget(std::uint32_t module) {
  const std::lock_guard lock(mutex_);
  forgotten_.insert(module);
  std::erase_if(letters_, [&](const auto& entry) {
    if (std::get<1>(entry.first) != module) {
      return false;
    }
    stored_bytes_[static_cast<std::size_t>(std::get<0>(entry.first))] -= entry.second.bytes.size();
    counters_.orphaned_records.fetch_add(1, std::memory_order_relaxed);
    return true;
  });
}

}  // namespace distro::exchange
