#include "transport/session.h"

#include <algorithm>

namespace distro::transport {
namespace {

// An acknowledgement leaves after so many chunks. Fewer: more frames for a trickle of bytes; more:
// the sender's window moves in jerks.
constexpr unsigned kAckEvery = 4;

// ... or after so long. Shorter: fewer ride along with data going the other way; longer: adds to
// the time that a sender keeps chunks, and to each close.
constexpr auto kAckDelay = std::chrono::milliseconds(20);

// The same through a hub, where a message is uploaded once for all, and its acknowledgement by each
// of them. Shorter: one for each message; longer: a close takes longer, and a sender keeps more.
constexpr auto kHubAckDelay = std::chrono::milliseconds(200);

}  // namespace

Session::Session(const ChannelConfig& config, std::uint64_t own_session, std::uint64_t peer_session)
    : own_session_(own_session),
      peer_session_(peer_session),
      keepalive_(config.keepalive),
      alike_(!config.relay.empty()),
      window_(send_chunk_bytes(config), config.window_bytes, config.resend_after),
      reassembly_(config.max_message_bytes,
                  config.window_bytes / kHeaderBytes + 1 + (alike_ ? kMaxSkip : 0)) {}

bool Session::connected(const FrameHeader& greeting, Deadline now) noexcept {
  if (!window_.acknowledge(greeting.ack, now)) {
    return false;
  }
  connected_ = true;
  window_.hold((greeting.flags & kFlagHold) != 0, now);
  window_.rewind(now);
  keepalive_at_ = now + keepalive_;
  return true;
}

void Session::owe_ack(Deadline at) noexcept { ack_at_ = std::min(ack_at_, at); }

Verdict Session::accept(const Frame& frame, Deadline now) {
  const FrameHeader& header = frame.header;
  if (header.session != peer_session_ || !window_.acknowledge(header.ack, now)) {
    return Verdict::stale;
  }
  if (!alike_ || header.kind == FrameKind::ack) {
    window_.hold((header.flags & kFlagHold) != 0, now);
  }
  if (header.kind == FrameKind::ack) {
    if ((header.flags & kFlagAsk) != 0) {
      owe_ack(now);
    }
    return Verdict::accepted;
  }
  const Verdict verdict = reassembly_.accept(frame);
  if (verdict == Verdict::accepted) {
    ++unacknowledged_;
    const bool complete = (header.flags & kFlagLast) != 0 && !alike_;
    const bool at_once =
        unacknowledged_ >= kAckEvery || complete || header.kind == FrameKind::goodbye;
    owe_ack(at_once ? now : now + (alike_ ? kHubAckDelay : kAckDelay));
  } else if (verdict == Verdict::duplicate || verdict == Verdict::gap) {
    ++unacknowledged_;  // the peer does not know what has arrived
    owe_ack(now);
  }
  return verdict;
}

void Session::hold_peer(bool hold, Deadline now) noexcept {
  if (hold != holding_) {
    holding_ = hold;
    owe_ack(now);
  }
}

FrameHeader Session::header(FrameKind kind) const noexcept {
  FrameHeader header;
  header.kind = kind;
  header.flags = holding_ ? kFlagHold : std::uint8_t{0};
  header.session = own_session_;
  header.ack = reassembly_.expected();
  return header;
}

std::optional<Frame> Session::next_frame(Deadline now) noexcept {
  if (!connected_) {
    return std::nullopt;
  }
  if (asking_) {
    Frame frame{header(FrameKind::ack), {}};
    frame.header.flags |= kFlagAsk;
    return frame;
  }
  if (alike_ && now >= ack_at_) {  // they wait for no end of the data, which carries none
    return Frame{header(FrameKind::ack), {}};
  }
  if (auto frame = window_.peek(now)) {
    frame->header.session = own_session_;
    if (!alike_) {
      const FrameHeader base = header(frame->header.kind);
      frame->header.flags |= base.flags;
      frame->header.ack = base.ack;
    }
    return frame;
  }
  if (now >= ack_at_ || now >= keepalive_at_) {
    return Frame{header(FrameKind::ack), {}};
  }
  return std::nullopt;
}

bool Session::sent(const Frame& frame, Deadline now) noexcept {
  if ((frame.header.flags & kFlagAsk) != 0) {
    asking_ = false;
  }
  if (!alike_ || frame.header.kind == FrameKind::ack) {
    unacknowledged_ = 0;
    ack_at_ = Deadline::max();
  }
  keepalive_at_ = now + keepalive_;
  return frame.header.kind != FrameKind::ack && window_.commit(now);
}

Deadline Session::next_timer() const noexcept {
  return connected_ ? std::min({ack_at_, keepalive_at_, window_.next_timer()}) : Deadline::max();
}

}  // namespace distro::transport
