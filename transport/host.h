#pragma once

#include <cstdint>

namespace distro::transport {

/// A process as others on the same host can recognise it.
struct ProcessId {
  std::int64_t pid = 0;
  std::uint64_t start = 0;  ///< Clock ticks from boot to its start: a reused pid has another.
};

/// This process. Throws ConfigError if /proc cannot be read.
ProcessId this_process();

/// Whether that process of this pid namespace still runs. Zombies and a reused pid count as dead;
/// what cannot be read counts as alive, for a false alarm ends a training.
bool is_alive(const ProcessId& process) noexcept;

}  // namespace distro::transport
