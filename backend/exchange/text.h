#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace distro::exchange {

/// Whether the bytes are UTF-8, as error texts, the store and Python need them.
[[nodiscard]] bool is_utf8(std::string_view text);

/// At most `most` bytes of a text that a peer or a user gave, fit for an error text: control
/// characters escaped, what is not UTF-8 replaced, "..." where it was cut.
[[nodiscard]] std::string printable(std::string_view text, std::size_t most);

}  // namespace distro::exchange
