#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "plugins/module_codec.h"

namespace distro::plugins {

/// Entries kept of each 4096 weights that are looked at: all that are kept of `turns` times as
/// many.
[[nodiscard]] std::uint32_t kept_of_turn(std::uint32_t k, std::size_t turns) noexcept;

/// How many turns weights take by default: the more, the less is looked at in an exchange and the
/// fewer bits an index costs. Of what is looked at, a sixteenth is sent at most, so that a
/// selection remains one.
[[nodiscard]] std::size_t default_turns(std::uint32_t k) noexcept;

/// Over how many steps comes what a gain adds to a mean of moves by default (Spread; 0: at once).
/// The more of a tile is sent at each step, the sooner all participants send the same entry, and
/// the longer it takes until each has seen what the others' entries did.
/// integration/studies/grids/spread.json compares.
[[nodiscard]] std::uint32_t default_spread_steps(std::uint32_t k, int delay) noexcept;

/// What a participant's unsent moves count in its own weights by default, of 1. `sent`: what they
/// count when they have been sent, gain * weight of the participant. That is the answer where few
/// entries are sent at a time: then sending changes nothing for the sender. Where a gain is spread
/// it is 1, for then the mean counts in full at once. Without a gain, but with k above 64, it is at
/// least 1/2: ranks that hardly see their own moves go on in a direction until these come back to
/// them from all, and where many are sent that is too far. integration/studies/grids/share.json
/// compares.
[[nodiscard]] float default_share(float sent, float gain, std::uint32_t k,
                                  std::uint32_t spread_steps) noexcept;

/// Step::move_mean, of the sum of |move| over the turn of exchange `number`: its weights have moved
/// since their last turn.
[[nodiscard]] double mean_move(const Geometry& geometry, std::uint64_t number, double sum) noexcept;

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
  struct State;
  std::unique_ptr<State> state_;
};

/// The factory of codecs in host memory.
[[nodiscard]] std::unique_ptr<ModuleCodec> make_host_codec(Geometry geometry,
                                                           const WeightsConfig& config);

}  // namespace distro::plugins
