#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <zmq.hpp>

#include "transport/channel.h"
#include "transport/frame.h"

namespace distro::transport::test {

/// A bare DEALER with a context of its own that speaks the protocol as well or badly as the test
/// likes.
class RawPeer {
 public:
  /// `tune`: options of the socket, before it connects.
  explicit RawPeer(const PeerAddress& target, const std::function<void(zmq::socket_t&)>& tune = {});

  void send(const Bytes& bytes);
  void send(const FrameHeader& header, const Bytes& payload = {});
  /// Several parts in one ZeroMQ message.
  void send_parts(int parts);
  /// The next frame of this kind, or an empty optional when none comes for so long.
  std::optional<Frame> receive(FrameKind kind,
                               std::chrono::milliseconds patience = std::chrono::seconds(2));

  Bytes hello(const ChannelConfig& own, const PeerAddress& own_address) const;

 private:
  PeerAddress target_;
  zmq::context_t context_;
  zmq::socket_t socket_;
  zmq::message_t last_;
};

Bytes encode(const FrameHeader& header, const Bytes& payload = {});

}  // namespace distro::transport::test
