#pragma once

#include <string>
#include <vector>

#include "tests/transport/group.h"
#include "transport/keys.h"

namespace distro::transport::test {

/// Keys of a group, for tests: those of all its ranks in one process.
class KeyRing {
 public:
  explicit KeyRing(int ranks) {
    for (int rank = 0; rank < ranks; ++rank) {
      pairs.push_back(make_key_pair());
    }
  }

  /// What `rank` reads out of its two files.
  [[nodiscard]] Keys of(int rank) const {
    Keys keys{pairs[static_cast<std::size_t>(rank)], {}, {}, ""};
    for (const auto& pair : pairs) {
      keys.public_by_rank.push_back(pair.public_key);
    }
    return keys;
  }

  /// For Group: gives each rank its own.
  [[nodiscard]] Group::Tune tune() const {
    return [this](ChannelConfig& options) { options.keys = of(options.rank); };
  }

  std::vector<KeyPair> pairs;
};

}  // namespace distro::transport::test
