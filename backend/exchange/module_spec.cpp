#include "backend/exchange/module_spec.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xxhash.h>

#include <algorithm>

#include "backend/exchange/rendezvous.h"
#include "backend/exchange/text.h"

namespace distro::exchange {
namespace {

// Of one tensor's line in an error text, in bytes. Less cuts ordinary names, more fills the log.
constexpr std::size_t kMaxShownLine = 200;
// Different lines that an error text shows; there may be as many as ranks.
constexpr std::size_t kMaxShownLines = 4;

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

}  // namespace

std::size_t TensorSpec::elements() const noexcept {
  std::size_t product = 1;
  for (const auto extent : shape) {
    product *= static_cast<std::size_t>(extent);
  }
  return product;
}

std::string describe(std::span<const TensorSpec> tensors, std::size_t most) {
  static constexpr std::string_view kTypes[] = {"float32", "float64", "float16", "bfloat16"};
  std::string text;
  for (const auto& tensor : tensors) {
    const std::string line =
        fmt::format("{} {} [{}]\n", tensor.name, kTypes[static_cast<std::size_t>(tensor.dtype)],
                    fmt::join(tensor.shape, ", "));
    if (line.size() > most - text.size()) {
      break;
    }
    text += line;
  }
  return text;
}

std::uint64_t geometry_hash(std::span<const TensorSpec> tensors, const Options& options) {
  const std::string text =
      describe(tensors, SIZE_MAX) +
      fmt::format("k {} bits {} delay {}", options.k, options.value_bits, options.delay);
  return XXH3_64bits(text.data(), text.size());
}

std::vector<std::size_t> element_counts(std::span<const TensorSpec> tensors) {
  std::vector<std::size_t> counts;
  for (const auto& tensor : tensors) {
    counts.push_back(tensor.elements());
  }
  return counts;
}

std::uint64_t gradient_bytes(std::span<const TensorSpec> tensors) {
  std::uint64_t bytes = 0;
  for (const auto& tensor : tensors) {
    bytes += tensor.elements() * kernels::size_of(tensor.dtype);
  }
  return bytes;
}

std::string first_difference(const std::map<int, std::string>& descriptions) {
  std::map<int, std::vector<std::string>> ranks;
  std::size_t longest = 0;
  for (const auto& [rank, description] : descriptions) {
    const auto& lines = ranks[rank] = lines_of(description);
    longest = std::max(longest, lines.size());
  }
  const auto line_of = [](const std::vector<std::string>& lines, std::size_t line) {
    return line < lines.size() ? lines[line] : std::string("nothing");
  };
  for (std::size_t line = 0; line < longest; ++line) {
    const std::string first = line_of(ranks.begin()->second, line);
    std::map<std::string, std::vector<int>> others;  // ranks by what they have instead
    for (const auto& [rank, lines] : ranks) {
      if (const std::string other = line_of(lines, line); other != first) {
        others[other].push_back(rank);
      }
    }
    std::vector<std::string> parts;
    for (const auto& [other, having] : others) {
      if (parts.size() == kMaxShownLines) {
        parts.push_back(fmt::format("{} more differ", others.size() - kMaxShownLines));
        break;
      }
      parts.push_back(fmt::format("{} {} {}", ranks_text(having),
                                  having.size() == 1 ? "has" : "have",
                                  printable(other, kMaxShownLine)));
    }
    if (!parts.empty()) {
      return fmt::format("where rank {} has {}, {}", ranks.begin()->first,
                         printable(first, kMaxShownLine), fmt::join(parts, ", "));
    }
  }
  return {};
}

}  // namespace distro::exchange
