#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "backend/exchange/group.h"

namespace distro::c10d_backend {

/// A collective that runs exactly in the inner backend. Adds to the inner Work: errors that name
/// the rank, and an optional last act on the outputs (the division of AVG, which is done here
/// because the inner backend's is not trusted).
class ExactWork : public c10d::Work {
 public:
  ExactWork(c10::intrusive_ptr<c10d::Work> inner, std::shared_ptr<exchange::Group> group,
            c10d::OpType operation, std::vector<at::Tensor> outputs,
            std::function<void()> last_act);

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  int sourceRank() const override;
  std::vector<at::Tensor> result() override;
  void synchronize() override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void abort() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  uint64_t getSequencenumber() const override;

 private:
  // When the future was completed: what waits with a deadline.
  struct Completion {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;  // guarded by mutex
  };
  using Deadline = transport::Deadline;

  const c10::intrusive_ptr<c10d::Work> inner_;
  const std::shared_ptr<exchange::Group> group_;
  const std::string operation_;
  const std::vector<at::Tensor> outputs_;
  // Completed by the inner Work's future; where it has none (gloo's reduce-scatter, send, receive),
  // by wait().
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  const std::shared_ptr<Completion> completion_ = std::make_shared<Completion>();
  bool completed_by_wait_ = false;
  std::function<void()> last_act_;  // where wait() is to run it
  std::mutex wait_mutex_;

  void wait_for_future(std::chrono::milliseconds timeout);
  void wait_for_inner(std::chrono::milliseconds timeout);
  void check_lost(Deadline& give_up_at) const;
};

}  // namespace distro::c10d_backend
