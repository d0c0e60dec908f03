#pragma once

#include <memory>
#include <mutex>
#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace distro::c10d_backend {

/// A part of an inner backend. Whoever lets go last destroys it without Python's lock, for Gloo's
/// destructor joins a thread which may be waiting for that lock to free a tensor; in a forked child
/// it is left alone.
using SharedBackend = std::shared_ptr<c10d::Backend>;
SharedBackend share(c10::intrusive_ptr<c10d::Backend> backend);

/// The backend of what stays exact, shared by the process group and its modules' synchronisers.
/// Copies refer to the same backend. Thread-safe.
///
/// Gloo's threads free tensors and run Python's callbacks, for which they take Python's lock. A
/// thread that does so while the interpreter ends is killed inside a destructor, and the process
/// aborts ("terminate called without an active exception"). So the group's end is the backend's:
/// release() joins its threads, however many objects still refer to it.
class InnerBackend {
 public:
  explicit InnerBackend(c10::intrusive_ptr<c10d::Backend> backend);

  /// The backend; lives until the end of the caller's expression at least. Throws
  /// exchange::ExchangeError after release().
  std::shared_ptr<c10d::Backend> operator->() const;

  /// Let go of the backend. Whoever lets go last destroys it, without Python's lock, after all
  /// collectives under way have ended. Idempotent.
  void release() const noexcept;

 private:
  struct State {
    std::mutex mutex;
    std::shared_ptr<c10d::Backend> backend;  // guarded by mutex
  };
  const std::shared_ptr<State> state_;
};

}  // namespace distro::c10d_backend
