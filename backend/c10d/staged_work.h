#pragma once

#include <memory>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "backend/c10d/staging.h"

namespace distro::c10d_backend {

/// A collective on tensors of a device that runs on their stand-ins in host memory. wait() returns
/// when the host has its part, and makes the current stream wait for the rest.
class StagedWork : public c10d::Work {
 public:
  /// `inner`: the collective on the stand-ins, begun.
  static c10::intrusive_ptr<StagedWork> make(c10::intrusive_ptr<c10d::Work> inner,
                                             c10d::OpType operation, Staging staging);
  StagedWork(c10::intrusive_ptr<c10d::Work> inner, c10d::OpType operation, Staging staging);

  bool isCompleted() override;
  int sourceRank() const override { return inner_->sourceRank(); }
  std::vector<at::Tensor> result() override { return end_->outputs; }
  void synchronize() override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void abort() override { inner_->abort(); }
  /// Throws where the inner Work has no future.
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  uint64_t getSequencenumber() const override { return inner_->getSequencenumber(); }

 private:
  /// The collective's end, on whichever thread it comes.
  struct End {
    Staging staging;
    std::vector<at::Tensor> outputs;
    c10::intrusive_ptr<c10::ivalue::Future> future;

    void deliver();
  };

  const c10::intrusive_ptr<c10d::Work> inner_;
  const c10::intrusive_ptr<c10::ivalue::Future> inner_future_;  // null: the end comes in wait()
  const std::shared_ptr<End> end_;
  std::mutex wait_mutex_;
};

}  // namespace distro::c10d_backend
