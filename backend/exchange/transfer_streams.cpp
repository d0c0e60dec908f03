#include "backend/exchange/transfer_streams.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "backend/exchange/error.h"
#include "backend/exchange/rendezvous.h"
#include "backend/exchange/text.h"

namespace distro::exchange {
namespace {

// How long a rank that sees a difference waits for the descriptions of the others, so as to name
// all that differ. Shorter than a round trip names fewer; longer delays the error.
constexpr std::chrono::seconds kPatience{2};

// Of a window: what is used before the sender is told. Smaller sends more credits; a quarter leaves
// it three to go on with.
constexpr std::size_t kCreditsPerWindow = 4;

bool contains(const std::vector<int>& ranks, int rank) {
  return std::ranges::find(ranks, rank) != ranks.end();
}

}  // namespace

TransferStreams::TransferStreams(transport::Channel& channel, Callbacks& callbacks, int rank,
                                 std::size_t window_bytes)
    : channel_(channel),
      callbacks_(callbacks),
      rank_(rank),
      window_bytes_(window_bytes),
      streams_(kMaxStreams) {}

TransferStreams::Flow& TransferStreams::flow(Stream& stream, int peer) {
  const auto [found, is_new] = stream.flows.try_emplace(peer);
  if (is_new) {
    found->second.limit = found->second.granted = window_bytes_;
  }
  return found->second;
}

void TransferStreams::open(std::uint32_t stream, std::vector<int> members) {
  Stream& opened = streams_.at(stream);
  for (const auto& entry : opened.flows) {
    if (!contains(members, entry.first)) {
      throw Misbehaviour(entry.first,
                         fmt::format("rank {}: rank {} takes part in stream {}, which is not its",
                                     rank_, entry.first, stream));
    }
  }
  opened.members = std::move(members);
}

void TransferStreams::issue(Collective collective, transport::Deadline now) {
  Stream& stream = streams_.at(collective.stream);
  const std::uint64_t number = stream.first + stream.active.size();
  Active& active = stream.active.emplace_back();
  active.what = collective.what;
  active.reduction = collective.reduction;
  active.timeout = collective.timeout;
  active.done = std::move(collective.done);
  active.issued = now;
  active.progress.began = now;
  active.progress.name = fmt::format("{} {}", name_of(active.what.operation), number + 1);

  Outgoing only_told;
  for (const int member : stream.members) {
    if (member != rank_) {
      active.incoming.emplace(member, Incoming{});
      if (std::ranges::none_of(collective.outgoing, [&](const auto& outgoing) {
            return contains(outgoing.to, member);
          })) {
        only_told.to.push_back(member);
      }
    }
  }
  for (auto& outgoing : collective.outgoing) {
    active.progress.total += outgoing.bytes.size();
    active.outgoing.push_back({outgoing.bytes, std::move(outgoing.to)});
  }
  if (!only_told.to.empty()) {
    active.outgoing.push_back(std::move(only_told));
  }
  for (const auto& incoming : collective.incoming) {
    Incoming& from = active.incoming.at(incoming.from);
    from.bytes = incoming.bytes;
    from.into = incoming.into;
    from.growing = incoming.growing;
    active.progress.total += incoming.growing == nullptr ? incoming.bytes : 0;
  }
  for (auto& [peer, ignored] : active.incoming) {
    use(collective.stream, stream, peer, now);
  }
  settle(stream);
}

// Of one outgoing string, to all its receivers at once.
bool TransferStreams::send_chunk(std::uint32_t number, Stream& stream, Active& active,
                                 std::uint64_t operation, Outgoing& outgoing,
                                 transport::Deadline now) {
  if (outgoing.done()) {
    return false;
  }
  const std::size_t size = std::min(kTransferChunk, outgoing.bytes.size() - outgoing.sent);
  const std::size_t message_bytes =
      kTransferHeaderBytes + (outgoing.begun ? 0 : kTransferDescriptionBytes) + size;
  for (const int peer : outgoing.to) {
    const Flow& to = flow(stream, peer);
    const bool has_credit = to.sent + message_bytes <= to.limit || left_.contains(peer);
    if (to.sending != operation || !has_credit) {
      return false;
    }
  }
  TransferDescription description = active.what;
  description.total = outgoing.bytes.size();
  const TransferHeader header{.kind = TransferKind::collective,
                              .stream = number,
                              .number = operation,
                              .offset = outgoing.sent};
  const auto message = std::make_shared<const transport::Bytes>(
      write_transfer(header, outgoing.begun ? nullptr : &description,
                     outgoing.bytes.subspan(outgoing.sent, size)));
  for (const int gone : channel_.multicast(outgoing.to, message)) {
    if (!outgoing.bytes.empty()) {
      const auto known = left_.find(gone);
      throw known != left_.end()
          ? known->second
          : transport::PeerLeft(
                gone, fmt::format("rank {} left the group while rank {} still has {} for it", gone,
                                  rank_, active.progress.name));
    }
  }
  outgoing.begun = true;
  outgoing.sent += size;
  for (const int peer : outgoing.to) {
    Flow& to = flow(stream, peer);
    to.sent += message_bytes;
    if (outgoing.done()) {
      to.sending = operation + 1;
    }
  }
  stream.moved = now;
  if (active.progress.moved == 0) {
    active.progress.began = now;
  }
  active.progress.moved += size;
  return true;
}

bool TransferStreams::pump(transport::Deadline now) {
  bool any = false;
  for (std::uint32_t number = 0; number < kMaxStreams; ++number) {
    Stream& stream = streams_[number];
    std::uint64_t operation = stream.first;
    bool sent = false;
    for (Active& active : stream.active) {
      bool moved = false;
      for (Outgoing& outgoing : active.outgoing) {
        moved = send_chunk(number, stream, active, operation, outgoing, now) || moved;
      }
      if (moved && active.reduction) {
        reduce(number, stream, active);  // it may have waited for this rank's own
      }
      sent = sent || moved;
      ++operation;
    }
    if (sent) {
      settle(stream);
    }
    any = any || sent;
  }
  return any;
}

void TransferStreams::follow(Flow& flow, int peer, const Part& part,
                             std::size_t message_bytes) const {
  const std::size_t size = part.payload().size();
  const bool in_place = part.number == flow.arriving &&
                        (part.description ? !flow.arriving_total
                                          : flow.arriving_total && part.offset == flow.arrived);
  if (!in_place) {
    throw Misbehaviour(peer, fmt::format("rank {}: rank {} sent byte {} of collective {} where "
                                         "byte {} of collective {} is the next",
                                         rank_, peer, part.offset, part.number + 1, flow.arrived,
                                         flow.arriving + 1));
  }
  if (part.description) {
    flow.arriving_total = part.description->total;
  }
  flow.arrived_messages += message_bytes;
  if (size > *flow.arriving_total - flow.arrived || flow.arrived_messages > flow.granted) {
    throw Misbehaviour(peer, fmt::format("rank {}: rank {} sent more of collective {} than it may",
                                         rank_, peer, part.number + 1));
  }
  flow.arrived += size;
  if (flow.arrived == *flow.arriving_total) {
    ++flow.arriving;
    flow.arrived = 0;
    flow.arriving_total.reset();
  }
}

void TransferStreams::take(int peer, transport::Bytes message, const OpenedTransfer& opened,
                           transport::Deadline now) {
  const std::uint32_t number = opened.header.stream;
  Stream& stream = streams_[number];
  if (stream.is_open() && !contains(stream.members, peer)) {
    throw Misbehaviour(
        peer, fmt::format("rank {}: rank {} takes part in stream {}, which is not its", rank_, peer,
                          number));
  }
  Flow& from = flow(stream, peer);
  if (opened.header.kind == TransferKind::stream_credit) {
    from.limit = std::max(from.limit, opened.header.offset);
    return;
  }
  const std::size_t message_bytes = message.size();
  Part part{{},
            message_bytes - opened.payload.size(),
            opened.header.number,
            opened.header.offset,
            opened.description};
  part.message = std::move(message);
  follow(from, peer, part, message_bytes);
  from.parts.push_back(std::move(part));
  use(number, stream, peer, now);
  settle(stream);
}

void TransferStreams::use(std::uint32_t number, Stream& stream, int peer, transport::Deadline now) {
  auto& parts = flow(stream, peer).parts;
  while (!parts.empty() && parts.front().number < stream.first + stream.active.size()) {
    Part part = std::move(parts.front());
    parts.pop_front();
    // Operations stay until every rank has told what it does in them.
    Active& active = stream.active[part.number - stream.first];
    use(number, stream, peer, active, std::move(part), now);
  }
}

void TransferStreams::use(std::uint32_t number, Stream& stream, int peer, Active& active, Part part,
                          transport::Deadline now) {
  Incoming& incoming = active.incoming.at(peer);
  Flow& from = flow(stream, peer);
  stream.moved = now;
  if (part.description) {
    incoming.told = part.description;
    compare(active, peer, *part.description, now);
    if (incoming.growing != nullptr && !active.differs_since) {
      incoming.bytes = part.description->total;
      active.progress.total += incoming.bytes;
    }
  }
  const auto payload = part.payload();
  const std::size_t message_bytes = part.message.size();
  if (active.differs_since || payload.empty()) {
    return used(number, from, peer, message_bytes);
  }
  if (active.progress.moved == 0) {
    active.progress.began = now;
  }
  active.progress.moved += payload.size();
  incoming.arrived += payload.size();
  if (active.reduction) {
    if (payload.size() != std::min<std::size_t>(kTransferChunk, incoming.bytes - part.offset)) {
      throw Misbehaviour(peer, fmt::format("rank {}: rank {} sent {} bytes of {} in one piece",
                                           rank_, peer, payload.size(), active.progress.name));
    }
    incoming.pieces.push_back(std::move(part));
    return reduce(number, stream, active);
  }
  if (incoming.growing != nullptr) {
    incoming.growing->insert(incoming.growing->end(), payload.begin(), payload.end());
  } else {
    std::memcpy(incoming.into + part.offset, payload.data(), payload.size());
  }
  incoming.used += payload.size();
  used(number, from, peer, message_bytes);
}

void TransferStreams::used(std::uint32_t number, Flow& flow, int peer, std::size_t bytes) {
  flow.used += bytes;
  const std::uint64_t limit = flow.used + window_bytes_;
  if (limit - flow.granted < window_bytes_ / kCreditsPerWindow) {
    return;
  }
  flow.granted = limit;
  const auto message = std::make_shared<const transport::Bytes>(write_transfer(
      {.kind = TransferKind::stream_credit, .stream = number, .offset = limit}, nullptr, {}));
  try {
    channel_.send(peer, message);
  } catch (const transport::PeerLeft&) {
    // It sends nothing more.
  }
}

// A chunk is combined once it is there of all ranks, and this rank's own is on its way: the result
// may lie where that is.
void TransferStreams::reduce(std::uint32_t number, Stream& stream, Active& active) {
  const auto& own = active.reduction->own;
  while (active.reduced < own.size() && !active.differs_since) {
    const std::size_t size = std::min(kTransferChunk, own.size() - active.reduced);
    const std::size_t end = active.reduced + size;
    const bool all_there = std::ranges::all_of(
        active.incoming, [](const auto& entry) { return !entry.second.pieces.empty(); });
    const bool own_is_sent = std::ranges::all_of(active.outgoing, [&](const Outgoing& outgoing) {
      return outgoing.sent >= std::min(end, outgoing.bytes.size());
    });
    if (!all_there || !own_is_sent) {
      return;
    }
    std::vector<const std::byte*> sources;
    for (const int member : stream.members) {
      sources.push_back(member == rank_
                            ? own.data() + active.reduced
                            : active.incoming.at(member).pieces.front().payload().data());
    }
    combine(active.what.type, active.what.combiner, sources, size / size_of(active.what.type),
            active.reduction->result + active.reduced);
    active.reduced = end;
    for (auto& [peer, incoming] : active.incoming) {
      const std::size_t message_bytes = incoming.pieces.front().message.size();
      incoming.pieces.pop_front();
      incoming.used += size;
      used(number, flow(stream, peer), peer, message_bytes);
    }
  }
}

bool TransferStreams::all_told(const Active& active) {
  return std::ranges::all_of(active.incoming,
                             [](const auto& entry) { return entry.second.told.has_value(); });
}

bool TransferStreams::complete(const Active& active) {
  return !active.differs_since && std::ranges::all_of(active.outgoing, &Outgoing::done) &&
         std::ranges::all_of(active.incoming,
                             [](const auto& entry) { return entry.second.done(); }) &&
         (!active.reduction || active.reduced == active.reduction->own.size()) &&
         (active.what.operation != TransferOperation::barrier || all_told(active));
}

void TransferStreams::settle(Stream& stream) {
  for (Active& active : stream.active) {
    if (!active.finished && complete(active)) {
      active.finished = true;
      callbacks_.run([done = std::move(active.done)] { done(nullptr); });
    }
  }
  while (!stream.active.empty() && stream.active.front().finished &&
         std::ranges::all_of(stream.active.front().incoming, [&](const auto& entry) {
           return entry.second.told.has_value() || left_.contains(entry.first);
         })) {
    stream.active.pop_front();
    ++stream.first;
  }
}

void TransferStreams::compare(Active& active, int peer, const TransferDescription& told,
                              transport::Deadline now) const {
  const Incoming& incoming = active.incoming.at(peer);
  const bool is_same = same(told, active.what);
  const bool fits =
      incoming.growing != nullptr ? told.total <= incoming.bytes : told.total == incoming.bytes;
  if (is_same && !fits) {
    active.sizes_differ =
        fmt::format("rank {} sends {} bytes to rank {}, which takes {}{}", peer, told.total, rank_,
                    incoming.growing != nullptr ? "at most " : "", incoming.bytes);
  }
  if ((!is_same || !fits) && !active.differs_since) {
    active.differs_since = now;
  }
}

void TransferStreams::throw_difference(const Stream& stream, const Active& active,
                                       std::uint64_t operation) const {
  std::map<std::string, std::vector<int>> ranks;
  for (const int member : stream.members) {
    const auto& told =
        member == rank_ ? std::optional(active.what) : active.incoming.at(member).told;
    if (told) {
      ranks[text_of(*told)].push_back(member);
    }
  }
  std::vector<std::string> parts;
  for (const auto& [text, members] : ranks) {
    parts.push_back(
        fmt::format("{} {} {}", ranks_text(members), members.size() == 1 ? "does" : "do", text));
  }
  if (ranks.size() == 1) {
    parts.push_back(active.sizes_differ);
  }
  throw ExchangeError(
      fmt::format("at collective {} of this group the ranks do not agree: {}. All ranks must call "
                  "the same collectives in the same order, with tensors of the same shapes and "
                  "types.",
                  operation + 1, fmt::join(parts, "; ")));
}

std::vector<int> TransferStreams::awaited(const Active& active) const {
  std::set<int> ranks;
  for (const auto& [peer, incoming] : active.incoming) {
    const bool to_tell = active.what.operation == TransferOperation::barrier && !incoming.told;
    if (!incoming.is_there() || to_tell) {
      ranks.insert(peer);
    }
  }
  if (ranks.empty()) {
    for (const Outgoing& outgoing : active.outgoing) {
      for (const int peer : outgoing.to) {
        // Who has left need not be told what this rank does.
        if (!outgoing.done() && !(outgoing.bytes.empty() && left_.contains(peer))) {
          ranks.insert(peer);
        }
      }
    }
  }
  return {ranks.begin(), ranks.end()};
}

void TransferStreams::throw_late(const Active& active, const std::vector<int>& awaited,
                                 transport::Deadline since, transport::Deadline now) const {
  std::vector<int> absent;
  for (const int peer : awaited) {
    if (!active.incoming.at(peer).told) {
      absent.push_back(peer);
    }
  }
  const auto& late = absent.empty() ? awaited : absent;
  const std::chrono::duration<double> waited = now - since;
  const std::chrono::duration<double> limit = active.timeout;
  const std::string state =
      absent.empty() ? fmt::format("stopped in the middle of it ({} of {} bytes have moved)",
                                   active.progress.moved, active.progress.total)
                     : std::string("did not come to it");
  throw transport::PeerTimeout(
      late.empty() ? rank_ : late.front(),
      fmt::format("rank {}: {} late at {}: waited {:.1f} s (the timeout is {:.1f} s), {}{}", rank_,
                  ranks_text(late) + (late.size() == 1 ? " is" : " are"), active.progress.name,
                  waited.count(), limit.count(), state,
                  why_late(channel_, late.empty() ? rank_ : late.front())));
}

void TransferStreams::leave(const transport::PeerLeft& peer) {
  left_.emplace(peer.rank(), peer);
  for (Stream& stream : streams_) {
    settle(stream);
  }
}

transport::Deadline TransferStreams::check(transport::Deadline now) {
  transport::Deadline next = transport::Deadline::max();
  for (const Stream& stream : streams_) {
    std::uint64_t operation = stream.first;
    for (const Active& active : stream.active) {
      if (active.differs_since) {
        const auto last = *active.differs_since + kPatience;
        if (now >= last || all_told(active)) {
          throw_difference(stream, active, operation);
        }
        next = std::min(next, last);
      } else if (!active.finished) {
        const auto late = awaited(active);
        for (const int peer : late) {
          if (const auto gone = left_.find(peer); gone != left_.end()) {
            throw transport::PeerLeft(
                peer, fmt::format("{} cannot end: {}", active.progress.name, gone->second.what()));
          }
        }
        const auto since = std::max(active.issued, stream.moved);
        if (now - since >= active.timeout) {
          throw_late(active, late, since, now);
        }
        next = std::min(next, since + active.timeout);
      }
      ++operation;
    }
  }
  return next;
}

void TransferStreams::fail(const std::exception_ptr& error) {
  for (Stream& stream : streams_) {
    for (Active& active : stream.active) {
      if (!active.finished) {
        callbacks_.run([done = std::move(active.done), error] { done(error); });
      }
    }
    stream.active.clear();
    stream.flows.clear();
  }
}

bool TransferStreams::idle() const {
  return std::ranges::all_of(streams_, [](const Stream& stream) {
    return std::ranges::all_of(stream.active, &Active::finished);
  });
}

const TransferProgress* TransferStreams::moving() const {
  for (const Stream& stream : streams_) {
    for (const Active& active : stream.active) {
      if (!active.finished && active.progress.moved > 0) {
        return &active.progress;
      }
    }
  }
  return nullptr;
}

}  // namespace distro::exchange
