#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "transport/channel.h"
#include "transport/log.h"

namespace distro::exchange {

/// How far a large operation has come: what a user on a slow line is told, so that it is seen to be
/// alive.
struct TransferProgress {
  std::string name;  ///< "broadcast 3"
  transport::Deadline began{};
  std::size_t total = 0;  ///< Bytes that this rank sends (once for several) and takes.
  std::size_t moved = 0;

  /// "broadcast 3: 34% (120 of 350 MB), 2.1 MB/s, about 110 s left".
  [[nodiscard]] std::string text(transport::Deadline now) const;
};

/// When to tell it: at level info often, at level warning after a while and then rarely, and the
/// end of what was told of.
class TransferReports {
 public:
  /// `first`: how long an operation moves before it is told of at level warning. Shorter disturbs
  /// those whose line is fast, longer leaves the others in doubt.
  explicit TransferReports(int rank, std::chrono::milliseconds first = std::chrono::seconds(10))
      : rank_(rank), first_(first) {}

  /// Look at what moves (null: nothing); writes to the log.
  void look(const TransferProgress* moving, transport::Deadline now);

 private:
  void tell(transport::LogLevel level, const std::string& text) const;

  const int rank_;
  const std::chrono::milliseconds first_;
  std::string told_;  // the last operation of which a warning told
  transport::Deadline told_began_{};
  std::size_t told_total_ = 0;
  transport::Deadline warned_{};
  transport::Deadline informed_{};
};

}  // namespace distro::exchange
