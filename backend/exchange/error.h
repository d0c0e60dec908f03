#pragma once

#include <stdexcept>
#include <string>

namespace distro::exchange {

/// A DISTRO_ variable or an option that is unknown, has a bad value, or is not available yet.
/// Raised at start-up; the message lists what is allowed.
class OptionError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The group cannot go on: ranks disagree, a record is malformed, a reference drifted, weights are
/// not finite. The message names the ranks to blame and says what to do. (A dead or late rank is a
/// transport::PeerError.)
class ExchangeError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What a rank sent is not what it may send: it is to blame, whoever was waited for.
class Misbehaviour : public ExchangeError {
 public:
  Misbehaviour(int rank, const std::string& message) : ExchangeError(message), rank_(rank) {}
  [[nodiscard]] int rank() const noexcept { return rank_; }

 private:
  int rank_;
};

/// This rank itself is destroying its group while one of its threads waits for a peer.
class Interrupted : public ExchangeError {
 public:
  using ExchangeError::ExchangeError;
};

}  // namespace distro::exchange
