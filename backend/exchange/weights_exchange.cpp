#include "backend/exchange/weights_exchange.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <oneapi/tbb/parallel_for.h>
#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <utility>

namespace distro::exchange {
namespace {

using transport::LogLevel;

// A mean move this many times the usual one is no optimizer step but an edit by the script (or a
// loss spike). Lower warns of ordinary schedules, higher overlooks edits.
constexpr double kUnusualMove = 8.0;
constexpr std::uint64_t kStepsToKnowUsual = 10;

class Stopwatch {
 public:
  explicit Stopwatch(std::atomic<std::uint64_t>& total) : total_(total) {}
  ~Stopwatch() {
    const auto elapsed = transport::Clock::now() - start_;
    total_.fetch_add(static_cast<std::uint64_t>(std::chrono::nanoseconds(elapsed).count()),
                     std::memory_order_relaxed);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  std::atomic<std::uint64_t>& total_;
  const transport::Clock::time_point start_ = transport::Clock::now();
};

std::string describe(const TensorSpec& spec) {
  static constexpr std::string_view kTypes[] = {"float32", "float64", "float16", "bfloat16"};
  return fmt::format("{} {} [{}]", spec.name, kTypes[static_cast<std::size_t>(spec.dtype)],
                     fmt::join(spec.shape, ", "));
}

std::string describe(std::span<const TensorSpec> specs) {
  std::string text;
  for (const auto& spec : specs) {
    text += describe(spec);
    text += '\n';
  }
  return text;
}

std::uint64_t hash(std::span<const TensorSpec> specs, const Options& options) {
  const std::string text = describe(specs) + fmt::format("k {} bits {} delay {}", options.k,
                                                         options.value_bits, options.delay);
  return XXH3_64bits(text.data(), text.size());
}

std::vector<std::size_t> sizes(std::span<const TensorSpec> specs) {
  std::vector<std::size_t> result;
  for (const auto& spec : specs) {
    result.push_back(spec.elements());
  }
  return result;
}

std::uint64_t bytes_of_gradients(std::span<const TensorSpec> specs) {
  std::uint64_t bytes = 0;
  for (const auto& spec : specs) {
    bytes += spec.elements() * kernels::size_of(spec.dtype);
  }
  return bytes;
}

std::string ranks_text(const std::vector<int>& ranks) {
  return fmt::format("{} {}", ranks.size() == 1 ? "rank" : "ranks", fmt::join(ranks, ", "));
}

// The ranks that do not have what most ranks have, by value; with no majority, all of them.
std::vector<int> minority(const std::map<std::uint64_t, std::vector<int>>& ranks_by_value,
                          std::size_t world) {
  std::vector<int> result;
  for (const auto& [value, ranks] : ranks_by_value) {
    if (2 * ranks.size() <= world) {
      result.insert(result.end(), ranks.begin(), ranks.end());
    }
  }
  std::ranges::sort(result);
  return result;
}

// The kernels take at most a tile at a time.
template <typename Use>
void by_tile(const plugins::TensorView& tensor, Use&& use) {
  const std::size_t size = kernels::size_of(tensor.dtype);
  for (std::size_t begin = 0; begin < tensor.elements; begin += kernels::kTileElements) {
    use(static_cast<std::byte*>(tensor.data) + begin * size, begin,
        std::min(kernels::kTileElements, tensor.elements - begin));
  }
}

std::optional<std::size_t> first_non_finite(WeightsExchange::Views x,
                                            const kernels::KernelTable& kernel) {
  for (std::size_t tensor = 0; tensor < x.size(); ++tensor) {
    bool finite = true;
    by_tile(x[tensor], [&](const void* values, std::size_t, std::size_t n) {
      finite = finite && kernel.finite(x[tensor].dtype, values, n);
    });
    if (!finite) {
      return tensor;
    }
  }
  return std::nullopt;
}

// Body of a begin message: how many exchanges the rank has sent (a resumed one: in its earlier
// life), and its first non-finite tensor, if there is one.
std::vector<std::byte> begin_body(std::uint64_t exchanges, std::optional<std::size_t> non_finite) {
  std::vector<std::byte> body(sizeof exchanges + (non_finite ? sizeof(std::uint32_t) : 0));
  std::memcpy(body.data(), &exchanges, sizeof exchanges);
  if (non_finite) {
    const auto tensor = static_cast<std::uint32_t>(*non_finite);
    std::memcpy(body.data() + sizeof exchanges, &tensor, sizeof tensor);
  }
  return body;
}

}  // namespace

std::size_t TensorSpec::elements() const noexcept {
  std::size_t product = 1;
  for (const auto extent : shape) {
    product *= static_cast<std::size_t>(extent);
  }
  return product;
}

struct WeightsExchange::Exchange {
  std::vector<plugins::ParsedRecord> records;  // by rank
  bool resync = false;
  float gain = 1.0F;

  // Every rank is a participant of the same weight.
  [[nodiscard]] std::vector<plugins::Contribution> contributions() const {
    std::vector<plugins::Contribution> result;
    for (const auto& record : records) {
      result.push_back({&record, 1.0F / static_cast<float>(records.size())});
    }
    return result;
  }
};

WeightsExchange::WeightsExchange(std::shared_ptr<Group> group, std::vector<TensorSpec> tensors)
    : group_(std::move(group)),
      specs_(std::move(tensors)),
      module_(group_->next_module()),
      geometry_(hash(specs_, group_->options())),
      gradient_bytes_(bytes_of_gradients(specs_)),
      codec_(plugins::Geometry(sizes(specs_)),
             plugins::WeightsConfig{group_->options().k, group_->options().value_bits,
                                    group_->options().isa}) {}

WeightsExchange::~WeightsExchange() { group_->forget(module_); }

std::string WeightsExchange::where(std::uint64_t exchange) const {
  return fmt::format("exchange {} of module {}", exchange, module_);
}

float WeightsExchange::share() const {
  const auto& fixed = group_->options().share;
  return fixed ? static_cast<float>(*fixed) : gain_ / static_cast<float>(group_->world_size());
}

void WeightsExchange::send(MessageKind kind, std::uint16_t flags, std::uint64_t exchange,
                           float gain, std::span<const std::byte> body) {
  group_->broadcast(seal({.kind = kind,
                          .flags = flags,
                          .module = module_,
                          .gain = gain,
                          .exchange = exchange,
                          .geometry = geometry_,
                          .checksum = checksum_sent_},
                         body));
}

// All peers' messages, by rank; the own rank's letter is empty. Whoever is missing, late or
// malformed is told to all.
std::vector<Letter> WeightsExchange::take_all(MessageKind kind, std::uint64_t exchange) {
  const Stopwatch stopwatch(group_->counters().wait_nanoseconds);
  const auto deadline = group_->deadline();
  std::vector<Letter> letters(static_cast<std::size_t>(group_->world_size()));
  for (int peer = 0; peer < group_->world_size(); ++peer) {
    if (peer == group_->rank()) {
      continue;
    }
    try {
      letters[static_cast<std::size_t>(peer)] =
          group_->take(peer, {module_, kind, exchange}, deadline);
    } catch (const transport::PeerError& error) {
      group_->abort(error.rank(), error.what());
      throw;
    } catch (const ExchangeError& error) {
      group_->abort(peer, error.what());
      throw;
    }
  }
  return letters;
}

// Every rank sees every other's geometry, so all of them come here together.
void WeightsExchange::explain_geometry() {
  const std::string own = describe(specs_);
  send(MessageKind::describe, 0, 0, 0.0F, std::as_bytes(std::span(own)));
  const auto letters = take_all(MessageKind::describe, 0);
  std::vector<std::string> texts;
  for (int peer = 0; peer < group_->world_size(); ++peer) {
    const auto body = letters[static_cast<std::size_t>(peer)].opened.body;
    texts.push_back(peer == group_->rank()
                        ? own
                        : std::string(reinterpret_cast<const char*>(body.data()), body.size()));
  }
  // The first line in which some rank differs from rank 0.
  for (std::size_t begin = 0;;) {
    const std::size_t end = texts[0].find('\n', begin);
    const std::string line =
        end == std::string::npos ? "nothing" : texts[0].substr(begin, end - begin);
    std::vector<std::string> differences;
    for (std::size_t rank = 1; rank < texts.size(); ++rank) {
      const std::size_t other_end = texts[rank].find('\n', begin);
      const std::string other =
          other_end == std::string::npos ? "nothing" : texts[rank].substr(begin, other_end - begin);
      if (other != line) {
        differences.push_back(fmt::format("rank {} has {}", rank, other));
      }
    }
    if (!differences.empty()) {
      throw ExchangeError(fmt::format(
          "module {} is not the same on all ranks: where rank 0 has {}, {}. Build the same model, "
          "with the same dtypes and requires_grad, on every rank.",
          module_, line, fmt::join(differences, ", ")));
    }
    if (end == std::string::npos) {
      throw ExchangeError(fmt::format(
          "module {} is exchanged with different options on the ranks; give all the same",
          module_));
    }
    begin = end + 1;
  }
}

void WeightsExchange::fail_non_finite(std::size_t tensor) {
  throw ExchangeError(fmt::format(
      "rank {}: parameter {} has a non-finite weight (inf or nan) at {}. All ranks stop. "
      "Lower the learning rate or clip the gradients, and resume from a checkpoint.",
      group_->rank(), specs_[tensor].name, where(number_)));
}

void WeightsExchange::check_finite(const std::vector<Letter>& letters) {
  for (std::size_t peer = 0; peer < letters.size(); ++peer) {
    const auto& opened = letters[peer].opened;
    if (static_cast<int>(peer) == group_->rank() || (opened.envelope.flags & kNonFinite) == 0) {
      continue;
    }
    std::uint32_t tensor = UINT32_MAX;
    if (opened.body.size() >= sizeof tensor) {
      std::memcpy(&tensor, opened.body.last(sizeof tensor).data(), sizeof tensor);
    }
    const std::string name = tensor < specs_.size() ? specs_[tensor].name : "(unknown)";
    throw ExchangeError(fmt::format(
        "rank {}: rank {} reports a non-finite weight (inf or nan) in parameter {} at {}. All "
        "ranks "
        "stop. Lower the learning rate or clip the gradients, and resume from a checkpoint.",
        group_->rank(), peer, name, where(opened.envelope.exchange)));
  }
}

std::vector<Letter> WeightsExchange::introduce(std::optional<std::size_t> non_finite) {
  checksum_sent_ = codec_.checksum();
  send(MessageKind::begin, non_finite ? kNonFinite : std::uint16_t{0}, 0, 0.0F,
       begin_body(number_, non_finite));
  auto letters = take_all(MessageKind::begin, 0);
  bool same_geometry = true;
  std::map<std::uint64_t, std::vector<int>> numbers;
  for (int rank = 0; rank < group_->world_size(); ++rank) {
    const auto& opened = letters[static_cast<std::size_t>(rank)].opened;
    std::uint64_t number = number_;
    if (rank != group_->rank()) {
      same_geometry = same_geometry && opened.envelope.geometry == geometry_;
      std::memcpy(&number, opened.body.data(), std::min(sizeof number, opened.body.size()));
    }
    numbers[number].push_back(rank);
  }
  if (!same_geometry) {
    explain_geometry();
  }
  if (numbers.size() > 1) {
    std::vector<std::string> parts;
    for (const auto& [number, ranks] : numbers) {
      parts.push_back(fmt::format("{} at exchange {}", ranks_text(ranks), number));
    }
    throw ExchangeError(fmt::format(
        "rank {}: the ranks resume module {} at different places: {}. Load states that were saved "
        "at the same step on all ranks, or on none.",
        group_->rank(), module_, fmt::join(parts, ", ")));
  }
  if (non_finite) {
    fail_non_finite(*non_finite);
  }
  check_finite(letters);
  return letters;
}

// Runs one of the collective functions. After an error the ranks may stand at different places of
// it, so that the module cannot go on: whoever tries gets the first error again instead of a wait
// for records that never come.
template <typename Step>
void WeightsExchange::guarded(Step&& step) {
  const std::lock_guard lock(mutex_);
  if (failed_) {
    std::rethrow_exception(failed_);
  }
  try {
    step();
  } catch (...) {
    failed_ = std::current_exception();
    throw;
  }
}

void WeightsExchange::begin(Views x, ExactCollectives& exact) {
  guarded([&] { begin_locked(x, exact); });
}

void WeightsExchange::sync(Views x, ExactCollectives& exact, float gain) {
  guarded([&] { sync_locked(x, exact, gain); });
}

void WeightsExchange::average(Views x, ExactCollectives& exact) {
  guarded([&] { average_locked(x, exact); });
}

void WeightsExchange::begin_locked(Views x, ExactCollectives& exact) {
  const auto adopt = [&] {
    std::optional<std::size_t> non_finite;
    group_->arena().execute([&] { non_finite = codec_.begin(x); });
    share_left_ = 0.0F;  // R = 0: any share gives the same x
    return non_finite;
  };
  const auto letters = introduce(loaded_ ? std::nullopt : adopt());
  std::vector<int> strangers;  // ranks whose reference is not rank 0's
  const auto checksum_of = [&](int rank) {
    return rank == group_->rank()
               ? checksum_sent_
               : letters[static_cast<std::size_t>(rank)].opened.envelope.checksum;
  };
  for (int rank = 0; rank < group_->world_size(); ++rank) {
    if (checksum_of(rank) != checksum_of(0)) {
      strangers.push_back(rank);
    }
  }
  if (!strangers.empty()) {
    group_->log(
        LogLevel::warning,
        fmt::format("module {}: {} began with other weights than rank 0; all ranks take rank 0's.",
                    module_, ranks_text(strangers)));
    exact.broadcast(x);
    if (const auto non_finite = adopt()) {
      fail_non_finite(*non_finite);
    }
  }
  begun_ = true;
  group_->counters().reference_checksum.store(codec_.checksum(), std::memory_order_relaxed);
}

void WeightsExchange::check_agreement(const std::vector<Letter>& letters) {
  std::map<std::uint64_t, std::vector<int>> checksums;
  checksums[checksum_sent_].push_back(group_->rank());
  std::vector<std::string> gains;
  for (std::size_t peer = 0; peer < letters.size(); ++peer) {
    const auto& envelope = letters[peer].opened.envelope;
    if (static_cast<int>(peer) == group_->rank()) {
      continue;
    }
    if (envelope.geometry != geometry_) {
      throw ExchangeError(
          fmt::format("rank {}: rank {} sent {} for other tensors or options than it began with",
                      group_->rank(), peer, where(number_)));
    }
    checksums[envelope.checksum].push_back(static_cast<int>(peer));
    if (envelope.gain != gain_) {
      gains.push_back(fmt::format("rank {} uses {}", peer, envelope.gain));
    }
  }
  if (!gains.empty()) {
    throw ExchangeError(
        fmt::format("rank {}: the ranks use different gains at {}: rank {} uses {}, {}. The gain "
                    "follows from the optimizer's "
                    "class: use the same optimizer on all ranks, or set DISTRO_GAIN.",
                    group_->rank(), where(number_), group_->rank(), gain_, fmt::join(gains, ", ")));
  }
  if (checksums.size() > 1) {
    throw ExchangeError(
        fmt::format("rank {}: the reference weights have drifted apart before {}: {} of {} differ "
                    "from the others. "
                    "A memory fault, or a different build on some rank; resume from a checkpoint.",
                    group_->rank(), where(number_), ranks_text(minority(checksums, letters.size())),
                    letters.size()));
  }
}

// Wait for, check and unpack the exchange that was sent last.
WeightsExchange::Exchange WeightsExchange::collect(std::uint64_t number) {
  const auto letters = take_all(MessageKind::step, number);
  check_finite(letters);
  check_agreement(letters);
  Exchange exchange;
  exchange.gain = gain_;
  exchange.records.resize(letters.size());
  std::vector<std::string> errors(letters.size());
  const Stopwatch stopwatch(group_->counters().decode_nanoseconds);
  const auto own = static_cast<std::size_t>(group_->rank());
  group_->arena().execute([&] {
    tbb::parallel_for(std::size_t{0}, letters.size(), [&](std::size_t peer) {
      if (peer == own) {
        return;
      }
      try {
        exchange.records[peer] = codec_.parse(letters[peer].opened.body);
      } catch (const plugins::RecordError& error) {
        errors[peer] = error.what();
      }
    });
  });
  for (std::size_t peer = 0; peer < errors.size(); ++peer) {
    if (!errors[peer].empty()) {
      const auto message = fmt::format("rank {}: malformed record from rank {} in {}: {}", own,
                                       peer, where(number), errors[peer]);
      group_->abort(static_cast<int>(peer), message);
      throw ExchangeError(message);
    }
    exchange.resync = exchange.resync || (letters[peer].opened.envelope.flags & kAsksResync) != 0;
  }
  exchange.records[own] = std::move(own_);
  exchange.resync = std::exchange(asked_, false) || exchange.resync;
  return exchange;
}

void WeightsExchange::send_step(std::uint16_t flags, std::span<const std::byte> body) {
  send(MessageKind::step, flags, number_, gain_, body);
  auto& counters = group_->counters();
  counters.exchanges.fetch_add(1, std::memory_order_relaxed);
  counters.gradient_bytes.fetch_add(gradient_bytes_, std::memory_order_relaxed);
}

void WeightsExchange::take_mean(Views x, ExactCollectives& exact) {
  exact.mean(x);
  std::optional<std::size_t> non_finite;
  group_->arena().execute([&] { non_finite = codec_.begin(x); });
  if (non_finite) {
    throw ExchangeError(
        fmt::format("rank {}: the mean of the ranks' weights is not finite (inf or nan) in "
                    "parameter {} at {}: some "
                    "rank's weights are not. All ranks stop; resume from a checkpoint.",
                    group_->rank(), specs_[*non_finite].name, where(number_)));
  }
  share_left_ = 0.0F;
  marked_ = false;
  asked_ = false;
}

void WeightsExchange::watch_move(double mean_move) {
  if (number_ > kStepsToKnowUsual && mean_move > kUnusualMove * usual_move_ && usual_move_ > 0.0 &&
      !warned_move_) {
    warned_move_ = true;
    group_->log(LogLevel::warning,
                fmt::format("module {}: the weights moved by {:.3g} on average at {}, usually "
                            "{:.3g}. If the script edits weights itself, "
                            "call torch_distro.resync(module) afterwards: an edit is otherwise "
                            "shared only in part.",
                            module_, mean_move, where(number_), usual_move_));
  }
  usual_move_ = usual_move_ == 0.0 ? mean_move : 0.9 * usual_move_ + 0.1 * mean_move;
}

void WeightsExchange::sync_locked(Views x, ExactCollectives& exact, float gain) {
  auto& counters = group_->counters();
  std::optional<Exchange> due;
  if (in_flight_) {
    due = collect(number_);
    in_flight_ = false;
  }
  const bool resync = due && due->resync;
  const float gain_due = gain_;
  ++number_;
  gain_ = gain;
  plugins::Step step;
  std::uint16_t flags = 0;
  std::vector<plugins::Contribution> contributions;
  plugins::Due work;
  const auto prepare = [&](const Exchange& exchange, float with_gain) {
    contributions = exchange.contributions();
    work = {contributions, static_cast<std::size_t>(group_->rank()), with_gain};
  };
  if (due) {
    prepare(*due, gain_due);
  }
  if (resync) {
    counters.resyncs.fetch_add(1, std::memory_order_relaxed);
    take_mean(x, exact);
  }
  {
    const Stopwatch stopwatch(counters.encode_nanoseconds);
    group_->arena().execute([&] {
      if (marked_ && due) {
        codec_.apply(work);
      }
      if (marked_ || resync) {
        flags = marked_ ? kAsksResync : std::uint16_t{0};
        step.record = codec_.empty_record();
      } else if (group_->options().delay == 1) {
        step = codec_.advance(x, due ? &work : nullptr, share_left_, share());
      } else {
        step = codec_.encode(x, share_left_);
      }
    });
  }
  checksum_sent_ = codec_.checksum();
  if (step.non_finite) {
    const auto tensor = static_cast<std::uint32_t>(*step.non_finite);
    send_step(kNonFinite, std::as_bytes(std::span(&tensor, 1)));
    fail_non_finite(*step.non_finite);
  }
  send_step(flags, step.record);
  own_ = codec_.parse(step.record);
  asked_ = flags == kAsksResync;
  marked_ = false;
  if (!asked_ && !resync) {
    watch_move(step.move_mean);
    share_left_ = share();
  }
  if (group_->options().delay == 1) {
    in_flight_ = true;
  } else if (const Exchange now = collect(number_); now.resync) {
    counters.resyncs.fetch_add(1, std::memory_order_relaxed);
    take_mean(x, exact);
  } else {
    prepare(now, gain_);
    group_->arena().execute([&] { codec_.settle(x, work, share()); });
  }
  counters.reference_checksum.store(codec_.checksum(), std::memory_order_relaxed);
}

void WeightsExchange::mark() {
  const std::lock_guard lock(mutex_);
  marked_ = begun_;  // before the beginning there is nothing to undo
}

void WeightsExchange::average_locked(Views x, ExactCollectives& exact) {
  const auto non_finite = first_non_finite(x, kernels::table(group_->options().isa));
  const auto tensor = static_cast<std::uint32_t>(non_finite.value_or(0));
  const auto body =
      non_finite ? std::as_bytes(std::span(&tensor, 1)) : std::span<const std::byte>{};
  send(MessageKind::average, non_finite ? kNonFinite : std::uint16_t{0}, number_, 0.0F, body);
  const auto letters = take_all(MessageKind::average, number_);
  if (non_finite) {
    fail_non_finite(*non_finite);
  }
  check_finite(letters);
  if (in_flight_) {
    // It is in every rank's x already, by the part that its rank applies; the mean replaces it.
    collect(number_);
    in_flight_ = false;
  }
  take_mean(x, exact);
  group_->counters().reference_checksum.store(codec_.checksum(), std::memory_order_relaxed);
}

bool WeightsExchange::begun() const {
  const std::lock_guard lock(mutex_);
  return begun_;
}

std::uint64_t WeightsExchange::checksum() const {
  const std::lock_guard lock(mutex_);
  return codec_.checksum();
}

std::uint64_t WeightsExchange::exchanges() const {
  const std::lock_guard lock(mutex_);
  return number_;
}

ModuleState WeightsExchange::state(Views x) const {
  const std::lock_guard lock(mutex_);
  const auto& kernel = kernels::table(group_->options().isa);
  ModuleState state{{}, {}, number_, share_left_};
  for (std::size_t tensor = 0; tensor < specs_.size(); ++tensor) {
    const auto reference = codec_.reference(tensor);
    const auto residual = codec_.residual(tensor);
    state.reference.emplace_back(reference.begin(), reference.end());
    auto& moved = state.residual.emplace_back(residual.begin(), residual.end());
    by_tile(x[tensor], [&](void* values, std::size_t begin, std::size_t n) {
      kernel.absorb(x[tensor].dtype, values, reference.data() + begin, moved.data() + begin, n,
                    share_left_);
    });
  }
  return state;
}

void WeightsExchange::load(const ModuleState& state, Views x) {
  const std::lock_guard lock(mutex_);
  if (begun_) {
    throw ExchangeError(fmt::format(
        "rank {}: load the state of module {} before its first training forward, not after",
        group_->rank(), module_));
  }
  if (state.reference.size() != specs_.size() || state.residual.size() != specs_.size()) {
    throw ExchangeError(fmt::format("rank {}: the state has {} tensors, module {} has {}",
                                    group_->rank(), state.reference.size(), module_,
                                    specs_.size()));
  }
  for (std::size_t tensor = 0; tensor < specs_.size(); ++tensor) {
    if (state.reference[tensor].size() != specs_[tensor].elements() ||
        state.residual[tensor].size() != specs_[tensor].elements()) {
      throw ExchangeError(fmt::format("rank {}: the state of {} does not have its {} elements",
                                      group_->rank(), specs_[tensor].name,
                                      specs_[tensor].elements()));
    }
    codec_.restore_state(tensor, state.reference[tensor], state.residual[tensor]);
  }
  codec_.rehash();
  const auto& kernel = kernels::table(group_->options().isa);
  for (std::size_t tensor = 0; tensor < specs_.size(); ++tensor) {
    by_tile(x[tensor], [&](void* values, std::size_t begin, std::size_t n) {
      kernel.restore(x[tensor].dtype, values, state.reference[tensor].data() + begin,
                     state.residual[tensor].data() + begin, n, state.share);
    });
  }
  number_ = state.exchanges;
  share_left_ = state.share;
  loaded_ = true;
}

}  // namespace distro::exchange
