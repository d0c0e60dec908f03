#include "transport/keys.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sodium.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <utility>

namespace distro::transport {
namespace {

// Of a peers file: about 10,000 lines. Less: large groups do not fit; more: a wrong path takes
// memory.
constexpr std::size_t kMaxPeersBytes = std::size_t{1} << 20;
// Of a secret file: four times what keygen writes. Less: no room for remarks; more: as above.
constexpr std::size_t kMaxSecretBytes = 1024;
// Of a text out of a file in an error. Longer ones are cut: it may be any file.
constexpr std::size_t kMaxShown = 40;

// Ranks in the world. Fewer: large groups are refused; more: the relay's table of them grows.
constexpr int kMaxRank = 65535;

constexpr std::string_view kBlanks = " \t\r";

class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  ~File() { close(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  [[nodiscard]] int get() const noexcept { return fd_; }
  bool close() noexcept {
    const int fd = std::exchange(fd_, -1);
    return fd < 0 || ::close(fd) == 0;
  }

 private:
  int fd_;
};

// Memory of a file that is wiped after use.
template <std::size_t Size>
struct Wiped {
  Wiped() = default;
  ~Wiped() { ::sodium_memzero(bytes.data(), bytes.size()); }
  Wiped(const Wiped&) = delete;
  Wiped& operator=(const Wiped&) = delete;
  std::array<char, Size> bytes{};
};

// Without waiting where the path is a pipe or a terminal.
int open_to_read(const std::string& path, std::string_view what, std::string_view variable) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
  if (fd < 0) {
    throw ConfigError(fmt::format(
        "cannot read the {} {} ({}): set {} to the path of the file that `torch-distro keygen` "
        "made",
        what, path, std::strerror(errno), variable));
  }
  return fd;
}

struct stat status_of(const File& file, const std::string& path, std::string_view what) {
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) {
    throw ConfigError(fmt::format("cannot read the {} {}: {}", what, path, std::strerror(errno)));
  }
  if (!S_ISREG(status.st_mode)) {
    throw ConfigError(fmt::format("the {} {} is not a regular file", what, path));
  }
  return status;
}

// Bytes read; one more than fits means that the file is too long.
std::size_t read_all(const File& file, std::span<char> into, const std::string& path,
                     std::string_view what) {
  std::size_t size = 0;
  while (size < into.size()) {
    const auto got = ::read(file.get(), into.data() + size, into.size() - size);
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got < 0) {
      throw ConfigError(fmt::format("cannot read the {} {}: {}", what, path, std::strerror(errno)));
    }
    if (got == 0) {
      return size;
    }
    size += static_cast<std::size_t>(got);
  }
  throw ConfigError(fmt::format("the {} {} is longer than {} bytes: it is another file", what, path,
                                into.size() - 1));
}

std::string_view next_line(std::string_view& text) {
  const auto end = text.find('\n');
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  return line;
}

std::string_view next_word(std::string_view& line) {
  line.remove_prefix(std::min(line.find_first_not_of(kBlanks), line.size()));
  const std::string_view word = line.substr(0, line.find_first_of(kBlanks));
  line.remove_prefix(word.size());
  return word;
}

// Of any bytes, for an error.
std::string shown(std::string_view text) {
  std::string result;
  for (const char c : text.substr(0, kMaxShown)) {
    result += c >= ' ' && c <= '~' ? c : '?';
  }
  return text.size() > kMaxShown ? result + "..." : result;
}

// Binary of any 32 bytes in Z85, or nothing.
std::optional<std::array<std::byte, kKeyBytes>> decode(std::string_view z85) {
  if (z85.size() != kZ85KeyBytes || z85.find('\0') != std::string_view::npos) {
    return std::nullopt;
  }
  Wiped<kZ85KeyBytes + 1> text;
  z85.copy(text.bytes.data(), z85.size());
  std::array<std::byte, kKeyBytes> key{};
  if (::zmq_z85_decode(reinterpret_cast<std::uint8_t*>(key.data()), text.bytes.data()) == nullptr) {
    return std::nullopt;
  }
  Wiped<kZ85KeyBytes + 1> again;
  ::zmq_z85_encode(again.bytes.data(), reinterpret_cast<const std::uint8_t*>(key.data()),
                   key.size());
  if (text.bytes != again.bytes) {  // digits above 2^32
    return std::nullopt;
  }
  return key;
}

void init_sodium() {
  if (::sodium_init() < 0) {
    throw ConfigError("libsodium cannot be initialised: no source of random numbers");
  }
}

// Below kMaxRank.
std::optional<int> rank_of(std::string_view text) {
  int rank = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), rank);
  const bool whole = error == std::errc{} && end == text.data() + text.size() && rank >= 0 &&
                     rank < kMaxRank && (text == "0" || text.front() != '0') && text.front() != '-';
  return whole ? std::optional<int>(rank) : std::nullopt;
}

void write_all(const File& file, std::string_view text, const std::string& path) {
  while (!text.empty()) {
    const auto written = ::write(file.get(), text.data(), text.size());
    if (written < 0 && errno == EINTR) {
      continue;
    }
    if (written < 0) {
      throw ConfigError(fmt::format("cannot write {}: {}", path, std::strerror(errno)));
    }
    text.remove_prefix(static_cast<std::size_t>(written));
  }
}

void check_own(std::string_view who, const PeerEntry& entry, const KeyPair& own,
               const std::string& secret_file, const std::string& peers_file) {
  if (entry.public_key != own.public_key) {
    throw ConfigError(fmt::format(
        "{0}: the key in {1} is another than that of {0} in {2}, line {3}: its public key is {4}. "
        "Set DISTRO_CURVE_SECRET_FILE to the key of {0}, or give all a peers file with this one",
        who, secret_file, peers_file, entry.line, own.public_key));
  }
}

// A new file is this user's alone from its first moment. One that takes the place of another is
// written under another name first, so that nobody ever sees a part of it.
void write_new(const std::string& path, std::string_view text, mode_t mode, bool replace) {
  std::string name = replace ? path + ".XXXXXX" : path;
  constexpr int kFlags = O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC;
  File file(replace ? ::mkostemp(name.data(), O_CLOEXEC)
                    : ::open(path.c_str(), kFlags, S_IRUSR | S_IWUSR));
  if (file.get() < 0 && errno == EEXIST) {
    throw ConfigError(
        fmt::format("{} is there already, and a key that is in use would be lost: move it away, or "
                    "give --force",
                    path));
  }
  const auto check = [&](bool done) {
    if (!done) {
      throw ConfigError(fmt::format("cannot write {}: {}", path, std::strerror(errno)));
    }
  };
  check(file.get() >= 0);
  try {
    write_all(file, text, path);
    check(::fchmod(file.get(), mode) == 0 && ::fsync(file.get()) == 0 && file.close());
    check(!replace || ::rename(name.c_str(), path.c_str()) == 0);
  } catch (...) {
    ::unlink(name.c_str());
    throw;
  }
}

}  // namespace

SecretKey::SecretKey(std::string_view z85) {
  auto key = decode(z85);
  if (!key) {
    throw ConfigError("a secret key is not 40 characters of Z85");
  }
  ::sodium_memzero(key->data(), key->size());
  z85.copy(text_.data(), kZ85KeyBytes);
}

SecretKey::~SecretKey() { ::sodium_memzero(text_.data(), text_.size()); }

KeyPair make_key_pair() {
  std::array<char, kZ85KeyBytes + 1> open{};
  Wiped<kZ85KeyBytes + 1> secret;
  if (::zmq_curve_keypair(open.data(), secret.bytes.data()) != 0) {
    throw ConfigError(fmt::format("no keys can be made: {} (libzmq needs to be built with CURVE)",
                                  zmq_strerror(zmq_errno())));
  }
  return {open.data(), SecretKey({secret.bytes.data(), kZ85KeyBytes})};
}

std::string public_key_of(const SecretKey& secret) {
  std::array<char, kZ85KeyBytes + 1> open{};
  if (::zmq_curve_public(open.data(), secret.z85()) != 0) {
    throw ConfigError(fmt::format("keys cannot be used: {} (libzmq needs to be built with CURVE)",
                                  zmq_strerror(zmq_errno())));
  }
  return open.data();
}

std::optional<std::array<std::byte, kKeyBytes>> decode_public_key(std::string_view z85) {
  init_sodium();
  const auto key = decode(z85);
  if (!key) {
    return std::nullopt;
  }
  // Of the few points of small order libsodium makes no secret, and libzmq ends the process that
  // dials with one.
  static constexpr std::array<unsigned char, crypto_box_SECRETKEYBYTES> kAnySecret{1};
  std::array<unsigned char, crypto_box_BEFORENMBYTES> ignored{};
  if (::crypto_box_beforenm(ignored.data(), reinterpret_cast<const unsigned char*>(key->data()),
                            kAnySecret.data()) != 0) {
    return std::nullopt;
  }
  return key;
}

bool is_peer_endpoint(std::string_view text) {
  constexpr std::string_view kScheme = "tcp://";
  // Longest name of the name service and a port.
  constexpr std::size_t kLongest = 253 + 6;
  if (!text.starts_with(kScheme) || text.size() > kScheme.size() + kLongest) {
    return false;
  }
  text.remove_prefix(kScheme.size());
  std::string_view host = text.substr(0, text.rfind(':'));
  if (text.starts_with('[')) {
    const auto bracket = text.find(']');
    if (bracket == std::string_view::npos) {
      return false;
    }
    host = text.substr(0, bracket + 1);
  }
  text.remove_prefix(host.size());
  if (!text.empty()) {
    std::uint16_t port = 0;
    const auto [end, error] = std::from_chars(text.data() + 1, text.data() + text.size(), port);
    if (text.front() != ':' || error != std::errc{} || end != text.data() + text.size() ||
        port == 0) {
      return false;
    }
  }
  const bool ipv6 = host.starts_with('[');
  if (ipv6) {
    host = host.substr(1, host.size() - 2);
  }
  return !host.empty() && std::ranges::all_of(host, [&](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           (ipv6 ? c == ':' : c == '-' || c == '_');
  });
}

PeersFile parse_peers(std::string_view text, std::string_view name) {
  PeersFile file;
  file.name = name;
  std::map<std::string, int, std::less<>> line_of_key;
  for (int number = 1; !text.empty(); ++number) {
    std::string_view line = next_line(text);
    const auto refuse = [&](const std::string& why) {
      throw ConfigError(fmt::format("{}, line {}: {}", name, number, why));
    };
    const std::string_view who = next_word(line);
    if (who.empty() || who.front() == '#') {
      continue;
    }
    const std::string_view key = next_word(line);
    const std::string_view endpoint = next_word(line);
    const auto rank = rank_of(who);
    if (!rank && who != "relay") {
      refuse(
          fmt::format("'{}' is neither a rank nor `relay`: a line is <rank or relay> <public key> "
                      "[endpoint]",
                      shown(who)));
    }
    if (!decode_public_key(key)) {
      refuse(
          fmt::format("'{}' is not a public key: those have 40 characters of Z85, as `torch-"
                      "distro keygen` writes them",
                      shown(key)));
    }
    if (!endpoint.empty() && !is_peer_endpoint(endpoint)) {
      refuse(
          fmt::format("'{}' is not an endpoint: tcp://host or tcp://host:port, an IPv6 address "
                      "in brackets",
                      shown(endpoint)));
    }
    if (const auto more = next_word(line); !more.empty()) {
      refuse(fmt::format("'{}' is too much: a line is <rank or relay> <public key> [endpoint]",
                         shown(more)));
    }
    if (const auto [same, added] = line_of_key.emplace(key, number); !added) {
      refuse(fmt::format("the key is that of line {} as well: each needs one of his own",
                         same->second));
    }
    PeerEntry entry{std::string(key), std::string(endpoint), number};
    const int before = rank ? (file.ranks.contains(*rank) ? file.ranks.at(*rank).line : 0)
                            : (file.relay ? file.relay->line : 0);
    if (before != 0) {
      refuse(fmt::format("{} {} is in line {} already", rank ? "rank" : "the", who, before));
    }
    if (rank) {
      file.ranks.emplace(*rank, std::move(entry));
    } else {
      file.relay = std::move(entry);
    }
  }
  return file;
}

PeersFile read_peers_file(const std::string& path) {
  constexpr std::string_view kWhat = "file of the peers' keys";
  const File file(open_to_read(path, kWhat, "DISTRO_CURVE_PEERS_FILE"));
  if ((status_of(file, path, kWhat).st_mode & S_IWOTH) != 0) {
    throw ConfigError(
        fmt::format("everybody on this host can write to {}, and so say who takes part: run "
                    "chmod 644 {}",
                    path, path));
  }
  std::vector<char> text(kMaxPeersBytes + 1);
  const std::size_t size = read_all(file, text, path, kWhat);
  return parse_peers({text.data(), size}, path);
}

std::string peers_line(std::string_view who, std::string_view public_key,
                       std::string_view endpoint) {
  return endpoint.empty() ? fmt::format("{} {}", who, public_key)
                          : fmt::format("{} {} {}", who, public_key, endpoint);
}

KeyPair read_secret_file(const std::string& path) {
  constexpr std::string_view kWhat = "file of the secret key";
  const File file(open_to_read(path, kWhat, "DISTRO_CURVE_SECRET_FILE"));
  const struct stat status = status_of(file, path, kWhat);
  if ((status.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
    throw ConfigError(
        fmt::format("others than its owner may use the secret key in {} (mode {:04o}): run chmod "
                    "600 {}; and make a new key if somebody else could have read it",
                    path, static_cast<unsigned>(status.st_mode) & 07777U, path));
  }
  if (status.st_uid != ::geteuid() && status.st_uid != 0) {
    throw ConfigError(
        fmt::format("the secret key in {} belongs to user {}, not to this one ({}): run chown {} "
                    "{}",
                    path, status.st_uid, ::geteuid(), ::geteuid(), path));
  }
  Wiped<kMaxSecretBytes + 1> bytes;
  std::string_view text(bytes.bytes.data(), read_all(file, bytes.bytes, path, kWhat));
  std::string_view open;
  std::string_view secret;
  for (int number = 1; !text.empty(); ++number) {
    std::string_view line = next_line(text);
    const std::string_view word = next_word(line);
    if (word.empty() || word.front() == '#') {
      continue;
    }
    std::string_view& key = word == "public" ? open : secret;
    const bool known = (word == "public" || word == "secret") && key.empty();
    key = next_word(line);
    if (!known || !next_word(line).empty()) {
      throw ConfigError(fmt::format(
          "{}, line {}: not a line of a key: the file has one line `public <key>` and one `secret "
          "<key>`, as `torch-distro keygen` writes them",
          path, number));
    }
  }
  auto decoded = decode(secret);
  if (!decoded || !decode_public_key(open)) {
    throw ConfigError(
        fmt::format("{}: no {} key of 40 characters of Z85 in it: it is cut, or not "
                    "a file that `torch-distro keygen` made",
                    path, decoded ? "public" : "secret"));
  }
  ::sodium_memzero(decoded->data(), decoded->size());
  KeyPair pair{std::string(open), SecretKey(secret)};
  if (public_key_of(pair.secret) != pair.public_key) {
    throw ConfigError(
        fmt::format("{}: the public key in it is not that of the secret one: make a new pair with "
                    "`torch-distro keygen`",
                    path));
  }
  return pair;
}

void write_secret_file(const std::string& path, const KeyPair& pair, std::string_view who,
                       bool replace) {
  Wiped<kMaxSecretBytes> text;
  const auto end = fmt::format_to_n(
      text.bytes.begin(), text.bytes.size(),
      "# torch-distro: the key of {}. Keep this file to yourself; the others get the public line.\n"
      "public {}\nsecret {}\n",
      who, pair.public_key, pair.secret.z85());
  write_new(path, {text.bytes.data(), end.size}, S_IRUSR | S_IWUSR, replace);
}

void write_peers_file(const std::string& path, std::string_view text, bool replace) {
  write_new(path, text, S_IRUSR | S_IWUSR | S_IRGRP | S_IROTH, replace);
}

Keys load_keys(const std::string& secret_file, const std::string& peers_file, int rank,
               std::span<const int> world_ranks) {
  const PeersFile peers = read_peers_file(peers_file);
  Keys keys{read_secret_file(secret_file), {}, {}, peers.relay ? peers.relay->public_key : ""};
  for (const int world_rank : world_ranks) {
    const auto found = peers.ranks.find(world_rank);
    if (found == peers.ranks.end()) {
      throw ConfigError(fmt::format(
          "{} has no line for rank {}, which takes part: add `{} <its public key>` (`torch-distro "
          "keygen` prints it), in the file of every rank",
          peers.name, world_rank, world_rank));
    }
    keys.public_by_rank.push_back(found->second.public_key);
    keys.endpoint_by_rank.push_back(found->second.endpoint);
  }
  const int own = world_ranks[static_cast<std::size_t>(rank)];
  check_own(fmt::format("rank {}", own), peers.ranks.at(own), keys.own, secret_file, peers.name);
  return keys;
}

Keys load_relay_keys(const std::string& secret_file, const std::string& peers_file) {
  const PeersFile peers = read_peers_file(peers_file);
  if (!peers.relay) {
    throw ConfigError(fmt::format(
        "{} has no line for the relay: add `relay <its public key>` (`torch-distro keygen --single "
        "relay` prints it), in the file of every rank",
        peers.name));
  }
  Keys keys{read_secret_file(secret_file), {}, {}, peers.relay->public_key};
  check_own("the relay", *peers.relay, keys.own, secret_file, peers.name);
  for (const auto& [rank, entry] : peers.ranks) {
    keys.public_by_rank.resize(static_cast<std::size_t>(rank) + 1);
    keys.public_by_rank.back() = entry.public_key;
  }
  return keys;
}

}  // namespace distro::transport
