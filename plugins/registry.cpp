#include "plugins/registry.h"

#include <fmt/format.h>

#include <array>
#include <string>

namespace distro::plugins {
namespace {

constexpr std::array kCodecs{
    CodecInfo{"weights", "what the optimizer did to the weights", true},
    CodecInfo{"ef", "gradients with error feedback", true},
    CodecInfo{"demo", "decoupled momentum (DeMo)", true},
};

std::string allowed() {
  std::string names;
  for (const CodecInfo& codec : kCodecs) {
    if (codec.available) {
      names += fmt::format("{}'{}'", names.empty() ? "" : ", ", codec.name);
    }
  }
  return names;
}

}  // namespace

std::span<const CodecInfo> codecs() noexcept { return kCodecs; }

const CodecInfo& find_codec(std::string_view name) {
  for (const CodecInfo& codec : kCodecs) {
    if (codec.name != name) {
      continue;
    }
    if (!codec.available) {
      throw UnknownCodec(
          fmt::format("the codec '{}' is not available yet; allowed: {}", name, allowed()));
    }
    return codec;
  }
  throw UnknownCodec(fmt::format("no codec is named '{}'; allowed: {}", name, allowed()));
}

}  // namespace distro::plugins
