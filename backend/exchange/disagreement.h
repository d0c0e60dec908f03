#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "backend/exchange/group.h"
#include "backend/exchange/mailbox.h"
#include "backend/exchange/module_spec.h"

namespace distro::exchange {

/// Geometries differ between this rank and the sender of at least one of `letters` (by rank; empty
/// where there is none): tell every rank what this one has (`own`), take what they tell, on this
/// `module`, and say where they differ. Empty if what they told does not differ.
///
/// Every rank that sees a difference comes here, and some fail before others have heard from all:
/// of a rank whose description does not come the text says that it has something else, and why no
/// more is known. Throws ExchangeError on a malformed description.
[[nodiscard]] std::string explain_difference(Group& group, std::span<const Letter> letters,
                                             std::uint64_t geometry, std::uint32_t module,
                                             const std::string& own);

/// Whether a letter (there may be none) tells of another geometry.
[[nodiscard]] bool differs(const Letter& letter, std::uint64_t geometry);

}  // namespace distro::exchange
