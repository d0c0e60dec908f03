#include "transport/send_window.h"

#include <algorithm>
#include <utility>

namespace distro::transport {
namespace {

// Rewinds without progress double the wait up to 2^this. Fewer: a link slower than the window per
// resend_after is filled with copies; more: after a long outage on a live connection the session
// sleeps needlessly.
constexpr unsigned kMaxBackoff = 4;

}  // namespace

SendWindow::SendWindow(std::size_t chunk_bytes, std::size_t window_bytes,
                       Clock::duration resend_after)
    : chunk_bytes_(chunk_bytes), window_bytes_(window_bytes), resend_after_(resend_after) {}

void SendWindow::push(Chunk chunk) {
  chunk.number = next_number_;
  next_number_ += chunk.numbers;
  chunks_.push_back(std::move(chunk));
}

void SendWindow::queue(const SharedBytes& message) {
  const std::size_t size = message->size();
  std::size_t offset = 0;
  do {
    Chunk chunk;
    chunk.message = message;
    chunk.offset = offset;
    chunk.size = std::min(chunk_bytes_, size - offset);
    if (offset == 0) {
      chunk.flags |= kFlagFirst;
    }
    offset += chunk.size;
    if (offset == size) {
      chunk.flags |= kFlagLast;
    }
    push(std::move(chunk));
  } while (offset < size);
}

void SendWindow::queue_goodbye() {
  Chunk chunk;
  chunk.kind = FrameKind::goodbye;
  push(std::move(chunk));
}

void SendWindow::skip_to(std::uint64_t number) {
  while (next_number_ < number) {
    Chunk chunk;
    chunk.kind = FrameKind::skip;
    chunk.numbers = std::min<std::uint64_t>(number - next_number_, kMaxSkip);
    auto payload = std::make_shared<Bytes>(kSkipBytes);
    encode_skip(static_cast<std::uint32_t>(chunk.numbers), std::span(*payload).first<kSkipBytes>());
    chunk.size = payload->size();
    chunk.message = std::move(payload);
    push(std::move(chunk));
  }
}

void SendWindow::discard() noexcept {
  chunks_.clear();
  cursor_ = 0;
  next_number_ = ever_sent_;
  in_flight_ = 0;
}

bool SendWindow::acknowledge(std::uint64_t ack, Deadline now) noexcept {
  if (ack > ever_sent_) {
    return false;
  }
  while (!chunks_.empty() && chunks_.front().number + chunks_.front().numbers <= ack) {
    if (cursor_ > 0) {
      in_flight_ -= chunks_.front().size + kHeaderBytes;
      --cursor_;
    }
    chunks_.pop_front();
    progress_at_ = now;
    rewinds_ = 0;
  }
  return true;
}

void SendWindow::rewind(Deadline now) noexcept {
  cursor_ = 0;
  in_flight_ = 0;
  progress_at_ = now;
}

void SendWindow::hold(bool held, Deadline now) noexcept {
  if (held && !held_) {
    probe_at_ = now + resend_after_;
  }
  held_ = held;
}

Deadline SendWindow::resend_at() const noexcept {
  return in_flight_ == 0 ? Deadline::max()
                         : progress_at_ + resend_after_ * (1 << std::min(rewinds_, kMaxBackoff));
}

std::optional<Frame> SendWindow::peek(Deadline now) noexcept {
  if (now >= resend_at()) {
    ++rewinds_;
    rewind(now);
  }
  if (cursor_ >= chunks_.size()) {
    return std::nullopt;
  }
  const Chunk& chunk = chunks_[cursor_];
  const bool too_much = in_flight_ + chunk.size + kHeaderBytes > window_bytes_ ||
                        chunk.number - chunks_.front().number > kMaxSkip;
  if (in_flight_ != 0 && too_much) {
    return std::nullopt;
  }
  if (held_ && chunk.number >= ever_sent_ && now < probe_at_) {
    return std::nullopt;
  }
  Frame frame;
  frame.header.kind = chunk.kind;
  frame.header.flags = chunk.flags;
  frame.header.sequence = chunk.number;
  if (chunk.message != nullptr) {
    frame.payload = std::span(*chunk.message).subspan(chunk.offset, chunk.size);
  }
  return frame;
}

bool SendWindow::commit(Deadline now) noexcept {
  const Chunk& chunk = chunks_[cursor_];
  if (in_flight_ == 0) {
    progress_at_ = now;
  }
  in_flight_ += chunk.size + kHeaderBytes;
  const bool again = chunk.number < ever_sent_;
  if (!again && held_) {
    probe_at_ = now + resend_after_;
  }
  ++cursor_;
  ever_sent_ = std::max(ever_sent_, chunk.number + chunk.numbers);
  return again;
}

Deadline SendWindow::next_timer() const noexcept {
  const bool waits = held_ && cursor_ < chunks_.size();
  return waits ? std::min(resend_at(), probe_at_) : resend_at();
}

}  // namespace distro::transport
