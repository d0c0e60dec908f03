#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>

#include "transport/channel.h"
#include "transport/frame.h"

namespace distro::transport {

/// The sending half of a session: numbers chunks, keeps them until they are acknowledged, and sends
/// them again from the last acknowledged one (go back N: the carriers lose frames only when a
/// connection breaks). Knows nothing of sockets. One thread.
class SendWindow {
 public:
  SendWindow(std::size_t chunk_bytes, std::size_t window_bytes, Clock::duration resend_after);

  void queue(const SharedBytes& message);
  void queue_goodbye();

  /// Leave out numbers, so that the next message begins with `number` (not below next_number()).
  void skip_to(std::uint64_t number);

  /// What the first frame of the next message will have.
  [[nodiscard]] std::uint64_t next_number() const noexcept { return next_number_; }

  /// The peer reads no more: forget all that it has not acknowledged.
  void discard() noexcept;

  /// All numbered frames before `ack` have arrived. False if such frames were never sent: a hostile
  /// number.
  bool acknowledge(std::uint64_t ack, Deadline now) noexcept;

  /// Start again from the first frame that is not acknowledged.
  void rewind(Deadline now) noexcept;

  /// The peer's inbox is full (or no longer): keep back what was never sent, except one frame each
  /// resend_after in case the word that it has emptied is lost.
  void hold(bool held, Deadline now) noexcept;

  /// The next DATA, SKIP or GOODBYE that the window allows; session and ack are left to the caller.
  /// Rewinds by itself after resend_after without progress.
  std::optional<Frame> peek(Deadline now) noexcept;

  /// The frame that peek returned was handed to the carrier. True if it had been sent before.
  bool commit(Deadline now) noexcept;

  [[nodiscard]] bool empty() const noexcept { return chunks_.empty(); }

  /// When peek may have something new without any other event.
  [[nodiscard]] Deadline next_timer() const noexcept;

 private:
  struct Chunk {
    FrameKind kind = FrameKind::data;
    std::uint8_t flags = 0;
    SharedBytes message;  // its payload is a part of this
    std::size_t offset = 0;
    std::size_t size = 0;
    std::uint64_t number = 0;
    std::uint64_t numbers = 1;  // more in a SKIP only
  };

  void push(Chunk chunk);
  [[nodiscard]] Deadline resend_at() const noexcept;

  std::size_t chunk_bytes_;
  std::size_t window_bytes_;
  Clock::duration resend_after_;

  std::deque<Chunk> chunks_;       // not acknowledged
  std::size_t cursor_ = 0;         // index of the next frame to send
  std::uint64_t next_number_ = 0;  // of the next frame to queue
  std::uint64_t ever_sent_ = 0;    // one past the highest number ever sent
  std::size_t in_flight_ = 0;      // bytes of the frames before cursor_, headers included
  Deadline progress_at_{};         // last progress while frames are in flight
  unsigned rewinds_ = 0;           // since the last progress
  bool held_ = false;
  Deadline probe_at_{};  // while held: when one new frame may go
};

}  // namespace distro::transport
