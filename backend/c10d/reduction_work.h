#pragma once

#include <exception>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "backend/c10d/operations.h"

namespace distro::c10d_backend {

/// A collective that the engine of gradient reductions runs on its own thread. Ends when that
/// thread says so; wait() without a time-out ends with the group's.
class ReductionWork : public c10d::Work {
 public:
  /// `title`: static text for the profiler, "distro:all_reduce".
  ReductionWork(int rank, c10d::OpType operation, const char* title,
                std::vector<at::Tensor> outputs, std::shared_ptr<Operations> operations,
                const Operations::Ticket& ticket);

  /// Called once, by the engine; null: the outputs are written.
  void complete(const std::exception_ptr& error);

  /// Throws what the collective failed with, or c10::DistBackendError at the time-out.
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  std::vector<at::Tensor> result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }
  uint64_t getSequencenumber() const override { return ticket_.sequence; }
  /// No `override`: torch before 2.15 does not ask.
  uint64_t getCompletionKey() const { return ticket_.key; }

  /// The operation, for error texts.
  [[nodiscard]] std::string name() const { return c10d::opTypeToString(opType_); }

 private:
  const std::vector<at::Tensor> outputs_;
  const std::shared_ptr<Operations> operations_;
  const Operations::Ticket ticket_;
  const c10::intrusive_ptr<c10::ivalue::Future> future_;  // its value is the outputs
};

}  // namespace distro::c10d_backend
