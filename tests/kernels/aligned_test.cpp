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

bool asks_for_huge_pages(std::uintptr_t address) {
  return flags_at(address).find(" hg ") != std::string::npos;
}

TEST(Aligned, WhatIsLargeAsksForHugePages) {
  constexpr std::size_t kMiB = std::size_t{1} << 20;
  // More than the heap keeps for itself.
  const HugeVector<float> huge(16 * kMiB);
  if (flags_at(address_of(huge) + 32 * kMiB).empty() ||
      !std::filesystem::exists("/sys/kernel/mm/transparent_hugepage")) {
    GTEST_SKIP() << "this kernel has no huge pages, or does not tell";
  }
  EXPECT_TRUE(asks_for_huge_pages(address_of(huge) + 32 * kMiB));
  AlignedVector<float> ordinary(16 * kMiB);
  const std::uintptr_t inside = address_of(ordinary) + 32 * kMiB;
  EXPECT_FALSE(asks_for_huge_pages(inside));
  want_huge_pages(ordinary.data() + 8 * kMiB, 4 * kMiB - 1);
  EXPECT_FALSE(asks_for_huge_pages(inside + kMiB));
  want_huge_pages(ordinary.data() + 8 * kMiB, 4 * kMiB);
  EXPECT_TRUE(asks_for_huge_pages(inside + kMiB));
  EXPECT_FALSE(asks_for_huge_pages(inside + 5 * kMiB));
}

}  // namespace
}  // namespace distro::kernels
