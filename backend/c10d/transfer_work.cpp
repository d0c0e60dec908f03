#include "backend/c10d/transfer_work.h"

#include <utility>

namespace distro::c10d_backend {

TransferWork::TransferWork(int rank, c10d::OpType operation, std::vector<at::Tensor> outputs)
    : Work(rank, operation),
      outputs_(std::move(outputs)),
      future_(
          c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()))) {
}

void TransferWork::complete(const std::exception_ptr& error) {
  finish(error);  // before the future: who has waited for that asks this
  if (error) {
    future_->setError(error);
  } else {
    future_->markCompleted(c10::IValue(outputs_));
  }
}

}  // namespace distro::c10d_backend
