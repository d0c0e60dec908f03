#pragma once

#include <cstddef>
#include <limits>
#include <new>
#include <vector>

namespace distro::kernels {

inline constexpr std::size_t kCacheLineBytes = 64;

/// Memory that begins with a cache line: a vector of a full cache line that begins elsewhere is
/// read from two. Through operator new, so that sanitizers see what becomes of it (oneTBB's
/// cache_aligned_allocator reuses memory behind ThreadSanitizer's back).
template <typename Element>
struct AlignedAllocator {
  using value_type = Element;

  AlignedAllocator() = default;
  template <typename Other>
  AlignedAllocator(const AlignedAllocator<Other>& /*other*/) noexcept {}  // NOLINT: a conversion

  [[nodiscard]] Element* allocate(std::size_t elements) {
    if (elements > std::numeric_limits<std::size_t>::max() / sizeof(Element)) {
      throw std::bad_array_new_length();
    }
    return static_cast<Element*>(
        ::operator new (elements * sizeof(Element), std::align_val_t{kCacheLineBytes}));
  }
  void deallocate(Element* memory, std::size_t /*elements*/) noexcept {
    ::operator delete (memory, std::align_val_t{kCacheLineBytes});
  }

  template <typename Other>
  bool operator==(const AlignedAllocator<Other>& /*other*/) const noexcept {
    return true;
  }
};

template <typename Element>
using AlignedVector = std::vector<Element, AlignedAllocator<Element>>;

}  // namespace distro::kernels
