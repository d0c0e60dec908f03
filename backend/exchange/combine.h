#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace distro::exchange {

/// What the elements of an exact collective are, as ranks tell each other (docs/protocol.md).
enum class ElementType : std::uint8_t {
  opaque = 0,  ///< Bytes: whatever has no arithmetic here. Its elements are counted in bytes.
  boolean,
  u8,
  i8,
  u16,
  i16,
  u32,
  i32,
  u64,
  i64,
  f16,
  bf16,
  f32,
  f64,
  c64,
  c128,
};
inline constexpr std::uint8_t kElementTypes = 16;

/// How a reduction makes one element of those of all ranks.
enum class Combiner : std::uint8_t {
  none = 0,
  sum,
  product,
  min,
  max,
  bit_and,
  bit_or,
  bit_xor,
};
inline constexpr std::uint8_t kCombiners = 8;

[[nodiscard]] std::size_t size_of(ElementType type) noexcept;
[[nodiscard]] std::string_view name_of(ElementType type) noexcept;
[[nodiscard]] std::string_view name_of(Combiner combiner) noexcept;

/// Whether the operator has a meaning for the type: no order of complex numbers, no bits of
/// fractions, nothing of opaque bytes.
[[nodiscard]] bool can_combine(ElementType type, Combiner combiner) noexcept;

/// Combine `elements` of each source, in the order of the sources, which makes the result the same
/// bits wherever it is computed. 16-bit floating point is combined in fp32 and rounded once;
/// integers wrap around; bool knows "or" (SUM, MAX) and "and" (PRODUCT, MIN); a NaN stays one, also
/// in MIN and MAX. `result` may be one of the sources. Needs no alignment. At least one source, and
/// can_combine(type, combiner).
void combine(ElementType type, Combiner combiner, std::span<const std::byte* const> sources,
             std::size_t elements, std::byte* result);

}  // namespace distro::exchange
