#pragma once

#include <array>
#include <cstddef>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transport/error.h"

namespace distro::transport {

/// Characters of a CURVE key in Z85, which may be any printable ones but quotes and backslashes,
/// '#' among them.
inline constexpr std::size_t kZ85KeyBytes = 40;
/// The same key in binary.
inline constexpr std::size_t kKeyBytes = 32;

/// The secret half of a key. Its memory is wiped with it, and nothing shows it by accident. Not
/// more than that: ZeroMQ keeps a copy in each socket for as long as that lives.
class SecretKey {
 public:
  /// Throws ConfigError, which does not show it, if this is no key in Z85.
  explicit SecretKey(std::string_view z85);
  SecretKey(const SecretKey&) = default;
  SecretKey& operator=(const SecretKey&) = default;
  ~SecretKey();

  /// Ends with a 0.
  [[nodiscard]] const char* z85() const noexcept { return text_.data(); }

 private:
  std::array<char, kZ85KeyBytes + 1> text_{};
};

struct KeyPair {
  std::string public_key;  ///< Z85.
  SecretKey secret;
};

/// A new random pair. Throws ConfigError if ZeroMQ was built without CURVE.
KeyPair make_key_pair();

/// The public key that belongs to a secret one, in Z85.
std::string public_key_of(const SecretKey& secret);

/// The key in binary, or an empty optional if this is not the text of a key: another length,
/// characters that Z85 does not have, a text that encodes no 32 bytes or that another text encodes
/// as well, or a point that gives every peer the same secret.
std::optional<std::array<std::byte, kKeyBytes>> decode_public_key(std::string_view z85);

/// A rank or the relay in a peers file.
struct PeerEntry {
  std::string public_key;  ///< Z85.
  std::string endpoint;    ///< "tcp://host" or "tcp://host:port"; empty: what the store says.
  int line = 0;            ///< From 1, for errors.
};

/// Who may take part, by rank in the world. The authority for keys: what the store says of them is
/// only compared with it.
struct PeersFile {
  std::string name;  ///< Of the file, for errors.
  std::map<int, PeerEntry> ranks;
  std::optional<PeerEntry> relay;
};

/// Parse lines of "<rank or relay> <public key> [endpoint]"; empty lines, and those that begin with
/// '#', are skipped. Throws ConfigError with `name` and the number of the line.
PeersFile parse_peers(std::string_view text, std::string_view name);

/// Throws ConfigError if the file cannot be read, is no regular file, is longer than 1 MiB or can
/// be written to by everybody; and as parse_peers().
PeersFile read_peers_file(const std::string& path);

/// A line of a peers file, without its end.
std::string peers_line(std::string_view who, std::string_view public_key,
                       std::string_view endpoint);

/// Whether this is "tcp://host" or "tcp://host:port", an IPv6 address in brackets.
bool is_peer_endpoint(std::string_view text);

/// Read a key pair that write_secret_file() wrote. Throws ConfigError if the file cannot be read,
/// is no regular file, belongs to somebody else than this user or root, can be read or written by
/// others (with the chmod that helps), or holds no pair.
KeyPair read_secret_file(const std::string& path);

/// Write a new file that only this user can read, from its first moment. Throws ConfigError; also
/// if the file is there, unless `replace`.
void write_secret_file(const std::string& path, const KeyPair& pair, std::string_view who,
                       bool replace);

/// The same for a file that all may read.
void write_peers_file(const std::string& path, std::string_view text, bool replace);

/// What a channel needs of the keys.
struct Keys {
  KeyPair own;
  std::vector<std::string> public_by_rank;    ///< Z85, by rank of the group. Relay: by rank in the
                                              ///< world; empty: there is no such rank.
  std::vector<std::string> endpoint_by_rank;  ///< As PeerEntry::endpoint; empty: none has one.
  std::string relay_public_key;               ///< Empty: the file names no relay.
};

/// Read the two files for this rank of a group. `world_ranks`: rank in the world by rank of the
/// group, which is what files count by. Throws ConfigError, also if a rank of the group is not in
/// the file or the own line has another key than the secret's.
Keys load_keys(const std::string& secret_file, const std::string& peers_file, int rank,
               std::span<const int> world_ranks);

/// The same for the relay, which serves all ranks of the file. Throws ConfigError, also if the file
/// has no line for the relay or one with another key than the secret's.
Keys load_relay_keys(const std::string& secret_file, const std::string& peers_file);

}  // namespace distro::transport
