#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "kernels/kernels.h"

namespace distro::kernels {

/// Which pages of memory to ask the system for.
enum class Pages : std::uint8_t {
  ordinary,
  /// Huge ones, for what is large: entries that lie all over it are then found without a walk of
  /// the page table for each. Only a wish: a system that has none gives ordinary ones.
  huge,
};

/// Wishes for huge pages where whole ones lie in this memory, best before it is written. Does
/// nothing to less than 4 MiB. The wish stays with the addresses: what the heap puts there later
/// has such pages, too.
void want_huge_pages(void* memory, std::size_t bytes) noexcept;

/// Memory that begins with a cache line: a vector of a full cache line that begins elsewhere is
/// read from two. Through operator new, so that sanitizers see what becomes of it (oneTBB's
/// cache_aligned_allocator reuses memory behind ThreadSanitizer's back).
template <typename Element, Pages kPages = Pages::ordinary>
struct AlignedAllocator {
  using value_type = Element;
  template <typename Other>
  struct rebind {  // NOLINT: the name that the standard has
    using other = AlignedAllocator<Other, kPages>;
  };

  AlignedAllocator() = default;
  template <typename Other>
  // NOLINTNEXTLINE(google-explicit-constructor,hicpp-explicit-conversions): a conversion
  AlignedAllocator(const AlignedAllocator<Other, kPages>& /*other*/) noexcept {}

  [[nodiscard]] Element* allocate(std::size_t elements) {
    if (elements > std::numeric_limits<std::size_t>::max() / sizeof(Element)) {
      throw std::bad_array_new_length();
    }
    const std::size_t bytes = elements * sizeof(Element);
    void* const memory = ::operator new (bytes, std::align_val_t{kCacheLineBytes});
    if constexpr (kPages == Pages::huge) {
      want_huge_pages(memory, bytes);
    }
    return static_cast<Element*>(memory);
  }
  void deallocate(Element* memory, std::size_t /*elements*/) noexcept {
    ::operator delete (memory, std::align_val_t{kCacheLineBytes});
  }

  template <typename Other>
  bool operator==(const AlignedAllocator<Other, kPages>& /*other*/) const noexcept {
    return true;
  }
};

template <typename Element>
using AlignedVector = std::vector<Element, AlignedAllocator<Element>>;

/// For what is as large as the module's weights.
template <typename Element>
using HugeVector = std::vector<Element, AlignedAllocator<Element, Pages::huge>>;

}  // namespace distro::kernels
