#pragma once

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>

namespace distro::test {

/// TEST_SEED, or another number each time; to be printed with a failure, so that it can be
/// repeated.
inline std::uint32_t seed() {
  const char* const text = std::getenv("TEST_SEED");
  return text == nullptr ? std::random_device{}() : static_cast<std::uint32_t>(std::stoul(text));
}

}  // namespace distro::test
