#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "backend/c10d/operations.h"
#include "backend/exchange/group.h"

namespace distro::c10d_backend {

/// The future by which an inner backend's Work completes; null where it has none: it does its last
/// part in wait().
[[nodiscard]] c10::intrusive_ptr<c10::ivalue::Future> future_of(c10d::Work& work,
                                                                c10d::OpType operation);

/// An operation that runs exactly in the inner backend. Adds to the inner Work: errors that name
/// the rank, a name in the profiler, word of its completion to the group's Operations, and an
/// optional last act on the outputs (such as the division of AVG, which is done here because the
/// inner backend's is not trusted).
class ExactWork : public c10d::Work {
 public:
  /// Begins the operation in the inner backend.
  using Start = std::function<c10::intrusive_ptr<c10d::Work>()>;

  /// What was called.
  struct Call {
    c10d::OpType type;
    const char* title;  ///< "distro:all_reduce"; static text.
    std::vector<at::Tensor> inputs;
    std::vector<at::Tensor> outputs;  ///< The future's value where the inner Work gives none.
    Operations::Ticket ticket;
  };

  /// `last_act` leaves the results in the call's outputs. Throws what `start` throws, translated
  /// (errors.h).
  ExactWork(const Call& call, std::shared_ptr<exchange::Group> group,
            std::shared_ptr<Operations> operations, const Start& start,
            std::function<void()> last_act);

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  int sourceRank() const override;
  std::vector<at::Tensor> result() override;
  void synchronize() override;

  /// A time-out given here says only how long to wait: the operation goes on and may be waited for
  /// again. (Gloo's own receive is the exception: there a time-out breaks the connections.)
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void abort() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  uint64_t getSequencenumber() const override;
  float getDuration() const override;

  /// No `override`: torch before 2.15 does not ask.
  uint64_t getCompletionKey() const;

 private:
  // The end of an operation, shared with the inner future's callback, which holds no reference to
  // the Work.
  class Completion;

  using Deadline = transport::Deadline;

  bool wait_by_future(std::chrono::milliseconds timeout);
  bool wait_by_inner(std::chrono::milliseconds timeout);
  void wait_for_inner(std::chrono::milliseconds timeout);
  void check_lost(Deadline& give_up_at) const;
  [[noreturn]] void throw_not_done(std::chrono::milliseconds timeout) const;

  const std::shared_ptr<exchange::Group> group_;
  const std::string operation_;
  const std::vector<at::Tensor> outputs_;
  const bool on_host_;
  const Operations::Ticket ticket_;
  const bool concluded_;  // the last act puts the results where the caller wants them
  const c10::intrusive_ptr<c10d::Work> inner_;
  const std::shared_ptr<Completion> completion_;
  // Completed by the inner Work's future; where it has none (gloo's reduce-scatter, send, receive),
  // by wait().
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  bool completed_by_wait_ = false;
  std::function<void()> last_act_;  // where wait() is to run it
  std::mutex wait_mutex_;
};

}  // namespace distro::c10d_backend
