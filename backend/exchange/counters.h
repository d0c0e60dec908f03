#pragma once

#include <atomic>
#include <cstdint>

namespace distro::exchange {

/// What one rank did in one group since it was made. Relaxed atomics: read at any time, from any
/// thread.
struct Counters {
  std::atomic<std::uint64_t> exchanges{
      0};  ///< Exchanges sent, over all modules; gradient modes: reductions that were compressed.
  std::atomic<std::uint64_t> reductions{
      0};                               ///< Gradient buckets that the inner backend was spared.
  std::atomic<std::uint64_t> exact{0};  ///< Collectives that ran exactly in the inner backend.
  std::atomic<std::uint64_t> exact_bytes{0};     ///< Their input bytes.
  std::atomic<std::uint64_t> gradient_bytes{0};  ///< What dense training would have reduced.
  std::atomic<std::uint64_t> payload_bytes_sent{
      0};  ///< Records to other participants, headers included, once for each receiver.
  std::atomic<std::uint64_t> payload_bytes_received{0};
  /// Handed to the other ranks of this rank's site: gradients, and records that are passed on.
  std::atomic<std::uint64_t> site_bytes{0};
  std::atomic<std::uint64_t> resyncs{0};
  std::atomic<std::uint64_t> orphaned_records{
      0};  ///< Records of modules that this rank has let go.
  std::atomic<std::uint64_t> encode_nanoseconds{0};
  std::atomic<std::uint64_t> decode_nanoseconds{0};
  std::atomic<std::uint64_t> wait_nanoseconds{
      0};  ///< Time in which a sync point waited for records.
  std::atomic<std::uint64_t> reference_checksum{
      0};  ///< Sum over the modules; gradient modes: of the last decoded result.
};

}  // namespace distro::exchange
