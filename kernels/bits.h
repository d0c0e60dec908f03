#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

/// Bit packing. A stream is bytes whose bits count from the lowest of the first byte; a field of b
/// bits has its lowest bit first. Writers and readers borrow their memory, allocate nothing, and
/// never touch a byte outside it.
namespace distro::kernels {

static_assert(std::endian::native == std::endian::little, "bit streams are stored by words");

/// Parameter r of the Rice code for the gaps between `count` ascending positions below `n` (1 <=
/// count < n): the r of smallest expected cost for geometric gaps of mean (n - count) / (count +
/// 1), by integers only, so that every machine chooses the same. Kiely, "Selecting the Golomb
/// Parameter in Rice Coding" (IPN 42-159, 2004): r is the largest, or 0, with 2^(r-1) <= 0.4812
/// (mean + 1/2).
[[nodiscard]] unsigned rice_parameter(std::size_t n, std::size_t count) noexcept;

/// Most bits that write_gaps() can need for any `count` of 1 to `most` positions below n.
[[nodiscard]] std::size_t largest_gaps_bits(std::size_t n, std::size_t most) noexcept;

class BitWriter {
 public:
  explicit BitWriter(std::span<std::byte> out) noexcept : out_(out) {}

  /// Append the low `bits` (0 to 32) of value; the rest of value must be zero.
  void put(std::uint32_t value, unsigned bits) noexcept;
  /// Append the first `bits` bits of another stream.
  void append(std::span<const std::byte> stream, std::size_t bits) noexcept;
  /// Append ascending positions below n as Rice-coded gaps.
  void write_gaps(std::span<const std::uint16_t> positions, std::size_t n) noexcept;
  /// Write out what is pending, padded with zero bits to a byte. Returns the bytes written in all.
  /// Nothing may follow.
  std::size_t finish() noexcept;

  [[nodiscard]] std::size_t bits() const noexcept { return stored_ * 8 + fill_; }
  /// Whether the memory was too small; then the stream is incomplete.
  [[nodiscard]] bool overflowed() const noexcept { return overflowed_; }

 private:
  std::span<std::byte> out_;
  std::size_t stored_ = 0;     ///< Bytes.
  std::uint64_t pending_ = 0;  ///< fill_ < 32 bits between calls.
  unsigned fill_ = 0;
  bool overflowed_ = false;
};

/// Reads hostile bytes: past the end it yields zeros and remembers it.
class BitReader {
 public:
  explicit BitReader(std::span<const std::byte> in) noexcept : in_(in) {}

  /// The next `bits` (0 to 32).
  std::uint32_t get(unsigned bits) noexcept;
  /// How many ones come before the next zero; consumes that zero too.
  std::size_t get_unary() noexcept;
  /// Read what write_gaps() wrote for positions.size() positions. False: a position is not below n,
  /// or the stream ended.
  bool read_gaps(std::span<std::uint16_t> positions, std::size_t n) noexcept;

  [[nodiscard]] bool overrun() const noexcept { return overrun_; }
  [[nodiscard]] std::size_t position() const noexcept { return position_; }
  [[nodiscard]] std::size_t remaining() const noexcept { return in_.size() * 8 - position_; }

 private:
  /// At least 57 bits from the position on (zeros past the end).
  [[nodiscard]] std::uint64_t window() const noexcept;

  std::span<const std::byte> in_;
  std::size_t position_ = 0;  ///< Bits.
  bool overrun_ = false;
};

}  // namespace distro::kernels
