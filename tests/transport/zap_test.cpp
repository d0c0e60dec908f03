#include "transport/zap.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>
#include <zmq.hpp>

#include "tests/transport/group.h"
#include "transport/keys.h"

namespace distro::transport::test {
namespace {

using Parts = std::vector<std::string>;

std::string binary(const std::string& z85) {
  const auto key = decode_public_key(z85);
  return {reinterpret_cast<const char*>(key->data()), key->size()};
}

const std::string kAda = make_key_pair().public_key;
const std::string kBob = make_key_pair().public_key;

Parts request(const std::string& domain, const std::string& key) {
  return {"1.0", "1", domain, "127.0.0.1", "", "CURVE", binary(key)};
}

ZapDomains domains() { return {{"a", {{binary(kAda), "4"}}}, {"b", {{binary(kBob), "5"}}}}; }

TEST(Zap, AKeyIsLetInToItsDomainAsItsUser) {
  const ZapReply reply = judge(request("a", kAda), domains());
  EXPECT_EQ(reply.user, "4");
  EXPECT_EQ(reply.request_id, "1");
  EXPECT_EQ(judge(request("b", kBob), domains()).user, "5");
}

TEST(Zap, AllElseIsRefusedWithAReason) {
  const auto refused = [](Parts parts, const std::string& why) {
    const ZapReply reply = judge(parts, domains());
    EXPECT_EQ(reply.user, "") << why;
    EXPECT_NE(reply.reason.find(why), std::string::npos) << reply.reason;
    for (const char c : reply.reason) {
      EXPECT_TRUE(c >= ' ' && c <= '~');
    }
  };
  refused(request("a", kBob), "key " + kBob);
  refused(request("b", kAda), "key " + kAda);
  refused(request("c", kAda), "no channel");
  refused(request("", kAda), "no channel");
  const Parts good = request("a", kAda);
  for (std::size_t i = 0; i < good.size(); ++i) {
    Parts parts = good;
    parts.resize(i);
    refused(parts, i == 6 ? "without a key" : "does not know");
  }
  Parts parts = good;
  parts[0] = "1.1";
  refused(parts, "does not know");
  for (const std::string mechanism : {"NULL", "PLAIN", "curve", "", "CURVE2"}) {
    parts = good;
    parts[5] = mechanism;
    refused(parts, "without a key");
  }
  parts = good;
  parts.push_back("x");
  refused(parts, "without a key");
  for (const std::string& key : {parts[6].substr(1), parts[6] + "x", std::string()}) {
    parts = good;
    parts[6] = key;
    refused(parts, "without a key");
  }
  parts = request("c\n\x1b[2J", kAda);
  parts[3] = std::string(300, '\n');
  refused(parts, "no channel");
}

// A handler and ZeroMQ's half of the talk with it.
struct Handler : testing::Test {
  Handler() : handler(context), client(context, zmq::socket_type::dealer) {
    handler.add_domain("a", {{kAda, "4"}});
    client.set(zmq::sockopt::linger, 0);
    client.set(zmq::sockopt::rcvtimeo, 2000);
    client.connect("inproc://zeromq.zap.01");
  }

  void send(const Parts& parts) {
    for (std::size_t i = 0; i < parts.size(); ++i) {
      client.send(zmq::buffer(parts[i]),
                  i + 1 < parts.size() ? zmq::send_flags::sndmore : zmq::send_flags::none);
    }
    handler.work(Clock::now(), {});
  }
  Parts receive() {
    Parts parts;
    zmq::message_t part;
    do {
      if (!client.recv(part)) {
        return parts;
      }
      parts.push_back(part.to_string());
    } while (part.more());
    return parts;
  }
  static Parts enveloped(Parts parts) {
    parts.insert(parts.begin(), "");
    return parts;
  }

  zmq::context_t context;
  ZapHandler handler;
  zmq::socket_t client;
};

TEST_F(Handler, AnswersAsRfc27Says) {
  send(enveloped(request("a", kAda)));
  EXPECT_EQ(receive(), (Parts{"", "1.0", "1", "200", "OK", "4", ""}));
  send(enveloped(request("a", kBob)));
  const Parts refused = receive();
  ASSERT_EQ(refused.size(), 7U);
  EXPECT_EQ(refused[3], "400");
  EXPECT_EQ(refused[5], "");
  EXPECT_EQ(handler.denied(), 1U);
}

TEST_F(Handler, BrokenRequestsDoNotStopIt) {
  send({"no delimiter"});
  send({""});
  send({"x", "1.0"});
  send(Parts(100, "x"));
  send(enveloped(Parts(100, "x")));
  send(enveloped({"1.0"}));
  send(enveloped(request("a", kAda)));
  Parts last;
  for (Parts next = receive(); !next.empty(); next = receive()) {
    last = next;
    if (last.size() > 3 && last[3] == "200") {
      break;
    }
  }
  EXPECT_EQ(last, (Parts{"", "1.0", "1", "200", "OK", "4", ""}));
}

TEST_F(Handler, ADomainThatIsGoneLetsNobodyIn) {
  handler.remove_domain("a");
  send(enveloped(request("a", kAda)));
  EXPECT_EQ(receive().at(3), "400");
}

TEST_F(Handler, DomainsAndKeysMustBeGood) {
  EXPECT_THROW(handler.add_domain("a", {}), ConfigError);
  EXPECT_THROW(handler.add_domain("", {}), ConfigError);
  EXPECT_THROW(handler.add_domain("b", {{"no key", "1"}}), ConfigError);
  EXPECT_THROW(handler.add_domain("b", {{kAda, ""}}), ConfigError);
  EXPECT_THROW(ZapHandler another(context), ConfigError);
}

TEST_F(Handler, AFloodOfRequestsLeavesOthersTheirTurn) {
  for (int i = 0; i < 1000; ++i) {
    const Parts parts = enveloped(request("a", kBob));
    for (std::size_t part = 0; part < parts.size(); ++part) {
      client.send(zmq::buffer(parts[part]),
                  part + 1 < parts.size() ? zmq::send_flags::sndmore : zmq::send_flags::none);
    }
  }
  const auto now = Clock::now();
  EXPECT_EQ(handler.work(now, {}), now);  // wants to go on at once
  EXPECT_LT(handler.denied(), 1000U);
  while (handler.work(now, {}) == now) {
  }
  EXPECT_EQ(handler.denied(), 1000U);
}

}  // namespace
}  // namespace distro::transport::test
