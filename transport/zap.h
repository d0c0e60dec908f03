#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>
#include <zmq.hpp>

#include "transport/io_service.h"

namespace distro::transport {

/// Who may connect: user ids by public key, in Z85.
using ZapUsers = std::map<std::string, std::string>;

/// The answer to one request of ZeroMQ to authenticate a connection (ZAP, RFC 27).
struct ZapReply {
  std::string request_id;
  std::string user;    ///< Empty: refused.
  std::string reason;  ///< Why refused, for the log.
};

/// Users by domain; of users, user ids by public key in binary.
using ZapDomains = std::map<std::string, std::map<std::string, std::string>, std::less<>>;

/// What a request, its parts after the envelope, comes to. A part of it is text of whoever
/// connects.
ZapReply judge(std::span<const std::string> parts, const ZapDomains& domains);

/// Tells ZeroMQ which keys may connect to the sockets of one context: without it CURVE encrypts and
/// lets everybody in. Each secured socket has a domain of its own (secure_server), so that one
/// handler serves many channels. To be made before the first of them is bound, and ended after the
/// last. All members are for one thread; waits for nothing.
class ZapHandler final : public IoHandler {
 public:
  /// Throws ConfigError if the context has a handler already.
  explicit ZapHandler(zmq::context_t& context);

  /// From now on these may connect to sockets of this domain. Throws ConfigError if there is such a
  /// domain or a key is none; user ids must not be empty.
  void add_domain(const std::string& name, const ZapUsers& users);
  void remove_domain(const std::string& name) noexcept;

  /// Connections refused so far.
  [[nodiscard]] std::uint64_t denied() const noexcept { return denied_; }

  void append_poll_items(std::vector<zmq::pollitem_t>& items) override;
  Deadline work(Deadline now, std::span<const zmq::pollitem_t> items) override;
  void fail(const std::string& reason) noexcept override;

 private:
  bool answer_one();

  zmq::socket_t router_;
  ZapDomains domains_;
  std::uint64_t denied_ = 0;
};

}  // namespace distro::transport
