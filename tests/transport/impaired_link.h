#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "transport/channel.h"

namespace distro::transport::test {

/// What the link does to frames, as probabilities.
struct Impairment {
  double loss = 0;
  double duplication = 0;
  double reordering = 0;  ///< Delays a frame so that later ones overtake it.
};

/// One direction of a link in simulated time. Deterministic by its seed.
class ImpairedLink {
 public:
  ImpairedLink(const Impairment& impairment, std::uint64_t seed)
      : impairment_(impairment), random_(seed) {}

  void send(Bytes frame, Deadline now);
  /// A frame that has arrived by now.
  std::optional<Bytes> receive(Deadline now);
  /// The connection breaks: all under way is lost.
  void cut() { under_way_.clear(); }

 private:
  struct Flight {
    Deadline arrival;
    Bytes frame;
  };
  bool happens(double probability) {
    return std::uniform_real_distribution<>(0, 1)(random_) < probability;
  }

  Impairment impairment_;
  std::mt19937_64 random_;
  std::vector<Flight> under_way_;
};

}  // namespace distro::transport::test
