#include "kernels/aligned.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#endif

namespace distro::kernels {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

void want_huge_pages(void* memory, std::size_t bytes) noexcept {
  constexpr std::size_t kLeastBytes = std::size_t{4} << 20;  // two huge pages of x86-64
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  if (bytes < kLeastBytes || std::align(page, page, memory, bytes) == nullptr) {
    return;
  }
  // A kernel without huge pages refuses it, and all is as before.
  (void)madvise(memory, bytes / page * page, MADV_HUGEPAGE);
}

#else

void want_huge_pages(void* /*memory*/, std::size_t /*bytes*/) noexcept {}

#endif

}  // namespace distro::kernels
