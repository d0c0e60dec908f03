#include "backend/exchange/disagreement.h"

#include <fmt/format.h>

#include <map>

#include "backend/exchange/error.h"
#include "backend/exchange/rendezvous.h"
#include "backend/exchange/stopwatch.h"

namespace distro::exchange {
namespace {

void tell(Group& group, const transport::Bytes& message) {
  for (const int neighbour : group.sites().neighbours(group.rank())) {
    try {
      group.send(neighbour, message);
    } catch (const transport::PeerError&) {
      // It is gone, and the others are to hear even so.
    }
  }
}

}  // namespace

bool differs(const Letter& letter, std::uint64_t geometry) {
  return !letter.bytes.empty() && letter.opened.envelope.geometry != geometry;
}

std::string explain_difference(Group& group, std::span<const Letter> letters,
                               std::uint64_t geometry, std::uint32_t module,
                               const std::string& own) {
  const Stopwatch stopwatch(group.counters().wait_nanoseconds);
  tell(group, seal({.kind = MessageKind::describe,
                    .module = module,
                    .origin = static_cast<std::uint32_t>(group.rank()),
                    .geometry = geometry},
                   std::as_bytes(std::span(own))));
  const auto deadline = group.deadline();
  std::map<int, std::string> told = {{group.rank(), own}};
  std::vector<int> silent;
  std::string why;
  for (int peer = 0; peer < group.world_size(); ++peer) {
    if (peer == group.rank()) {
      continue;
    }
    try {
      const Letter letter = group.take(peer, {module, MessageKind::describe, 0}, deadline);
      const auto body = letter.opened.body;
      told[peer].assign(reinterpret_cast<const char*>(body.data()), body.size());
    } catch (const transport::PeerError& error) {
      why = why.empty() ? error.what() : why;
      if (differs(letters[static_cast<std::size_t>(peer)], geometry)) {
        silent.push_back(peer);
      }
    } catch (const Interrupted&) {
      throw;
    } catch (const Misbehaviour& error) {
      group.abort(error.rank(), error.what());
      throw;
    } catch (const ExchangeError& error) {
      group.abort(peer, error.what());
      throw;
    }
  }
  const std::string difference = first_difference(told);
  if (!difference.empty() || silent.empty()) {
    return difference;
  }
  return fmt::format("{} {} not what rank {} has, and cannot say any more what ({})",
                     ranks_text(silent), silent.size() == 1 ? "has" : "have", group.rank(), why);
}

}  // namespace distro::exchange
