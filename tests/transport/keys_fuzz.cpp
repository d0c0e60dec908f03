// Any bytes as a peers file, and as the parts of a request to check a key: parsing neither crashes
// nor lets anybody in who is not known.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "transport/keys.h"
#include "transport/zap.h"

namespace {

using namespace distro::transport;

const std::string kKey = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID";

void try_peers(std::string_view text) {
  try {
    const PeersFile file = parse_peers(text, "peers");
    // What is accepted says the same when it is written again.
    std::string again;
    for (const auto& [rank, entry] : file.ranks) {
      again += peers_line(std::to_string(rank), entry.public_key, entry.endpoint) + "\n";
    }
    if (file.relay) {
      again += peers_line("relay", file.relay->public_key, file.relay->endpoint);
    }
    const PeersFile second = parse_peers(again, "again");
    if (second.ranks.size() != file.ranks.size() ||
        second.relay.has_value() != file.relay.has_value()) {
      std::abort();
    }
  } catch (const ConfigError& error) {
    if (std::string_view(error.what()).starts_with("again")) {
      std::abort();
    }
  }
}

void try_request(std::string_view bytes) {
  static const std::string kBinary = [] {
    const auto key = decode_public_key(kKey);
    return std::string(reinterpret_cast<const char*>(key->data()), key->size());
  }();
  static const ZapDomains kDomains{{"rank 0", {{kBinary, "1"}}}};
  std::vector<std::string> parts;
  while (!bytes.empty()) {
    const std::size_t size = static_cast<std::uint8_t>(bytes.front());
    bytes.remove_prefix(1);
    // Some sizes stand for what random bytes never meet.
    static const std::string kWords[] = {"1.0", "CURVE", "rank 0", kBinary};
    if (size >= 252) {
      parts.push_back(kWords[size - 252]);
      continue;
    }
    parts.emplace_back(bytes.substr(0, size));
    bytes.remove_prefix(parts.back().size());
  }
  const ZapReply reply = judge(parts, kDomains);
  const bool known = parts.size() == 7 && parts[0] == "1.0" && parts[2] == "rank 0" &&
                     parts[5] == "CURVE" && parts[6] == kBinary;
  if (reply.user.empty() == known || reply.user.empty() == reply.reason.empty()) {
    std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try_peers(bytes);
  try_request(bytes);
  return 0;
}
