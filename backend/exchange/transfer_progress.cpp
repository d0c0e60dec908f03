#include "backend/exchange/transfer_progress.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace distro::exchange {
namespace {

// Operations below this size are not told of: what they wait for is not the line.
constexpr std::size_t kLargeBytes = std::size_t{1} << 20;

// Of the time until the first warning: how often it is told at level info, and how much rarer
// warnings come after the first. 10 s, 5 s and 30 s by default.
constexpr int kInfosPerWarning = 2;
constexpr int kLaterWarnings = 3;

double megabytes(std::size_t bytes) { return static_cast<double>(bytes) * 1e-6; }

double seconds(transport::Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

}  // namespace

std::string TransferProgress::text(transport::Deadline now) const {
  const double elapsed = std::max(seconds(now - began), 1e-3);
  const double rate = static_cast<double>(moved) / elapsed;
  const std::string left =
      moved == 0 ? "nothing came yet"
                 : fmt::format("about {:.0f} s left", static_cast<double>(total - moved) / rate);
  return fmt::format(
      "{}: {:.0f}% ({:.0f} of {:.0f} MB), {:.1f} MB/s, {}", name,
      100.0 * static_cast<double>(moved) / static_cast<double>(std::max<std::size_t>(total, 1)),
      megabytes(moved), megabytes(total), rate * 1e-6, left);
}

void TransferReports::tell(transport::LogLevel level, const std::string& text) const {
  transport::log(level, fmt::format("[distro rank {}] {}", rank_, text));
}

void TransferReports::look(const TransferProgress* moving, transport::Deadline now) {
  if (!told_.empty() && (moving == nullptr || moving->name != told_)) {
    tell(transport::LogLevel::warning,
         fmt::format("{}: done, {:.0f} MB in {:.0f} s", std::exchange(told_, {}),
                     megabytes(told_total_), seconds(now - told_began_)));
  }
  if (moving == nullptr || moving->total < kLargeBytes ||
      now - moving->began < first_ / kInfosPerWarning) {
    return;
  }
  const bool warn =
      now - moving->began >= first_ &&
      (told_.empty() ? now - warned_ >= first_ : now - warned_ >= kLaterWarnings * first_);
  if (warn) {
    warned_ = informed_ = now;
    told_ = moving->name;
    told_began_ = moving->began;
    told_total_ = moving->total;
    tell(transport::LogLevel::warning, moving->text(now));
  } else if (now - informed_ >= first_ / kInfosPerWarning) {
    informed_ = now;
    tell(transport::LogLevel::info, moving->text(now));
  }
}

}  // namespace distro::exchange
