#include "transport/keys.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <zmq.hpp>

#include "tests/transport/key_ring.h"

namespace distro::transport::test {
namespace {

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// A directory of its own, and files of a group of two and a relay in it.
class KeyFiles : public testing::Test {
 protected:
  KeyFiles() {
    std::string name = "/tmp/distro-keys-XXXXXX";
    folder = ::mkdtemp(name.data());
    for (int rank = 0; rank < 2; ++rank) {
      write_secret_file(secret(rank), ring.pairs[static_cast<std::size_t>(rank)], "a rank", false);
    }
    write(peers(), line("0", 0) + line("1", 1));
  }
  ~KeyFiles() override { std::filesystem::remove_all(folder); }

  [[nodiscard]] std::string secret(int rank) const {
    return folder + "/rank" + std::to_string(rank) + ".key";
  }
  [[nodiscard]] std::string peers() const { return folder + "/peers.txt"; }
  [[nodiscard]] std::string line(const std::string& who, std::size_t pair,
                                 const std::string& endpoint = "") const {
    return peers_line(who, ring.pairs[pair].public_key, endpoint) + "\n";
  }
  static void write(const std::string& path, const std::string& text) {
    std::ofstream(path) << text;
  }
  static std::string read(const std::string& path) {
    std::stringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  }
  // No error text may show a secret.
  std::string safe_error_of(const std::function<void()>& body) const {
    const std::string error = error_of(body);
    for (const auto& pair : ring.pairs) {
      EXPECT_FALSE(has(error, pair.secret.z85())) << error;
    }
    return error;
  }

  KeyRing ring{3};
  std::string folder;
};

TEST_F(KeyFiles, WhatIsWrittenIsRead) {
  const KeyPair pair = read_secret_file(secret(0));
  EXPECT_EQ(pair.public_key, ring.pairs[0].public_key);
  EXPECT_STREQ(pair.secret.z85(), ring.pairs[0].secret.z85());
  const std::array<int, 2> world{0, 1};
  const Keys keys = load_keys(secret(1), peers(), 1, world);
  EXPECT_EQ(keys.own.public_key, ring.pairs[1].public_key);
  EXPECT_EQ(keys.public_by_rank[0], ring.pairs[0].public_key);
  EXPECT_EQ(keys.relay_public_key, "");
}

TEST_F(KeyFiles, ASecretFileIsItsOwnersAloneFromTheStart) {
  const ::mode_t before = ::umask(0);
  write_secret_file(folder + "/new.key", ring.pairs[2], "a rank", false);
  ::umask(before);
  struct stat status {};
  ASSERT_EQ(::stat((folder + "/new.key").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777U, 0600U);
}

TEST_F(KeyFiles, LoosePermissionsAreRefusedWithTheChmodThatHelps) {
  for (const ::mode_t mode : {0640U, 0604U, 0660U, 0644U, 0610U, 0601U, 0666U, 0777U}) {
    ASSERT_EQ(::chmod(secret(0).c_str(), mode), 0);
    const std::string error = safe_error_of([&] { read_secret_file(secret(0)); });
    EXPECT_TRUE(has(error, "chmod 600 " + secret(0))) << error;
  }
  for (const ::mode_t mode : {0600U, 0400U, 0700U}) {
    ASSERT_EQ(::chmod(secret(0).c_str(), mode), 0);
    EXPECT_EQ(error_of([&] { read_secret_file(secret(0)); }), "");
  }
}

TEST_F(KeyFiles, ASecretOfAnotherUserIsRefused) {
  if (::geteuid() != 0) {
    GTEST_SKIP() << "only root can give a file away";
  }
  ASSERT_EQ(::chown(secret(0).c_str(), 12345, 12345), 0);
  EXPECT_TRUE(has(error_of([&] { read_secret_file(secret(0)); }), "belongs to user 12345"));
}

TEST_F(KeyFiles, APeersFileThatEverybodyCanWriteToIsRefused) {
  ASSERT_EQ(::chmod(peers().c_str(), 0666), 0);
  EXPECT_TRUE(has(error_of([&] { read_peers_file(peers()); }), "chmod 644 " + peers()));
}

TEST_F(KeyFiles, WhatIsNoRegularFileIsRefusedWithoutWaiting) {
  const std::string pipe = folder + "/pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  for (const std::string& path : {pipe, folder, std::string("/dev/zero")}) {
    EXPECT_TRUE(has(error_of([&] { read_secret_file(path); }), "not a regular file")) << path;
    EXPECT_TRUE(has(error_of([&] { read_peers_file(path); }), "not a regular file")) << path;
  }
  for (const std::string& path : {folder + "/none", std::string()}) {
    EXPECT_TRUE(has(error_of([&] { read_secret_file(path); }), "DISTRO_CURVE_SECRET_FILE"));
    EXPECT_TRUE(has(error_of([&] { read_peers_file(path); }), "DISTRO_CURVE_PEERS_FILE"));
  }
}

TEST_F(KeyFiles, LongFilesAreRefused) {
  write(secret(0), std::string(1025, '#'));
  EXPECT_TRUE(has(error_of([&] { read_secret_file(secret(0)); }), "longer than 1024"));
  write(peers(), std::string((1 << 20) + 1, '#'));
  EXPECT_TRUE(has(error_of([&] { read_peers_file(peers()); }), "longer than 1048576"));
}

TEST_F(KeyFiles, SecretFilesThatHoldNoPairAreRefused) {
  const std::string open = "public " + ring.pairs[0].public_key + "\n";
  const std::string good = std::string("secret ") + ring.pairs[0].secret.z85() + "\n";
  const std::string other = std::string("secret ") + ring.pairs[1].secret.z85() + "\n";
  const std::string raw = std::string(ring.pairs[0].secret.z85()) + "\n";
  for (const auto& [text, part] : std::vector<std::pair<std::string, std::string>>{
           {"", "no secret key"},
           {open, "no secret key"},
           {good, "no public key"},
           {open + good.substr(0, good.size() - 2), "no secret key"},
           {open + good + good, "line 3"},
           {open + open + good, "line 2"},
           {open + good + "x\n", "line 3"},
           {open + "secret a b\n", "line 2"},
           {open + "secret\n", "no secret key"},
           {open + "secret " + std::string(40, '~') + "\n", "no secret key"},
           {open + other, "not that of the secret one"},
           {raw, "line 1"},
           {std::string("\0\0\0", 3), "line 1"}}) {
    write(secret(0), text);
    const std::string error = safe_error_of([&] { read_secret_file(secret(0)); });
    EXPECT_TRUE(has(error, part)) << text << ": " << error;
    EXPECT_TRUE(has(error, secret(0))) << error;
  }
  write(secret(0), "\n# remark\r\n  public\t" + ring.pairs[0].public_key + " \r\n" + good);
  EXPECT_EQ(error_of([&] { read_secret_file(secret(0)); }), "");
}

TEST_F(KeyFiles, AKeyInUseIsNotReplacedUnlessThatIsMeant) {
  const std::string before = read(secret(0));
  EXPECT_TRUE(
      has(error_of([&] { write_secret_file(secret(0), ring.pairs[2], "x", false); }), "--force"));
  EXPECT_EQ(read(secret(0)), before);
  ASSERT_EQ(::chmod(secret(0).c_str(), 0644), 0);
  write_secret_file(secret(0), ring.pairs[2], "x", true);
  EXPECT_EQ(read_secret_file(secret(0)).public_key, ring.pairs[2].public_key);
  EXPECT_FALSE(
      error_of([&] { write_secret_file("/no/such/dir/a", ring.pairs[2], "x", false); }).empty());
  std::size_t files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) {
    ++files;
  }
  EXPECT_EQ(files, 3U);  // nothing half-written is left
}

// A link in the place of a new file must not lead the secret elsewhere.
TEST_F(KeyFiles, ALinkIsNotFollowedByAWrite) {
  const std::string link = folder + "/link.key";
  ASSERT_EQ(::symlink((folder + "/elsewhere").c_str(), link.c_str()), 0);
  EXPECT_TRUE(
      has(error_of([&] { write_secret_file(link, ring.pairs[2], "x", false); }), "--force"));
  write_secret_file(link, ring.pairs[2], "x", true);
  EXPECT_FALSE(std::filesystem::exists(folder + "/elsewhere"));
}

TEST_F(KeyFiles, PeersAreReadWithRemarksAndEndpoints) {
  const PeersFile file = parse_peers("# remark\n\n" + line("7", 0, "tcp://example.org:4000") +
                                         "\t relay " + ring.pairs[1].public_key + "\r\n" +
                                         peers_line("0", ring.pairs[2].public_key, "tcp://[::1]"),
                                     "p");
  EXPECT_EQ(file.ranks.at(7).public_key, ring.pairs[0].public_key);
  EXPECT_EQ(file.ranks.at(7).endpoint, "tcp://example.org:4000");
  EXPECT_EQ(file.ranks.at(7).line, 3);
  EXPECT_EQ(file.ranks.at(0).endpoint, "tcp://[::1]");
  ASSERT_TRUE(file.relay);
  EXPECT_EQ(file.relay->line, 4);
}

// '#' is a digit of Z85.
TEST_F(KeyFiles, TheSignOfRemarksInAKeyIsPartOfIt) {
  const auto is_sharp = [](std::string_view key) { return key.find('#') != key.npos; };
  KeyPair pair = make_key_pair();
  while (!is_sharp(pair.public_key) || !is_sharp(pair.secret.z85())) {
    pair = make_key_pair();
  }
  write_secret_file(folder + "/sharp.key", pair, "rank 3", false);
  EXPECT_EQ(read_secret_file(folder + "/sharp.key").public_key, pair.public_key);
  EXPECT_EQ(parse_peers(peers_line("3", pair.public_key, ""), "p").ranks.at(3).public_key,
            pair.public_key);
}

TEST_F(KeyFiles, BadPeersAreRefusedWithTheirLine) {
  const std::string key = ring.pairs[0].public_key;
  const std::string zeros(40, '0');
  for (const auto& [text, part] : std::vector<std::pair<std::string, std::string>>{
           {"rank0 " + key, "neither a rank nor `relay`"},
           {"-1 " + key, "neither a rank"},
           {"01 " + key, "neither a rank"},
           {"65535 " + key, "neither a rank"},
           {"99999999999999999999 " + key, "neither a rank"},
           {"1x " + key, "neither a rank"},
           {key, "neither a rank"},
           {"1", "not a public key"},
           {"1 " + key.substr(1), "not a public key"},
           {"1 " + key + "0", "not a public key"},
           {"1 " + key.substr(0, 39) + "~", "not a public key"},
           {"1 " + key.substr(0, 39) + std::string(1, '\0'), "not a public key"},
           {"1 " + key.substr(0, 35) + "#####", "not a public key"},  // above 2^32
           {"1 " + zeros, "not a public key"},                        // of small order
           {"1 " + key + " tcp://", "not an endpoint"},
           {"1 " + key + " tcp://a:0", "not an endpoint"},
           {"1 " + key + " tcp://a:65536", "not an endpoint"},
           {"1 " + key + " tcp://a:", "not an endpoint"},
           {"1 " + key + " tcp://a:1;tcp://b:2", "not an endpoint"},
           {"1 " + key + " tcp://::1", "not an endpoint"},
           {"1 " + key + " tcp://[::1", "not an endpoint"},
           {"1 " + key + " tcp://[]", "not an endpoint"},
           {"1 " + key + " tcp://[::1]x", "not an endpoint"},
           {"1 " + key + " ipc:///tmp/x", "not an endpoint"},
           {"1 " + key + " tcp://*:5", "not an endpoint"},
           {"1 " + key + " tcp://" + std::string(300, 'a'), "not an endpoint"},
           {"1 " + key + " tcp://a x", "too much"},
           {line("1", 0) + line("2", 0), "line 1 as well"},
           {line("1", 0) + line("1", 1), "rank 1 is in line 1 already"},
           {line("relay", 0) + line("relay", 1), "relay is in line 1 already"},
           {line("0", 0) + line("relay", 0), "line 1 as well"}}) {
    const std::string error = error_of([&] { parse_peers(text, "peers.txt"); });
    EXPECT_TRUE(has(error, part)) << text << ": " << error;
    const bool second = text.find('\n') != std::string::npos;
    EXPECT_TRUE(has(error, second ? "peers.txt, line 2: " : "peers.txt, line 1: ")) << error;
    EXPECT_LT(error.size(), 400U) << error;
  }
}

TEST_F(KeyFiles, AGroupsRanksMustAllBeInTheFile) {
  const std::array<int, 3> world{0, 1, 5};
  const std::string error = error_of([&] { load_keys(secret(0), peers(), 0, world); });
  EXPECT_TRUE(has(error, peers() + " has no line for rank 5")) << error;
}

TEST_F(KeyFiles, TheOwnLineMustHaveTheOwnKey) {
  const std::array<int, 2> world{0, 1};
  const std::string error = safe_error_of([&] { load_keys(secret(1), peers(), 0, world); });
  EXPECT_TRUE(has(error, "rank 0: the key in " + secret(1))) << error;
  EXPECT_TRUE(has(error, peers() + ", line 1")) << error;
  EXPECT_TRUE(has(error, ring.pairs[1].public_key)) << error;
}

TEST_F(KeyFiles, ASubgroupIsLookedUpByRanksOfTheWorld) {
  write(peers(), line("4", 0, "tcp://10.0.0.4") + line("9", 1));
  const std::array<int, 2> world{9, 4};
  const Keys keys = load_keys(secret(0), peers(), 1, world);
  EXPECT_EQ(keys.public_by_rank[0], ring.pairs[1].public_key);
  EXPECT_EQ(keys.public_by_rank[1], ring.pairs[0].public_key);
  EXPECT_EQ(keys.endpoint_by_rank[1], "tcp://10.0.0.4");
}

TEST_F(KeyFiles, TheRelayTakesAllRanksOfTheFile) {
  write(peers(), line("3", 0) + line("1", 1) + line("relay", 2));
  write_secret_file(folder + "/relay.key", ring.pairs[2], "the relay", false);
  const Keys keys = load_relay_keys(folder + "/relay.key", peers());
  ASSERT_EQ(keys.public_by_rank.size(), 4U);
  EXPECT_EQ(keys.public_by_rank[0], "");
  EXPECT_EQ(keys.public_by_rank[1], ring.pairs[1].public_key);
  EXPECT_EQ(keys.public_by_rank[3], ring.pairs[0].public_key);
  EXPECT_TRUE(has(error_of([&] { load_relay_keys(secret(0), peers()); }), "the relay: the key in"));
  write(peers(), line("3", 0));
  EXPECT_TRUE(has(error_of([&] { load_relay_keys(folder + "/relay.key", peers()); }),
                  "no line for the relay"));
}

TEST(Keys, PublicKeysAreThoseOfTheirSecrets) {
  const KeyPair a = make_key_pair();
  const KeyPair b = make_key_pair();
  EXPECT_NE(a.public_key, b.public_key);
  EXPECT_EQ(public_key_of(a.secret), a.public_key);
  EXPECT_EQ(a.public_key.size(), kZ85KeyBytes);
}

TEST(Keys, WhatIsNoSecretIsRefusedUnseen) {
  for (const std::string& text :
       {std::string(), std::string(39, 'a'), std::string(41, 'a'), std::string(40, '~')}) {
    const std::string error = error_of([&] { SecretKey{text}; });
    EXPECT_FALSE(error.empty());
    EXPECT_TRUE(text.empty() || !has(error, text)) << error;
  }
}

}  // namespace
}  // namespace distro::transport::test
