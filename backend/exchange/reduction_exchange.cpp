#include "backend/exchange/reduction_exchange.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xxhash.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "backend/exchange/disagreement.h"
#include "backend/exchange/error.h"
#include "backend/exchange/stopwatch.h"

namespace distro::exchange {
namespace {

// Results whose checksums are kept, to be compared with what slower ranks say of them. Ranks are at
// most as many reductions apart as may be open at once.
constexpr std::size_t kResultsKept = 256;

// Codecs kept. They hold no state: a script whose reductions never have the same size twice only
// makes them anew.
constexpr std::size_t kCodecsKept = 1024;

std::vector<plugins::Residual*> pointers(
    const std::vector<std::shared_ptr<plugins::Residual>>& residuals) {
  std::vector<plugins::Residual*> result;
  for (const auto& residual : residuals) {
    result.push_back(residual.get());
  }
  return result;
}

std::uint64_t checksum_of(std::span<const plugins::TensorView> tensors) {
  std::uint64_t sum = 0;
  for (const auto& tensor : tensors) {
    sum = XXH3_64bits_withSeed(tensor.data, tensor.elements * kernels::size_of(tensor.dtype), sum);
  }
  return sum;
}

constexpr std::uint32_t kOnlyTensor[] = {0};

}  // namespace

ReductionExchange::ReductionExchange(Group& group)
    : group_(group), config_(group.options().gradient_config()) {}

std::string ReductionExchange::description(const Reduction& reduction) const {
  return fmt::format("{}\n{}mode {} k {} bits {} transform {} beta {}\n", reduction.what,
                     describe(reduction.tensors, kMaxDescriptionBytes),
                     name_of(group_.options().mode), config_.k, config_.value_bits,
                     static_cast<int>(config_.transform), config_.beta);
}

const plugins::GradientCodec& ReductionExchange::codec(const OpenReduction& open) {
  if (codecs_.size() >= kCodecsKept && !codecs_.contains(open.geometry)) {
    codecs_.clear();
  }
  auto& codec = codecs_[open.geometry];
  if (!codec) {
    std::vector<std::vector<std::int64_t>> shapes;
    for (const auto& tensor : open.reduction.tensors) {
      shapes.push_back(tensor.shape);
    }
    codec = std::make_unique<plugins::GradientCodec>(std::move(shapes), config_);
  }
  return *codec;
}

void ReductionExchange::blame(int peer, const std::string& message) {
  group_.abort(peer, message);
  throw ExchangeError(message);
}

void ReductionExchange::encode_and_send(OpenReduction& open, std::uint32_t stream,
                                        std::uint32_t slot) {
  const auto& reduction = open.reduction;
  open.residuals = reduction.residuals(slot);
  const auto residuals = pointers(open.residuals);
  std::vector<std::vector<std::byte>> records;
  {
    const Stopwatch stopwatch(group_.counters().encode_nanoseconds);
    const auto& encoder = codec(open);
    const auto encode = [&](auto gradients, auto kept) {
      auto encoded = encoder.encode(gradients, kept);
      records.push_back(std::move(encoded.record));
      open.own.push_back(std::move(encoded.own));
      return std::move(encoded.non_finite);
    };
    group_.arena().execute([&] {
      const std::span input(reduction.input);
      const std::span kept(std::as_const(residuals));
      if (!reduction.scatter) {
        open.non_finite = encode(input, kept);
        return;
      }
      for (std::size_t slice = 0; slice < input.size(); ++slice) {
        if (!encode(input.subspan(slice, 1), kept.subspan(slice, 1)).empty()) {
          open.non_finite.push_back(static_cast<std::uint32_t>(slice));
        }
      }
    });
  }
  const auto sealed = [&](const std::vector<std::byte>& record) {
    open.sent_bytes += record.size();
    const auto last =
        results_.empty() ? std::pair<const std::uint64_t, std::uint64_t>{} : *results_.rbegin();
    return seal_reduction({.decoded = last.first,
                           .checksum = last.second,
                           .slot = slot,
                           .non_finite = open.non_finite,
                           .record = record},
                          group_.rank(), stream, open.number, open.geometry);
  };
  if (!reduction.scatter) {
    group_.broadcast(sealed(records.front()));
  }
  for (int peer = 0; reduction.scatter && peer < group_.world_size(); ++peer) {
    if (peer != group_.rank()) {
      group_.send(peer, sealed(records[static_cast<std::size_t>(peer)]));
    }
  }
}

void ReductionExchange::open(OpenReduction& open) {
  open.number = ++opened_;
  const std::string text = description(open.reduction);
  open.geometry = XXH3_64bits(text.data(), text.size());
  if (open.reduction.exact) {
    group_.broadcast(
        seal_reduction({.exact = true}, group_.rank(), kReductions, open.number, open.geometry));
  } else {
    encode_and_send(open, kReductions, open.reduction.slot);
  }
}

Letter ReductionExchange::take(int peer, const Subject& subject, transport::Deadline deadline) {
  const Stopwatch stopwatch(group_.counters().wait_nanoseconds);
  try {
    return group_.take(peer, subject, deadline);
  } catch (const transport::PeerError& error) {
    group_.abort(error.rank(), error.what());
    throw;
  } catch (const Interrupted&) {
    throw;
  } catch (const ExchangeError& error) {
    blame(peer, error.what());
  }
}

// The first letter of another reduction ends the wait for the rest: the ranks that differ know what
// is wrong, whether or not the others come.
std::vector<Letter> ReductionExchange::take_announced(const OpenReduction& open) {
  const auto deadline = group_.deadline();
  std::vector<Letter> letters(static_cast<std::size_t>(group_.world_size()));
  for (int peer = 0; peer < group_.world_size(); ++peer) {
    if (peer == group_.rank()) {
      continue;
    }
    auto& letter = letters[static_cast<std::size_t>(peer)];
    letter = take(peer, {kReductions, MessageKind::reduction, open.number}, deadline);
    if (differs(letter, open.geometry)) {
      fail_difference(open, letters);
    }
  }
  return letters;
}

// Where two ranks differ every rank differs from one of them, so all of them come here.
void ReductionExchange::fail_difference(const OpenReduction& open,
                                        const std::vector<Letter>& letters) {
  std::string own = description(open.reduction);
  own.resize(std::min(own.size(), kMaxDescriptionBytes));
  throw ExchangeError(fmt::format(
      "rank {}: gradient reduction {} is not the same on all ranks: {}. Reduce the same tensors, "
      "with the same operator, in the same order on every rank.",
      group_.rank(), open.number,
      explain_difference(group_, letters, open.geometry, kReductionAnswers, own)));
}

ReductionMessage ReductionExchange::read_one(const OpenReduction& open, int peer,
                                             const Letter& letter) {
  ReductionMessage message;
  try {
    message = read_reduction(letter.opened, open.reduction.input.size());
    if (message.decoded >= open.number) {
      throw EnvelopeError(
          fmt::format("reduction {} is sent by a rank that has decoded reduction {}", open.number,
                      message.decoded));
    }
  } catch (const EnvelopeError& error) {
    blame(peer, fmt::format("rank {}: malformed message from rank {}: {}", group_.rank(), peer,
                            error.what()));
  }
  // Whatever the peer had decoded, this rank has by now.
  if (const auto own = results_.find(message.decoded);
      own != results_.end() && own->second != message.checksum) {
    blame(peer,
          fmt::format("rank {}: the gradients decoded in reduction {} differ between ranks {} "
                      "and {}. A memory fault, or a different build on one of them; resume "
                      "from a checkpoint.",
                      group_.rank(), message.decoded, group_.rank(), peer));
  }
  return message;
}

ReductionExchange::Messages ReductionExchange::read(const OpenReduction& open,
                                                    const std::vector<Letter>& letters) {
  Messages messages(letters.size());
  for (int peer = 0; peer < group_.world_size(); ++peer) {
    const auto rank = static_cast<std::size_t>(peer);
    if (peer != group_.rank()) {
      messages[rank] = read_one(open, peer, letters[rank]);
    }
  }
  return messages;
}

void ReductionExchange::take_answers(const OpenReduction& open, std::vector<Letter>& letters,
                                     Messages& messages) {
  const auto deadline = group_.deadline();
  for (int peer = 0; peer < group_.world_size(); ++peer) {
    const auto rank = static_cast<std::size_t>(peer);
    if (peer == group_.rank() || !messages[rank].exact) {
      continue;
    }
    letters[rank] = take(peer, {kReductionAnswers, MessageKind::reduction, open.number}, deadline);
    messages[rank] = read_one(open, peer, letters[rank]);
    if (messages[rank].exact || letters[rank].opened.envelope.geometry != open.geometry) {
      blame(peer, fmt::format("rank {}: rank {} answered gradient reduction {} without a record",
                              group_.rank(), peer, open.number));
    }
  }
}

bool ReductionExchange::finish(OpenReduction& open) {
  auto letters = take_announced(open);
  auto messages = read(open, letters);
  const bool exact = open.own.empty();
  const auto self = static_cast<std::size_t>(group_.rank());
  messages[self].exact = exact;
  const auto known = std::ranges::find(messages, false, &ReductionMessage::exact);
  if (known == messages.end()) {
    open.reduction.run_exact();
    return false;
  }
  if (exact) {
    encode_and_send(open, kReductionAnswers, known->slot);
    messages[self].exact = false;
  }
  take_answers(open, letters, messages);
  decode(open, messages);
  return true;
}

void ReductionExchange::decode(OpenReduction& open, const Messages& messages) {
  const auto& reduction = open.reduction;
  const Stopwatch stopwatch(group_.counters().decode_nanoseconds);
  const auto& decoder = codec(open);
  const auto self = static_cast<std::size_t>(group_.rank());
  auto non_finite = open.non_finite;
  std::vector<plugins::ParsedRecord> parsed(messages.size());
  std::vector<plugins::Contribution> contributions;
  for (std::size_t rank = 0; rank < messages.size(); ++rank) {
    const plugins::ParsedRecord* record = &open.own[reduction.scatter ? self : 0];
    if (rank != self) {
      try {
        group_.arena().execute([&] { parsed[rank] = decoder.parse(messages[rank].record); });
      } catch (const plugins::RecordError& error) {
        blame(static_cast<int>(rank),
              fmt::format("rank {}: malformed record from rank {} in gradient reduction {}: {}",
                          group_.rank(), rank, open.number, error.what()));
      }
      record = &parsed[rank];
      std::ranges::copy(messages[rank].non_finite, std::back_inserter(non_finite));
    }
    contributions.push_back({record, reduction.weight});
  }
  std::ranges::sort(non_finite);
  non_finite.erase(std::unique(non_finite.begin(), non_finite.end()), non_finite.end());
  const auto residuals = pointers(open.residuals);
  const std::span kept(std::as_const(residuals));
  group_.arena().execute([&] {
    if (!reduction.scatter) {
      decoder.decode(contributions, non_finite, reduction.output);
      if (!non_finite.empty()) {
        decoder.take_back(open.own.front(), non_finite, kept);
      }
      return;
    }
    const bool own_slice = std::ranges::binary_search(non_finite, static_cast<std::uint32_t>(self));
    decoder.decode(contributions,
                   own_slice ? std::span(kOnlyTensor) : std::span<const std::uint32_t>{},
                   reduction.output);
    for (const auto slice : non_finite) {
      decoder.take_back(open.own[slice], kOnlyTensor, kept.subspan(slice, 1));
    }
  });
  note_result(open);
}

void ReductionExchange::note_result(const OpenReduction& open) {
  auto& counters = group_.counters();
  counters.exchanges.fetch_add(1, std::memory_order_relaxed);
  counters.reductions.fetch_add(1, std::memory_order_relaxed);
  std::uint64_t bytes = 0;
  for (const auto& tensor : open.reduction.input) {
    bytes += tensor.elements * kernels::size_of(tensor.dtype);
  }
  counters.gradient_bytes.fetch_add(bytes, std::memory_order_relaxed);
  if (open.reduction.scatter) {
    return;  // each rank has another result
  }
  const auto checksum = checksum_of(open.reduction.output);
  counters.reference_checksum.store(checksum, std::memory_order_relaxed);
  results_[open.number] = checksum;
  if (results_.size() > kResultsKept) {
    results_.erase(results_.begin());
  }
}

}  // namespace distro::exchange
