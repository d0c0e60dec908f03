#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/aligned.h"
#include "kernels/kernels.h"
#include "plugins/record.h"
#include "plugins/tensor_view.h"

namespace distro::plugins {

/// ef: error feedback; the result is the mean. demo: DeMo (arXiv 2411.19870), for plain SGD: the
/// mean over the ranks that sent a coefficient, and the sign of the decoded result.
enum class GradientMethod : std::uint8_t { ef, demo };

/// dct: 64 x 64 blocks in the transform domain (orthonormal DCT-II). none: the elements themselves.
enum class Transform : std::uint8_t { dct, none };

/// How gradients are compressed; the same on all ranks but for isa, which changes no bit.
struct GradientConfig {
  GradientMethod method = GradientMethod::ef;
  std::uint32_t k = 6;           ///< Coefficients kept per 4096.
  std::uint32_t value_bits = 1;  ///< 1: sign x shared scale; 32: exact fp32 values.
  Transform transform = Transform::dct;
  float beta = 1.0F;  ///< Decay of the residual at each step, 0 to 1.
  kernels::Isa isa = kernels::Isa::scalar;
};

/// What one rank has not sent yet of one tensor's gradients: coefficients in tile order, as many as
/// the tensor has elements, all finite. Belongs to the tensor, not to the bucket that carries it:
/// DDP rebuilds its buckets after the first iteration.
struct Residual {
  kernels::HugeVector<float> coefficients;  ///< Empty before the first encode.
};

/// This rank's own record, unpacked.
struct OwnRecord : ParsedRecord {
  /// What the residual held at each entry before the entry was taken out: adding the entry again
  /// would not always give it back.
  std::vector<float> before;
};

/// What encode() made.
struct EncodedGradients {
  std::vector<std::byte> record;  ///< The record's body, ready for the wire.
  OwnRecord own;                  ///< The same, unpacked.
  /// Tensors with a non-finite gradient (of magnitude kernels::kLargestWeight or more, infinite, or
  /// NaN), ascending. They have no entries in the record, and their
  /// residual is as it was.
  std::vector<std::uint32_t> non_finite;
};

/// The codec of one list of gradient tensors that are reduced together (a DDP bucket, a flat
/// tensor). From call to call it keeps scratch memory only: the residuals are the caller's, so that
/// they survive a new grouping of the tensors.
///
/// Each tensor has tiles of its own. Dimensions of one element count for nothing. A tensor of two
/// dimensions or more is cut as the matrix (first dimension x all others) into blocks of at most 64
/// x 64, strip by strip; partial blocks at its edges have a DCT of their own size. A tensor of one
/// dimension is taken as rows of 64, its last, shorter row being a block of its own. As many
/// consecutive blocks as have at most 4096 elements together are a tile: they share a selection.
///
/// Work runs as oneTBB tasks inside the caller's arena. Every function may be called from one
/// thread at a time.
class GradientCodec {
 public:
  /// shapes[i]: dimensions of tensor i; a tensor may have none (one element) or no elements. Throws
  /// std::invalid_argument on a negative dimension, k, value_bits or beta out of range.
  GradientCodec(std::vector<std::vector<std::int64_t>> shapes, GradientConfig config);
  ~GradientCodec();
  GradientCodec(GradientCodec&&) noexcept;
  GradientCodec& operator=(GradientCodec&&) noexcept;

  [[nodiscard]] std::size_t tensors() const noexcept;
  [[nodiscard]] std::size_t tensor_elements(std::size_t tensor) const noexcept;

  /// Per tensor: M = beta * M + transform(gradient); the k largest coefficients of each tile are
  /// quantised, taken out of M and put into the record. `gradients`: dense, in the shapes' order;
  /// read only. `residuals`: one a tensor; an empty one becomes zeros first.
  EncodedGradients encode(std::span<const TensorView> gradients,
                          std::span<Residual* const> residuals) const;

  /// Check and unpack a record body that a peer sent. Memory is bounded by the layout. Throws
  /// RecordError on any malformed byte.
  [[nodiscard]] ParsedRecord parse(std::span<const std::byte> body) const;

  /// Every rank's record, in rank order and with weights that sum to 1, becomes the result in
  /// `out`: one inverse transform a tile, the same bits on all ranks (demo: signs). Tensors in
  /// `non_finite` (ascending: those of any rank) become NaN instead.
  void decode(std::span<const Contribution> contributions,
              std::span<const std::uint32_t> non_finite, std::span<const TensorView> out) const;

  /// Put this rank's own entries of these tensors back into their residuals, which then have the
  /// bits that they had before anything was taken out: the step is void for them, because some
  /// rank's gradient is not finite. For the residuals' last encode() only.
  void take_back(const OwnRecord& own, std::span<const std::uint32_t> non_finite,
                 std::span<Residual* const> residuals) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace distro::plugins
