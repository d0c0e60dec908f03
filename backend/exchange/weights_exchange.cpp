#include "backend/exchange/weights_exchange.h"

#include <fmt/format.h>
#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "backend/exchange/stopwatch.h"
#include "plugins/record_coder.h"
#include "plugins/weights_defaults.h"

namespace distro::exchange {
namespace {

using transport::LogLevel;

// A mean move this many times the usual one is no optimizer step but an edit by the script (or a
// loss spike). Lower warns of ordinary schedules, higher overlooks edits.
constexpr double kUnusualMove = 8.0;
constexpr std::uint64_t kStepsToKnowUsual = 10;

// With R = 0 any share gives the same x.
constexpr float kNoShareYet = 0.0F;

// What fits into one message.
constexpr std::size_t kLargestRecordBytes = transport::kMaxMessageBytes - kEnvelopeBytes;

plugins::WeightsConfig config_of(const Options& options, tbb::task_arena& arena) {
  return {.k = options.k,
          .value_bits = options.value_bits,
          .isa = options.isa,
          .arena = &arena,
          .spread_steps = options.spread_steps(),
          .residual_bits = options.residual_bits};
}

// The tiles of a module whose records all ranks can keep. Before any memory is taken for it.
plugins::Geometry checked_geometry(const Options& options, const Sites& sites,
                                   std::span<const TensorSpec> tensors) {
  plugins::Geometry geometry(element_counts(tensors), options.turns());
  // The first turn has the most weights.
  const plugins::RecordCoder coder(
      geometry.layout(0), {plugins::kept_of_turn(options.k, options.turns()), options.value_bits});
  // A leader passes on the records of all participants.
  const bool passes_on = sites.participants() < sites.ranks();
  const std::size_t largest =
      kLargestRecordBytes / (passes_on ? static_cast<std::size_t>(sites.participants()) : 1);
  if (coder.largest_body_bytes() > largest) {
    constexpr double kMebi = 1 << 20;
    throw OptionError(fmt::format(
        "a record of this module's {} weights can have {:.0f} MiB with DISTRO_K={} and {} bits a "
        "value; the most is {:.0f} MiB. Lower DISTRO_K{}, or set DISTRO_MODE=dense.",
        geometry.elements(), static_cast<double>(coder.largest_body_bytes()) / kMebi, options.k,
        options.value_bits, static_cast<double>(largest) / kMebi,
        options.value_bits == 1 ? "" : " or Options(value_bits)"));
  }
  return geometry;
}

}  // namespace

struct WeightsExchange::Exchange {
  std::vector<plugins::ParsedRecord> records;  // by participant
  bool resync = false;
  float gain = 1.0F;

  [[nodiscard]] std::vector<plugins::Contribution> contributions(const Sites& sites) const {
    std::vector<plugins::Contribution> result;
    for (int participant = 0; participant < sites.participants(); ++participant) {
      result.push_back(
          {&records[static_cast<std::size_t>(participant)], sites.weight(participant)});
    }
    return result;
  }
};

WeightsExchange::WeightsExchange(std::shared_ptr<Group> group, std::vector<TensorSpec> tensors,
                                 const plugins::CodecFactory& make_codec)
    : group_(std::move(group)),
      ranks_(group_, std::move(tensors)),
      codec_(make_codec(checked_geometry(group_->options(), group_->sites(), ranks_.tensors()),
                        config_of(group_->options(), group_->arena()))) {}

WeightsExchange::~WeightsExchange() { group_->forget(ordinal()); }

float WeightsExchange::share() const {
  if (const auto& fixed = group_->options().share) {
    return static_cast<float>(*fixed);
  }
  const Sites& sites = group_->sites();
  const float gain = sent_.gain == kGainUnknown ? sites.gain() : sent_.gain;
  const float sent = sites.share(sites.participant_of(group_->rank()), gain);
  const Options& options = group_->options();
  return plugins::default_share(sent, gain, options.k, options.spread_steps());
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
  } catch (const std::exception& error) {
    failed_ = std::current_exception();
    group_->abort(group_->rank(), error.what());  // unless somebody else has been blamed already
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

void WeightsExchange::stay_exact(Views x, ExactCollectives& exact, const std::string& reason) {
  guarded([&] { stay_exact_locked(x, exact, reason); });
}

void WeightsExchange::begin_locked(Views x, ExactCollectives& exact) {
  const auto adopt = [&] {
    share_left_ = kNoShareYet;
    return codec_->begin(x);
  };
  const auto non_finite = loaded_ ? std::nullopt : adopt();
  sent_.checksum = codec_->checksum();
  const auto letters = ranks_.introduce(sent_, non_finite);
  std::vector<int> strangers;  // ranks whose reference is not rank 0's
  const auto checksum_of = [&](int rank) {
    return rank == group_->rank()
               ? sent_.checksum
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
                    ordinal(), ranks_text(strangers)));
    exact.broadcast(x);
    if (const auto still = adopt()) {
      ranks_.fail_non_finite(*still, sent_.exchange);
    }
  }
  begun_ = true;
  publish();
}

void WeightsExchange::stay_exact_locked(Views x, ExactCollectives& exact,
                                        const std::string& reason) {
  if (!begun_) {
    ranks_.introduce_exact(reason);
  } else {
    if (in_flight_) {
      collect();  // every rank's x holds its part of it; the mean replaces it
    }
    ++sent_.exchange;
    ranks_.stop(sent_, reason);
    exact.mean(x);
  }
  // W and R are not needed any more.
  codec_ = plugins::make_host_codec(plugins::Geometry({}),
                                    config_of(group_->options(), group_->arena()));
  publish();
}

// A module's part of the group's checksum stays when the module goes: ranks let go of it at
// different times. A sum, so that the order of modules does not matter.
void WeightsExchange::publish() {
  const std::uint64_t checksum = codec_->checksum();
  group_->counters().reference_checksum.fetch_add(checksum - std::exchange(published_, checksum),
                                                  std::memory_order_relaxed);
}

float WeightsExchange::gain_of(const std::vector<Letter>& letters) {
  if (const auto gain = ranks_.gain_of(letters, sent_)) {
    return *gain;
  }
  const float gain = group_->sites().gain();
  if (moved_ && !warned_gain_) {
    warned_gain_ = true;
    group_->log(
        LogLevel::warning,
        fmt::format("module {}: its weights move, but no torch.optim optimizer was seen to "
                    "step them. The mean of the participants' moves is multiplied by {:.3g}, "
                    "which is right for optimizers that normalise, as Adam does; for "
                    "hand-written SGD set DISTRO_GAIN=1.",
                    ordinal(), gain));
  }
  return gain;
}

// Wait for, check and unpack the exchange that was sent last.
WeightsExchange::Exchange WeightsExchange::collect() {
  const auto letters = ranks_.take_step(sent_);
  Exchange exchange;
  exchange.gain = gain_of(letters);
  const Sites& sites = group_->sites();
  exchange.records.resize(static_cast<std::size_t>(sites.participants()));
  std::vector<std::string> errors(exchange.records.size());
  const Stopwatch stopwatch(group_->counters().decode_nanoseconds);
  const auto letter_of = [&](std::size_t participant) -> const Letter& {
    return letters[static_cast<std::size_t>(sites.leader(static_cast<int>(participant)))];
  };
  group_->arena().execute([&] {
    tbb::parallel_for(std::size_t{0}, errors.size(), [&](std::size_t participant) {
      if (letter_of(participant).bytes.empty()) {
        return;  // this rank's own
      }
      try {
        exchange.records[participant] =
            codec_->parse(letter_of(participant).opened.body, since_mean());
      } catch (const plugins::RecordError& error) {
        errors[participant] = error.what();
      }
    });
  });
  for (std::size_t participant = 0; participant < errors.size(); ++participant) {
    if (!errors[participant].empty()) {
      const int peer = sites.leader(static_cast<int>(participant));
      ranks_.blame(peer,
                   fmt::format("rank {}: malformed record from rank {} in {}: {}", group_->rank(),
                               peer, ranks_.where(sent_.exchange), errors[participant]));
    }
    exchange.resync =
        exchange.resync || (letter_of(participant).opened.envelope.flags & kAsksResync) != 0;
  }
  if (ranks_.leads()) {
    exchange.records[own()] = std::move(own_);
  }
  exchange.resync = std::exchange(asked_, false) || exchange.resync;
  in_flight_ = false;
  return exchange;
}

// Which contribution is this participant's.
std::size_t WeightsExchange::own() const {
  return static_cast<std::size_t>(group_->sites().participant_of(group_->rank()));
}

// Say what this rank has done in an exchange: to its leader, or, once all of the site have said so,
// to the other participants. `edited`: the script has overwritten the weights.
void WeightsExchange::send(const plugins::Step& step, std::uint64_t fingerprint, bool edited) {
  sent_.checksum = codec_->checksum();
  asked_ = edited;
  if (step.non_finite) {
    if (ranks_.leads()) {
      ranks_.send(MessageKind::step, kNonFinite, sent_, non_finite_body(*step.non_finite));
    }
    ranks_.fail_non_finite(*step.non_finite, sent_.exchange);
  }
  if (!ranks_.leads()) {
    ranks_.report(sent_, edited ? kAsksResync : std::uint16_t{0}, fingerprint);
  } else {
    if (ranks_.has_site()) {
      const auto reports = ranks_.take_reports(sent_, fingerprint, edited);
      asked_ = asked_ || reports.ask_resync;
      sent_.gain = reports.gain;
    }
    ranks_.send(MessageKind::step, asked_ ? kAsksResync : std::uint16_t{0}, sent_, step.record);
  }
  auto& counters = group_->counters();
  counters.exchanges.fetch_add(1, std::memory_order_relaxed);
  counters.gradient_bytes.fetch_add(exchange::gradient_bytes(ranks_.tensors()),
                                    std::memory_order_relaxed);
}

void WeightsExchange::take_mean(Views x, ExactCollectives& exact) {
  exact.mean(x);
  if (const auto non_finite = codec_->begin(x)) {
    throw ExchangeError(
        fmt::format("rank {}: the mean of the ranks' weights is not finite (inf or nan) in "
                    "parameter {} at {}: some "
                    "rank's weights are not. All ranks stop; resume from a checkpoint.",
                    group_->rank(), tensors()[*non_finite].name, ranks_.where(sent_.exchange)));
  }
  share_left_ = kNoShareYet;
  mean_at_ = sent_.exchange;
  marked_ = false;
  asked_ = false;
}

void WeightsExchange::watch_move(double mean_move) {
  if (sent_.exchange > kStepsToKnowUsual && mean_move > kUnusualMove * usual_move_ &&
      usual_move_ > 0.0 && !warned_move_) {
    warned_move_ = true;
    group_->log(LogLevel::warning,
                fmt::format("module {}: the weights moved by {:.3g} on average at {}, usually "
                            "{:.3g}. If the script edits weights itself, "
                            "call torch_distro.resync(module) afterwards: an edit is otherwise "
                            "shared only in part.",
                            ordinal(), mean_move, ranks_.where(sent_.exchange), usual_move_));
  }
  usual_move_ = usual_move_ == 0.0 ? mean_move : 0.9 * usual_move_ + 0.1 * mean_move;
}

// Encode what this rank moved since the last sync point, after applying `due` if there is one.
plugins::Step WeightsExchange::encode(Views x, const Exchange* due) {
  const Stopwatch stopwatch(group_->counters().encode_nanoseconds);
  std::vector<plugins::Contribution> contributions;
  std::optional<plugins::Due> work;
  if (due != nullptr) {
    contributions = due->contributions(group_->sites());
    work = {contributions, own(), due->gain};
  }
  const plugins::Due* const apply = work ? &*work : nullptr;
  const bool now = group_->options().delay == 1;
  plugins::Step step;
  if (marked_) {
    // x is the script's: leave it alone until all take the mean.
    if (work) {
      codec_->apply(*work);
    }
    step.record = codec_->empty_record(since_mean());
  } else if (!ranks_.leads()) {
    if (now) {
      step = codec_->follow(x, since_mean(), apply, share_left_, share());
    } else {
      step.non_finite = codec_->first_non_finite(x);
    }
  } else {
    step = now ? codec_->advance(x, since_mean(), apply, share_left_, share())
               : codec_->encode(x, since_mean(), share_left_);
  }
  if (ranks_.leads() && !step.non_finite) {
    own_ = codec_->parse(step.record, since_mean());
  }
  return step;
}

// Delay 0: the exchange that was sent a moment ago. The shares with which x was left before it, and
// is to be after it.
void WeightsExchange::settle(Views x, const Exchange& now, float share_before, float share_after) {
  const Stopwatch stopwatch(group_->counters().encode_nanoseconds);
  const auto contributions = now.contributions(group_->sites());
  const plugins::Due work{contributions, own(), now.gain};
  if (ranks_.leads()) {
    codec_->settle(x, work, share_after);
  } else if (const auto bad =
                 codec_->follow(x, since_mean(), &work, share_before, share_after).non_finite) {
    ranks_.fail_non_finite(*bad, sent_.exchange);
  }
}

void WeightsExchange::sync_locked(Views x, ExactCollectives& exact, float gain) {
  std::optional<Exchange> due;
  if (in_flight_) {
    due = collect();
  }
  const bool resync = due && due->resync;
  ++sent_.exchange;
  sent_.gain = gain;
  if (resync) {
    group_->counters().resyncs.fetch_add(1, std::memory_order_relaxed);
    take_mean(x, exact);
  }
  float share_before = share_left_;
  const float share_after = share();  // the reports of the site may tell of another gain
  const bool edited = marked_;
  const std::uint64_t fingerprint = ranks_.has_site() ? codec_->fingerprint(x, sent_.exchange) : 0;
  if (codec_->geometry().turns() > 1 && share_before != share_after &&
      share_before != kNoShareYet && !edited) {
    // Another gain: weights whose turn it is not would keep the old share.
    codec_->reshare(x, share_before, share_after);
    share_before = share_left_ = share_after;
  }
  plugins::Step step;
  if (resync) {
    step.record = codec_->empty_record(since_mean());
    own_ = codec_->parse(step.record, since_mean());
  } else {
    step = encode(x, due ? &*due : nullptr);
  }
  marked_ = false;
  send(step, fingerprint, edited);
  if (!edited && !resync) {
    watch_move(step.move_mean);
    moved_ = step.move_mean > 0.0 && sent_.exchange > 1;  // fp64 weights "move" by rounding to W
    share_left_ = share_after;
  }
  in_flight_ = true;
  if (group_->options().delay == 0) {
    if (const Exchange now = collect(); now.resync) {
      group_->counters().resyncs.fetch_add(1, std::memory_order_relaxed);
      take_mean(x, exact);
    } else {
      settle(x, now, share_before, share_after);
    }
  }
  publish();
}

void WeightsExchange::mark() {
  const std::lock_guard lock(mutex_);
  marked_ = begun_;  // before the beginning there is nothing to undo
}

void WeightsExchange::average_locked(Views x, ExactCollectives& exact) {
  const auto non_finite = codec_->first_non_finite(x);
  ranks_.send(MessageKind::average, non_finite ? kNonFinite : std::uint16_t{0},
              {.exchange = sent_.exchange, .gain = kGainUnknown, .checksum = sent_.checksum},
              non_finite ? non_finite_body(*non_finite) : std::vector<std::byte>{});
  // An exchange in flight is in every rank's x already, by the part that its rank applies; the mean
  // replaces it. A resync that it asks for is this mean.
  sent_.exchange = ranks_.take_average(sent_, non_finite);
  in_flight_ = false;
  take_mean(x, exact);
  publish();
}

bool WeightsExchange::begun() const {
  const std::lock_guard lock(mutex_);
  return begun_;
}

std::uint64_t WeightsExchange::checksum() const {
  const std::lock_guard lock(mutex_);
  return codec_->checksum();
}

std::uint64_t WeightsExchange::exchanges() const {
  const std::lock_guard lock(mutex_);
  return sent_.exchange;
}

ModuleState WeightsExchange::state(Views x) {
  const std::lock_guard lock(mutex_);
  if (!begun_ && !loaded_) {
    codec_->begin(x);  // W = x as it is now; the first training forward adopts it again
  }
  ModuleState state{{}, {}, {}, sent_.exchange, share_left_, mean_at_};
  for (auto& tensor : codec_->state(x, share_left_)) {
    state.reference.push_back(std::move(tensor.reference));
    state.residual.push_back(std::move(tensor.residual));
    state.pending.push_back(std::move(tensor.pending));
  }
  return state;
}

void WeightsExchange::show_reference(Views x) {
  const std::lock_guard lock(mutex_);
  codec_->leave(x, 0.0F);
}

void WeightsExchange::load(const ModuleState& state, Views x) {
  const std::lock_guard lock(mutex_);
  if (begun_) {
    throw ExchangeError(fmt::format(
        "rank {}: load the state of module {} before its first training forward, not after",
        group_->rank(), ordinal()));
  }
  if (state.reference.size() != tensors().size() || state.residual.size() != tensors().size() ||
      state.pending.size() != tensors().size()) {
    throw ExchangeError(fmt::format("rank {}: the state has {} tensors, module {} has {}",
                                    group_->rank(), state.reference.size(), ordinal(),
                                    tensors().size()));
  }
  if (state.mean_at > state.exchanges) {
    throw ExchangeError(
        fmt::format("rank {}: the state of module {} is of {} exchanges, and the ranks' mean was "
                    "taken after {}",
                    group_->rank(), ordinal(), state.exchanges, state.mean_at));
  }
  for (std::size_t tensor = 0; tensor < tensors().size(); ++tensor) {
    const std::size_t elements = tensors()[tensor].elements();
    const auto& pending = state.pending[tensor];
    if (state.reference[tensor].size() != elements || state.residual[tensor].size() != elements ||
        (!pending.empty() && pending.size() != elements)) {
      throw ExchangeError(fmt::format("rank {}: the state of {} does not have its {} elements",
                                      group_->rank(), tensors()[tensor].name, elements));
    }
    codec_->restore_state(tensor, state.reference[tensor], state.residual[tensor], pending);
  }
  if (state.share == kNoShareYet) {
    // All ranks had the same weights, and R is the optimizer's move since: x has all of it, and the
    // next exchange takes it from there.
    codec_->leave(x, 1.0F);
    for (std::size_t tensor = 0; tensor < tensors().size(); ++tensor) {
      const std::vector<float> none(tensors()[tensor].elements());
      codec_->restore_state(tensor, state.reference[tensor], none, state.pending[tensor]);
    }
  } else {
    codec_->leave(x, state.share);
  }
  codec_->rehash();
  sent_.exchange = state.exchanges;
  share_left_ = state.share;
  mean_at_ = state.mean_at;
  loaded_ = true;
}

}  // namespace distro::exchange
