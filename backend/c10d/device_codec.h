#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "plugins/module_codec.h"

namespace distro::c10d_backend {

struct DeviceState;

/// The `weights` mode codec of a module whose parameters lie on one device: W, P and R, if it is
/// kept, lie there, and every dense operation runs there, by ATen, on the caller's current stream.
/// Of the weights only the selected entries go to the host, W at the entries that an exchange
/// touches, and what a fingerprint is taken of.
///
/// Writes the same records as plugins::WeightsCodec, and holds the same bits, of finite weights
/// (with others both refuse to go on, and differ in what they leave behind): what changes W is
/// computed on the host by the same functions, in participant order, and the device only stores it.
/// The dense operations are single multiplications, additions and roundings, each in a kernel of
/// its own, so that no compiler can contract them (ADR 0013).
///
/// Device-independent: on the CPU device it is an (unhurried) host codec, which is how it is
/// tested.
class DeviceCodec final : public plugins::ModuleCodec {
 public:
  DeviceCodec(plugins::Geometry geometry, const plugins::WeightsConfig& config, at::Device device);
  ~DeviceCodec() override;
  DeviceCodec(const DeviceCodec&) = delete;
  DeviceCodec& operator=(const DeviceCodec&) = delete;

  [[nodiscard]] const plugins::Geometry& geometry() const noexcept override;
  [[nodiscard]] std::optional<std::size_t> first_non_finite(Views x) override;
  std::optional<std::size_t> begin(Views x) override;
  plugins::Step advance(Views x, std::uint64_t number, const plugins::Due* due, float share_before,
                        float share_after) override;
  plugins::Step follow(Views x, std::uint64_t number, const plugins::Due* due, float share_before,
                       float share_after) override;
  plugins::Step encode(Views x, std::uint64_t number, float share_before) override;
  void settle(Views x, const plugins::Due& due, float share_after) override;
  void apply(const plugins::Due& due) override;
  void leave(Views x, float share) override;
  void reshare(Views x, float share_before, float share_after) override;
  [[nodiscard]] std::vector<std::byte> empty_record(std::uint64_t number) const override;
  [[nodiscard]] plugins::ParsedRecord parse(std::span<const std::byte> body,
                                            std::uint64_t number) const override;
  [[nodiscard]] std::uint64_t checksum() const noexcept override;
  [[nodiscard]] std::vector<plugins::TensorState> state(Views x, float share) override;
  [[nodiscard]] std::uint64_t fingerprint(Views x, std::uint64_t number) override;
  void restore_state(std::size_t tensor, std::span<const float> reference,
                     std::span<const float> residual, std::span<const float> pending) override;
  void rehash() override;

 private:
  /// One exchange; null: nothing is due, x is not written. With a due exchange x is written.
  plugins::Step step(Views x, std::uint64_t number, const plugins::Due* due, float share_before,
                     const float* share_after, bool selects);

  std::unique_ptr<DeviceState> state_;
};

/// The factory of codecs on a device.
[[nodiscard]] plugins::CodecFactory device_codecs(at::Device device);

}  // namespace distro::c10d_backend
