// Included by body.inc.h inside its anonymous namespace, once per instruction set; no include
// guard, no std functions (an inline std function compiled with AVX flags could be the copy that
// the linker keeps for everybody).
//
// A format reads an element as float and writes a float as an element. Branch-free on integers, so
// that compilers vectorise it, and without arithmetic on subnormals, so that FTZ and DAZ change
// nothing.

inline std::uint32_t bits_of(float value) { return __builtin_bit_cast(std::uint32_t, value); }
inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

struct F32 {
  using Element = float;
  static float load(float element) { return element; }
  static float store(float value) { return value; }
};

struct Bf16 {
  using Element = std::uint16_t;
  static float load(std::uint16_t element) { return float_of(std::uint32_t{element} << 16); }
  static std::uint16_t store(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    const std::uint32_t nan = (bits >> 16) | 0x40U;
    return static_cast<std::uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? nan : rounded);
  }
};

struct F16 {
  using Element = std::uint16_t;

  static float load(std::uint16_t element) {
    constexpr std::uint32_t kExponent = 0x7c00U << 13;     // f16's exponent field in f32's place
    constexpr std::uint32_t kSmallestNormal = 113U << 23;  // 2^-14
    const std::uint32_t placed = (element & 0x7fffU) << 13;
    const std::uint32_t exponent = placed & kExponent;
    const std::uint32_t normal = placed + (112U << 23);   // rebias 15 to 127
    const std::uint32_t special = placed + (224U << 23);  // 31 to 255
    // A subnormal is m 2^-24: put m under 2^-14 and take 2^-14 away again, exactly.
    const std::uint32_t subnormal =
        bits_of(float_of(kSmallestNormal | placed) - float_of(kSmallestNormal));
    std::uint32_t magnitude = exponent == 0 ? subnormal : normal;
    magnitude = exponent == kExponent ? special : magnitude;
    return float_of(magnitude | (std::uint32_t{element} & 0x8000U) << 16);
  }

  static std::uint16_t store(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    const std::uint32_t odd = (magnitude >> 13) & 1U;
    const std::uint32_t normal = (magnitude - (112U << 23) + 0xfffU + odd) >> 13;
    // Below 2^-14: beside 0.5 an f32 has ulp 2^-24, the unit of f16's subnormals, so that the
    // addition rounds.
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5F) - bits_of(0.5F);
    const std::uint32_t nan = 0x7e00U | ((magnitude >> 13) & 0x3ffU);
    std::uint32_t half = magnitude < (113U << 23) ? subnormal : normal;
    half = magnitude >= 0x47800000U ? 0x7c00U : half;  // 65536 and more
    half = magnitude > 0x7f800000U ? nan : half;
    return static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000U));
  }
};
