#pragma once

#include <span>
#include <stdexcept>
#include <string_view>

namespace distro::plugins {

/// A codec that this build knows by name.
struct CodecInfo {
  std::string_view name;
  std::string_view exchanges;  ///< What crosses the wire, in a few words for listings.
  bool available = false;      ///< False: planned, and asking for it is an error that says so.
};

/// A name that no codec has, or whose codec is not available yet. The message lists what is
/// allowed.
class UnknownCodec : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// All codecs, the default first.
[[nodiscard]] std::span<const CodecInfo> codecs() noexcept;

/// The available codec of this name. Throws UnknownCodec.
[[nodiscard]] const CodecInfo& find_codec(std::string_view name);

}  // namespace distro::plugins
