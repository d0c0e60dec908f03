#include "backend/exchange/options.h"

#include <gtest/gtest.h>

#include <array>

namespace distro::exchange {
namespace {

std::string message_of(const StringMap& environment, const StringMap& overrides) {
  try {
    resolve_options(environment, overrides);
  } catch (const OptionError& error) {
    return error.what();
  }
  return {};
}

TEST(Options, DefaultsAreThoseOfTheContract) {
  const Options options = resolve_options({}, {});
  EXPECT_EQ(options.mode, Mode::automatic);
  EXPECT_EQ(options.k, 10U);
  EXPECT_EQ(options.turns(), 16U);
  EXPECT_EQ(resolve_options({{"DISTRO_MODE", "ef"}}, {}).k, 6U);
  EXPECT_EQ(resolve_options({{"DISTRO_MODE", "ef"}}, {{"k", "10"}}).k, 10U);
  EXPECT_EQ(resolve_options({}, {{"turns", "3"}}).turns(), 3U);
  EXPECT_EQ(resolve_options({{"DISTRO_K", "4096"}}, {}).turns(), 1U);
  EXPECT_EQ(options.delay, 1);
  EXPECT_FALSE(options.gain);
  EXPECT_FALSE(options.share);
  EXPECT_EQ(options.value_bits, 1U);
  EXPECT_EQ(options.residual_bits, 32U);
  EXPECT_EQ(options.carrier, transport::Carrier::tcp);
  EXPECT_FALSE(options.insecure);
}

TEST(Options, OverridesWinOverTheEnvironment) {
  const Options options =
      resolve_options({{"DISTRO_K", "16"}, {"DISTRO_DELAY", "0"}}, {{"k", "32"}});
  EXPECT_EQ(options.k, 32U);
  EXPECT_EQ(options.delay, 0);
}

TEST(Options, AreReadFromEveryVariable) {
  const Options options = resolve_options({{"DISTRO_MODE", "dense"},
                                           {"DISTRO_GAIN", "1.5"},
                                           {"DISTRO_TRANSPORT", "ipc"},
                                           {"DISTRO_BIND", "lo"},
                                           {"DISTRO_ADVERTISE", "example.org"},
                                           {"DISTRO_PORTS", "40000-40010"},
                                           {"DISTRO_INSECURE", "1"},
                                           {"DISTRO_THREADS", "3"},
                                           {"DISTRO_STATS", "/tmp/s.json"},
                                           {"DISTRO_LOG", "debug"},
                                           {"DISTRO_ISA", "scalar"},
                                           {"DISTRO_DEFAULT", "1"},
                                           {"PATH", "is not ours"}},
                                          {});
  EXPECT_EQ(options.mode, Mode::dense);
  EXPECT_EQ(options.gain, 1.5);
  EXPECT_EQ(options.carrier, transport::Carrier::ipc);
  EXPECT_EQ(options.first_port, 40000);
  EXPECT_EQ(options.last_port, 40010);
  EXPECT_TRUE(options.insecure);
  EXPECT_EQ(options.threads, 3);
  EXPECT_EQ(options.isa, kernels::Isa::scalar);
}

TEST(Options, AnUnknownVariableIsAnErrorThatListsTheKnown) {
  const auto message = message_of({{"DISTRO_MODUS", "x"}}, {});
  EXPECT_NE(message.find("DISTRO_MODUS"), std::string::npos);
  EXPECT_NE(message.find("DISTRO_MODE, DISTRO_K"), std::string::npos) << message;
  EXPECT_NE(message_of({}, {{"modus", "x"}}).find("value_bits"), std::string::npos);
}

TEST(Options, ABadValueIsAnErrorThatListsWhatIsAllowed) {
  for (const auto& [variable, value] :
       std::vector<std::pair<std::string, std::string>>{{"DISTRO_K", "0"},
                                                        {"DISTRO_K", "4097"},
                                                        {"DISTRO_K", "6x"},
                                                        {"DISTRO_K", ""},
                                                        {"DISTRO_K", "-1"},
                                                        {"DISTRO_GAIN", "nan"},
                                                        {"DISTRO_GAIN", "-2"},
                                                        {"DISTRO_DELAY", "2"},
                                                        {"DISTRO_MODE", "fast"},
                                                        {"DISTRO_PORTS", "9-1"},
                                                        {"DISTRO_PORTS", "70000"},
                                                        {"DISTRO_INSECURE", "yes"},
                                                        {"DISTRO_THREADS", "0"},
                                                        {"DISTRO_LOG", "loud"},
                                                        {"DISTRO_DEFAULT", "2"},
                                                        {"DISTRO_TRANSPORT", "udp"},
                                                        {"DISTRO_ISA", "sse9"}}) {
    const auto message = message_of({{variable, value}}, {});
    EXPECT_NE(message.find(variable), std::string::npos)
        << variable << "=" << value << ": " << message;
    EXPECT_NE(message.find("Allowed: "), std::string::npos) << message;
  }
  EXPECT_NE(message_of({}, {{"value_bits", "7"}}).find("Allowed: 1, 32"), std::string::npos);
  EXPECT_NE(message_of({}, {{"residual_bits", "24"}}).find("Allowed: 16, 32"), std::string::npos);
}

TEST(Options, ATransportByPathIsLoadedAndNamedByWhatItIs) {
  const Options options = resolve_options({{"DISTRO_TRANSPORT", DISTRO_EXAMPLE_TRANSPORT}}, {});
  EXPECT_EQ(options.carrier, transport::Carrier::plugin);
  EXPECT_EQ(options.agreed().at("transport"), "example 1.0");
  const auto message = message_of({{"DISTRO_TRANSPORT", "/no/such/lib.so"}}, {});
  EXPECT_NE(message.find("/no/such/lib.so"), std::string::npos) << message;
  EXPECT_NE(message.find("docs/transports.md"), std::string::npos) << message;
  // A name wins over a path as any option does.
  EXPECT_EQ(
      resolve_options({{"DISTRO_TRANSPORT", DISTRO_EXAMPLE_TRANSPORT}}, {{"transport", "tcp"}})
          .agreed()
          .at("transport"),
      "tcp");
}

TEST(Options, AHubNeedsARelayAndTcp) {
  const auto options = resolve_options(
      {{"DISTRO_TOPOLOGY", "hub"}, {"DISTRO_RELAY", "tcp://relay.example:29600"}}, {});
  EXPECT_TRUE(options.hub);
  EXPECT_EQ(options.relay, "tcp://relay.example:29600");
  EXPECT_THROW(resolve_options({{"DISTRO_TOPOLOGY", "hub"}}, {}), OptionError);
  EXPECT_THROW(resolve_options({{"DISTRO_RELAY", "tcp://relay.example:29600"}}, {}), OptionError);
  EXPECT_THROW(resolve_options({{"DISTRO_TOPOLOGY", "star"}}, {}), OptionError);
  for (const char* bad :
       {"relay.example:1", "tcp://relay.example", "tcp://:1", "tcp://a:0", "tcp://a:65536"}) {
    EXPECT_THROW(resolve_options({{"DISTRO_TOPOLOGY", "hub"}, {"DISTRO_RELAY", bad}}, {}),
                 OptionError)
        << bad;
  }
  EXPECT_THROW(resolve_options({{"DISTRO_TOPOLOGY", "hub"},
                                {"DISTRO_RELAY", "tcp://relay.example:29600"},
                                {"DISTRO_TRANSPORT", "ipc"}},
                               {}),
               OptionError);
}

TEST(Options, ARateLimitIsInBytesASecond) {
  EXPECT_EQ(resolve_options({{"DISTRO_RATE_LIMIT", "1250000"}}, {}).rate_limit_bytes, 1'250'000U);
  EXPECT_EQ(resolve_options({}, {}).rate_limit_bytes, 0U);
  for (const char* bad : {"0", "999", "-1", "1e6", "10M"}) {
    EXPECT_THROW(resolve_options({{"DISTRO_RATE_LIMIT", bad}}, {}), OptionError) << bad;
  }
}

TEST(Options, KeysNeedBothFilesAndTcp) {
  const StringMap both{{"DISTRO_CURVE_SECRET_FILE", "/a"}, {"DISTRO_CURVE_PEERS_FILE", "/b"}};
  EXPECT_TRUE(resolve_options(both, {}).has_keys());
  EXPECT_EQ(resolve_options(both, {}).agreed().at("keys"), "1");
  EXPECT_EQ(resolve_options({}, {}).agreed().at("keys"), "0");
  for (const auto& [variable, missing] :
       std::vector<std::pair<std::string, std::string>>{{"SECRET", "PEERS"}, {"PEERS", "SECRET"}}) {
    const auto message = message_of({{"DISTRO_CURVE_" + variable + "_FILE", "/x"}}, {});
    EXPECT_NE(message.find("DISTRO_CURVE_" + missing + "_FILE is not"), std::string::npos)
        << message;
  }
  for (const std::string carrier : {"ipc", "inproc", DISTRO_EXAMPLE_TRANSPORT}) {
    EXPECT_NE(message_of(both, {{"transport", carrier}}).find("keys protect tcp"),
              std::string::npos)
        << carrier;
  }
}

TEST(Options, ASiteIsALabelOfWeightsMode) {
  for (const char* site : {"host", "berlin-2", "a.b_c"}) {
    EXPECT_EQ(resolve_options({{"DISTRO_SITE", site}}, {}).site, site);
  }
  EXPECT_EQ(resolve_options({{"DISTRO_SITE", "a"}}, {{"site", "b"}}).site, "b");
  for (const std::string& site :
       {std::string("a b"), std::string("host/x"), std::string(65, 'a')}) {
    EXPECT_NE(message_of({{"DISTRO_SITE", site}}, {}).find("label"), std::string::npos) << site;
  }
  EXPECT_NE(message_of({{"DISTRO_SITE", "a"}, {"DISTRO_MODE", "demo"}}, {}).find("mode weights"),
            std::string::npos);
  EXPECT_EQ(resolve_options({{"DISTRO_SITE", "a"}, {"DISTRO_MODE", "dense"}}, {}).site, "a");
}

TEST(Options, GradientModesHaveTheirOwn) {
  const Options ef = resolve_options({{"DISTRO_MODE", "ef"}, {"DISTRO_MIN_ELEMENTS", "100"}}, {});
  EXPECT_EQ(ef.min_elements, 100U);
  EXPECT_EQ(ef.gradient_config().method, plugins::GradientMethod::ef);
  EXPECT_EQ(ef.gradient_config().transform, plugins::Transform::dct);
  EXPECT_EQ(ef.gradient_config().beta, 1.0F);
  EXPECT_FALSE(ef.compress_reduce_scatter);

  const Options demo = resolve_options({{"DISTRO_MODE", "demo"}}, {});
  EXPECT_EQ(demo.gradient_config().method, plugins::GradientMethod::demo);
  EXPECT_EQ(demo.gradient_config().beta, 0.999F);

  const Options given = resolve_options({}, {{"mode", "demo"},
                                             {"beta", "0.5"},
                                             {"transform", "none"},
                                             {"reduce_scatter", "compress"},
                                             {"value_bits", "32"},
                                             {"k", "64"}});
  EXPECT_EQ(given.gradient_config().beta, 0.5F);
  EXPECT_EQ(given.gradient_config().transform, plugins::Transform::none);
  EXPECT_EQ(given.gradient_config().value_bits, 32U);
  EXPECT_EQ(given.gradient_config().k, 64U);
  EXPECT_TRUE(given.compress_reduce_scatter);
  EXPECT_NE(given.agreed(), demo.agreed());
  EXPECT_NE(message_of({}, {{"mode", "ef"}, {"beta", "1.5"}}).find("0 to 1"), std::string::npos);
}

TEST(Options, OneForExpertsThatMeansNothingInTheModeIsAnErrorThatSaysSo) {
  for (const auto& [mode, option, value] :
       std::vector<std::array<std::string, 3>>{{"auto", "beta", "0.9"},
                                               {"weights", "transform", "dct"},
                                               {"dense", "reduce_scatter", "exact"},
                                               {"weights", "min_elements", "10"},
                                               {"dense", "value_bits", "32"},
                                               {"ef", "share", "0.5"}}) {
    const auto message = message_of({{"DISTRO_MODE", mode}}, {{option, value}});
    EXPECT_NE(message.find("Options(" + option + ") means nothing in mode " + mode),
              std::string::npos)
        << message;
  }
  EXPECT_EQ(message_of({{"DISTRO_MODE", "weights"}, {"DISTRO_MIN_ELEMENTS", "10"}}, {}), "");
}

}  // namespace
}  // namespace distro::exchange
