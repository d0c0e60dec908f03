#include "plugins/weights.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "plugins/fingerprint.h"
#include "plugins/weights_state.h"
#include "plugins/weights_tile.h"

namespace distro::plugins {

WeightsCodec::WeightsCodec(Geometry geometry, WeightsConfig config)
    : state_(std::make_unique<WeightsState>(std::move(geometry), config)) {}
WeightsCodec::~WeightsCodec() = default;
WeightsCodec::WeightsCodec(WeightsCodec&&) noexcept = default;
WeightsCodec& WeightsCodec::operator=(WeightsCodec&&) noexcept = default;

const Geometry& WeightsCodec::geometry() const noexcept { return state_->geometry; }

std::optional<std::size_t> WeightsCodec::first_non_finite(Views x) {
  check(state_->geometry, x);
  return state_->find_non_finite(x);
}

std::optional<std::size_t> WeightsCodec::begin(Views x) {
  WeightsState& state = *state_;
  check(state.geometry, x);
  if (const auto bad = state.find_non_finite(x)) {
    return bad;
  }
  for (std::size_t turn = 0; turn < state.geometry.turns(); ++turn) {
    state.for_each_tile(turn, [&](const Tile& tile, std::size_t, WeightsState::RunResult&) {
      adopt_tile(state.kernels, state.geometry, tile, x, state.w.data() + tile.begin);
    });
  }
  state.r.fill_zeros();
  state.pending =
      WeightsState::Values();  // on all ranks: who has P writes other weights than who has none
  rehash();
  return std::nullopt;
}

Step WeightsCodec::advance(Views x, std::uint64_t number, const Due* due, float share_before,
                           float share_after) {
  check(state_->geometry, x);
  if (due != nullptr) {
    check(state_->geometry, *due);
  }
  return state_->step(number, {x, &share_before, due, true, &share_after});
}

Step WeightsCodec::follow(Views x, std::uint64_t number, const Due* due, float share_before,
                          float share_after) {
  check(state_->geometry, x);
  if (due != nullptr) {
    check(state_->geometry, *due);
  }
  return state_->step(number, {x, &share_before, due, false, &share_after});
}

Step WeightsCodec::encode(Views x, std::uint64_t number, float share_before) {
  check(state_->geometry, x);
  return state_->step(number, {x, &share_before, nullptr, true, nullptr});
}

void WeightsCodec::settle(Views x, const Due& due, float share_after) {
  check(state_->geometry, x);
  check(state_->geometry, due);
  WeightsState& state = *state_;
  const bool derive = !state.r.kept();
  state.keep_pending(due);
  state.keep_residual(x, share_after);
  const WeightsState::Pass pass{
      x, nullptr, &due, false, &share_after, derive, derive || state.encoded_ahead};
  if (!state.run(due.turn(), pass).finite) {
    throw std::logic_error("weights have changed between encode() and settle()");
  }
  state.all_left(x, share_after);
}

void WeightsCodec::apply(const Due& due) {
  check(state_->geometry, due);
  state_->keep_pending(due);
  state_->run(due.turn(), {{}, nullptr, &due, false, nullptr});
}

void WeightsCodec::leave(Views x, float share) {
  check(state_->geometry, x);
  constexpr float kAll = 1.0F;
  if (!state_->r.kept() && share != 0.0F) {
    reshare(x, kAll, share);  // R is in x
    return;
  }
  for (std::size_t turn = 0; turn < state_->geometry.turns(); ++turn) {
    state_->run(turn, {x, nullptr, nullptr, false, &share});
  }
  state_->drop_residual(x, share);
}

void WeightsCodec::reshare(Views x, float share_before, float share_after) {
  check(state_->geometry, x);
  state_->keep_residual(x, share_after);
  const bool derive = state_->derives(x, share_before);
  for (std::size_t turn = 0; turn < state_->geometry.turns(); ++turn) {
    state_->run(turn, {x, &share_before, nullptr, false, &share_after, derive, derive});
  }
  state_->drop_residual(x, share_after);
}

std::vector<std::byte> WeightsCodec::empty_record(std::uint64_t number) const {
  const RecordCoder& coder = state_->coders[state_->geometry.turn_of(number)];
  return in_arena(state_->arena, [&] { return coder.empty(); });
}

ParsedRecord WeightsCodec::parse(std::span<const std::byte> body, std::uint64_t number) const {
  const std::size_t turn = state_->geometry.turn_of(number);
  ParsedRecord record = in_arena(state_->arena, [&] { return state_->coders[turn].parse(body); });
  record.turn = turn;
  return record;
}

std::uint64_t WeightsCodec::checksum() const noexcept { return state_->checksum; }

std::vector<float> WeightsCodec::reference(std::size_t tensor) const {
  return state_->of_tensor(tensor, state_->w);
}

std::vector<float> WeightsCodec::residual(std::size_t tensor) const {
  return state_->residual_of_tensor(tensor);
}

std::vector<TensorState> WeightsCodec::state(Views x, float share) {
  WeightsState& state = *state_;
  check(state.geometry, x);
  const bool derive = state.derives(x, share);
  WeightsState::Values r(state.geometry.elements());
  if (state.r.kept()) {
    state.r.read(0, r);
  }
  for (std::size_t turn = 0; turn < state.geometry.turns(); ++turn) {
    state.for_each_tile(turn, [&](const Tile& tile, std::size_t, WeightsState::RunResult&) {
      TileBuffer buffer;
      float* const tile_r = r.data() + tile.begin;
      if (!absorb_tile(state.kernels, state.geometry, tile, x, state.arrived(tile, buffer), tile_r,
                       derive ? nullptr : &share)) {
        std::fill_n(tile_r, tile.elements, std::numeric_limits<float>::quiet_NaN());
      }
    });
  }
  std::vector<TensorState> result;
  for (std::size_t tensor = 0; tensor < state.geometry.tensors(); ++tensor) {
    result.push_back(
        {reference(tensor), state.of_tensor(tensor, r),
         state.pending.empty() ? std::vector<float>{} : state.of_tensor(tensor, state.pending)});
  }
  return result;
}

std::uint64_t WeightsCodec::fingerprint(Views x, std::uint64_t number) {
  check(state_->geometry, x);
  return plugins::fingerprint(part_of(x, number));
}

void WeightsCodec::restore_state(std::size_t tensor, std::span<const float> reference,
                                 std::span<const float> residual, std::span<const float> pending) {
  WeightsState& state = *state_;
  check_state(state.geometry, state.kernels, tensor, reference, residual, pending);
  state.to_tensor(tensor, reference, state.w);
  state.r.keep(state.geometry.elements());
  state.residual_to_tensor(tensor, residual);
  if (!pending.empty() && state.spread_steps > 0) {
    state.pending.resize(state.geometry.elements());
    state.to_tensor(tensor, pending, state.pending);
  } else if (!state.pending.empty()) {
    state.to_tensor(tensor, std::vector<float>(reference.size()), state.pending);
  }
}

void WeightsCodec::rehash() {
  WeightsState& state = *state_;
  state.checksum = 0;
  for (std::size_t turn = 0; turn < state.geometry.turns(); ++turn) {
    state.for_each_tile(turn, [&](const Tile& tile, std::size_t, WeightsState::RunResult& result) {
      result.checksum +=
          state.kernels.checksum(state.w.data() + tile.begin, tile.elements, tile.begin);
    });
    for (std::size_t run = 0; run < state.geometry.runs(turn).size(); ++run) {
      state.checksum += state.results[run].checksum;
    }
  }
}

std::unique_ptr<ModuleCodec> make_host_codec(Geometry geometry, const WeightsConfig& config) {
  return std::make_unique<WeightsCodec>(std::move(geometry), config);
}

}  // namespace distro::plugins
