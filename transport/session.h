#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "transport/channel.h"
#include "transport/frame.h"
#include "transport/reassembly.h"
#include "transport/send_window.h"

namespace distro::transport {

/// Exactly-once, in-order messages to and from one peer over a carrier that may lose frames when
/// its connection breaks. A state machine without sockets, clocks or threads of its own: the owner
/// hands in frames and the time, and carries away what next_frame returns. docs/protocol.md
/// describes it. One thread.
class Session {
 public:
  Session(const ChannelConfig& config, std::uint64_t own_session, std::uint64_t peer_session);

  void queue(const SharedBytes& message) { window_.queue(message); }
  void queue_goodbye() { window_.queue_goodbye(); }
  /// As SendWindow, so that the next message has the same numbers for several peers.
  void skip_to(std::uint64_t number) { window_.skip_to(number); }
  [[nodiscard]] std::uint64_t next_number() const noexcept { return window_.next_number(); }
  void discard_outgoing() noexcept { window_.discard(); }

  /// A connection is up, and the peer said in HELLO or WELCOME what it expects next. False if it
  /// cannot expect that.
  bool connected(const FrameHeader& greeting, Deadline now) noexcept;

  /// The connection broke: send nothing until it is back.
  void disconnected() noexcept { connected_ = false; }

  /// A DATA, SKIP, ACK or GOODBYE frame of the peer.
  Verdict accept(const Frame& frame, Deadline now);
  std::optional<Bytes> take() { return reassembly_.take(); }

  /// The inbox of this rank for the peer is full, or has room again.
  void hold_peer(bool hold, Deadline now) noexcept;

  /// Send an acknowledgement now even if none is owed, to find out whether the connection still
  /// stands.
  void request_ack(Deadline now) noexcept { owe_ack(now); }

  /// Have the peer acknowledge at once, to see that it is there.
  void ask(Deadline now) noexcept {
    asking_ = true;
    owe_ack(now);
  }

  /// What to send now, if anything. Its payload stays valid until the session's next call. Call
  /// sent() if, and only if, the carrier took it.
  std::optional<Frame> next_frame(Deadline now) noexcept;

  /// True if the frame was a resend.
  bool sent(const Frame& frame, Deadline now) noexcept;

  /// Header for a frame outside the numbering (HELLO, WELCOME, ABORT).
  [[nodiscard]] FrameHeader header(FrameKind kind) const noexcept;

  /// When next_frame may have something without any other event; max: never.
  [[nodiscard]] Deadline next_timer() const noexcept;

  [[nodiscard]] bool all_acknowledged() const noexcept { return window_.empty(); }
  [[nodiscard]] bool owes_ack() const noexcept { return unacknowledged_ > 0; }
  [[nodiscard]] bool said_goodbye() const noexcept { return reassembly_.said_goodbye(); }
  [[nodiscard]] std::string_view violation() const noexcept { return reassembly_.violation(); }

 private:
  void owe_ack(Deadline at) noexcept;

  std::uint64_t own_session_;
  std::uint64_t peer_session_;
  Clock::duration keepalive_;
  // Frames are to be the same for all peers, so numbered ones say nothing of the other direction;
  // acknowledgements go alone, and later.
  bool alike_;
  SendWindow window_;
  Reassembly reassembly_;
  bool connected_ = false;
  bool holding_ = false;
  bool asking_ = false;
  unsigned unacknowledged_ = 0;        // frames that arrived since an ack left
  Deadline ack_at_ = Deadline::max();  // when one must leave
  Deadline keepalive_at_ = Deadline::max();
};

}  // namespace distro::transport
