#include "tests/transport/raw_peer.h"

namespace distro::transport::test {

Bytes encode(const FrameHeader& header, const Bytes& payload) {
  Bytes bytes(kHeaderBytes + payload.size());
  encode_frame({header, payload}, bytes);
  return bytes;
}

RawPeer::RawPeer(const PeerAddress& target, const std::function<void(zmq::socket_t&)>& tune)
    : target_(target), socket_(context_, zmq::socket_type::dealer) {
  socket_.set(zmq::sockopt::linger, 0);
  if (tune) {
    tune(socket_);
  }
  socket_.connect(target.endpoint);
}

void RawPeer::send(const Bytes& bytes) {
  socket_.send(zmq::const_buffer(bytes.data(), bytes.size()), zmq::send_flags::none);
}

void RawPeer::send(const FrameHeader& header, const Bytes& payload) {
  send(encode(header, payload));
}

void RawPeer::send_parts(int parts) {
  for (int i = 1; i <= parts; ++i) {
    socket_.send(zmq::const_buffer("part", 4),
                 i < parts ? zmq::send_flags::sndmore : zmq::send_flags::none);
  }
}

std::optional<Frame> RawPeer::receive(FrameKind kind, std::chrono::milliseconds patience) {
  socket_.set(zmq::sockopt::rcvtimeo, static_cast<int>(patience.count()));
  while (socket_.recv(last_, zmq::recv_flags::none)) {
    const auto parsed = parse_frame({last_.data<std::byte>(), last_.size()}, std::size_t{1} << 20);
    if (parsed.frame && parsed.frame->header.kind == kind) {
      return parsed.frame;
    }
  }
  return std::nullopt;
}

Bytes RawPeer::hello(const ChannelConfig& own, const PeerAddress& own_address) const {
  Greeting greeting;
  greeting.rank = static_cast<std::uint32_t>(own.rank);
  greeting.world_size = static_cast<std::uint32_t>(own.world_size);
  greeting.chunk_bytes = static_cast<std::uint32_t>(own.chunk_bytes);
  greeting.group = own.group;
  greeting.addressee = target_.session;
  Bytes payload(kGreetingBytes);
  encode_greeting(greeting, std::span(payload).first<kGreetingBytes>());
  return encode({FrameKind::hello, 0, own_address.session, 0, 0}, payload);
}

}  // namespace distro::transport::test
