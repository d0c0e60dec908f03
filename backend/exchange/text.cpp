#include "backend/exchange/text.h"

#include <nlohmann/json.hpp>

namespace distro::exchange {

using nlohmann::json;

bool is_utf8(std::string_view text) {
  try {
    (void)json(text).dump();
    return true;
  } catch (const json::type_error&) {
    return false;
  }
}

std::string printable(std::string_view text, std::size_t most) {
  const bool cut = text.size() > most;
  const std::string quoted =
      json(text.substr(0, most)).dump(-1, ' ', false, json::error_handler_t::replace);
  return quoted.substr(1, quoted.size() - 2) + (cut ? "..." : "");
}

std::string why_late(const transport::Channel& channel, int rank) {
  const std::string trouble = channel.trouble(rank);
  return trouble.empty()
             ? ". It hangs, or computes, or its script does something else; look at its "
               "log."
             : "; " + trouble;
}

}  // namespace distro::exchange
