#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "plugins/module_codec.h"

namespace distro::plugins {

struct WeightsState;

/// The `weights` mode codec of one module in host memory (README.md, "How it works": reference W,
/// residual R, top k of R by tile): W and R lie there, and x does.
///
/// Work runs as oneTBB tasks over runs of tiles.
class WeightsCodec final : public ModuleCodec {
 public:
  WeightsCodec(Geometry geometry, WeightsConfig config);
  ~WeightsCodec() override;
  WeightsCodec(WeightsCodec&&) noexcept;
  WeightsCodec& operator=(WeightsCodec&&) noexcept;

  [[nodiscard]] const Geometry& geometry() const noexcept override;
  [[nodiscard]] std::optional<std::size_t> first_non_finite(Views x) override;
  std::optional<std::size_t> begin(Views x) override;
  Step advance(Views x, std::uint64_t number, const Due* due, float share_before,
               float share_after) override;
  Step follow(Views x, std::uint64_t number, const Due* due, float share_before,
              float share_after) override;
  Step encode(Views x, std::uint64_t number, float share_before) override;
  void settle(Views x, const Due& due, float share_after) override;
  void apply(const Due& due) override;
  void leave(Views x, float share) override;
  void reshare(Views x, float share_before, float share_after) override;
  [[nodiscard]] std::vector<std::byte> empty_record(std::uint64_t number) const override;
  [[nodiscard]] ParsedRecord parse(std::span<const std::byte> body,
                                   std::uint64_t number) const override;
  [[nodiscard]] std::uint64_t checksum() const noexcept override;
  [[nodiscard]] std::vector<TensorState> state(Views x, float share) override;
  [[nodiscard]] std::uint64_t fingerprint(Views x, std::uint64_t number) override;
  void restore_state(std::size_t tensor, std::span<const float> reference,
                     std::span<const float> residual, std::span<const float> pending) override;
  void rehash() override;

  /// A copy of W and R of tensor i, in the tensor's element order; of R what is kept of it (zeros
  /// where derives_residual(): state() has it).
  [[nodiscard]] std::vector<float> reference(std::size_t tensor) const;
  [[nodiscard]] std::vector<float> residual(std::size_t tensor) const;

 private:
  std::unique_ptr<WeightsState> state_;
};

/// The factory of codecs in host memory.
[[nodiscard]] std::unique_ptr<ModuleCodec> make_host_codec(Geometry geometry,
                                                           const WeightsConfig& config);

}  // namespace distro::plugins
