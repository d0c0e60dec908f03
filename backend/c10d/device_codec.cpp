#include "backend/c10d/device_codec.h"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>

#include "backend/c10d/device_state.h"
#include "backend/c10d/tensors.h"
#include "plugins/fingerprint.h"

namespace distro::c10d_backend {
namespace {

std::unique_ptr<DeviceState> make_state(plugins::Geometry geometry,
                                        const plugins::WeightsConfig& config, at::Device device) {
  const LastingArithmetic plain;
  return std::make_unique<DeviceState>(std::move(geometry), config, device);
}

}  // namespace

DeviceCodec::DeviceCodec(plugins::Geometry geometry, const plugins::WeightsConfig& config,
                         at::Device device)
    : state_(make_state(std::move(geometry), config, device)) {}
DeviceCodec::~DeviceCodec() = default;

const plugins::Geometry& DeviceCodec::geometry() const noexcept { return state_->geometry; }

std::uint64_t DeviceCodec::checksum() const noexcept { return state_->checksum; }

std::optional<std::size_t> DeviceCodec::first_non_finite(Views x) {
  check(state_->geometry, x);
  const LastingArithmetic plain;
  // One reduction and one small copy to the host for each type.
  std::array<std::vector<at::Tensor>, 4> tensors;
  std::array<std::vector<std::size_t>, 4> which;
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (x[i].elements > 0) {
      const auto type = static_cast<std::size_t>(x[i].dtype);
      tensors[type].push_back(tensor_of(x[i], state_->device));
      which[type].push_back(i);
    }
  }
  std::optional<std::size_t> first;
  for (std::size_t type = 0; type < tensors.size(); ++type) {
    if (tensors[type].empty()) {
      continue;
    }
    const auto largest = at::_foreach_norm(tensors[type], std::numeric_limits<double>::infinity());
    const at::Tensor host = to_host(at::stack(largest).to(at::kDouble));
    for (std::size_t i = 0; i < largest.size(); ++i) {
      const double magnitude = host.const_data_ptr<double>()[i];
      // Written so that a NaN fails it.
      if (!(magnitude < static_cast<double>(kernels::kLargestWeight))) {
        first = std::min(first.value_or(which[type][i]), which[type][i]);
      }
    }
  }
  return first;
}

std::optional<std::size_t> DeviceCodec::begin(Views x) {
  if (const auto bad = first_non_finite(x)) {
    return bad;
  }
  const LastingArithmetic plain;
  for (std::size_t turn = 0; turn < state_->turns.size(); ++turn) {
    for (const auto& chunk : state_->chunks(turn, x)) {
      state_->w.narrow(0, chunk.begin, chunk.slots).copy_(chunk.weights());
    }
  }
  state_->r.fill_zeros();
  state_->pending = at::Tensor();
  rehash();
  return std::nullopt;
}

plugins::Step DeviceCodec::step(Views x, std::uint64_t number, const plugins::Due* due,
                                float share_before, const float* share_after, bool selects) {
  check(state_->geometry, x);
  if (due != nullptr) {
    check(state_->geometry, *due);
  }
  const LastingArithmetic plain;
  const std::size_t turn = state_->geometry.turn_of(number);
  const DeviceState::Chunks of_turn = state_->chunks(turn, x);
  // The weights of the exchange that is due had the turn before.
  const bool two_turns = due != nullptr && due->turn() != turn;
  const DeviceState::Chunks of_due =
      two_turns ? state_->chunks(due->turn(), x) : DeviceState::Chunks{};
  if (due != nullptr) {
    state_->keep_pending(*due);
  }
  if (share_after != nullptr) {
    state_->keep_residual(x, *share_after);
  }
  const bool derive = state_->derives(x, share_before);
  state_->encoded_ahead = derive;
  const bool touched_only = share_after != nullptr && state_->touches_only(x, *share_after, derive);
  if (!DeviceState::finite({&of_turn, &of_due})) {
    return {{}, 0.0, first_non_finite(x)};
  }
  if (two_turns) {
    const std::size_t before = due->turn();
    const at::Tensor residual = state_->open(before, derive);
    static_cast<void>(state_->absorb(before, of_due, share_before, residual));
    const at::Tensor touched = state_->exchange(*due, residual);
    state_->close(before, residual);
    state_->restore(before, of_due, residual, *share_after, touched_only ? &touched : nullptr);
  }
  const at::Tensor residual = state_->open(turn, derive);
  const at::Tensor moved = state_->absorb(turn, of_turn, share_before, residual);
  const bool of_turn_is_due = due != nullptr && !two_turns;
  at::Tensor touched;
  if (of_turn_is_due) {
    touched = state_->exchange(*due, residual);
  }
  const at::Tensor keys = selects ? state_->selection.keys(residual) : at::Tensor();
  state_->close(turn, residual);
  // Rounding R may take x over to the next number of its type.
  const bool rounds = state_->r.kept() && state_->r.rounds();
  if (share_after != nullptr &&
      (of_turn_is_due || rounds || plugins::restores(share_before, *share_after))) {
    // Before the host waits for the keys.
    state_->restore(turn, of_turn, residual, *share_after, touched_only ? &touched : nullptr);
  }
  plugins::Step step;
  if (selects) {
    step.record = state_->write(turn, to_host(keys));
  }
  step.move_mean = plugins::mean_move(state_->geometry, number, moved.item<double>());
  if (share_after != nullptr) {
    state_->all_left(x, *share_after);
  }
  return step;
}

plugins::Step DeviceCodec::advance(Views x, std::uint64_t number, const plugins::Due* due,
                                   float share_before, float share_after) {
  return step(x, number, due, share_before, &share_after, true);
}

plugins::Step DeviceCodec::follow(Views x, std::uint64_t number, const plugins::Due* due,
                                  float share_before, float share_after) {
  return step(x, number, due, share_before, &share_after, false);
}

plugins::Step DeviceCodec::encode(Views x, std::uint64_t number, float share_before) {
  return step(x, number, nullptr, share_before, nullptr, true);
}

void DeviceCodec::settle(Views x, const plugins::Due& due, float share_after) {
  check(state_->geometry, x);
  check(state_->geometry, due);
  const LastingArithmetic plain;
  const bool derive = !state_->r.kept();
  state_->keep_pending(due);
  state_->keep_residual(x, share_after);
  const std::size_t turn = due.turn();
  const DeviceState::Chunks of_turn = state_->chunks(turn, x);
  if (derive && !DeviceState::finite({&of_turn})) {
    throw std::logic_error("weights have changed between encode() and settle()");
  }
  const at::Tensor residual = state_->open(turn, derive);
  if (derive) {
    static_cast<void>(state_->absorb(turn, of_turn, share_after, residual));
  }
  const at::Tensor touched = state_->exchange(due, residual);
  state_->close(turn, residual);
  const bool touched_only = state_->touches_only(x, share_after, derive || state_->encoded_ahead);
  state_->restore(turn, of_turn, residual, share_after, touched_only ? &touched : nullptr);
  state_->all_left(x, share_after);
}

void DeviceCodec::apply(const plugins::Due& due) {
  check(state_->geometry, due);
  const LastingArithmetic plain;
  state_->keep_pending(due);
  static_cast<void>(state_->move_reference(due));
  if (state_->r.kept()) {
    const at::Tensor residual = state_->open(due.turn(), false);
    state_->take_from(residual, *due.contributions[due.own].record);
    state_->close(due.turn(), residual);
  }
}

void DeviceCodec::leave(Views x, float share) {
  check(state_->geometry, x);
  constexpr float kAll = 1.0F;
  if (!state_->r.kept() && share != 0.0F) {
    reshare(x, kAll, share);  // R is in x
    return;
  }
  const LastingArithmetic plain;
  for (std::size_t turn = 0; turn < state_->turns.size(); ++turn) {
    state_->restore(turn, state_->chunks(turn, x), state_->open(turn, false), share, nullptr);
  }
  state_->drop_residual(x, share);
}

void DeviceCodec::reshare(Views x, float share_before, float share_after) {
  check(state_->geometry, x);
  const LastingArithmetic plain;
  state_->keep_residual(x, share_after);
  const bool derive = state_->derives(x, share_before);
  for (std::size_t turn = 0; turn < state_->turns.size(); ++turn) {
    const DeviceState::Chunks of_turn = state_->chunks(turn, x);
    const at::Tensor residual = state_->open(turn, derive);
    static_cast<void>(state_->absorb(turn, of_turn, share_before, residual));
    state_->close(turn, residual);
    if (!state_->touches_only(x, share_after, derive)) {
      state_->restore(turn, of_turn, residual, share_after, nullptr);
    }
  }
  state_->drop_residual(x, share_after);
}

std::vector<std::byte> DeviceCodec::empty_record(std::uint64_t number) const {
  const plugins::RecordCoder& coder = state_->turns[state_->geometry.turn_of(number)].coder;
  return plugins::in_arena(state_->config.arena, [&] { return coder.empty(); });
}

plugins::ParsedRecord DeviceCodec::parse(std::span<const std::byte> body,
                                         std::uint64_t number) const {
  const std::size_t turn = state_->geometry.turn_of(number);
  plugins::ParsedRecord record = plugins::in_arena(
      state_->config.arena, [&] { return state_->turns[turn].coder.parse(body); });
  record.turn = turn;
  return record;
}

std::vector<plugins::TensorState> DeviceCodec::state(Views x, float share) {
  check(state_->geometry, x);
  const LastingArithmetic plain;
  const bool derive = state_->derives(x, share);
  at::Tensor residual = at::empty_like(state_->w);
  for (std::size_t turn = 0; turn < state_->turns.size(); ++turn) {
    const at::Tensor of_turn = state_->of_turn(residual, turn);
    if (derive) {
      of_turn.zero_();
    } else {
      of_turn.copy_(state_->of_turn(state_->r.memory(), turn));
    }
    static_cast<void>(state_->absorb(turn, state_->chunks(turn, x), share, of_turn));
  }
  residual = residual.cpu();
  const at::Tensor reference = state_->w.cpu();
  const at::Tensor pending = state_->pending.defined() ? state_->pending.cpu() : at::Tensor();
  const auto of_tensor = [&](std::size_t tensor, const at::Tensor& slots) {
    const auto n = static_cast<std::int64_t>(state_->geometry.tensor_elements(tensor));
    const at::Tensor values = at::empty({n}, at::kFloat);
    for (const DeviceState::Turn& turn : state_->turns) {
      turn.layout.take(tensor, slots, values);
    }
    const auto* const data = values.const_data_ptr<float>();
    return std::vector<float>(data, data + n);
  };
  std::vector<plugins::TensorState> result;
  for (std::size_t tensor = 0; tensor < state_->geometry.tensors(); ++tensor) {
    result.push_back({of_tensor(tensor, reference), of_tensor(tensor, residual),
                      pending.defined() ? of_tensor(tensor, pending) : std::vector<float>{}});
  }
  return result;
}

std::uint64_t DeviceCodec::fingerprint(Views x, std::uint64_t number) {
  check(state_->geometry, x);
  const LastingArithmetic plain;
  // One copy to the host for each type.
  std::vector<plugins::TensorView> part = plugins::part_of(x, number);
  std::array<std::vector<at::Tensor>, 4> tensors;
  std::array<std::vector<std::size_t>, 4> which;
  for (std::size_t i = 0; i < part.size(); ++i) {
    const auto type = static_cast<std::size_t>(part[i].dtype);
    tensors[type].push_back(tensor_of(part[i], state_->device));
    which[type].push_back(i);
  }
  std::vector<at::Tensor> copies;
  for (std::size_t type = 0; type < tensors.size(); ++type) {
    if (tensors[type].empty()) {
      continue;
    }
    copies.push_back(to_host(at::cat(tensors[type])));
    const plugins::TensorView copy = view_of(copies.back());
    std::size_t begin = 0;
    for (const std::size_t i : which[type]) {
      part[i].data = address(copy, begin);
      begin += part[i].elements;
    }
  }
  return plugins::fingerprint(part);
}

void DeviceCodec::restore_state(std::size_t tensor, std::span<const float> reference,
                                std::span<const float> residual, std::span<const float> pending) {
  check_state(state_->geometry, kernels::table(state_->config.isa), tensor, reference, residual,
              pending);
  const LastingArithmetic plain;
  state_->r.keep();
  if (!pending.empty() && state_->config.spread_steps > 0 && !state_->pending.defined()) {
    state_->pending = at::zeros_like(state_->w);
  }
  const at::Tensor w = to_device(reference, state_->device);
  const at::Tensor r = to_device(residual, state_->device);
  const at::Tensor p = pending.empty() ? at::zeros_like(w) : to_device(pending, state_->device);
  for (const DeviceState::Turn& turn : state_->turns) {
    turn.layout.put(tensor, w, state_->w);
    turn.layout.put(tensor, r, state_->r.memory());
    if (state_->pending.defined()) {
      turn.layout.put(tensor, p, state_->pending);
    }
  }
}

void DeviceCodec::rehash() {
  const LastingArithmetic plain;
  const at::Tensor host = state_->w.cpu();
  const auto& kernel = kernels::table(state_->config.isa);
  state_->checksum = 0;
  for (std::size_t turn = 0; turn < state_->turns.size(); ++turn) {
    const float* const w = host.const_data_ptr<float>() + state_->turns[turn].layout.first_slot();
    std::vector<std::uint64_t> sums(state_->geometry.runs(turn).size());
    state_->for_each_run(turn, [&](std::size_t run, const plugins::TileRun& tiles) {
      for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
        const auto& tile = state_->geometry.tiles(turn)[t];
        sums[run] += kernel.checksum(w + t * kernels::kTileElements, tile.elements, tile.begin);
      }
    });
    for (const std::uint64_t sum : sums) {
      state_->checksum += sum;
    }
  }
}

plugins::CodecFactory device_codecs(at::Device device) {
  return [device](plugins::Geometry geometry, const plugins::WeightsConfig& config) {
    return std::make_unique<DeviceCodec>(std::move(geometry), config, device);
  };
}

}  // namespace distro::c10d_backend
