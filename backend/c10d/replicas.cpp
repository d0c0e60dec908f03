#include "backend/c10d/replicas.h"

#include <utility>

#include "backend/c10d/recognition.h"
#include "backend/c10d/tensors.h"

namespace distro::c10d_backend {
namespace {

class DoneWork : public c10d::Work {
 public:
  DoneWork(int rank, c10d::OpType type, const char* title, std::vector<at::Tensor> tensors)
      : Work(rank, type, title, tensors), tensors_(std::move(tensors)) {
    future_ = c10::make_intrusive<c10::ivalue::Future>(
        c10::ListType::create(c10::TensorType::get()), devices_of(tensors_));
    future_->markCompleted(c10::IValue(tensors_));
    finish();
  }
  bool wait(std::chrono::milliseconds /*timeout*/) override { return true; }
  void synchronize() override {}
  std::vector<at::Tensor> result() override { return tensors_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  const std::vector<at::Tensor> tensors_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

}  // namespace

void as_if_reduced(at::Tensor& gradient, const c10d::ReduceOp& op, int ranks) {
  TORCH_CHECK_VALUE(
      op == c10d::ReduceOp::SUM || op == c10d::ReduceOp::AVG || op == c10d::ReduceOp::PREMUL_SUM,
      "gradients of replicas are summed or averaged");
  if (op == c10d::ReduceOp::AVG) {
    return;
  }
  const PlainArithmetic plain;
  gradient.mul_(weight_of(op, ranks) * static_cast<float>(ranks));
}

c10::intrusive_ptr<c10d::Work> done(int rank, c10d::OpType type, const char* title,
                                    std::vector<at::Tensor> tensors) {
  return c10::make_intrusive<DoneWork>(rank, type, title, std::move(tensors));
}

}  // namespace distro::c10d_backend
