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

void SendWindow::queue(const SharedBytes& message) {
  const std::size_t size = message->size();
  std::size_t offset = 0;
  do {
    const std::size_t part = std::min(chunk_bytes_, size - offset);
    Chunk chunk{message, offset, part, 0};
    if (offset == 0) {
      chunk.flags |= kFlagFirst;
    }
    offset += part;
    if (offset == size) {
      chunk.flags |= kFlagLast;
    }
    chunks_.push_back(std::move(chunk));
  } while (offset < size);
}

void SendWindow::queue_goodbye() { chunks_.push_back({}); }

void SendWindow::discard() noexcept {
  chunks_.clear();
  base_ = cursor_ = ever_sent_;
  in_flight_ = 0;
}

bool SendWindow::acknowledge(std::uint64_t ack, Deadline now) noexcept {
  if (ack > ever_sent_) {
    return false;
  }
  if (ack <= base_) {
    return true;
  }
  while (base_ < ack && !chunks_.empty()) {
    if (base_ < cursor_) {
      in_flight_ -= chunks_.front().size + kHeaderBytes;
    }
    chunks_.pop_front();
    ++base_;
  }
  cursor_ = std::max(cursor_, base_);
  progress_at_ = now;
  rewinds_ = 0;
  return true;
}

void SendWindow::rewind(Deadline now) noexcept {
  cursor_ = base_;
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
  const auto index = static_cast<std::size_t>(cursor_ - base_);
  if (index >= chunks_.size()) {
    return std::nullopt;
  }
  const Chunk& chunk = chunks_[index];
  if (in_flight_ != 0 && in_flight_ + chunk.size + kHeaderBytes > window_bytes_) {
    return std::nullopt;
  }
  if (held_ && cursor_ >= ever_sent_ && now < probe_at_) {
    return std::nullopt;
  }
  Frame frame;
  frame.header.kind = chunk.message == nullptr ? FrameKind::goodbye : FrameKind::data;
  frame.header.flags = chunk.flags;
  frame.header.sequence = cursor_;
  if (chunk.message != nullptr) {
    frame.payload = std::span(*chunk.message).subspan(chunk.offset, chunk.size);
  }
  return frame;
}

bool SendWindow::commit(Deadline now) noexcept {
  const Chunk& chunk = chunks_[static_cast<std::size_t>(cursor_ - base_)];
  if (in_flight_ == 0) {
    progress_at_ = now;
  }
  in_flight_ += chunk.size + kHeaderBytes;
  const bool again = cursor_ < ever_sent_;
  if (!again && held_) {
    probe_at_ = now + resend_after_;
  }
  ++cursor_;
  ever_sent_ = std::max(ever_sent_, cursor_);
  return again;
}

Deadline SendWindow::next_timer() const noexcept {
  const bool waits = held_ && static_cast<std::size_t>(cursor_ - base_) < chunks_.size();
  return waits ? std::min(resend_at(), probe_at_) : resend_at();
}

}  // namespace distro::transport
