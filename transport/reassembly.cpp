#include "transport/reassembly.h"

#include <utility>

namespace distro::transport {

Reassembly::Reassembly(std::size_t max_message_bytes, std::uint64_t max_ahead)
    : max_message_bytes_(max_message_bytes), max_ahead_(max_ahead) {}

Verdict Reassembly::violate(std::string_view why) noexcept {
  violation_ = why;
  return Verdict::violation;
}

Verdict Reassembly::accept(const Frame& frame) {
  const FrameHeader& header = frame.header;
  if (header.sequence < expected_) {
    return Verdict::duplicate;
  }
  if (header.sequence > expected_) {
    return header.sequence - expected_ > max_ahead_ ? Verdict::stale : Verdict::gap;
  }
  if (goodbye_) {
    return violate("it sent more after its goodbye");
  }
  if (header.kind == FrameKind::goodbye) {
    if (in_message_) {
      return violate("it said goodbye in the middle of a message");
    }
    goodbye_ = true;
    ++expected_;
    return Verdict::accepted;
  }
  if (header.kind == FrameKind::skip) {
    if (in_message_) {
      return violate("it left out numbers in the middle of a message");
    }
    expected_ += parse_skip(frame.payload);
    return Verdict::accepted;
  }
  const bool first = (header.flags & kFlagFirst) != 0;
  const bool last = (header.flags & kFlagLast) != 0;
  if (first == in_message_) {
    return violate("the chunks of its messages are out of order");
  }
  if (!last && frame.payload.empty()) {
    return violate("it sent an empty chunk in the middle of a message");
  }
  if (frame.payload.size() > max_message_bytes_ - partial_.size()) {
    return violate("its message is larger than this rank accepts (max_message_bytes)");
  }
  partial_.insert(partial_.end(), frame.payload.begin(), frame.payload.end());
  in_message_ = !last;
  if (last) {
    complete_.push_back(std::exchange(partial_, {}));
  }
  ++expected_;
  return Verdict::accepted;
}

std::optional<Bytes> Reassembly::take() {
  if (complete_.empty()) {
    return std::nullopt;
  }
  Bytes message = std::move(complete_.front());
  complete_.pop_front();
  return message;
}

}  // namespace distro::transport
