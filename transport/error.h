#pragma once

#include <stdexcept>
#include <string>

namespace distro::transport {

/// Base of every error of the transport. The message says what happened, to which rank, and what to
/// do.
class TransportError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Bad configuration: an address that cannot be bound, a port range in use, a binding that the
/// security rule refuses.
class ConfigError : public TransportError {
 public:
  using TransportError::TransportError;
};

/// Bytes from a peer that do not follow the protocol.
class ProtocolError : public TransportError {
 public:
  using TransportError::TransportError;
};

/// An error that one rank of the group is to blame for.
class PeerError : public TransportError {
 public:
  PeerError(int rank, const std::string& message) : TransportError(message), rank_(rank) {}

  /// The rank that is dead, late or gone (not the one that noticed).
  [[nodiscard]] int rank() const noexcept { return rank_; }

 private:
  int rank_;
};

/// The peer's process ended, or its connection stayed away, without a goodbye; or a peer told us of
/// such a rank.
class PeerLost : public PeerError {
 public:
  using PeerError::PeerError;
};

/// The peer said goodbye, and all that it sent has been received already.
class PeerLeft : public PeerError {
 public:
  using PeerError::PeerError;
};

/// The channel was closed by its own side, or belongs to another process (a fork's parent).
class ClosedError : public TransportError {
 public:
  using TransportError::TransportError;
};

/// The peer is connected but did not deliver by the deadline.
class PeerTimeout : public PeerError {
 public:
  using PeerError::PeerError;
};

/// The peer does not take what is sent to it: more waits for its acknowledgement than a channel
/// keeps.
class PeerBacklog : public PeerError {
 public:
  using PeerError::PeerError;
};

}  // namespace distro::transport
