#include "transport/plugin_endpoint.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <string_view>

#include "transport/frame.h"
#include "transport/log.h"
#include "transport/plugin.h"

namespace distro::transport {
namespace {

// How long the library may take to hand over its last frames: acknowledgements of goodbyes, all
// else has been acknowledged. Shorter: a peer waits for its own time; longer: other groups of the
// process stand still.
constexpr std::int64_t kLingerMs = 100;

constexpr std::size_t kLongestText = DISTRO_TRANSPORT_ERROR_BYTES - 1;

// Text of the library as it may stand in a log line.
std::string printable(const char* text) {
  if (text == nullptr) {
    return {};
  }
  std::string result(text, ::strnlen(text, kLongestText));
  std::ranges::replace_if(
      result, [](char c) { return static_cast<unsigned char>(c) < ' ' || c == 127; }, '?');
  return result;
}

std::string text_of(distro_transport_error& error) {
  error.text[kLongestText] = '\0';
  const std::string text = printable(error.text);
  return text.empty() ? "it gave no reason" : text;
}

}  // namespace

void PluginEndpoint::Closer::operator()(distro_transport_channel* channel) const noexcept {
  try {
    plugin->table().close(channel, kLingerMs);
  } catch (...) {
    log(LogLevel::error, "[distro] close of the transport " + plugin->identity() + " threw");
  }
}

void PluginEndpoint::fail(const char* function, const std::string& why) const {
  throw TransportError(fmt::format("rank {}: {} of the transport {} ({}): {}", config_.rank,
                                   function, config_.plugin->identity(), config_.plugin->path(),
                                   why));
}

template <typename Function>
auto PluginEndpoint::call(const char* function, Function&& body) {
  std::string thrown;
  try {
    return body();
  } catch (const std::exception& error) {
    thrown = printable(error.what());
  } catch (...) {
    thrown = "something that is no std::exception";
  }
  fail(function, "it threw " + thrown + "; functions of the C interface must not throw");
}

PluginEndpoint::PluginEndpoint(const ChannelConfig& config)
    : config_(config),
      table_(config.plugin->table()),
      max_frame_bytes_(config.chunk_bytes + kFrameAllowance),
      channel_(nullptr, Closer{config.plugin.get()}) {
  try {
    open();
    read_address();
  } catch (const TransportError& error) {
    throw ConfigError(error.what());
  }
}

void PluginEndpoint::read_address() {
  const char* address = call("address", [&] { return table_.address(channel_.get()); });
  const std::size_t length =
      address == nullptr ? 0 : ::strnlen(address, DISTRO_TRANSPORT_ADDRESS_BYTES);
  if (length == 0 || length == DISTRO_TRANSPORT_ADDRESS_BYTES ||
      !std::all_of(address, address + length, [](char c) { return c >= ' ' && c <= '~'; })) {
    fail("address", fmt::format("it must be 1 to {} printable ASCII characters",
                                DISTRO_TRANSPORT_ADDRESS_BYTES - 1));
  }
  address_.assign(address, length);
  poll_fd_ = call("poll_fd", [&] { return table_.poll_fd(channel_.get()); });
  if (poll_fd_ < 0 || ::fcntl(poll_fd_, F_GETFD) < 0) {
    fail("poll_fd", fmt::format("{} is no open file descriptor", poll_fd_));
  }
}

void PluginEndpoint::open() {
  distro_transport_config given{};
  given.struct_size = sizeof given;
  given.rank = config_.rank;
  given.world_size = config_.world_size;
  given.group = config_.group;
  given.max_frame_bytes = max_frame_bytes_;
  given.timeout_ms = config_.timeout.count();
  given.bind = config_.bind_address.c_str();
  given.advertise = config_.advertise.c_str();
  given.first_port = config_.first_port;
  given.last_port = config_.last_port;
  given.insecure = config_.insecure ? 1 : 0;
  distro_transport_error error{};
  distro_transport_channel* channel = nullptr;
  const std::int32_t status = call("open", [&] { return table_.open(&given, &channel, &error); });
  if (status != DISTRO_TRANSPORT_OK) {
    fail("open", text_of(error));
  }
  if (channel == nullptr) {
    fail("open", "it succeeded without a channel");
  }
  channel_.reset(channel);
}

void PluginEndpoint::connect(const std::vector<PeerAddress>& addresses) {
  std::vector<const char*> texts;
  for (const PeerAddress& address : addresses) {
    if (address.endpoint.size() >= DISTRO_TRANSPORT_ADDRESS_BYTES) {
      fail("connect", fmt::format("the address of rank {} has {} characters", texts.size(),
                                  address.endpoint.size()));
    }
    texts.push_back(address.endpoint.c_str());
  }
  distro_transport_error error{};
  const std::int32_t status =
      call("connect", [&] { return table_.connect(channel_.get(), texts.data(), &error); });
  if (status != DISTRO_TRANSPORT_OK) {
    fail("connect", text_of(error));
  }
}

SendResult PluginEndpoint::send(int peer, std::span<const std::byte> frame) {
  distro_transport_error error{};
  const std::int32_t status = call("send", [&] {
    return table_.send(channel_.get(), peer, frame.data(), frame.size(), &error);
  });
  switch (status) {
    case DISTRO_TRANSPORT_OK:
      return SendResult::sent;
    case DISTRO_TRANSPORT_AGAIN:
      return SendResult::blocked;
    case DISTRO_TRANSPORT_GONE:
      return SendResult::gone;
    default:
      fail("send", fmt::format("to rank {}: {}", peer, text_of(error)));
  }
}

std::optional<PluginEndpoint::Event> PluginEndpoint::receive() {
  distro_transport_event event{};
  event.struct_size = sizeof event;
  distro_transport_error error{};
  const std::int32_t status =
      call("receive", [&] { return table_.receive(channel_.get(), &event, &error); });
  if (status == DISTRO_TRANSPORT_AGAIN) {
    return std::nullopt;
  }
  if (status != DISTRO_TRANSPORT_OK) {
    fail("receive", text_of(error));
  }
  if (event.peer < 0 || event.peer >= config_.world_size || event.peer == config_.rank) {
    fail("receive", fmt::format("an event of rank {}, which is no peer", event.peer));
  }
  if (event.kind < DISTRO_TRANSPORT_FRAME || event.kind > DISTRO_TRANSPORT_SPACE) {
    fail("receive", fmt::format("an event of unknown kind {}", event.kind));
  }
  Event result{
      static_cast<distro_transport_event_kind>(event.kind), event.peer, {}, printable(event.text)};
  if (result.kind == DISTRO_TRANSPORT_FRAME) {
    if (event.size > max_frame_bytes_ || (event.data == nullptr && event.size > 0)) {
      fail("receive",
           fmt::format("a frame of rank {} of {} bytes at {}", event.peer, event.size, event.data));
    }
    result.data = {static_cast<const std::byte*>(event.data), event.size};
  }
  return result;
}

std::optional<Listener::Carried> PluginEndpoint::counters() {
  if (table_.counters == nullptr) {
    return std::nullopt;
  }
  distro_transport_counters counters{};
  counters.struct_size = sizeof counters;
  call("counters", [&] {
    table_.counters(channel_.get(), &counters);
    return 0;
  });
  return Listener::Carried{counters.bytes_sent, counters.bytes_received};
}

}  // namespace distro::transport
