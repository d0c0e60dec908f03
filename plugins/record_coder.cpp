#include "plugins/record_coder.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels/half.h"
#include "plugins/parallel.h"

namespace distro::plugins {
namespace {

constexpr std::size_t kSectionRuns = 64;
constexpr unsigned kScaleBits = 16;
constexpr unsigned kFloatBits = 32;
constexpr std::size_t kLengthBytes = sizeof(std::uint32_t);
constexpr std::uint16_t kLargestScale = 0x7f7f;  // bf16's largest finite value
constexpr std::uint32_t kInfinity = 0x7f800000;

unsigned count_bits(std::size_t kept) noexcept {
  return static_cast<unsigned>(std::bit_width(kept));
}

/// The scale of a run as bf16 bits; 0 where the mean is below half of bf16's smallest value.
std::uint16_t scale_of(double magnitudes, std::size_t entries) noexcept {
  if (entries == 0) {
    return 0;
  }
  const double mean = magnitudes / static_cast<double>(entries);
  return std::min(kernels::to_bf16(static_cast<float>(mean)), kLargestScale);
}

/// What follows the length of section s, in a body whose lengths are right. Each thread follows the
/// lengths for itself: a list of them would be memory of each call.
template <class Byte>
std::span<Byte> content(std::span<Byte> body, std::size_t s) noexcept {
  while (true) {
    std::uint32_t length = 0;
    std::memcpy(&length, body.data(), kLengthBytes);
    body = body.subspan(kLengthBytes);
    if (s == 0) {
      return body.first(length);
    }
    body = body.subspan(length);
    --s;
  }
}

}  // namespace

RunWriter::RunWriter(const TileLayout& layout, const TileRun& run, RecordFormat format,
                     std::span<std::byte> out) noexcept
    : layout_(&layout), run_(run), format_(format), out_(out), writer_(out) {
  if (format_.value_bits == 1) {
    writer_.put(0, kScaleBits);  // finish() knows it
  }
}

void RunWriter::write_tile(std::span<const std::uint16_t> index, const float* r) noexcept {
  const std::size_t n = layout_->tile_size(run_.first_tile + next_tile_++);
  const std::size_t kept = TileLayout::kept(format_.k, n);
  if (index.size() == kept) {
    writer_.put(1, 1);
  } else {
    writer_.put(0, 1);
    writer_.put(static_cast<std::uint32_t>(index.size()), count_bits(kept));
  }
  if (index.size() < n) {
    writer_.write_gaps(index, n);
  }
  for (const std::uint16_t i : index) {
    const auto bits = std::bit_cast<std::uint32_t>(r[i]);
    if (format_.value_bits == 1) {
      writer_.put(bits >> 31, 1);
    } else {
      writer_.put(bits, kFloatBits);
    }
  }
}

void RunWriter::add(std::span<const std::uint16_t> index, const float* r) noexcept {
  entries_ += index.size();
  if (format_.value_bits == 1) {
    for (const std::uint16_t i : index) {
      magnitudes_ += std::abs(static_cast<double>(r[i]));
    }
  }
  write_tile(index, r);
}

std::size_t RunWriter::finish() noexcept {
  const std::uint16_t scale = scale_of(magnitudes_, entries_);
  if (format_.value_bits == 1 && scale == 0 && entries_ > 0) {
    // Entries that would move nothing: a scale of zero means no entries.
    writer_ = kernels::BitWriter(out_);
    writer_.put(0, kScaleBits);
    next_tile_ = 0;
    while (next_tile_ < run_.tiles) {
      write_tile({}, nullptr);
    }
  }
  const std::size_t bits = writer_.bits();
  writer_.finish();
  if (format_.value_bits == 1) {
    std::memcpy(out_.data(), &scale, sizeof(scale));
  }
  return bits;
}

RecordCoder::RecordCoder(const TileLayout& layout, RecordFormat format)
    : layout_(&layout), format_(format) {
  constexpr std::size_t kFull = kernels::kTileElements;
  if (format.k < 1 || format.k > kFull) {
    throw std::invalid_argument(fmt::format("k is {}; allowed: 1 to {}", format.k, kFull));
  }
  if (format.value_bits != 1 && format.value_bits != kFloatBits) {
    throw std::invalid_argument(
        fmt::format("value_bits is {}; allowed: 1, {}", format.value_bits, kFloatBits));
  }
  const std::size_t full_gaps = kernels::largest_gaps_bits(kFull, format.k);
  std::size_t bytes = 0;
  const std::span<const TileRun> runs = layout.runs();
  for (std::size_t run = 0; run < runs.size(); ++run) {
    if (run % kSectionRuns == 0) {
      sections_.push_back(
          {run, std::min(kSectionRuns, runs.size() - run), runs[run].first_tile, most_entries_});
    }
    std::size_t bits = kScaleBits;
    for (std::size_t tile = runs[run].first_tile; tile < runs[run].first_tile + runs[run].tiles;
         ++tile) {
      const std::size_t n = layout.tile_size(tile);
      const std::size_t kept = TileLayout::kept(format.k, n);
      const std::size_t gaps = n == kFull ? full_gaps : kernels::largest_gaps_bits(n, kept);
      bits += 1 + count_bits(kept) + gaps + kept * format.value_bits;
      most_entries_ += kept;
    }
    staged_.push_back(bytes);
    bytes += (bits + 7) / 8;
  }
  staged_.push_back(bytes);
  if (most_entries_ > std::numeric_limits<std::uint32_t>::max()) {
    throw std::invalid_argument(
        fmt::format("{} entries are more than a record can hold", most_entries_));
  }
}

std::size_t RecordCoder::largest_body_bytes() const noexcept {
  return staging_bytes() + sections_.size() * kLengthBytes;
}

RunWriter RecordCoder::writer(std::size_t run, std::span<std::byte> staging) const noexcept {
  return {*layout_, layout_->runs()[run], format_,
          staging.subspan(staged_[run], staged_[run + 1] - staged_[run])};
}

std::vector<std::byte> RecordCoder::assemble(std::span<const std::byte> staging,
                                             std::span<const std::size_t> bits) const {
  const auto content_bytes = [&](const Section& section) {
    const auto of_section = bits.subspan(section.first_run, section.runs);
    return (std::accumulate(of_section.begin(), of_section.end(), std::size_t{0}) + 7) / 8;
  };
  std::size_t bytes = 0;
  for (const Section& section : sections_) {
    bytes += kLengthBytes + content_bytes(section);
  }
  std::vector<std::byte> body(bytes);
  std::size_t at = 0;
  for (const Section& section : sections_) {
    const auto length = static_cast<std::uint32_t>(content_bytes(section));
    std::memcpy(body.data() + at, &length, kLengthBytes);
    at += kLengthBytes + length;
  }
  parallel_for(sections_.size(), [&](std::size_t s) {
    const Section& section = sections_[s];
    kernels::BitWriter writer(content(std::span(body), s));
    for (std::size_t run = section.first_run; run < section.first_run + section.runs; ++run) {
      writer.append(staging.subspan(staged_[run], staged_[run + 1] - staged_[run]), bits[run]);
    }
    writer.finish();
  });
  return body;
}

std::vector<std::byte> RecordCoder::empty() const {
  std::vector<std::byte> staging(staging_bytes());
  std::vector<std::size_t> bits;
  for (std::size_t run = 0; run < layout_->runs().size(); ++run) {
    RunWriter run_writer = writer(run, staging);
    for (std::size_t tile = 0; tile < layout_->runs()[run].tiles; ++tile) {
      run_writer.add({}, nullptr);
    }
    bits.push_back(run_writer.finish());
  }
  return assemble(staging, bits);
}

/// Reads one section into its part of the record, as if all tiles before it were full.
struct RecordCoder::SectionReader {
  const RecordCoder& coder;
  const Section& section;
  kernels::BitReader reader;
  ParsedRecord& record;
  std::size_t entry = section.first_entry;

  /// Leaves in first[t + 1] the entries of tile t.
  void read() {
    for (std::size_t run = section.first_run; run < section.first_run + section.runs; ++run) {
      read_run(coder.layout_->runs()[run]);
    }
    if (reader.overrun()) {
      fail("ends too early");
    }
    if (reader.remaining() >= 8) {
      fail(fmt::format("has {} bits too many", reader.remaining()));
    }
    if (reader.get(static_cast<unsigned>(reader.remaining())) != 0) {
      fail("is not padded with zero bits");
    }
  }

 private:
  [[noreturn]] void fail(std::string_view what) const {
    throw RecordError(fmt::format("the record's section of runs {} to {} {}", section.first_run,
                                  section.first_run + section.runs - 1, what));
  }

  void read_run(const TileRun& run) {
    float scale = 0.0F;
    if (coder.format_.value_bits == 1) {
      const std::uint32_t bits = reader.get(kScaleBits);
      if (bits > kLargestScale) {
        fail(fmt::format("has a scale that is negative or not finite (bf16 bits {:#06x})", bits));
      }
      scale = kernels::from_bf16(static_cast<std::uint16_t>(bits));
    }
    const std::size_t before = entry;
    for (std::size_t tile = run.first_tile; tile < run.first_tile + run.tiles; ++tile) {
      read_tile(tile, scale);
    }
    if (coder.format_.value_bits == 1 && (entry > before) != (scale > 0.0F)) {
      fail("has a run whose scale is zero though it has entries, or the other way round");
    }
  }

  void read_tile(std::size_t tile, float scale) {
    const std::size_t n = coder.layout_->tile_size(tile);
    const std::size_t kept = TileLayout::kept(coder.format_.k, n);
    std::size_t count = kept;
    if (reader.get(1) == 0) {
      count = reader.get(count_bits(kept));
      if (count >= kept) {
        fail(fmt::format("announces {} entries in tile {}, in the form for fewer than {}", count,
                         tile, kept));
      }
    }
    const std::span<std::uint16_t> index = std::span(record.index).subspan(entry, count);
    if (count == n) {
      std::iota(index.begin(), index.end(), std::uint16_t{0});
    } else if (!reader.read_gaps(index, n)) {
      fail(reader.overrun() ? std::string("ends too early")
                            : fmt::format("has an index outside tile {} of {} elements", tile, n));
    }
    const std::span<float> value = std::span(record.value).subspan(entry, count);
    if (coder.format_.value_bits == 1) {
      read_signs(value, scale);
    } else {
      for (float& q : value) {
        q = read_float(tile);
      }
    }
    record.first[tile + 1] = static_cast<std::uint32_t>(count);
    entry += count;
  }

  void read_signs(std::span<float> value, float scale) noexcept {
    const auto magnitude = std::bit_cast<std::uint32_t>(scale);
    for (std::size_t i = 0; i < value.size(); i += 32) {
      const auto n = static_cast<unsigned>(std::min<std::size_t>(32, value.size() - i));
      std::uint32_t signs = reader.get(n);
      for (unsigned j = 0; j < n; ++j, signs >>= 1) {
        value[i + j] = std::bit_cast<float>(magnitude | (signs & 1U) << 31);
      }
    }
  }

  float read_float(std::size_t tile) {
    const std::uint32_t bits = reader.get(kFloatBits);
    const std::uint32_t magnitude = bits & ~(1U << 31);
    if (reader.overrun()) {
      fail("ends too early");
    }
    if (magnitude == 0 || magnitude >= kInfinity) {
      fail(fmt::format("has a value in tile {} that is zero or not finite (bits {:#010x})", tile,
                       bits));
    }
    return std::bit_cast<float>(bits);
  }
};

ParsedRecord RecordCoder::parse(std::span<const std::byte> body) const {
  std::size_t at = 0;
  for (std::size_t s = 0; s < sections_.size(); ++s) {
    std::uint32_t length = 0;
    if (body.size() - at < kLengthBytes) {
      throw RecordError(fmt::format("the record ends before its section {} of {} (at byte {})", s,
                                    sections_.size(), body.size()));
    }
    std::memcpy(&length, body.data() + at, kLengthBytes);
    at += kLengthBytes;
    if (body.size() - at < length) {
      throw RecordError(fmt::format("the record's section {} announces {} bytes where {} are left",
                                    s, length, body.size() - at));
    }
    at += length;
  }
  if (at != body.size()) {
    throw RecordError(fmt::format("{} bytes follow the record's last section", body.size() - at));
  }

  ParsedRecord record;
  record.first.resize(layout_->tiles() + 1);
  record.index.resize(most_entries_);
  record.value.resize(most_entries_);
  parallel_for(sections_.size(), [&](std::size_t s) {
    SectionReader{*this, sections_[s], kernels::BitReader(content(body, s)), record}.read();
  });
  std::partial_sum(record.first.begin(), record.first.end(), record.first.begin());

  // Close the gaps that sections with fewer entries leave.
  for (std::size_t s = 0; s < sections_.size(); ++s) {
    const std::size_t from = sections_[s].first_entry;
    const std::size_t to = record.first[sections_[s].first_tile];
    const std::size_t end_tile =
        s + 1 < sections_.size() ? sections_[s + 1].first_tile : layout_->tiles();
    const std::size_t entries = record.first[end_tile] - to;
    if (from != to) {
      std::copy_n(record.index.begin() + static_cast<std::ptrdiff_t>(from), entries,
                  record.index.begin() + static_cast<std::ptrdiff_t>(to));
      std::copy_n(record.value.begin() + static_cast<std::ptrdiff_t>(from), entries,
                  record.value.begin() + static_cast<std::ptrdiff_t>(to));
    }
  }
  record.index.resize(record.first.back());
  record.value.resize(record.first.back());
  return record;
}

}  // namespace distro::plugins
