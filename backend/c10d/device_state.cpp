#include "backend/c10d/device_state.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "backend/c10d/tensors.h"
#include "kernels/sparse_sum.h"

namespace distro::c10d_backend {
namespace {

constexpr auto kTile = static_cast<std::int64_t>(kernels::kTileElements);

std::int64_t slots_of(const plugins::Geometry& geometry) noexcept {
  std::int64_t tiles = 0;
  for (std::size_t turn = 0; turn < geometry.turns(); ++turn) {
    tiles += static_cast<std::int64_t>(geometry.tiles(turn).size());
  }
  return tiles * kTile;
}

/// W + share * R, in fp64 for fp64 weights: two operations, not one fused.
at::Tensor sum_of(const at::Tensor& w, const at::Tensor& r, float share, at::ScalarType type) {
  const auto scale = static_cast<double>(share);
  return (type == at::kDouble ? r.to(at::kDouble).mul_(scale) : r.mul(scale)).add_(w);
}

}  // namespace

DeviceState::DeviceState(plugins::Geometry cut, const plugins::WeightsConfig& how, at::Device where)
    : geometry(std::move(cut)),
      config(how),
      kept(plugins::kept_of_turn(how.k, geometry.turns())),
      device(where),
      selection(kept, device),
      r(config.residual_bits, slots_of(geometry), device) {
  std::int64_t slots = 0;
  std::size_t most_staged = 0;
  std::size_t most_runs = 0;
  for (std::size_t turn = 0; turn < geometry.turns(); ++turn) {
    turns.push_back({DeviceLayout(geometry, turn, slots),
                     plugins::RecordCoder(geometry.layout(turn), {kept, config.value_bits})});
    slots += turns.back().layout.slots();
    most_staged = std::max(most_staged, turns.back().coder.staging_bytes());
    most_runs = std::max(most_runs, geometry.runs(turn).size());
  }
  staging.resize(most_staged);
  bits.resize(most_runs);
  touched_by_run.resize(most_runs);
  w = at::zeros({slots_of(geometry)}, at::TensorOptions().device(device).dtype(at::kFloat));
}

bool DeviceState::finite(std::initializer_list<const Chunks*> looked_at) {
  std::vector<at::Tensor> largest;
  for (const Chunks* chunks : looked_at) {
    for (const auto& chunk : *chunks) {
      largest.push_back(
          at::linalg_vector_norm(chunk.weights(), std::numeric_limits<double>::infinity())
              .to(at::kDouble));
    }
  }
  // Written so that a NaN fails it.
  return largest.empty() ||
         at::stack(largest).max().item<double>() < static_cast<double>(kernels::kLargestWeight);
}

DeviceState::Chunks DeviceState::chunks(std::size_t turn, Views x) const {
  return turns[turn].layout.chunks(x, device);
}

at::Tensor DeviceState::arrived(const DeviceLayout::Chunk& chunk) const {
  const at::Tensor of_chunk = w.narrow(0, chunk.begin, chunk.slots);
  return pending.defined() ? of_chunk - pending.narrow(0, chunk.begin, chunk.slots) : of_chunk;
}

at::Tensor DeviceState::of_turn(const at::Tensor& slots, std::size_t turn) const {
  const DeviceLayout& layout = turns[turn].layout;
  return slots.narrow(0, layout.first_slot(), layout.slots());
}

at::Tensor DeviceState::open(std::size_t turn, bool derive) {
  const DeviceLayout& layout = turns[turn].layout;
  return derive ? r.open_anew(layout.first_slot(), layout.slots())
                : r.open(layout.first_slot(), layout.slots());
}

void DeviceState::close(std::size_t turn, const at::Tensor& residual) {
  r.close(residual, turns[turn].layout.first_slot());
}

at::Tensor DeviceState::absorb(std::size_t turn, const Chunks& chunks, float share,
                               const at::Tensor& residual) const {
  const std::int64_t first_slot = turns[turn].layout.first_slot();
  at::Tensor moved = at::zeros({}, w.options().dtype(at::kDouble));
  for (const auto& chunk : chunks) {
    const at::Tensor unsent = residual.narrow(0, chunk.begin - first_slot, chunk.slots);
    const at::Tensor exact = sum_of(arrived(chunk), unsent, share, chunk.type);
    at::Tensor before = exact.to(chunk.type).to(exact.scalar_type());
    if (chunk.type == at::kHalf) {
      before = at::where(before.isinf(), exact, before);  // as in the host's kernels
    }
    const at::Tensor move = (chunk.weights().to(exact.scalar_type()) - before).to(at::kFloat);
    moved.add_(move.abs().sum(at::kDouble));
    unsent.add_(move);
  }
  return moved;
}

void DeviceState::restore(std::size_t turn, const Chunks& chunks, const at::Tensor& residual,
                          float share, const at::Tensor* touched) const {
  const std::int64_t first_slot = turns[turn].layout.first_slot();
  at::Tensor writes;
  if (touched != nullptr) {
    if (!touched->defined()) {
      return;
    }
    writes = at::zeros(residual.sizes(), w.options().dtype(at::kBool));
    writes.index_fill_(0, *touched, true);
  }
  for (const auto& chunk : chunks) {
    const at::Tensor x =
        sum_of(arrived(chunk), residual.narrow(0, chunk.begin - first_slot, chunk.slots), share,
               chunk.type)
            .to(chunk.type);
    chunk.assign(writes.defined()
                     ? at::where(writes.narrow(0, chunk.begin - first_slot, chunk.slots), x,
                                 chunk.weights().view_as(x))
                     : x);
  }
}

void DeviceState::keep_pending(const plugins::Due& due) {
  const float held = plugins::spread(due.gain, config.spread_steps, geometry.turns()).gain;
  if (held > 0.0F && !pending.defined()) {
    pending = at::zeros_like(w);
  }
}

bool DeviceState::touches_only(Views x, float share_after, bool ahead) const noexcept {
  return ahead && !pending.defined() && plugins::derives_residual(x, share_after);
}

bool DeviceState::derives(Views x, float share) const noexcept {
  return !r.kept() || plugins::derives_residual(x, share);
}

void DeviceState::keep_residual(Views x, float share) {
  if (!plugins::derives_residual(x, share)) {
    r.keep();
  }
}

void DeviceState::all_left(Views x, float share) {
  if (geometry.turns() == 1) {
    drop_residual(x, share);
  }
}

void DeviceState::drop_residual(Views x, float share) {
  if (plugins::derives_residual(x, share)) {
    r.drop();
  }
}

at::Tensor DeviceState::move_reference(const plugins::Due& due) {
  const plugins::Spread spread = plugins::spread(due.gain, config.spread_steps, geometry.turns());
  const std::size_t turn = due.turn();
  const std::size_t runs = geometry.runs(turn).size();
  for_each_run(turn, [&](std::size_t run, const plugins::TileRun& tiles) {
    Touched& touched = touched_by_run[run];
    touched.slot.clear();
    touched.sum.clear();
    kernels::SparseSum sum;
    for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
      for (const auto& [record, weight] : due.contributions) {
        sum.add(weight, record->indices(t), record->values(t));
      }
      sum.drain([&](std::size_t j, float value) {
        touched.slot.push_back(static_cast<std::int64_t>(t) * kTile + static_cast<std::int64_t>(j));
        touched.sum.push_back(value);
      });
    }
  });
  std::vector<std::int64_t> slots;
  std::vector<float> sums;
  std::vector<std::size_t> begin;  // of each run in slots
  for (const Touched& touched : std::span(touched_by_run).first(runs)) {
    begin.push_back(slots.size());
    slots.insert(slots.end(), touched.slot.begin(), touched.slot.end());
    sums.insert(sums.end(), touched.sum.begin(), touched.sum.end());
  }
  const at::Tensor at_slots = to_device<std::int64_t>(slots, device);
  if (pending.defined()) {
    const at::Tensor p = of_turn(pending, turn);
    const at::Tensor added = to_device<float>(sums, device).mul_(static_cast<double>(spread.gain));
    p.index_copy_(0, at_slots, p.index_select(0, at_slots).add_(added));
    p.mul_(static_cast<double>(spread.keep));
  }
  if (slots.empty()) {
    return {};
  }
  const at::Tensor w_of_turn = of_turn(w, turn);
  const at::Tensor values = to_host(w_of_turn.index_select(0, at_slots));
  auto* const value_of = values.mutable_data_ptr<float>();
  for_each_run(turn, [&](std::size_t run, const plugins::TileRun&) {
    Touched& touched = touched_by_run[run];
    touched.checksum = 0;
    for (std::size_t i = 0; i < touched.slot.size(); ++i) {
      const std::int64_t slot = touched.slot[i];
      const std::size_t element =
          geometry.tiles(turn)[static_cast<std::size_t>(slot / kTile)].begin +
          static_cast<std::size_t>(slot % kTile);
      float& value = value_of[begin[run] + i];
      const float before = std::exchange(value, kernels::moved(value, due.gain, touched.sum[i]));
      touched.checksum += kernels::mix(element, value) - kernels::mix(element, before);
    }
  });
  for (const Touched& touched : std::span(touched_by_run).first(runs)) {
    checksum += touched.checksum;
  }
  w_of_turn.index_copy_(0, at_slots, values.to(device, /*non_blocking=*/true));
  return at_slots;
}

void DeviceState::take_from(const at::Tensor& residual, const plugins::ParsedRecord& own) const {
  if (own.index.empty()) {
    return;
  }
  std::vector<std::int64_t> slots(own.index.size());
  for (std::size_t t = 0; t + 1 < own.first.size(); ++t) {
    for (std::size_t i = own.first[t]; i < own.first[t + 1]; ++i) {
      slots[i] = static_cast<std::int64_t>(t) * kTile + own.index[i];
    }
  }
  const at::Tensor index = to_device<std::int64_t>(slots, device);
  const at::Tensor sent = to_device<float>(own.value, device);
  residual.index_copy_(0, index, residual.index_select(0, index).sub_(sent));
}

std::vector<std::byte> DeviceState::write(std::size_t turn, const at::Tensor& keys) {
  const std::int64_t* const first_key = keys.const_data_ptr<std::int64_t>();
  const plugins::RecordCoder& coder = turns[turn].coder;
  for_each_run(turn, [&](std::size_t run, const plugins::TileRun& tiles) {
    plugins::RunWriter writer = coder.writer(run, staging);
    std::array<float, kernels::kTileElements> value;  // set where an entry is
    std::array<std::uint16_t, kernels::kTileElements> index;
    for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
      const std::size_t most = plugins::TileLayout::kept(kept, geometry.tiles(turn)[t].elements);
      const std::int64_t* key = first_key + t * kept;
      std::size_t count = 0;
      for (; count < most; ++count, ++key) {
        const DeviceSelection::Entry entry = DeviceSelection::entry(*key);
        if (entry.value == 0.0F) {
          break;  // so are all smaller ones
        }
        index[count] = entry.index;
        value[entry.index] = entry.value;
      }
      std::ranges::sort(index.begin(), index.begin() + static_cast<std::ptrdiff_t>(count));
      writer.add(std::span(index).first(count), value.data());
    }
    bits[run] = writer.finish();
  });
  return plugins::in_arena(config.arena, [&] {
    return coder.assemble(staging, std::span(bits).first(geometry.runs(turn).size()));
  });
}

at::Tensor DeviceState::exchange(const plugins::Due& due, const at::Tensor& residual) {
  take_from(residual, *due.contributions[due.own].record);
  return move_reference(due);
}

}  // namespace distro::c10d_backend
