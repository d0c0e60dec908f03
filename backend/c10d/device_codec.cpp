#include "backend/c10d/device_codec.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "backend/c10d/tensors.h"
#include "kernels/sparse_sum.h"
#include "plugins/fingerprint.h"
#include "plugins/float_environment.h"
#include "plugins/parallel.h"

namespace distro::c10d_backend {
namespace {

constexpr auto kTile = static_cast<std::int64_t>(kernels::kTileElements);

// A key orders the entries of a tile as the codec in host memory does, by magnitude and then by the
// lower index, and holds all that a record needs of an entry: bits 13 to 43 the magnitude of R as
// fp32 bits, 1 to 12 the index counted from the tile's end, 0 the sign. No two keys are equal, so
// any top-k gives the same entries.
constexpr int kMagnitudeShift = 13;
constexpr int kIndexShift = 1;
constexpr std::int64_t kMagnitudeMask = 0x7fffffff;

// Tiles selected at a time: 16 bytes of temporaries a weight.
constexpr std::int64_t kSelectTiles = 2048;

struct Entry {
  std::uint16_t index;
  float value;  // 0: no entry
};

Entry entry_of(std::int64_t key) noexcept {
  const auto bits = static_cast<std::uint64_t>(key);
  const auto magnitude = static_cast<std::uint32_t>(bits >> kMagnitudeShift);
  const auto from_end = static_cast<std::uint16_t>((bits >> kIndexShift) & (kTile - 1));
  return {static_cast<std::uint16_t>(kTile - 1 - from_end),
          std::bit_cast<float>(magnitude | static_cast<std::uint32_t>(bits & 1U) << 31)};
}

/// W + share * R, in fp64 for fp64 weights: two operations, not one fused.
at::Tensor sum_of(const at::Tensor& w, const at::Tensor& r, float share, at::ScalarType type) {
  const auto scale = static_cast<double>(share);
  return (type == at::kDouble ? r.to(at::kDouble).mul_(scale) : r.mul(scale)).add_(w);
}

/// A copy of host values on the device, in the order of the current stream.
template <class Value>
at::Tensor to_device(std::span<const Value> values, at::ScalarType type, at::Device device) {
  at::Tensor host = at::empty({static_cast<std::int64_t>(values.size())},
                              at::TensorOptions().dtype(type).pinned_memory(!device.is_cpu()));
  std::memcpy(host.data_ptr(), values.data(), values.size_bytes());
  return host.to(device, /*non_blocking=*/true);
}

}  // namespace

DeviceCodec::DeviceCodec(plugins::Geometry geometry, const plugins::WeightsConfig& config,
                         at::Device device)
    : geometry_(std::move(geometry)),
      config_(config),
      kept_(plugins::kept_of_turn(config.k, geometry_.turns())),
      device_(device) {
  TORCH_CHECK_VALUE(config.residual_bits == 32,
                    "Options(residual_bits=16) is for modules in host memory, and this one is on ",
                    device, "; leave it out, or move the module");
  const PlainArithmetic plain;
  std::int64_t slots = 0;
  std::size_t most_staged = 0;
  std::size_t most_runs = 0;
  for (std::size_t turn = 0; turn < geometry_.turns(); ++turn) {
    turns_.push_back({DeviceLayout(geometry_, turn, slots),
                      plugins::RecordCoder(geometry_.layout(turn), {kept_, config.value_bits})});
    slots += turns_.back().layout.slots();
    most_staged = std::max(most_staged, turns_.back().coder.staging_bytes());
    most_runs = std::max(most_runs, geometry_.runs(turn).size());
  }
  staging_.resize(most_staged);
  bits_.resize(most_runs);
  touched_.resize(most_runs);
  const auto options = at::TensorOptions().device(device_);
  w_ = at::zeros({slots}, options.dtype(at::kFloat));
  r_ = at::zeros({slots}, options.dtype(at::kFloat));
  lane_ = at::arange(kTile - 1, -1, -1, options.dtype(at::kLong)).mul_(1 << kIndexShift);
}

template <class Task>
void DeviceCodec::for_each_run(std::size_t turn, const Task& task) const {
  plugins::in_arena(config_.arena, [&] {
    plugins::parallel_for(geometry_.runs(turn).size(), [&](std::size_t run) {
      const plugins::DefaultFloatEnvironment environment;
      task(run, geometry_.runs(turn)[run]);
    });
  });
}

std::optional<std::size_t> DeviceCodec::first_non_finite(Views x) {
  check(geometry_, x);
  const PlainArithmetic plain;
  // One reduction and one small copy to the host for each type.
  std::array<std::vector<at::Tensor>, 4> tensors;
  std::array<std::vector<std::size_t>, 4> which;
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (x[i].elements > 0) {
      const auto type = static_cast<std::size_t>(x[i].dtype);
      tensors[type].push_back(tensor_of(x[i], device_));
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

bool DeviceCodec::finite(std::initializer_list<const Chunks*> looked_at) const {
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

std::optional<std::size_t> DeviceCodec::begin(Views x) {
  if (const auto bad = first_non_finite(x)) {
    return bad;
  }
  const PlainArithmetic plain;
  for (std::size_t turn = 0; turn < turns_.size(); ++turn) {
    for (const auto& chunk : chunks(turn, x)) {
      w_.narrow(0, chunk.begin, chunk.slots).copy_(chunk.weights());
    }
  }
  r_.zero_();
  pending_ = at::Tensor();
  rehash();
  return std::nullopt;
}

DeviceCodec::Chunks DeviceCodec::chunks(std::size_t turn, Views x) const {
  return turns_[turn].layout.chunks(x, device_);
}

at::Tensor DeviceCodec::arrived(const DeviceLayout::Chunk& chunk) const {
  const at::Tensor w = w_.narrow(0, chunk.begin, chunk.slots);
  return pending_.defined() ? w - pending_.narrow(0, chunk.begin, chunk.slots) : w;
}

at::Tensor DeviceCodec::absorb(const Chunks& chunks, float share, bool derive,
                               const at::Tensor& residual) const {
  at::Tensor moved = at::zeros({}, w_.options().dtype(at::kDouble));
  for (const auto& chunk : chunks) {
    const at::Tensor r = residual.narrow(0, chunk.begin, chunk.slots);
    if (derive) {
      r.zero_();
    }
    const at::Tensor exact = sum_of(arrived(chunk), r, share, chunk.type);
    at::Tensor before = exact.to(chunk.type).to(exact.scalar_type());
    if (chunk.type == at::kHalf) {
      before = at::where(before.isinf(), exact, before);  // as in the host's kernels
    }
    const at::Tensor move = (chunk.weights().to(exact.scalar_type()) - before).to(at::kFloat);
    moved.add_(move.abs().sum(at::kDouble));
    r.add_(move);
  }
  return moved;
}

void DeviceCodec::restore(const Chunks& chunks, float share, bool touched_only) const {
  at::Tensor touched;
  if (touched_only) {
    if (!touched_slots_.defined()) {
      return;
    }
    touched = at::zeros(w_.sizes(), w_.options().dtype(at::kBool));
    touched.index_fill_(0, touched_slots_, true);
  }
  for (const auto& chunk : chunks) {
    const at::Tensor x =
        sum_of(arrived(chunk), r_.narrow(0, chunk.begin, chunk.slots), share, chunk.type)
            .to(chunk.type);
    chunk.assign(touched_only ? at::where(touched.narrow(0, chunk.begin, chunk.slots), x,
                                          chunk.weights().view_as(x))
                              : x);
  }
}

void DeviceCodec::keep_pending(const plugins::Due& due) {
  const float held = plugins::spread(due.gain, config_.spread_steps, geometry_.turns()).gain;
  if (held > 0.0F && !pending_.defined()) {
    pending_ = at::zeros_like(w_);
  }
}

bool DeviceCodec::touches_only(Views x, float share_after, bool ahead) const noexcept {
  return ahead && !pending_.defined() && plugins::derives_residual(x, share_after);
}

void DeviceCodec::keep_residual(Views x, float share) noexcept {
  derives_ = derives_ && plugins::derives_residual(x, share);
}

void DeviceCodec::all_left(Views x, float share) noexcept {
  if (geometry_.turns() == 1) {
    drop_residual(x, share);
  }
}

void DeviceCodec::drop_residual(Views x, float share) noexcept {
  derives_ = derives_ || plugins::derives_residual(x, share);
}

void DeviceCodec::move_reference(const plugins::Due& due) {
  const float held = plugins::spread(due.gain, config_.spread_steps, geometry_.turns()).gain;
  keep_pending(due);
  const std::size_t turn = due.turn();
  const std::int64_t first_slot = turns_[turn].layout.first_slot();
  const std::size_t runs = geometry_.runs(turn).size();
  for_each_run(turn, [&](std::size_t run, const plugins::TileRun& tiles) {
    Touched& touched = touched_[run];
    touched.slot.clear();
    touched.sum.clear();
    kernels::SparseSum sum;
    for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
      for (const auto& [record, weight] : due.contributions) {
        const std::size_t first = record->first[t];
        const std::size_t count = record->first[t + 1] - first;
        sum.add(weight, std::span(record->index).subspan(first, count),
                std::span(record->value).subspan(first, count));
      }
      sum.drain([&](std::size_t j, float value) {
        touched.slot.push_back(first_slot + static_cast<std::int64_t>(t) * kTile +
                               static_cast<std::int64_t>(j));
        touched.sum.push_back(value);
      });
    }
  });
  std::vector<std::int64_t> slots;
  std::vector<std::size_t> begin;  // of each run in slots
  for (const Touched& touched : std::span(touched_).first(runs)) {
    begin.push_back(slots.size());
    slots.insert(slots.end(), touched.slot.begin(), touched.slot.end());
  }
  touched_slots_ = at::Tensor();
  if (slots.empty()) {
    return;
  }
  const at::Tensor index = to_device<std::int64_t>(slots, at::kLong, device_);
  touched_slots_ = index;
  const at::Tensor values = to_host(w_.index_select(0, index));
  auto* const w = values.mutable_data_ptr<float>();
  for_each_run(turn, [&](std::size_t run, const plugins::TileRun&) {
    Touched& touched = touched_[run];
    touched.checksum = 0;
    for (std::size_t i = 0; i < touched.slot.size(); ++i) {
      const std::int64_t slot = touched.slot[i] - first_slot;
      const std::size_t element =
          geometry_.tiles(turn)[static_cast<std::size_t>(slot / kTile)].begin +
          static_cast<std::size_t>(slot % kTile);
      float& value = w[begin[run] + i];
      const float before = std::exchange(value, kernels::moved(value, due.gain, touched.sum[i]));
      touched.checksum += kernels::mix(element, value) - kernels::mix(element, before);
    }
  });
  for (const Touched& touched : std::span(touched_).first(runs)) {
    checksum_ += touched.checksum;
  }
  w_.index_copy_(0, index, values.to(device_, /*non_blocking=*/true));
  if (pending_.defined()) {
    std::vector<float> sums;
    for (const Touched& touched : std::span(touched_).first(runs)) {
      sums.insert(sums.end(), touched.sum.begin(), touched.sum.end());
    }
    const at::Tensor added =
        to_device<float>(sums, at::kFloat, device_).mul_(static_cast<double>(held));
    pending_.index_copy_(0, index, pending_.index_select(0, index).add_(added));
  }
}

void DeviceCodec::take_from_residual(const plugins::ParsedRecord& own) {
  if (own.index.empty()) {
    return;
  }
  const std::int64_t first_slot = turns_[own.turn].layout.first_slot();
  std::vector<std::int64_t> slots(own.index.size());
  for (std::size_t t = 0; t + 1 < own.first.size(); ++t) {
    for (std::size_t i = own.first[t]; i < own.first[t + 1]; ++i) {
      slots[i] = first_slot + static_cast<std::int64_t>(t) * kTile + own.index[i];
    }
  }
  const at::Tensor index = to_device<std::int64_t>(slots, at::kLong, device_);
  const at::Tensor sent = to_device<float>(own.value, at::kFloat, device_);
  r_.index_copy_(0, index, r_.index_select(0, index).sub_(sent));
}

at::Tensor DeviceCodec::select(std::size_t turn) const {
  const DeviceLayout& layout = turns_[turn].layout;
  std::vector<at::Tensor> keys;
  for (std::int64_t tile = 0; tile < layout.tiles(); tile += kSelectTiles) {
    const std::int64_t tiles = std::min(kSelectTiles, layout.tiles() - tile);
    const at::Tensor bits = r_.narrow(0, layout.first_slot() + tile * kTile, tiles * kTile)
                                .view({tiles, kTile})
                                .view(at::kInt);
    at::Tensor key = bits.bitwise_and(kMagnitudeMask).to(at::kLong);
    key.mul_(std::int64_t{1} << kMagnitudeShift).add_(lane_).add_(bits.lt(0));
    keys.push_back(std::get<0>(key.topk(kept_, /*dim=*/1, /*largest=*/true, /*sorted=*/true)));
  }
  return keys.empty() ? at::empty({0, kept_}, lane_.options()) : at::cat(keys);
}

std::vector<std::byte> DeviceCodec::write(std::size_t turn, const at::Tensor& keys) {
  const std::int64_t* const first_key = keys.const_data_ptr<std::int64_t>();
  const plugins::RecordCoder& coder = turns_[turn].coder;
  for_each_run(turn, [&](std::size_t run, const plugins::TileRun& tiles) {
    plugins::RunWriter writer = coder.writer(run, staging_);
    std::array<float, kernels::kTileElements> r;  // set where an entry is
    std::array<std::uint16_t, kernels::kTileElements> index;
    for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
      const std::size_t kept = plugins::TileLayout::kept(kept_, geometry_.tiles(turn)[t].elements);
      const std::int64_t* key = first_key + t * kept_;
      std::size_t count = 0;
      for (; count < kept; ++count, ++key) {
        const Entry entry = entry_of(*key);
        if (entry.value == 0.0F) {
          break;  // so are all smaller ones
        }
        index[count] = entry.index;
        r[entry.index] = entry.value;
      }
      std::ranges::sort(index.begin(), index.begin() + static_cast<std::ptrdiff_t>(count));
      writer.add(std::span(index).first(count), r.data());
    }
    bits_[run] = writer.finish();
  });
  return plugins::in_arena(config_.arena, [&] {
    return coder.assemble(staging_, std::span(bits_).first(geometry_.runs(turn).size()));
  });
}

plugins::Step DeviceCodec::step(Views x, std::uint64_t number, const plugins::Due* due,
                                float share_before, const float* share_after, bool selects) {
  check(geometry_, x);
  if (due != nullptr) {
    check(geometry_, *due);
  }
  const PlainArithmetic plain;
  touched_slots_ = at::Tensor();
  const std::size_t turn = geometry_.turn_of(number);
  const Chunks of_turn = chunks(turn, x);
  // The weights of the exchange that is due had the turn before.
  const bool two_turns = due != nullptr && due->turn() != turn;
  const Chunks of_due = two_turns ? chunks(due->turn(), x) : Chunks{};
  if (due != nullptr) {
    keep_pending(*due);
  }
  if (share_after != nullptr) {
    keep_residual(x, *share_after);
  }
  const bool derive = derives_ || plugins::derives_residual(x, share_before);
  encoded_ahead_ = derive;
  const bool touched_only = share_after != nullptr && touches_only(x, *share_after, derive);
  if (!finite({&of_turn, &of_due})) {
    return {{}, 0.0, first_non_finite(x)};
  }
  if (two_turns) {
    static_cast<void>(absorb(of_due, share_before, derive, r_));
    exchange(*due);
    restore(of_due, *share_after, touched_only);
  }
  const at::Tensor moved = absorb(of_turn, share_before, derive, r_);
  const bool of_turn_is_due = due != nullptr && !two_turns;
  if (of_turn_is_due) {
    exchange(*due);
  }
  const at::Tensor keys = selects ? select(turn) : at::Tensor();
  if (share_after != nullptr && (of_turn_is_due || plugins::restores(share_before, *share_after))) {
    restore(of_turn, *share_after, touched_only);  // before the host waits for the keys
  }
  plugins::Step step;
  if (selects) {
    step.record = write(turn, to_host(keys));
  }
  step.move_mean = plugins::mean_move(geometry_, number, moved.item<double>());
  if (share_after != nullptr) {
    all_left(x, *share_after);
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
  check(geometry_, x);
  apply(due);
  const PlainArithmetic plain;
  const bool ahead = derives_ || encoded_ahead_;
  keep_residual(x, share_after);
  restore(chunks(due.turn(), x), share_after, touches_only(x, share_after, ahead));
  all_left(x, share_after);
}

void DeviceCodec::exchange(const plugins::Due& due) {
  move_reference(due);
  if (pending_.defined()) {
    const DeviceLayout& layout = turns_[due.turn()].layout;
    pending_.narrow(0, layout.first_slot(), layout.slots())
        .mul_(static_cast<double>(
            plugins::spread(due.gain, config_.spread_steps, geometry_.turns()).keep));
  }
  take_from_residual(*due.contributions[due.own].record);
}

void DeviceCodec::apply(const plugins::Due& due) {
  check(geometry_, due);
  const PlainArithmetic plain;
  exchange(due);
}

void DeviceCodec::leave(Views x, float share) {
  check(geometry_, x);
  constexpr float kAll = 1.0F;
  if (derives_ && share != 0.0F) {
    reshare(x, kAll, share);  // R is in x
    return;
  }
  const PlainArithmetic plain;
  for (std::size_t turn = 0; turn < turns_.size(); ++turn) {
    restore(chunks(turn, x), share, false);
  }
  drop_residual(x, share);
}

void DeviceCodec::reshare(Views x, float share_before, float share_after) {
  check(geometry_, x);
  const PlainArithmetic plain;
  keep_residual(x, share_after);
  const bool derive = derives_ || plugins::derives_residual(x, share_before);
  touched_slots_ = at::Tensor();
  for (std::size_t turn = 0; turn < turns_.size(); ++turn) {
    const Chunks of_turn = chunks(turn, x);
    static_cast<void>(absorb(of_turn, share_before, derive, r_));
    restore(of_turn, share_after, touches_only(x, share_after, derive));
  }
  drop_residual(x, share_after);
}

std::vector<std::byte> DeviceCodec::empty_record(std::uint64_t number) const {
  const plugins::RecordCoder& coder = turns_[geometry_.turn_of(number)].coder;
  return plugins::in_arena(config_.arena, [&] { return coder.empty(); });
}

plugins::ParsedRecord DeviceCodec::parse(std::span<const std::byte> body,
                                         std::uint64_t number) const {
  const std::size_t turn = geometry_.turn_of(number);
  plugins::ParsedRecord record =
      plugins::in_arena(config_.arena, [&] { return turns_[turn].coder.parse(body); });
  record.turn = turn;
  return record;
}

std::vector<plugins::TensorState> DeviceCodec::state(Views x, float share) {
  check(geometry_, x);
  const PlainArithmetic plain;
  const bool derive = derives_ || plugins::derives_residual(x, share);
  at::Tensor residual = r_.clone();
  for (std::size_t turn = 0; turn < turns_.size(); ++turn) {
    static_cast<void>(absorb(chunks(turn, x), share, derive, residual));
  }
  residual = residual.cpu();
  const at::Tensor reference = w_.cpu();
  const at::Tensor pending = pending_.defined() ? pending_.cpu() : at::Tensor();
  const auto of_tensor = [&](std::size_t tensor, const at::Tensor& slots) {
    const auto n = static_cast<std::int64_t>(geometry_.tensor_elements(tensor));
    const at::Tensor values = at::empty({n}, at::kFloat);
    for (const Turn& turn : turns_) {
      turn.layout.take(tensor, slots, values);
    }
    const auto* const data = values.const_data_ptr<float>();
    return std::vector<float>(data, data + n);
  };
  std::vector<plugins::TensorState> result;
  for (std::size_t tensor = 0; tensor < geometry_.tensors(); ++tensor) {
    result.push_back({of_tensor(tensor, reference), of_tensor(tensor, residual),
                      pending.defined() ? of_tensor(tensor, pending) : std::vector<float>{}});
  }
  return result;
}

std::uint64_t DeviceCodec::fingerprint(Views x, std::uint64_t number) {
  check(geometry_, x);
  const PlainArithmetic plain;
  // One copy to the host for each type.
  std::vector<plugins::TensorView> part = plugins::part_of(x, number);
  std::array<std::vector<at::Tensor>, 4> tensors;
  std::array<std::vector<std::size_t>, 4> which;
  for (std::size_t i = 0; i < part.size(); ++i) {
    const auto type = static_cast<std::size_t>(part[i].dtype);
    tensors[type].push_back(tensor_of(part[i], device_));
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
  check_state(geometry_, kernels::table(config_.isa), tensor, reference, residual, pending);
  const PlainArithmetic plain;
  derives_ = false;
  if (!pending.empty() && config_.spread_steps > 0 && !pending_.defined()) {
    pending_ = at::zeros_like(w_);
  }
  const at::Tensor w = to_device(reference, at::kFloat, device_);
  const at::Tensor r = to_device(residual, at::kFloat, device_);
  const at::Tensor p =
      pending.empty() ? at::zeros_like(w) : to_device(pending, at::kFloat, device_);
  for (const Turn& turn : turns_) {
    turn.layout.put(tensor, w, w_);
    turn.layout.put(tensor, r, r_);
    if (pending_.defined()) {
      turn.layout.put(tensor, p, pending_);
    }
  }
}

void DeviceCodec::rehash() {
  const PlainArithmetic plain;
  const at::Tensor host = w_.cpu();
  const auto& kernel = kernels::table(config_.isa);
  checksum_ = 0;
  for (std::size_t turn = 0; turn < turns_.size(); ++turn) {
    const float* const w = host.const_data_ptr<float>() + turns_[turn].layout.first_slot();
    std::vector<std::uint64_t> sums(geometry_.runs(turn).size());
    for_each_run(turn, [&](std::size_t run, const plugins::TileRun& tiles) {
      for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
        const auto& tile = geometry_.tiles(turn)[t];
        sums[run] += kernel.checksum(w + t * kernels::kTileElements, tile.elements, tile.begin);
      }
    });
    for (const std::uint64_t sum : sums) {
      checksum_ += sum;
    }
  }
}

plugins::CodecFactory device_codecs(at::Device device) {
  return [device](plugins::Geometry geometry, const plugins::WeightsConfig& config) {
    return std::make_unique<DeviceCodec>(std::move(geometry), config, device);
  };
}

}  // namespace distro::c10d_backend
