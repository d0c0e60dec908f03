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

/// W + share * R, rounded as x was when it was left: two operations, not one fused.
at::Tensor left(const at::Tensor& w, const at::Tensor& r, float share, at::ScalarType type) {
  const auto scale = static_cast<double>(share);
  if (type == at::kDouble) {
    return r.to(at::kDouble).mul_(scale).add_(w);
  }
  return r.mul(scale).add_(w).to(type);
}

/// A copy of host values on the device, in the order of the current stream.
template <class Value>
at::Tensor to_device(std::span<const Value> values, at::ScalarType type, at::Device device) {
  at::Tensor host = at::empty({static_cast<std::int64_t>(values.size())},
                              at::TensorOptions().dtype(type).pinned_memory(!device.is_cpu()));
  std::memcpy(host.data_ptr(), values.data(), values.size_bytes());
  return host.to(device, /*non_blocking=*/true);
}

std::vector<float> values_of(const at::Tensor& host, std::int64_t begin, std::size_t n) {
  const float* data = host.const_data_ptr<float>() + begin;
  return {data, data + n};
}

}  // namespace

DeviceCodec::DeviceCodec(plugins::Geometry geometry, const plugins::WeightsConfig& config,
                         at::Device device)
    : geometry_(std::move(geometry)),
      config_(config),
      coder_(geometry_.layout(), {config.k, config.value_bits}),
      layout_(geometry_),
      device_(device),
      staging_(coder_.staging_bytes()),
      bits_(geometry_.runs().size()),
      touched_(geometry_.runs().size()) {
  const PlainArithmetic plain;
  const auto options = at::TensorOptions().device(device_);
  w_ = at::zeros({layout_.slots()}, options.dtype(at::kFloat));
  r_ = at::zeros({layout_.slots()}, options.dtype(at::kFloat));
  lane_ = at::arange(kTile - 1, -1, -1, options.dtype(at::kLong)).mul_(1 << kIndexShift);
}

template <class Task>
void DeviceCodec::for_each_run(const Task& task) const {
  plugins::in_arena(config_.arena, [&] {
    plugins::parallel_for(geometry_.runs().size(), [&](std::size_t run) {
      const plugins::DefaultFloatEnvironment environment;
      task(run, geometry_.runs()[run]);
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

std::optional<std::size_t> DeviceCodec::begin(Views x) {
  if (const auto bad = first_non_finite(x)) {
    return bad;
  }
  const PlainArithmetic plain;
  for (const auto& chunk : layout_.chunks(x, device_)) {
    w_.narrow(0, chunk.begin, chunk.slots).copy_(chunk.weights());
  }
  r_.zero_();
  rehash();
  return std::nullopt;
}

at::Tensor DeviceCodec::absorb(Views x, float share, const at::Tensor& residual) const {
  at::Tensor moved = at::zeros({}, w_.options().dtype(at::kDouble));
  for (const auto& chunk : layout_.chunks(x, device_)) {
    const at::Tensor w = w_.narrow(0, chunk.begin, chunk.slots);
    const at::Tensor r = residual.narrow(0, chunk.begin, chunk.slots);
    const at::Tensor before = left(w, r, share, chunk.type);
    const at::Tensor move = chunk.type == at::kDouble
                                ? (chunk.weights() - before).to(at::kFloat)
                                : chunk.weights().to(at::kFloat) - before.to(at::kFloat);
    moved.add_(move.abs().sum(at::kDouble));
    r.add_(move);
  }
  return moved;
}

void DeviceCodec::restore(Views x, float share) const {
  for (const auto& chunk : layout_.chunks(x, device_)) {
    chunk.assign(left(w_.narrow(0, chunk.begin, chunk.slots),
                      r_.narrow(0, chunk.begin, chunk.slots), share, chunk.type));
  }
}

void DeviceCodec::move_reference(const plugins::Due& due) {
  for_each_run([&](std::size_t run, const plugins::TileRun& tiles) {
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
        touched.slot.push_back(static_cast<std::int64_t>(t) * kTile + static_cast<std::int64_t>(j));
        touched.sum.push_back(value);
      });
    }
  });
  std::vector<std::int64_t> slots;
  std::vector<std::size_t> begin;  // of each run in slots
  for (const Touched& touched : touched_) {
    begin.push_back(slots.size());
    slots.insert(slots.end(), touched.slot.begin(), touched.slot.end());
  }
  if (slots.empty()) {
    return;
  }
  const at::Tensor index = to_device<std::int64_t>(slots, at::kLong, device_);
  const at::Tensor values = to_host(w_.index_select(0, index));
  auto* const w = values.mutable_data_ptr<float>();
  for_each_run([&](std::size_t run, const plugins::TileRun&) {
    Touched& touched = touched_[run];
    touched.checksum = 0;
    for (std::size_t i = 0; i < touched.slot.size(); ++i) {
      const auto tile = static_cast<std::size_t>(touched.slot[i] / kTile);
      const std::size_t element =
          geometry_.tiles()[tile].begin + static_cast<std::size_t>(touched.slot[i] % kTile);
      float& value = w[begin[run] + i];
      const float before = std::exchange(value, kernels::moved(value, due.gain, touched.sum[i]));
      touched.checksum += kernels::mix(element, value) - kernels::mix(element, before);
    }
  });
  for (const Touched& touched : touched_) {
    checksum_ += touched.checksum;
  }
  w_.index_copy_(0, index, values.to(device_, /*non_blocking=*/true));
}

void DeviceCodec::take_from_residual(const plugins::ParsedRecord& own) {
  if (own.index.empty()) {
    return;
  }
  std::vector<std::int64_t> slots(own.index.size());
  for (std::size_t t = 0; t + 1 < own.first.size(); ++t) {
    for (std::size_t i = own.first[t]; i < own.first[t + 1]; ++i) {
      slots[i] = static_cast<std::int64_t>(t) * kTile + own.index[i];
    }
  }
  const at::Tensor index = to_device<std::int64_t>(slots, at::kLong, device_);
  const at::Tensor sent = to_device<float>(own.value, at::kFloat, device_);
  r_.index_copy_(0, index, r_.index_select(0, index).sub_(sent));
}

at::Tensor DeviceCodec::select() const {
  std::vector<at::Tensor> keys;
  for (std::int64_t tile = 0; tile < layout_.tiles(); tile += kSelectTiles) {
    const std::int64_t tiles = std::min(kSelectTiles, layout_.tiles() - tile);
    const at::Tensor bits =
        r_.narrow(0, tile * kTile, tiles * kTile).view({tiles, kTile}).view(at::kInt);
    at::Tensor key = bits.bitwise_and(kMagnitudeMask).to(at::kLong);
    key.mul_(std::int64_t{1} << kMagnitudeShift).add_(lane_).add_(bits.lt(0));
    keys.push_back(std::get<0>(key.topk(config_.k, /*dim=*/1, /*largest=*/true, /*sorted=*/true)));
  }
  return keys.empty() ? at::empty({0, config_.k}, lane_.options()) : at::cat(keys);
}

std::vector<std::byte> DeviceCodec::write(const at::Tensor& keys) {
  const std::int64_t* const first_key = keys.const_data_ptr<std::int64_t>();
  for_each_run([&](std::size_t run, const plugins::TileRun& tiles) {
    plugins::RunWriter writer = coder_.writer(run, staging_);
    std::array<float, kernels::kTileElements> r;  // set where an entry is
    std::array<std::uint16_t, kernels::kTileElements> index;
    for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
      const std::size_t kept = plugins::TileLayout::kept(config_.k, geometry_.tiles()[t].elements);
      const std::int64_t* key = first_key + t * config_.k;
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
  return plugins::in_arena(config_.arena, [&] { return coder_.assemble(staging_, bits_); });
}

plugins::Step DeviceCodec::finish(const at::Tensor& keys, const at::Tensor& moved) {
  plugins::Step step;
  step.record = write(to_host(keys));
  step.move_mean = mean_of(moved);
  return step;
}

double DeviceCodec::mean_of(const at::Tensor& moved) const {
  const auto elements = static_cast<double>(std::max<std::size_t>(geometry_.elements(), 1));
  return moved.item<double>() / elements;
}

plugins::Step DeviceCodec::advance(Views x, const plugins::Due* due, float share_before,
                                   float share_after) {
  if (due != nullptr) {
    check(geometry_, *due);
  }
  if (const auto bad = first_non_finite(x)) {
    return {{}, 0.0, bad};
  }
  const PlainArithmetic plain;
  const at::Tensor moved = absorb(x, share_before, r_);
  if (due != nullptr) {
    move_reference(*due);
    take_from_residual(*due->contributions[due->own].record);
  }
  const at::Tensor keys = select();
  restore(x, share_after);  // before the host waits for the keys
  return finish(keys, moved);
}

plugins::Step DeviceCodec::follow(Views x, const plugins::Due* due, float share_before,
                                  float share_after) {
  if (const auto bad = first_non_finite(x)) {
    return {{}, 0.0, bad};
  }
  const PlainArithmetic plain;
  const at::Tensor moved = absorb(x, share_before, r_);
  if (due != nullptr) {
    apply(*due);
  }
  restore(x, share_after);
  return {{}, mean_of(moved), std::nullopt};
}

plugins::Step DeviceCodec::encode(Views x, float share_before) {
  if (const auto bad = first_non_finite(x)) {
    return {{}, 0.0, bad};
  }
  const PlainArithmetic plain;
  const at::Tensor moved = absorb(x, share_before, r_);
  return finish(select(), moved);
}

void DeviceCodec::settle(Views x, const plugins::Due& due, float share_after) {
  check(geometry_, x);
  apply(due);
  const PlainArithmetic plain;
  restore(x, share_after);
}

void DeviceCodec::apply(const plugins::Due& due) {
  check(geometry_, due);
  const PlainArithmetic plain;
  move_reference(due);
  take_from_residual(*due.contributions[due.own].record);
}

void DeviceCodec::leave(Views x, float share) {
  check(geometry_, x);
  const PlainArithmetic plain;
  restore(x, share);
}

std::vector<std::byte> DeviceCodec::empty_record() const {
  return plugins::in_arena(config_.arena, [&] { return coder_.empty(); });
}

plugins::ParsedRecord DeviceCodec::parse(std::span<const std::byte> body) const {
  return plugins::in_arena(config_.arena, [&] { return coder_.parse(body); });
}

std::vector<plugins::TensorState> DeviceCodec::state(Views x, float share) {
  check(geometry_, x);
  const PlainArithmetic plain;
  at::Tensor residual = r_.clone();
  static_cast<void>(absorb(x, share, residual));
  residual = residual.cpu();
  const at::Tensor reference = w_.cpu();
  std::vector<plugins::TensorState> result;
  for (std::size_t tensor = 0; tensor < geometry_.tensors(); ++tensor) {
    const std::size_t n = geometry_.tensor_elements(tensor);
    result.push_back({values_of(reference, layout_.slot(tensor), n),
                      values_of(residual, layout_.slot(tensor), n)});
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
                                std::span<const float> residual) {
  check_state(geometry_, kernels::table(config_.isa), tensor, reference, residual);
  const PlainArithmetic plain;
  const auto n = static_cast<std::int64_t>(reference.size());
  w_.narrow(0, layout_.slot(tensor), n).copy_(to_device(reference, at::kFloat, device_));
  r_.narrow(0, layout_.slot(tensor), n).copy_(to_device(residual, at::kFloat, device_));
}

void DeviceCodec::rehash() {
  const PlainArithmetic plain;
  const at::Tensor host = w_.cpu();
  const float* const w = host.const_data_ptr<float>();
  const auto& kernel = kernels::table(config_.isa);
  std::vector<std::uint64_t> sums(geometry_.runs().size());
  for_each_run([&](std::size_t run, const plugins::TileRun& tiles) {
    for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
      const auto& tile = geometry_.tiles()[t];
      sums[run] += kernel.checksum(w + t * kernels::kTileElements, tile.elements, tile.begin);
    }
  });
  checksum_ = 0;
  for (const std::uint64_t sum : sums) {
    checksum_ += sum;
  }
}

plugins::CodecFactory device_codecs(at::Device device) {
  return [device](plugins::Geometry geometry, const plugins::WeightsConfig& config) {
    return std::make_unique<DeviceCodec>(std::move(geometry), config, device);
  };
}

}  // namespace distro::c10d_backend
