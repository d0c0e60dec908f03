#include "backend/exchange/combine.h"

#include <algorithm>
#include <array>
#include <complex>
#include <cstring>
#include <type_traits>

#include "kernels/half.h"

namespace distro::exchange {
namespace {

// Elements that are combined at a time, so that what is added up stays in the fastest cache.
// Smaller costs more loops, larger falls out of it.
constexpr std::size_t kBlock = 1024;

// How elements lie in memory, and what they are combined in.
template <typename T>
struct Plain {
  using Stored = T;
  using Value = T;
  static Value load(Stored stored) { return stored; }
  static Stored store(Value value) { return value; }
};

struct Boolean {
  using Stored = std::uint8_t;
  using Value = bool;
  static Value load(Stored stored) { return stored != 0; }
  static Stored store(Value value) { return value ? 1 : 0; }
};

struct F16 {
  using Stored = std::uint16_t;
  using Value = float;
  static Value load(Stored stored) { return kernels::from_f16(stored); }
  static Stored store(Value value) { return kernels::to_f16(value); }
};

struct Bf16 {
  using Stored = std::uint16_t;
  using Value = float;
  static Value load(Stored stored) { return kernels::from_bf16(stored); }
  static Stored store(Value value) { return kernels::to_bf16(value); }
};

template <typename T>
constexpr bool kIsComplex = false;
template <typename T>
constexpr bool kIsComplex<std::complex<T>> = true;

// By way of 64 unsigned bits, where nothing overflows but wraps around.
template <typename T>
T wrapped(std::uint64_t value) {
  return static_cast<T>(value);
}

struct Sum {
  template <typename T>
  static T of(T a, T b) {
    if constexpr (std::is_same_v<T, bool>) {
      return a || b;
    } else if constexpr (std::is_integral_v<T>) {
      return wrapped<T>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
    } else {
      return a + b;
    }
  }
};

struct Product {
  template <typename T>
  static T of(T a, T b) {
    if constexpr (std::is_same_v<T, bool>) {
      return a && b;
    } else if constexpr (std::is_integral_v<T>) {
      return wrapped<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
    } else {
      return a * b;
    }
  }
};

struct Min {
  template <typename T>
  static T of(T a, T b) {
    return b < a || b != b ? b : a;  // b != b: a NaN
  }
};

struct Max {
  template <typename T>
  static T of(T a, T b) {
    return b > a || b != b ? b : a;
  }
};

struct BitAnd {
  template <typename T>
  static T of(T a, T b) {
    return static_cast<T>(a & b);
  }
};

struct BitOr {
  template <typename T>
  static T of(T a, T b) {
    return static_cast<T>(a | b);
  }
};

struct BitXor {
  template <typename T>
  static T of(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

template <typename Format>
typename Format::Value load(const std::byte* from, std::size_t index) {
  typename Format::Stored stored;
  std::memcpy(&stored, from + index * sizeof stored, sizeof stored);
  return Format::load(stored);
}

template <typename Format, typename Operator>
void combine_as(std::span<const std::byte* const> sources, std::size_t elements,
                std::byte* result) {
  std::array<typename Format::Value, kBlock> values;
  for (std::size_t begin = 0; begin < elements; begin += kBlock) {
    const std::size_t count = std::min(kBlock, elements - begin);
    for (std::size_t i = 0; i < count; ++i) {
      values[i] = load<Format>(sources.front(), begin + i);
    }
    for (const std::byte* const source : sources.subspan(1)) {
      for (std::size_t i = 0; i < count; ++i) {
        values[i] = Operator::of(values[i], load<Format>(source, begin + i));
      }
    }
    for (std::size_t i = 0; i < count; ++i) {
      const typename Format::Stored stored = Format::store(values[i]);
      std::memcpy(result + (begin + i) * sizeof stored, &stored, sizeof stored);
    }
  }
}

using Function = void (*)(std::span<const std::byte* const>, std::size_t, std::byte*);

template <typename Format>
Function function_of(Combiner combiner) {
  using Value = typename Format::Value;
  if constexpr (!kIsComplex<Value>) {
    if (combiner == Combiner::min) {
      return &combine_as<Format, Min>;
    }
    if (combiner == Combiner::max) {
      return &combine_as<Format, Max>;
    }
  }
  if constexpr (std::is_integral_v<Value>) {
    switch (combiner) {
      case Combiner::bit_and:
        return &combine_as<Format, BitAnd>;
      case Combiner::bit_or:
        return &combine_as<Format, BitOr>;
      case Combiner::bit_xor:
        return &combine_as<Format, BitXor>;
      default:
        break;
    }
  }
  switch (combiner) {
    case Combiner::sum:
      return &combine_as<Format, Sum>;
    case Combiner::product:
      return &combine_as<Format, Product>;
    default:
      return nullptr;
  }
}

Function function_of(ElementType type, Combiner combiner) {
  switch (type) {
    case ElementType::opaque:
      return nullptr;
    case ElementType::boolean:
      return function_of<Boolean>(combiner);
    case ElementType::u8:
      return function_of<Plain<std::uint8_t>>(combiner);
    case ElementType::i8:
      return function_of<Plain<std::int8_t>>(combiner);
    case ElementType::u16:
      return function_of<Plain<std::uint16_t>>(combiner);
    case ElementType::i16:
      return function_of<Plain<std::int16_t>>(combiner);
    case ElementType::u32:
      return function_of<Plain<std::uint32_t>>(combiner);
    case ElementType::i32:
      return function_of<Plain<std::int32_t>>(combiner);
    case ElementType::u64:
      return function_of<Plain<std::uint64_t>>(combiner);
    case ElementType::i64:
      return function_of<Plain<std::int64_t>>(combiner);
    case ElementType::f16:
      return function_of<F16>(combiner);
    case ElementType::bf16:
      return function_of<Bf16>(combiner);
    case ElementType::f32:
      return function_of<Plain<float>>(combiner);
    case ElementType::f64:
      return function_of<Plain<double>>(combiner);
    case ElementType::c64:
      return function_of<Plain<std::complex<float>>>(combiner);
    case ElementType::c128:
      return function_of<Plain<std::complex<double>>>(combiner);
  }
  return nullptr;
}

}  // namespace

std::size_t size_of(ElementType type) noexcept {
  static constexpr std::array<std::size_t, kElementTypes> kSizes = {1, 1, 1, 1, 2, 2, 4, 4,
                                                                    8, 8, 2, 2, 4, 8, 8, 16};
  return kSizes[static_cast<std::size_t>(type)];
}

std::string_view name_of(ElementType type) noexcept {
  static constexpr std::array<std::string_view, kElementTypes> kNames = {
      "bytes",  "bool",  "uint8",   "int8",     "uint16",  "int16",   "uint32",    "int32",
      "uint64", "int64", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"};
  return kNames[static_cast<std::size_t>(type)];
}

std::string_view name_of(Combiner combiner) noexcept {
  static constexpr std::array<std::string_view, kCombiners> kNames = {
      "", "SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"};
  return kNames[static_cast<std::size_t>(combiner)];
}

bool can_combine(ElementType type, Combiner combiner) noexcept {
  return function_of(type, combiner) != nullptr;
}

void combine(ElementType type, Combiner combiner, std::span<const std::byte* const> sources,
             std::size_t elements, std::byte* result) {
  function_of(type, combiner)(sources, elements, result);
}

}  // namespace distro::exchange
