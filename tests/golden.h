#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

/// Constants that any machine, compiler and standard library must reproduce.
namespace distro::test {

/// Random numbers that are the same everywhere: the standard specifies its engines to the bit, but
/// neither its distributions nor <cmath>.
class Numbers {
 public:
  explicit Numbers(std::uint64_t seed) : engine_(seed) {}

  [[nodiscard]] std::uint64_t below(std::uint64_t n) { return engine_() % n; }

  /// Either sign, a random mantissa, and a magnitude of at least 2^low and below 2^high; normal.
  [[nodiscard]] float wide(int low, int high) {
    const auto exponent = low + static_cast<int>(below(static_cast<std::uint64_t>(high - low)));
    const auto bits = static_cast<std::uint32_t>(engine_());
    return std::bit_cast<float>((bits & 0x807fffffU) | static_cast<std::uint32_t>(exponent + 127)
                                                           << 23);
  }

 private:
  std::mt19937_64 engine_;
};

/// XXH3-64 of all that was added, in order.
class Hash {
 public:
  template <class Element>
  void add(std::span<const Element> elements) {
    static_assert(std::has_unique_object_representations_v<Element> ||
                  std::is_floating_point_v<Element>);
    // Not of no memory at all: a null pointer has no hash.
    const std::uint64_t bytes = elements.size_bytes();
    value_ = XXH3_64bits_withSeed(&bytes, sizeof(bytes), value_);
    if (bytes > 0) {
      value_ = XXH3_64bits_withSeed(elements.data(), elements.size_bytes(), value_);
    }
  }
  template <class Element, class Allocator>
  void add(const std::vector<Element, Allocator>& elements) {
    add(std::span<const Element>(elements));
  }
  template <class Value>
  requires std::is_arithmetic_v<Value>
  void add(Value value) { add(std::span<const Value>(&value, 1)); }

  [[nodiscard]] std::uint64_t value() const noexcept { return value_; }

 private:
  std::uint64_t value_ = 0;
};

/// What some computation gives, by its name.
template <std::size_t kHashes>
struct GoldenLine {
  std::string_view name;
  std::array<std::uint64_t, kHashes> hashes;
};

/// Compares with a table. finish() fails with the lines that the table should have instead of its
/// own, to be pasted there if the bits were changed on purpose (then every rank must have the new
/// version).
template <std::size_t kHashes>
class Golden {
 public:
  explicit Golden(std::span<const GoldenLine<kHashes>> lines) : lines_(lines) {}

  void see(const std::string& name, const std::array<std::uint64_t, kHashes>& hashes) {
    ++seen_;
    const auto line = std::ranges::find(lines_, name, &GoldenLine<kHashes>::name);
    if (line == lines_.end() || line->hashes != hashes) {
      other_ += fmt::format("    {{\"{}\", {{{:#018x}}}}},\n", name, fmt::join(hashes, ", "));
    }
  }

  void finish() const {
    EXPECT_TRUE(other_.empty()) << "Other bits than in the table of this test:\n" << other_;
    EXPECT_EQ(seen_, lines_.size()) << "lines that the table lacks, or that no one computes";
  }

 private:
  std::span<const GoldenLine<kHashes>> lines_;
  std::string other_;
  std::size_t seen_ = 0;
};

}  // namespace distro::test
