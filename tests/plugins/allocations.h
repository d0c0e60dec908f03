#pragma once

#include <cstddef>

namespace distro::test {

/// Calls of operator new so far, on all threads. Whoever links allocations.cpp has its operator
/// new.
[[nodiscard]] std::size_t allocations() noexcept;

/// Bytes that are allocated now.
[[nodiscard]] std::size_t allocated_bytes() noexcept;

}  // namespace distro::test
