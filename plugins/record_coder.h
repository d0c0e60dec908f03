#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/bits.h"
#include "plugins/record.h"
#include "plugins/tile_layout.h"

namespace distro::plugins {

/// What both ends know of a record body beside the layout.
struct RecordFormat {
  std::uint32_t k = 6;           ///< Entries kept per 4096.
  std::uint32_t value_bits = 1;  ///< 1: sign x bf16 scale of the run; 32: fp32 each.
};

/// Writes the entries of one run of tiles, tile by tile, as bits that need not end on a byte.
class RunWriter {
 public:
  /// `out` must have the room that RecordCoder gives a run.
  RunWriter(const TileLayout& layout, const TileRun& run, RecordFormat format,
            std::span<std::byte> out) noexcept;

  /// The next tile's entries: ascending indices, and r of the whole tile, non-zero at them.
  void add(std::span<const std::uint16_t> index, const float* r) noexcept;
  /// After the last tile. Returns the bits of the run.
  std::size_t finish() noexcept;

 private:
  void write_tile(std::span<const std::uint16_t> index, const float* r) noexcept;

  const TileLayout* layout_;
  TileRun run_;
  RecordFormat format_;
  std::span<std::byte> out_;
  kernels::BitWriter writer_;
  std::size_t next_tile_ = 0;
  std::size_t entries_ = 0;
  double magnitudes_ = 0.0;
};

/// Writes and reads the body of a record (docs/protocol.md). Stateless
/// but for the layout that it derives of it once, so all of it may run on any number of
/// threads.
class RecordCoder {
 public:
  /// The layout must outlive the coder. Throws std::invalid_argument where k is not 1 to 4096,
  /// value_bits not 1 or 32, or the entries are more than 32 bits can count.
  RecordCoder(const TileLayout& layout, RecordFormat format);

  [[nodiscard]] const RecordFormat& format() const noexcept { return format_; }

  /// Bytes in which all runs can be staged side by side.
  [[nodiscard]] std::size_t staging_bytes() const noexcept { return staged_.back(); }
  /// The largest body that any record of this geometry can have, in bytes.
  [[nodiscard]] std::size_t largest_body_bytes() const noexcept;
  /// A writer of run `run` into its own part of the staging memory.
  [[nodiscard]] RunWriter writer(std::size_t run, std::span<std::byte> staging) const noexcept;
  /// The body, from all runs staged and the bits of each.
  [[nodiscard]] std::vector<std::byte> assemble(std::span<const std::byte> staging,
                                                std::span<const std::size_t> bits) const;
  /// The body that has no entry.
  [[nodiscard]] std::vector<std::byte> empty() const;
  /// Check and unpack. Memory is bounded by the layout, whatever the bytes say. Throws
  /// RecordError.
  [[nodiscard]] ParsedRecord parse(std::span<const std::byte> body) const;

 private:
  /// Runs that share a length prefix: the unit of parallel packing and parsing.
  struct Section {
    std::size_t first_run = 0;
    std::size_t runs = 0;
    std::size_t first_tile = 0;
    std::size_t first_entry = 0;  ///< If all tiles before it were full.
  };
  struct SectionReader;

  const TileLayout* layout_;
  RecordFormat format_;
  std::vector<std::size_t> staged_;  ///< Where each run is staged, in bytes; one more for the end.
  std::vector<Section> sections_;
  std::size_t most_entries_ = 0;
};

}  // namespace distro::plugins
