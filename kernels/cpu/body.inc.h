// The kernels, compiled once per instruction set: the including file opens its namespace, this file
// defines kernel_table()'s functions in an anonymous namespace there. Plain loops that compilers
// vectorise; every value is computed by the same operations in the same order whatever the vector
// width. See formats.inc.h for why nothing of std is called here.

namespace {

#include "kernels/cpu/formats.inc.h"

/// Sums run in this many lanes, so that the order of additions does not depend on the vector width.
constexpr std::size_t kLanes = 16;

inline std::int32_t magnitude_of(float value) {
  return static_cast<std::int32_t>(bits_of(value) & 0x7fffffffU);
}

struct MoveLanes {
  float sum[kLanes] = {};
  std::int32_t largest[kLanes] = {};

  void see(std::size_t lane, float move) {
    const std::int32_t magnitude = magnitude_of(move);
    sum[lane] += float_of(static_cast<std::uint32_t>(magnitude));
    largest[lane] = magnitude > largest[lane] ? magnitude : largest[lane];
  }

  Move total() const {
    Move move;
    std::int32_t most = 0;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      move.absolute_sum += static_cast<double>(sum[lane]);
      most = largest[lane] > most ? largest[lane] : most;
    }
    move.absolute_max = float_of(static_cast<std::uint32_t>(most));
    move.finite = most < 0x7f800000;
    return move;
  }
};

/// The move of one weight, and r with it.
template <class Format>
inline float absorb_one(typename Format::Element x, float w, float& r, float share) {
  const float left = Format::load(Format::store(w + share * r));
  const float move = Format::load(x) - left;
  r += move;
  return move;
}

struct F64 {
  using Element = double;
  static double store(float value) { return static_cast<double>(value); }
};

template <>
inline float absorb_one<F64>(double x, float w, float& r, float share) {
  const double left = static_cast<double>(w) + static_cast<double>(share) * static_cast<double>(r);
  const float move = static_cast<float>(x - left);
  r += move;
  return move;
}

template <class Format>
Move absorb_as(const void* __restrict x_memory, const float* __restrict w, float* __restrict r,
               std::size_t n, float share) {
  const auto* __restrict x = static_cast<const typename Format::Element*>(x_memory);
  MoveLanes lanes;
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      lanes.see(lane, absorb_one<Format>(x[i + lane], w[i + lane], r[i + lane], share));
    }
  }
  for (std::size_t lane = 0; i + lane < n; ++lane) {
    lanes.see(lane, absorb_one<Format>(x[i + lane], w[i + lane], r[i + lane], share));
  }
  return lanes.total();
}

Move absorb(DType dtype, const void* x, const float* w, float* r, std::size_t n,
            float share) noexcept {
  switch (dtype) {
    case DType::f32:
      return absorb_as<F32>(x, w, r, n, share);
    case DType::f64:
      return absorb_as<F64>(x, w, r, n, share);
    case DType::f16:
      return absorb_as<F16>(x, w, r, n, share);
    case DType::bf16:
      return absorb_as<Bf16>(x, w, r, n, share);
  }
  return {};
}

template <class Format>
void restore_as(void* __restrict x_memory, const float* __restrict w, const float* __restrict r,
                std::size_t n, float share) {
  auto* __restrict x = static_cast<typename Format::Element*>(x_memory);
  for (std::size_t i = 0; i < n; ++i) {
    x[i] = Format::store(w[i] + share * r[i]);
  }
}

template <>
void restore_as<F64>(void* __restrict x_memory, const float* __restrict w,
                     const float* __restrict r, std::size_t n, float share) {
  auto* __restrict x = static_cast<double*>(x_memory);
  for (std::size_t i = 0; i < n; ++i) {
    x[i] = static_cast<double>(w[i]) + static_cast<double>(share) * static_cast<double>(r[i]);
  }
}

void restore(DType dtype, void* x, const float* w, const float* r, std::size_t n,
             float share) noexcept {
  switch (dtype) {
    case DType::f32:
      restore_as<F32>(x, w, r, n, share);
      return;
    case DType::f64:
      restore_as<F64>(x, w, r, n, share);
      return;
    case DType::f16:
      restore_as<F16>(x, w, r, n, share);
      return;
    case DType::bf16:
      restore_as<Bf16>(x, w, r, n, share);
      return;
  }
}

/// Largest magnitude, as the bits of a signed integer of the element's size (baseline x86 compares
/// no unsigned vectors).
template <class Bits>
Bits largest_magnitude(const void* __restrict x_memory, std::size_t n, Bits mask) {
  const auto* __restrict x = static_cast<const unsigned char*>(x_memory);
  Bits largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    Bits element;
    __builtin_memcpy(&element, x + i * sizeof(Bits), sizeof(Bits));
    const auto magnitude = static_cast<Bits>(element & mask);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

bool finite(DType dtype, const void* x, std::size_t n) noexcept {
  constexpr auto kLimit = __builtin_bit_cast(std::int32_t, kLargestWeight);
  constexpr auto kLimit64 = __builtin_bit_cast(std::int64_t, static_cast<double>(kLargestWeight));
  constexpr std::int16_t kMask16 = 0x7fff;
  constexpr std::int32_t kMask32 = 0x7fffffff;
  constexpr std::int64_t kMask64 = 0x7fffffffffffffff;
  switch (dtype) {
    case DType::f32:
      return largest_magnitude(x, n, kMask32) < kLimit;
    case DType::f64:
      return largest_magnitude(x, n, kMask64) < kLimit64;
    case DType::f16:
      return largest_magnitude(x, n, kMask16) < 0x7c00;
    case DType::bf16:
      return largest_magnitude(x, n, kMask16) < (kLimit >> 16);
  }
  return false;
}

template <class Format>
void adopt_as(const void* __restrict x_memory, float* __restrict w, std::size_t n) {
  const auto* __restrict x = static_cast<const typename Format::Element*>(x_memory);
  for (std::size_t i = 0; i < n; ++i) {
    w[i] = Format::load(x[i]);
  }
}

template <>
void adopt_as<F64>(const void* __restrict x_memory, float* __restrict w, std::size_t n) {
  const auto* __restrict x = static_cast<const double*>(x_memory);
  for (std::size_t i = 0; i < n; ++i) {
    w[i] = static_cast<float>(x[i]);
  }
}

bool adopt(DType dtype, const void* x, float* w, std::size_t n) noexcept {
  switch (dtype) {
    case DType::f32:
      adopt_as<F32>(x, w, n);
      break;
    case DType::f64:
      adopt_as<F64>(x, w, n);
      break;
    case DType::f16:
      adopt_as<F16>(x, w, n);
      break;
    case DType::bf16:
      adopt_as<Bf16>(x, w, n);
      break;
  }
  return finite(dtype, x, n);
}

std::int32_t largest_of(const float* __restrict r, std::size_t n) {
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::int32_t magnitude = magnitude_of(r[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

/// A bound >= least that k or more of the values reach, exactly k unless values tie there; `least`
/// if fewer than k reach it. Bisection, because counting is what vectors do best. Only reads; with
/// a const pointer GCC 12 fears that the callers' arrays are unwritten.
std::int32_t bound_of_largest(std::int32_t* __restrict values, std::size_t n, std::size_t k,
                              std::int32_t least) {
  const auto wanted = static_cast<std::int32_t>(k);
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    largest = values[i] > largest ? values[i] : largest;
  }
  std::int64_t reached = least;  // by k values, or it is the answer
  std::int64_t missed = largest < least ? least : std::int64_t{largest} + 1;
  std::int32_t probe = least;
  while (true) {
    std::int32_t count = 0;
    for (std::size_t i = 0; i < n; ++i) {
      count += values[i] >= probe ? 1 : 0;
    }
    if (count >= wanted) {
      reached = probe;
    } else {
      missed = probe;
    }
    if (count == wanted || missed - reached <= 1) {
      return static_cast<std::int32_t>(reached);
    }
    probe = static_cast<std::int32_t>(reached + (missed - reached) / 2);
  }
}

/// Of c ascending candidates, all of magnitude `least` or more, the k largest, ties to the lowest
/// index.
std::size_t choose(const std::uint16_t* __restrict candidate, std::int32_t* __restrict magnitude,
                   std::size_t c, std::size_t k, std::int32_t least,
                   std::uint16_t* __restrict index) {
  const std::int32_t bound = c <= k ? least : bound_of_largest(magnitude, c, k, least);
  std::size_t larger = 0;
  for (std::size_t i = 0; i < c; ++i) {
    larger += magnitude[i] > bound ? 1U : 0U;
  }
  std::size_t ties = k - larger;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < c; ++i) {
    const bool tie = magnitude[i] == bound && ties > 0;
    ties -= tie ? 1U : 0U;
    if (magnitude[i] > bound || tie) {
      index[kept++] = candidate[i];
    }
  }
  return kept;
}

/// Group-maximum filter: the k-th largest of the maxima of groups of consecutive elements is a
/// lower bound of the k-th largest element, so only groups that reach it hold candidates, and few
/// elements in them do.
template <std::size_t kGroup>
std::size_t select_by_groups(const float* __restrict r, std::size_t n, std::size_t k,
                             std::uint16_t* index) {
  constexpr std::size_t kGroups = kTileElements / kGroup;
  std::int32_t maxima[kGroups];
  const std::size_t whole = n / kGroup;
  for (std::size_t group = 0; group < whole; ++group) {
    maxima[group] = largest_of(r + group * kGroup, kGroup);
  }
  std::size_t groups = whole;
  if (whole * kGroup < n) {
    maxima[groups++] = largest_of(r + whole * kGroup, n - whole * kGroup);
  }

  std::uint16_t candidate[kTileElements];
  std::int32_t magnitudes[kTileElements];
  std::int32_t bound = 1;  // zeros are no entries
  if (k <= groups) {
    bound = bound_of_largest(maxima, groups, k, 1);
  } else {
    for (std::size_t i = 0; i < n; ++i) {
      magnitudes[i] = magnitude_of(r[i]);
    }
    bound = bound_of_largest(magnitudes, n, k, 1);
  }
  std::size_t candidates = 0;
  for (std::size_t group = 0; group < groups; ++group) {
    if (maxima[group] < bound) {
      continue;
    }
    const std::size_t end = group < whole ? (group + 1) * kGroup : n;
    for (std::size_t i = group * kGroup; i < end; ++i) {
      const std::int32_t magnitude = magnitude_of(r[i]);
      candidate[candidates] = static_cast<std::uint16_t>(i);
      magnitudes[candidates] = magnitude;
      candidates += magnitude >= bound ? 1U : 0U;
    }
  }
  return choose(candidate, magnitudes, candidates, k, bound, index);
}

std::size_t select(const float* r, std::size_t n, std::size_t k, std::uint16_t* index) noexcept {
  constexpr std::size_t kFew = 12;  // few entries want few large groups, more want many small ones
  return k <= kFew ? select_by_groups<64>(r, n, k, index) : select_by_groups<16>(r, n, k, index);
}

/// splitmix64's finaliser over the index and the bits.
inline std::uint64_t mix_one(std::uint64_t index, float value) {
  std::uint64_t z = index * 0x9e3779b97f4a7c15U + bits_of(value);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
  return z ^ (z >> 31);
}

std::uint64_t checksum(const float* w, std::size_t n, std::uint64_t first) noexcept {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    sum += mix_one(first + i, w[i]);
  }
  return sum;
}

#include "kernels/cpu/blocks.inc.h"
#include "kernels/cpu/dct.inc.h"

}  // namespace
