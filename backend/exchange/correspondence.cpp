#include "backend/exchange/correspondence.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "backend/exchange/disagreement.h"
#include "backend/exchange/stopwatch.h"
#include "backend/exchange/text.h"

namespace distro::exchange {
namespace {

using RanksByValue = std::map<std::uint64_t, std::vector<int>>;

constexpr std::string_view kStopText =
    "All ranks stop. Lower the learning rate or clip the gradients, and resume from a checkpoint.";

// "rank 3 of 4 differs from the others": who does not have what most have.
std::string minority(const RanksByValue& ranks_by_value) {
  std::size_t all = 0;
  for (const auto& [value, ranks] : ranks_by_value) {
    all += ranks.size();
  }
  std::vector<int> result;
  for (const auto& [value, ranks] : ranks_by_value) {
    if (2 * ranks.size() <= all) {
      result.insert(result.end(), ranks.begin(), ranks.end());
    }
  }
  std::ranges::sort(result);
  if (result.size() == all) {
    return fmt::format("{} differ from each other", ranks_text(result));
  }
  return fmt::format("{} of {} {} from the others", ranks_text(result), all,
                     result.size() == 1 ? "differs" : "differ");
}

// Body of a begin message: how many exchanges the rank has sent (a resumed one: in its earlier
// life), and its first non-finite tensor, if there is one.
std::vector<std::byte> begin_body(std::uint64_t exchanges, std::optional<std::size_t> non_finite) {
  std::vector<std::byte> body(sizeof exchanges);
  std::memcpy(body.data(), &exchanges, sizeof exchanges);
  if (non_finite) {
    const auto tensor = non_finite_body(*non_finite);
    body.insert(body.end(), tensor.begin(), tensor.end());
  }
  return body;
}

std::span<const std::byte> reason_body(std::string_view reason) {
  return std::as_bytes(std::span(reason.substr(0, kMaxReasonBytes)));
}

std::uint16_t flags_of(std::optional<std::size_t> non_finite) {
  return non_finite ? kNonFinite : std::uint16_t{0};
}

}  // namespace

std::vector<std::byte> non_finite_body(std::size_t tensor) {
  const auto index = static_cast<std::uint32_t>(tensor);
  std::vector<std::byte> body(sizeof index);
  std::memcpy(body.data(), &index, sizeof index);
  return body;
}

Correspondence::Correspondence(std::shared_ptr<Group> group, std::vector<TensorSpec> tensors)
    : group_(std::move(group)),
      tensors_(std::move(tensors)),
      module_(group_->next_module()),
      geometry_(geometry_hash(tensors_, group_->options())) {}

std::string Correspondence::where(std::uint64_t exchange) const {
  return fmt::format("exchange {} of module {}", exchange, module_);
}

void Correspondence::send(MessageKind kind, std::uint16_t flags, const Statement& statement,
                          std::span<const std::byte> body) {
  group_->broadcast(seal(envelope(kind, flags, statement), body));
}

Envelope Correspondence::envelope(MessageKind kind, std::uint16_t flags,
                                  const Statement& statement) const {
  return {.kind = kind,
          .flags = flags,
          .module = module_,
          .origin = static_cast<std::uint32_t>(group_->rank()),
          .gain = statement.gain,
          .exchange = statement.exchange,
          .geometry = geometry_,
          .checksum = statement.checksum};
}

bool Correspondence::leads() const { return group_->sites().leads(group_->rank()); }

bool Correspondence::has_site() const { return group_->sites().site_of(group_->rank()).size() > 1; }

void Correspondence::blame(int peer, const std::string& message) {
  group_->abort(peer, message);
  throw ExchangeError(message);
}

std::vector<Letter> Correspondence::take_all(MessageKind kind, std::uint64_t exchange) {
  std::vector<int> peers;
  for (int peer = 0; peer < group_->world_size(); ++peer) {
    if (peer != group_->rank()) {
      peers.push_back(peer);
    }
  }
  return take_from(peers, kind, exchange);
}

// By rank; empty for the own rank and those that were not asked.
std::vector<Letter> Correspondence::take_from(const std::vector<int>& peers, MessageKind kind,
                                              std::uint64_t exchange) {
  const Stopwatch stopwatch(group_->counters().wait_nanoseconds);
  const auto deadline = group_->deadline();
  std::vector<Letter> letters(static_cast<std::size_t>(group_->world_size()));
  for (const int peer : peers) {
    auto& letter = letters[static_cast<std::size_t>(peer)];
    try {
      do {
        letter = group_->take(peer, {module_, kind, exchange}, deadline);
        if (letter.opened.envelope.kind != kind) {
          check_finite(letter, peer);  // an exchange before the awaited average
        }
      } while (letter.opened.envelope.kind != kind);
    } catch (const transport::PeerError& error) {
      group_->abort(error.rank(), error.what());
      throw;
    } catch (const Misbehaviour& error) {
      blame(error.rank(), error.what());
    } catch (const ExchangeError& error) {
      blame(peer, error.what());
    }
  }
  return letters;
}

// Every rank sees every other's geometry, so all of them come here together.
void Correspondence::explain_geometry(const std::vector<Letter>& letters) {
  const std::string difference = explain_difference(*group_, letters, geometry_, module_,
                                                    describe(tensors_, kMaxDescriptionBytes));
  throw ExchangeError(
      difference.empty()
          ? fmt::format(
                "module {} is exchanged with different options on the ranks, or has more "
                "parameters "
                "than can be compared here; give all ranks the same options and the same module",
                module_)
          : fmt::format("module {} is not the same on all ranks: {}. Build the same model, with "
                        "the same dtypes and "
                        "requires_grad, on every rank.",
                        module_, difference));
}

void Correspondence::fail_non_finite(std::size_t tensor, std::uint64_t exchange) const {
  throw ExchangeError(
      fmt::format("rank {}: parameter {} has a non-finite weight (inf or nan) at {}. {}",
                  group_->rank(), tensors_[tensor].name, where(exchange), kStopText));
}

void Correspondence::check_finite(const Letter& letter, int peer) const {
  const auto& opened = letter.opened;
  if ((opened.envelope.flags & kNonFinite) == 0) {
    return;
  }
  std::uint32_t tensor = UINT32_MAX;
  if (opened.body.size() >= sizeof tensor) {
    std::memcpy(&tensor, opened.body.last(sizeof tensor).data(), sizeof tensor);
  }
  const std::string name = tensor < tensors_.size() ? tensors_[tensor].name : "(unknown)";
  throw ExchangeError(fmt::format(
      "rank {}: rank {} reports a non-finite weight (inf or nan) in parameter {} at {}. {}",
      group_->rank(), peer, name, where(opened.envelope.exchange), kStopText));
}

void Correspondence::check_finite(const std::vector<Letter>& letters) const {
  for (std::size_t peer = 0; peer < letters.size(); ++peer) {
    if (static_cast<int>(peer) != group_->rank()) {
      check_finite(letters[peer], static_cast<int>(peer));
    }
  }
}

// All ranks exchange the module, or none does. `reason`: why this rank does not (null: it does).
void Correspondence::check_same_door(const std::vector<Letter>& letters,
                                     const std::string* reason) const {
  std::vector<int> exchanging;
  std::map<std::string, std::vector<int>> exact;  // ranks by reason
  for (std::size_t rank = 0; rank < letters.size(); ++rank) {
    const auto& [envelope, body] = letters[rank].opened;
    const bool mine = static_cast<int>(rank) == group_->rank();
    if (!mine && letters[rank].bytes.empty()) {
      continue;  // another rank speaks for it
    }
    if (mine ? reason == nullptr : (envelope.flags & kExact) == 0) {
      exchanging.push_back(static_cast<int>(rank));
      continue;
    }
    const std::size_t header = envelope.kind == MessageKind::begin ? sizeof(std::uint64_t) : 0;
    const auto text = body.subspan(mine ? 0 : std::min(header, body.size()));
    exact[mine ? printable(*reason, kMaxReasonBytes)
               : printable({reinterpret_cast<const char*>(text.data()), text.size()},
                           kMaxReasonBytes)]
        .push_back(static_cast<int>(rank));
  }
  if (exchanging.empty() || exact.empty()) {
    return;
  }
  std::vector<std::string> parts;
  for (const auto& [why, ranks] : exact) {
    parts.push_back(fmt::format("{} {} its gradients exactly ({})", ranks_text(ranks),
                                ranks.size() == 1 ? "reduces" : "reduce", why));
  }
  throw ExchangeError(
      fmt::format("rank {}: the ranks do not treat module {} alike: {} {} its weights, {}. Write "
                  "the script so that all ranks do the same, or set DISTRO_MODE=dense.",
                  group_->rank(), module_, ranks_text(exchanging),
                  exchanging.size() == 1 ? "exchanges" : "exchange", fmt::join(parts, ", ")));
}

void Correspondence::introduce_exact(const std::string& reason) {
  auto body = begin_body(0, std::nullopt);
  const auto text = reason_body(reason);
  body.insert(body.end(), text.begin(), text.end());
  send(MessageKind::begin, kExact, {.gain = 0.0F}, body);
  check_same_door(take_all(MessageKind::begin, 0), &reason);
}

void Correspondence::stop(const Statement& own, const std::string& reason) {
  if (leads()) {
    check_same_door(
        take_from(group_->sites().others_of_site(group_->rank()), MessageKind::check, own.exchange),
        &reason);
    send(MessageKind::step, kExact, own, reason_body(reason));
  } else {
    tell_leader(kExact, own, reason_body(reason));
  }
  check_same_door(
      take_from(group_->sites().other_leaders(group_->rank()), MessageKind::step, own.exchange),
      &reason);
}

void Correspondence::tell_leader(std::uint16_t flags, const Statement& own,
                                 std::span<const std::byte> body) {
  group_->send(group_->sites().leader_of(group_->rank()),
               seal(envelope(MessageKind::check, flags, own), body));
}

void Correspondence::report(const Statement& own, std::uint16_t flags, std::uint64_t fingerprint) {
  tell_leader(flags, own, std::as_bytes(std::span(&fingerprint, 1)));
}

Correspondence::Reports Correspondence::take_reports(const Statement& own,
                                                     std::uint64_t fingerprint, bool edited) {
  const auto letters =
      take_from(group_->sites().others_of_site(group_->rank()), MessageKind::check, own.exchange);
  check_same_door(letters, nullptr);
  check_agreement(letters, own);
  Reports reports;
  reports.gain = gain_of(letters, own).value_or(kGainUnknown);
  RanksByValue fingerprints = {{fingerprint, {group_->rank()}}};
  for (const int member : group_->sites().others_of_site(group_->rank())) {
    const auto& [envelope, body] = letters[static_cast<std::size_t>(member)].opened;
    reports.ask_resync = reports.ask_resync || (envelope.flags & kAsksResync) != 0;
    std::uint64_t theirs = 0;
    std::memcpy(&theirs, body.data(), sizeof theirs);  // open() has checked the size
    fingerprints[theirs].push_back(member);
  }
  if (fingerprints.size() > 1 && !edited && !reports.ask_resync) {
    throw ExchangeError(fmt::format(
        "rank {}: the weights of {} are not the same on its ranks before {}: {}. A "
        "script that edits weights on some rank (call torch_distro.resync(module) after it), an "
        "optimizer that does not step alike on their hardware, or a memory fault; resume from a "
        "checkpoint, or give each rank a site of its own.",
        group_->rank(), group_->sites().name(group_->sites().participant_of(group_->rank())),
        where(own.exchange), minority(fingerprints)));
  }
  return reports;
}

std::vector<Letter> Correspondence::introduce(const Statement& own,
                                              std::optional<std::size_t> non_finite) {
  send(MessageKind::begin, flags_of(non_finite), {.gain = 0.0F, .checksum = own.checksum},
       begin_body(own.exchange, non_finite));
  auto letters = take_all(MessageKind::begin, 0);
  check_same_door(letters, nullptr);
  bool same_geometry = true;
  RanksByValue numbers;
  for (std::size_t rank = 0; rank < letters.size(); ++rank) {
    const auto& opened = letters[rank].opened;
    std::uint64_t number = own.exchange;
    if (static_cast<int>(rank) != group_->rank()) {
      same_geometry = same_geometry && opened.envelope.geometry == geometry_;
      if (opened.body.size() < sizeof number) {
        blame(static_cast<int>(rank),
              fmt::format("rank {}: rank {} sent a begin message of {} bytes", group_->rank(), rank,
                          opened.body.size()));
      }
      std::memcpy(&number, opened.body.data(), sizeof number);
    }
    numbers[number].push_back(static_cast<int>(rank));
  }
  if (!same_geometry) {
    explain_geometry(letters);
  }
  if (numbers.size() > 1) {
    std::vector<std::string> parts;
    for (const auto& [number, ranks] : numbers) {
      parts.push_back(fmt::format("{} at exchange {}", ranks_text(ranks), number));
    }
    throw ExchangeError(
        fmt::format("rank {}: the ranks resume module {} at different places: {}. Load states that "
                    "were saved at the "
                    "same step on all ranks, or on none.",
                    group_->rank(), module_, fmt::join(parts, ", ")));
  }
  if (non_finite) {
    fail_non_finite(*non_finite, own.exchange);
  }
  check_finite(letters);
  return letters;
}

void Correspondence::check_agreement(const std::vector<Letter>& letters,
                                     const Statement& own) const {
  RanksByValue checksums;
  checksums[own.checksum].push_back(group_->rank());
  for (std::size_t peer = 0; peer < letters.size(); ++peer) {
    const auto& envelope = letters[peer].opened.envelope;
    if (letters[peer].bytes.empty()) {
      continue;  // the own rank, or one for which another speaks
    }
    if (envelope.geometry != geometry_) {
      throw ExchangeError(
          fmt::format("rank {}: rank {} sent {} for other tensors or options than it began with",
                      group_->rank(), peer, where(own.exchange)));
    }
    if (envelope.exchange == own.exchange) {  // always, but where ranks average
      checksums[envelope.checksum].push_back(static_cast<int>(peer));
    }
  }
  if (checksums.size() > 1) {
    throw ExchangeError(
        fmt::format("rank {}: the reference weights have drifted apart before {}: {}. "
                    "A memory fault, or a different build on some rank; resume from a checkpoint.",
                    group_->rank(), where(own.exchange), minority(checksums)));
  }
}

std::vector<Letter> Correspondence::take_step(const Statement& own) {
  auto letters =
      take_from(group_->sites().other_leaders(group_->rank()), MessageKind::step, own.exchange);
  check_same_door(letters, nullptr);
  check_finite(letters);
  check_agreement(letters, own);
  return letters;
}

std::optional<float> Correspondence::gain_of(const std::vector<Letter>& letters,
                                             const Statement& own) const {
  std::map<float, std::vector<int>> gains;
  for (std::size_t rank = 0; rank < letters.size(); ++rank) {
    const bool mine = static_cast<int>(rank) == group_->rank();
    const float gain = mine ? own.gain : letters[rank].opened.envelope.gain;
    if (gain != kGainUnknown) {
      gains[gain].push_back(static_cast<int>(rank));
    }
  }
  if (gains.size() > 1) {
    std::vector<std::string> parts;
    for (const auto& [gain, ranks] : gains) {
      parts.push_back(
          fmt::format("{} {} {}", ranks_text(ranks), ranks.size() == 1 ? "uses" : "use", gain));
    }
    throw ExchangeError(
        fmt::format("rank {}: the ranks use different gains at {}: {}. The gain follows from the "
                    "optimizer's class: use the same "
                    "optimizer on all ranks, or set DISTRO_GAIN.",
                    group_->rank(), where(own.exchange), fmt::join(parts, ", ")));
  }
  return gains.empty() ? std::nullopt : std::optional(gains.begin()->first);
}

std::uint64_t Correspondence::take_average(const Statement& own,
                                           std::optional<std::size_t> non_finite) {
  const auto letters = take_all(MessageKind::average, own.exchange);
  if (non_finite) {
    fail_non_finite(*non_finite, own.exchange);
  }
  check_finite(letters);
  check_agreement(letters, own);
  std::uint64_t furthest = own.exchange;
  for (const auto& letter : letters) {
    furthest = std::max(furthest, letter.opened.envelope.exchange);
  }
  return furthest;
}

}  // namespace distro::exchange
