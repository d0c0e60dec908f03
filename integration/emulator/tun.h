#pragma once

#include <string>

#include "integration/emulator/descriptor.h"

namespace distro::emulator {

/// Makes a TUN interface in a network namespace (a name of `ip netns`), which lives as long as the
/// descriptor. Each read is one packet, and so is each write; neither blocks.
///
/// \throws std::runtime_error it cannot be made: what is missing, and what to do. The thread may
/// then be in the other namespace.
Descriptor open_tun(const std::string& network_namespace, const std::string& interface);

}  // namespace distro::emulator
