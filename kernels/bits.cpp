#include "kernels/bits.h"

#include <algorithm>
#include <cstring>

namespace distro::kernels {
namespace {

constexpr unsigned kStored = 32;  // a writer stores words of this many bits
constexpr unsigned kWindow =
    57;  // bits of an 8-byte load that are left behind any bit offset in a byte
constexpr unsigned kLongestRun = 16;  // ones written in one field

std::size_t gaps_bits_bound(std::size_t n, std::size_t count) noexcept {
  const unsigned r = rice_parameter(n, count);
  return count * (1 + r) + (n >> r);
}

}  // namespace

unsigned rice_parameter(std::size_t n, std::size_t count) noexcept {
  // The largest r with 2^(r-1) <= 0.4812 (mean + 1/2), both sides times 20000 (count + 1).
  const std::uint64_t parts = count + 1;
  const std::uint64_t bound = 4812 * (2 * (n - count) + parts);
  unsigned r = 0;
  while ((std::uint64_t{10000} * parts << (r + 1)) <= bound) {
    ++r;
  }
  return r;
}

std::size_t largest_gaps_bits(std::size_t n, std::size_t most) noexcept {
  std::size_t largest = 0;
  for (std::size_t count = 1; count <= most && count < n; ++count) {
    largest = std::max(largest, gaps_bits_bound(n, count));
  }
  return largest;
}

void BitWriter::put(std::uint32_t value, unsigned bits) noexcept {
  pending_ |= std::uint64_t{value} << fill_;
  fill_ += bits;
  if (fill_ < kStored) {
    return;
  }
  if (out_.size() - stored_ < sizeof(std::uint32_t)) {
    // The last word may be wanted by fewer bytes than four; finish() settles that for what is
    // pending only.
    overflowed_ = true;
  } else {
    const auto word = static_cast<std::uint32_t>(pending_);
    std::memcpy(out_.data() + stored_, &word, sizeof(word));
    stored_ += sizeof(word);
  }
  pending_ >>= kStored;
  fill_ -= kStored;
}

void BitWriter::append(std::span<const std::byte> stream, std::size_t bits) noexcept {
  BitReader reader(stream);
  for (; bits >= kStored; bits -= kStored) {
    put(reader.get(kStored), kStored);
  }
  put(reader.get(static_cast<unsigned>(bits)), static_cast<unsigned>(bits));
}

void BitWriter::write_gaps(std::span<const std::uint16_t> positions, std::size_t n) noexcept {
  if (positions.empty()) {
    return;
  }
  const unsigned r = rice_parameter(n, positions.size());
  std::uint32_t next = 0;
  for (const std::uint16_t position : positions) {
    const std::uint32_t gap = position - next;
    std::uint32_t quotient = gap >> r;
    for (; quotient >= kLongestRun; quotient -= kLongestRun) {
      put((1U << kLongestRun) - 1, kLongestRun);
    }
    put((1U << quotient) - 1, quotient + 1);  // the ones and a zero
    put(gap & ((1U << r) - 1), r);
    next = position + 1U;
  }
}

std::size_t BitWriter::finish() noexcept {
  const std::size_t bytes = (fill_ + 7) / 8;
  if (out_.size() - stored_ < bytes) {
    overflowed_ = true;
    return stored_;
  }
  if (bytes > 0) {  // an empty span may be null, which memcpy must not be given
    std::memcpy(out_.data() + stored_, &pending_, bytes);
  }
  stored_ += bytes;
  pending_ = 0;
  fill_ = 0;
  return stored_;
}

std::uint64_t BitReader::window() const noexcept {
  const std::size_t byte = position_ / 8;
  std::uint64_t word = 0;
  if (in_.size() - byte >= sizeof(word)) {
    std::memcpy(&word, in_.data() + byte, sizeof(word));
  } else if (byte < in_.size()) {
    std::memcpy(&word, in_.data() + byte, in_.size() - byte);
  }
  return word >> (position_ % 8);
}

std::uint32_t BitReader::get(unsigned bits) noexcept {
  if (remaining() < bits) {
    overrun_ = true;
    return 0;
  }
  const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
  const auto value = static_cast<std::uint32_t>(window() & mask);
  position_ += bits;
  return value;
}

std::size_t BitReader::get_unary() noexcept {
  std::size_t ones = 0;
  while (true) {
    const std::size_t valid = std::min<std::size_t>(kWindow, remaining());
    const auto run = static_cast<std::size_t>(std::countr_one(window()));
    if (run < valid) {
      position_ += run + 1;
      return ones + run;
    }
    ones += valid;
    position_ += valid;
    if (remaining() == 0) {
      overrun_ = true;
      return ones;
    }
  }
}

bool BitReader::read_gaps(std::span<std::uint16_t> positions, std::size_t n) noexcept {
  if (positions.empty()) {
    return true;
  }
  const unsigned r = rice_parameter(n, positions.size());
  std::size_t next = 0;
  for (std::uint16_t& position : positions) {
    std::size_t here = next;
    const std::uint64_t bits = window();
    const auto ones = static_cast<unsigned>(std::countr_one(bits));
    if (ones + 1 + r <= std::min<std::size_t>(kWindow, remaining())) {  // nearly always
      here += (std::size_t{ones} << r) + ((bits >> (ones + 1)) & ((1U << r) - 1));
      position_ += ones + 1 + r;
    } else {
      const std::size_t quotient = get_unary();
      here += (quotient << r) + get(r);
    }
    if (overrun_ || here >= n) {
      return false;
    }
    position = static_cast<std::uint16_t>(here);
    next = here + 1;
  }
  return true;
}

}  // namespace distro::kernels
