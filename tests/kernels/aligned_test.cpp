#include "kernels/aligned.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace distro::kernels {
namespace {

template <class Vector>
std::uintptr_t address_of(const Vector& vector) {
  return reinterpret_cast<std::uintptr_t>(vector.data());  // NOLINT: a number to look at
}

TEST(Aligned, BeginsWithACacheLineWhateverTheSize) {
  for (const std::size_t elements : {1U, 7U, 4096U, 1U << 21U}) {
    EXPECT_EQ(address_of(AlignedVector<float>(elements)) % kCacheLineBytes, 0U) << elements;
    EXPECT_EQ(address_of(HugeVector<float>(elements)) % kCacheLineBytes, 0U) << elements;
  }
}

/// The flags that the kernel has for the memory at this address; empty where it does not tell.
std::string flags_at(std::uintptr_t address) {
  std::ifstream maps("/proc/self/smaps");
  bool here = false;
  for (std::string line; std::getline(maps, line);) {
    std::istringstream words(line);
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    char dash = 0;
    if (words >> std::hex >> begin >> dash >> end && dash == '-') {
      here = begin <= address && address < end;
    } else if (here && line.starts_with("VmFlags:")) {
      return line + " ";
    }
  }
  return {};
}

TEST(Aligned, WhatIsLargeAsksForHugePages) {
  const HugeVector<float> large(std::size_t{4} << 20);
  const std::string flags = flags_at(address_of(large) + (8U << 20));
  if (flags.empty() || !std::filesystem::exists("/sys/kernel/mm/transparent_hugepage")) {
    GTEST_SKIP() << "this kernel has no huge pages, or does not tell";
  }
  EXPECT_NE(flags.find(" hg "), std::string::npos) << flags;
  const AlignedVector<float> ordinary(std::size_t{16} << 20);
  const std::string others = flags_at(address_of(ordinary) + (32U << 20));
  EXPECT_EQ(others.find(" hg "), std::string::npos) << others;
}

}  // namespace
}  // namespace distro::kernels
