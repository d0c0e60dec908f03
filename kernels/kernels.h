#pragma once

#include <cstddef>
#include <cstdint>

/// The mathematics of the exchange on flat memory. Pure noexcept functions on memory that the
/// caller owns: no allocation, no threads, no I/O. One body (kernels/cpu/body.inc) is compiled
/// once per instruction set, with floating-point contraction off and in a fixed order, so that
/// every table below gives the same bits.
namespace distro::kernels {

/// Consecutive weights that share one selection.
inline constexpr std::size_t kTileElements = 4096;

inline constexpr std::size_t kCacheLineBytes = 64;

enum class Isa : std::uint8_t { scalar, avx2, avx512 };

/// Element type of the script's weights and gradients. The reference and the residual are always
/// f32.
enum class DType : std::uint8_t { f32, f64, f16, bf16 };

[[nodiscard]] constexpr std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::f32:
      return 4;
    case DType::f64:
      return 8;
    case DType::f16:
    case DType::bf16:
      return 2;
  }
  return 0;
}

/// A weight or gradient of this magnitude or more counts as non-finite: a run that is there has
/// diverged, and below it no sum or difference of weights, moves or gradients that the codecs form
/// can overflow.
inline constexpr float kLargestWeight = 0x1p100F;

/// How a result is written.
enum class Store : std::uint8_t {
  cached,
  /// Past the caches where it has whole cache lines, which are then not read before: for results
  /// that are larger than the caches and are read much later.
  streamed,
};

/// One instruction set's functions. n <= kTileElements everywhere; pointers need their type's
/// alignment only.
struct KernelTable {
  Isa isa;

  /// r += x - round(w + share * r), where round() is to x's type: what the optimizer did since
  /// restore(). f64 works in f64 on the promoted w and r, and rounds the move to f32. Returns the
  /// sum of |move|: 16 fp32 lanes, added in lane order.
  double (*absorb)(DType dtype, const void* x, const float* w, float* r, std::size_t n,
                   float share) noexcept;

  /// r = x - round(w): absorb() where r was zero, whatever its memory holds.
  double (*derive)(DType dtype, const void* x, const float* w, float* r, std::size_t n) noexcept;

  /// x = round(w + share * r), to x's type.
  void (*restore)(DType dtype, void* x, const float* w, const float* r, std::size_t n,
                  float share) noexcept;

  /// Whether all |x| < kLargestWeight. Reads x once and writes nothing.
  bool (*finite)(DType dtype, const void* x, std::size_t n) noexcept;

  /// w = x rounded to f32. Returns whether all |x| < kLargestWeight.
  bool (*adopt)(DType dtype, const void* x, float* w, std::size_t n) noexcept;

  /// The k non-zero entries of r of largest magnitude, ties to the lowest index; ascending indices
  /// into `index` (room for k). Returns how many: k, or fewer when r has fewer non-zero entries.
  /// NaN-free input.
  std::size_t (*select)(const float* r, std::size_t n, std::size_t k,
                        std::uint16_t* index) noexcept;

  /// Sum over j of mix(first + j, bits of w[j]), modulo 2^64: order-independent, so it can be kept
  /// up to date by subtracting an entry's old mix and adding its new one.
  std::uint64_t (*checksum)(const float* w, std::size_t n, std::uint64_t first) noexcept;

  /// w[index[i]] += gain * sum[i], no index twice. Returns what this adds to the checksum of w,
  /// whose entry 0 has the checksum index `first`.
  std::uint64_t (*move)(float* w, const std::uint16_t* index, const float* sum, std::size_t n,
                        float gain, std::uint64_t first) noexcept;

  /// block = x rounded to f32: a rows x columns part of a matrix whose rows are `stride` elements
  /// apart; the block's rows lie side by side.
  void (*gather)(DType dtype, const void* x, std::size_t stride, float* block, std::size_t rows,
                 std::size_t columns) noexcept;

  /// x = block rounded to x's type: the reverse.
  void (*scatter)(DType dtype, const float* block, void* x, std::size_t stride, std::size_t rows,
                  std::size_t columns, Store how) noexcept;

  /// m = beta * m + c.
  void (*decay_and_add)(float* m, const float* c, std::size_t n, float beta) noexcept;

  /// x = 1, 0 or -1 by its sign; 0 for a NaN.
  void (*signs)(float* x, std::size_t n) noexcept;

  /// The orthonormal DCT-II of a block by rows and columns, sides 1 to 64; its rows are `stride`
  /// elements apart. Coefficients lie by columns: that of row frequency u and column frequency v at
  /// coefficients[v * rows + u]. Finite input.
  void (*dct)(const float* block, std::size_t stride, float* coefficients, std::size_t rows,
              std::size_t columns) noexcept;

  /// The inverse of dct(), from the n coefficients at `index` (ascending); all others are zero, and
  /// a zero is as none. The block's rows lie side by side. The fewer coefficients the faster; where
  /// more than a third of the row frequencies of 64 or 32 rows are there, sums go in another order,
  /// and all cost the same.
  void (*inverse_dct)(const std::uint16_t* index, const float* coefficients, std::size_t n,
                      float* block, std::size_t rows, std::size_t columns) noexcept;
};

/// The table of an instruction set; scalar where the CPU lacks it.
[[nodiscard]] const KernelTable& table(Isa isa) noexcept;

/// The best instruction set of this CPU.
[[nodiscard]] Isa best_isa() noexcept;

/// The mix of one entry of checksum().
[[nodiscard]] std::uint64_t mix(std::uint64_t index, float value) noexcept;

}  // namespace distro::kernels
