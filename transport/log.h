#pragma once

#include <string_view>

namespace distro::transport {

enum class LogLevel { error, warning, info, debug };

/// Set the level of the process's log (stderr, one line an event, "[distro rank N] ..." prefixed by
/// the caller). Thread-safe. The logger is spdlog's registry entry "torch_distro", the one global
/// of this room beside the I/O service.
void set_log_level(LogLevel level);

/// Write one line. Thread-safe, never throws.
void log(LogLevel level, std::string_view message) noexcept;

/// Write one line the first time that this key is seen in the process. Thread-safe, never throws.
void log_once(LogLevel level, std::string_view key, std::string_view message) noexcept;

}  // namespace distro::transport
