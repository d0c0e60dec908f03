#include "backend/c10d/reduction_work.h"

#include <torch/csrc/distributed/c10d/exception.h>

#include <utility>

#include "backend/c10d/python_lock.h"

namespace distro::c10d_backend {

ReductionWork::ReductionWork(int rank, c10d::OpType operation, const char* title,
                             std::vector<at::Tensor> outputs,
                             std::shared_ptr<Operations> operations,
                             const Operations::Ticket& ticket)
    : Work(rank, operation, title, outputs),
      outputs_(std::move(outputs)),
      operations_(std::move(operations)),
      ticket_(ticket),
      future_(
          c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()))) {
}

void ReductionWork::complete(const std::exception_ptr& error) {
  finish(error);
  if (error) {
    future_->setError(error);
  } else {
    operations_->finish(ticket_);
    future_->markCompleted(c10::IValue(outputs_));
  }
}

bool ReductionWork::wait(std::chrono::milliseconds timeout) {
  const WithoutPythonLock without_lock;  // the engine's thread may need it to free a tensor
  std::unique_lock lock(mutex_);
  if (timeout == kNoTimeout) {
    cv_.wait(lock, [this] { return completed_; });
  } else if (!cv_.wait_for(lock, timeout, [this] { return completed_; })) {
    C10_THROW_ERROR(DistBackendError, c10::str("rank ", rank_, ": ", c10d::opTypeToString(opType_),
                                               " is not done after the time-out of this wait, ",
                                               timeout.count(), " ms"));
  }
  if (exception_) {
    std::rethrow_exception(exception_);
  }
  return true;
}

}  // namespace distro::c10d_backend
