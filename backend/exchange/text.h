#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "transport/channel.h"

namespace distro::exchange {

/// Whether the bytes are UTF-8, as error texts, the store and Python need them.
[[nodiscard]] bool is_utf8(std::string_view text);

/// At most `most` bytes of a text that a peer or a user gave, fit for an error text: control
/// characters escaped, what is not UTF-8 replaced, "..." where it was cut.
[[nodiscard]] std::string printable(std::string_view text, std::size_t most);

/// How an error about a rank that is late at something ends: what is known of the way to it, or
/// what else it can be.
[[nodiscard]] std::string why_late(const transport::Channel& channel, int rank);

}  // namespace distro::exchange
