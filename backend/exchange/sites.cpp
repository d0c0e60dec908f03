#include "backend/exchange/sites.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <numeric>

#include "backend/exchange/rendezvous.h"

namespace distro::exchange {
namespace {

// No label that is given has a slash: a host's identity never meets one.
constexpr std::string_view kHostPrefix = "host/";

}  // namespace

Sites::Sites(const std::vector<std::string>& labels) : participant_of_(labels.size()) {
  std::map<std::string, int> known;
  for (std::size_t rank = 0; rank < labels.size(); ++rank) {
    const std::string& label = labels[rank];
    const auto found = label.empty() ? known.end() : known.find(label);
    if (found != known.end()) {
      participant_of_[rank] = found->second;
    } else {
      participant_of_[rank] = known[label] = participants();
      labels_.push_back(label);
      members_.emplace_back();
    }
    members_[index(participant_of_[rank])].push_back(static_cast<int>(rank));
  }
}

Sites Sites::none(int ranks) { return Sites(std::vector<std::string>(index(ranks))); }

std::vector<int> Sites::others_of_site(int rank) const {
  const auto site = site_of(rank);
  std::vector<int> ranks;
  std::ranges::copy_if(site, std::back_inserter(ranks), [=](int other) { return other != rank; });
  return ranks;
}

std::vector<int> Sites::other_leaders(int rank) const {
  std::vector<int> ranks;
  for (int participant = 0; participant < participants(); ++participant) {
    if (leader(participant) != rank) {
      ranks.push_back(leader(participant));
    }
  }
  return ranks;
}

std::vector<int> Sites::neighbours(int rank) const {
  if (!leads(rank)) {
    return {leader_of(rank)};
  }
  std::vector<int> ranks = others_of_site(rank);
  std::ranges::copy(other_leaders(rank), std::back_inserter(ranks));
  return ranks;
}

// In lowest terms, so that two sites of two ranks compute as two ranks do, bit for bit.
Sites::Fraction Sites::part(int participant) const {
  const int size = static_cast<int>(members(participant).size());
  const int divisor = std::gcd(size, ranks());
  return {size / divisor, ranks() / divisor};
}

float Sites::weight(int participant) const {
  const auto [numerator, denominator] = part(participant);
  return static_cast<float>(numerator) / static_cast<float>(denominator);
}

float Sites::gain() const {
  double squares = 0.0;
  for (const auto& members : members_) {
    squares += static_cast<double>(members.size() * members.size());
  }
  const auto all = static_cast<double>(ranks());
  return static_cast<float>(std::sqrt(all * all / squares));
}

float Sites::share(int participant, float gain) const {
  const auto [numerator, denominator] = part(participant);
  return gain * static_cast<float>(numerator) / static_cast<float>(denominator);
}

bool Sites::even() const {
  return std::ranges::all_of(
      members_, [&](const auto& members) { return members.size() == members_.front().size(); });
}

std::string Sites::name(int participant) const {
  const auto& label = labels_.at(index(participant));
  const std::string who = ranks_text(members_.at(index(participant)));
  if (label.starts_with(kHostPrefix)) {
    return fmt::format("the host of {}", who);
  }
  return label.empty() ? who : fmt::format("site '{}' ({})", label, who);
}

std::string Sites::text() const {
  std::vector<std::string> names;
  for (int participant = 0; participant < participants(); ++participant) {
    names.push_back(name(participant));
  }
  return fmt::format("{}", fmt::join(names, ", "));
}

std::string site_label(std::string_view site, std::string_view host) {
  return site == "host" ? fmt::format("{}{}", kHostPrefix, host) : std::string(site);
}

bool is_site(std::string_view site) {
  const auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  };
  return site.size() <= kMaxSiteBytes && std::ranges::all_of(site, allowed);
}

std::string forgotten_site(const std::vector<std::string>& labels,
                           std::span<const Placement> placements) {
  std::map<std::string_view, std::map<bool, std::vector<int>>> hosts;
  for (std::size_t rank = 0; rank < labels.size(); ++rank) {
    hosts[placements[rank].host][labels[rank].empty()].push_back(static_cast<int>(rank));
  }
  for (const auto& [host, ranks] : hosts) {
    if (ranks.size() == 2) {
      return fmt::format("DISTRO_SITE is set for {} and not for {} of the same host",
                         ranks_text(ranks.at(false)), ranks_text(ranks.at(true)));
    }
  }
  return "";
}

}  // namespace distro::exchange
