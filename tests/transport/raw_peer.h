#pragma once

#include <cstdint>
#include <optional>
#include <zmq.hpp>

#include "transport/channel.h"
#include "transport/frame.h"

namespace distro::transport::test {

/// A bare DEALER with a context of its own that speaks the protocol as well or badly as the test
/// likes.
class RawPeer {
 public:
  explicit RawPeer(const PeerAddress& target);

  void send(const Bytes& bytes);
  void send(const FrameHeader& header, const Bytes& payload = {});
  /// Several parts in one ZeroMQ message.
  void send_parts(int parts);
  /// The next frame of this kind, or an empty optional after two seconds.
  std::optional<Frame> receive(FrameKind kind);

  Bytes hello(const ChannelConfig& own, const PeerAddress& own_address) const;

 private:
  PeerAddress target_;
  zmq::context_t context_;
  zmq::socket_t socket_;
  zmq::message_t last_;
};

Bytes encode(const FrameHeader& header, const Bytes& payload = {});

}  // namespace distro::transport::test
