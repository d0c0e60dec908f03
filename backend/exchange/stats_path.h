#pragma once

#include <string>

namespace distro::exchange {

/// Whether the counters' file (DISTRO_STATS) can be written at exit, found at the start of the
/// training instead of at its end: the path must not be a directory, and the nearest of its folders
/// that exists must be one that this process may write to. An empty path is fine: no file. Throws
/// OptionError.
void check_stats_path(const std::string& path);

}  // namespace distro::exchange
