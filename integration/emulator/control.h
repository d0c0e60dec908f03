#pragma once

#include <string>
#include <string_view>

#include "integration/emulator/network.h"

namespace distro::emulator {

/// Runs one command, a JSON object, and returns the answer, another. Numbers of hosts are those of
/// the command line.
///
///   {"do": "set", "host": 0, NAME: VALUE...}            names of Line; the others stay
///   {"do": "set", "host": 0, "address": "10.78.0.9"}
///   {"do": "cut", "host": 0, "seconds": 5}              0: whole again
///   {"do": "cut", "host": 0, "peer": 1, "seconds": 5}
///   {"do": "counters"}                                  {"hosts": [{NAME: COUNT...}...]}
///
/// What is wrong with a command is answered by {"error": TEXT}, and nothing has been changed.
std::string execute(std::string_view command, Network& network, Time now);

/// \throws std::invalid_argument it is no IPv4 address.
Address parse_address(const std::string& text);

}  // namespace distro::emulator
