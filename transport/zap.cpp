#include "transport/zap.h"

#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <iterator>
#include <utility>

#include "transport/keys.h"
#include "transport/log.h"

namespace distro::transport {
namespace {

constexpr const char* kEndpoint = "inproc://zeromq.zap.01";  // RFC 27

// Version, request id, domain, address, routing id, mechanism; of CURVE one credential.
constexpr std::size_t kParts = 6;
constexpr std::size_t kCurveParts = kParts + 1;
constexpr std::string_view kVersion = "1.0";

// Of what a stranger may have chosen, in the log.
constexpr std::size_t kMaxShown = 64;

// Requests answered before others have their turn. Fewer: more rounds; more: a flood of strangers
// delays the peers.
constexpr int kBatch = 64;

std::string shown(std::string_view text) {
  std::string result;
  for (const char c : text.substr(0, kMaxShown)) {
    result += c >= ' ' && c <= '~' ? c : '?';
  }
  return result;
}

std::string z85(std::string_view key) {
  std::array<char, kZ85KeyBytes + 1> text{};
  ::zmq_z85_encode(text.data(), reinterpret_cast<const std::uint8_t*>(key.data()), key.size());
  return text.data();
}

}  // namespace

ZapReply judge(std::span<const std::string> parts, const ZapDomains& domains) {
  ZapReply reply;
  reply.request_id = parts.size() > 1 ? parts[1] : "";
  if (parts.size() < kParts || parts[0] != kVersion) {
    reply.reason = "ZeroMQ asked in a way that this version does not know";
    return reply;
  }
  const std::string& domain = parts[2];
  const std::string& mechanism = parts[5];
  const std::string from = shown(parts[3]);
  if (mechanism != "CURVE" || parts.size() != kCurveParts || parts[6].size() != kKeyBytes) {
    reply.reason = fmt::format("a connection from {} to {} without a key ({})", from, shown(domain),
                               shown(mechanism));
    return reply;
  }
  const auto users = domains.find(domain);
  if (users == domains.end()) {
    reply.reason = fmt::format("a connection from {} to {}, which is no channel of this process",
                               from, shown(domain));
    return reply;
  }
  const auto user = users->second.find(parts[6]);
  if (user == users->second.end()) {
    reply.reason = fmt::format(
        "a connection from {} to {} with the key {}, which nobody has in "
        "the peers file",
        from, shown(domain), z85(parts[6]));
    return reply;
  }
  reply.user = user->second;
  return reply;
}

ZapHandler::ZapHandler(zmq::context_t& context) : router_(context, zmq::socket_type::router) {
  router_.set(zmq::sockopt::linger, 0);
  try {
    router_.bind(kEndpoint);
  } catch (const zmq::error_t& error) {
    throw ConfigError(
        fmt::format("the handler that checks keys cannot start: {} ({})", error.what(), kEndpoint));
  }
}

void ZapHandler::add_domain(const std::string& name, const ZapUsers& users) {
  std::map<std::string, std::string> by_key;
  for (const auto& [key, user] : users) {
    const auto binary = decode_public_key(key);
    if (!binary || user.empty()) {
      throw ConfigError(
          fmt::format("domain {}: '{}' is not a public key, or has no user id", name, shown(key)));
    }
    by_key.emplace(std::string(reinterpret_cast<const char*>(binary->data()), binary->size()),
                   user);
  }
  if (name.empty() || !domains_.emplace(name, std::move(by_key)).second) {
    throw ConfigError(fmt::format("there is a domain '{}' already, or its name is empty", name));
  }
}

void ZapHandler::remove_domain(const std::string& name) noexcept { domains_.erase(name); }

void ZapHandler::append_poll_items(std::vector<zmq::pollitem_t>& items) {
  items.push_back({router_.handle(), 0, ZMQ_POLLIN, 0});
}

Deadline ZapHandler::work(Deadline now, std::span<const zmq::pollitem_t> /*items*/) {
  for (int count = 0; count < kBatch; ++count) {
    if (!answer_one()) {
      return Deadline::max();
    }
  }
  return now;
}

bool ZapHandler::answer_one() {
  std::vector<std::string> envelope;  // routing id, empty part
  std::vector<std::string> parts;
  zmq::message_t part;
  do {
    if (!router_.recv(part, zmq::recv_flags::dontwait)) {
      return false;
    }
    // One part too many is enough to refuse the request.
    auto& to = envelope.size() < 2 ? envelope : parts;
    if (to.size() <= kCurveParts) {
      to.emplace_back(part.data<char>(), part.size());
    }
  } while (part.more());
  if (envelope.size() < 2 || !envelope[1].empty()) {
    return true;  // nobody to answer
  }
  const ZapReply reply = judge(parts, domains_);
  const bool allowed = !reply.user.empty();
  if (!allowed) {
    ++denied_;
    log_once(LogLevel::warning, "zap/" + (parts.size() > 2 ? parts[2] : std::string()),
             fmt::format("[distro] refused {} (logged once; rejected_connections counts them)",
                         reply.reason));
  }
  const std::string_view answer[] = {envelope[0],
                                     envelope[1],
                                     kVersion,
                                     reply.request_id,
                                     allowed ? "200" : "400",
                                     allowed ? "OK" : "this key may not connect",
                                     reply.user,
                                     ""};
  for (const auto& text : answer) {
    const bool last = &text == std::end(answer) - 1;
    // A connection that has gone takes no answer; ZeroMQ drops it.
    router_.send(
        zmq::const_buffer(text.data(), text.size()),
        last ? zmq::send_flags::dontwait : zmq::send_flags::dontwait | zmq::send_flags::sndmore);
  }
  return true;
}

void ZapHandler::fail(const std::string& reason) noexcept {
  log(LogLevel::error,
      "[distro] the handler that checks keys has failed: nobody can connect any more: " + reason);
}

}  // namespace distro::transport
