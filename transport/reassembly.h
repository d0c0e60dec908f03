#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string_view>

#include "transport/channel.h"
#include "transport/frame.h"

namespace distro::transport {

/// What a session makes of a frame.
enum class Verdict {
  accepted,
  duplicate,  ///< Arrived before: dropped.
  gap,        ///< A frame before it is missing: dropped, the sender will come back to it.
  stale,      ///< Not of this session, or a number that an honest peer cannot have sent: rejected.
  violation,  ///< Well-formed, next in order, and still against the protocol: the session cannot go
              ///< on.
};

/// The receiving half of a session: takes numbered frames in order and joins chunks to messages.
/// Memory grows with the chunks that arrived, never by an announced length. One thread.
class Reassembly {
 public:
  /// `max_ahead`: how far an honest peer's numbers can be ahead at most.
  Reassembly(std::size_t max_message_bytes, std::uint64_t max_ahead);

  /// A DATA, SKIP or GOODBYE frame.
  Verdict accept(const Frame& frame);

  /// The next complete message.
  std::optional<Bytes> take();

  [[nodiscard]] std::uint64_t expected() const noexcept { return expected_; }
  [[nodiscard]] bool said_goodbye() const noexcept { return goodbye_; }

  /// Why the last verdict was a violation.
  [[nodiscard]] std::string_view violation() const noexcept { return violation_; }

 private:
  Verdict violate(std::string_view why) noexcept;

  std::size_t max_message_bytes_;
  std::uint64_t max_ahead_;
  std::uint64_t expected_ = 0;
  bool in_message_ = false;
  bool goodbye_ = false;
  Bytes partial_;
  std::deque<Bytes> complete_;
  std::string_view violation_;
};

}  // namespace distro::transport
