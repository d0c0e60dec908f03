#include "backend/c10d/module_gradients.h"

#include <utility>

#include "backend/c10d/exact_collectives.h"
#include "backend/c10d/gradient_reductions.h"
#include "backend/c10d/tensors.h"

namespace distro::c10d_backend {
namespace {

// DDP's end of it; dies with the reducer.
class CommHook : public c10d::CommHookInterface {
 public:
  explicit CommHook(std::shared_ptr<ModuleGradients> module) : module_(std::move(module)) {}
  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    return module_->on_bucket(bucket);
  }
  at::Tensor parseHookResult(const c10::IValue& result) override {
    return c10d::detail::parseCppCommHookResult(result);
  }

 private:
  const std::shared_ptr<ModuleGradients> module_;
};

}  // namespace

ModuleGradients::ModuleGradients(const c10::intrusive_ptr<ProcessGroupDistro>& backend,
                                 std::vector<at::Tensor> parameters,
                                 const std::vector<std::string>& names)
    : reductions_(backend->gradients()),
      inner_(backend->inner()),
      operations_(backend->operations()),
      parameters_(std::move(parameters)) {
  TORCH_CHECK_VALUE(reductions_, "this process group reduces no gradients by itself (mode ",
                    exchange::name_of(backend->group()->options().mode), ")");
  TORCH_CHECK_VALUE(parameters_.size() == names.size(),
                    "as many names as parameters are needed, got ", names.size(), " and ",
                    parameters_.size());
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    names_.emplace(parameters_[i].unsafeGetTensorImpl(), names[i]);
  }
}

void ModuleGradients::attach(const std::shared_ptr<ModuleGradients>& module,
                             const std::shared_ptr<c10d::Reducer>& reducer) {
  reducer->register_comm_hook(std::make_unique<CommHook>(module));
}

c10::intrusive_ptr<c10::ivalue::Future> ModuleGradients::exact_mean(at::Tensor& buffer) {
  return exact_mean_of_bucket(buffer, reductions_->group(), inner_, operations_)->getFuture();
}

c10::intrusive_ptr<c10::ivalue::Future> ModuleGradients::on_bucket(c10d::GradBucket& bucket) {
  if (bucket.isLast()) {
    ++backwards_;
  }
  at::Tensor& buffer = bucket.getBufferRef();
  const auto& options = reductions_->group()->options();
  if (!is_candidate(buffer, c10d::ReduceOp::SUM, options.min_elements)) {
    return exact_mean(buffer);
  }
  const auto parameters = bucket.getParameters();
  const auto gradients = bucket.getGradients();
  const auto type = *codec_type(buffer.scalar_type());
  std::vector<exchange::TensorSpec> specs;
  Residuals residuals;
  {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const void* key = parameters[i].unsafeGetTensorImpl();
      auto& residual = residuals_[key];
      if (!residual) {
        residual = std::make_shared<plugins::Residual>();
      }
      residuals.push_back(residual);
      const auto name = names_.find(key);
      specs.push_back(
          {name == names_.end() ? "(unnamed)" : name->second, type, gradients[i].sizes().vec()});
    }
  }
  return reductions_->mean(buffer, std::move(specs), gradients, std::move(residuals))->getFuture();
}

std::vector<std::optional<at::Tensor>> ModuleGradients::residuals() {
  const std::lock_guard lock(mutex_);
  std::vector<std::optional<at::Tensor>> result;
  for (const auto& parameter : parameters_) {
    const auto found = residuals_.find(parameter.unsafeGetTensorImpl());
    const bool compressed = found != residuals_.end() && !found->second->coefficients.empty();
    auto& residual = result.emplace_back();
    if (compressed) {
      residual = at::tensor(at::ArrayRef<float>(found->second->coefficients.data(),
                                                found->second->coefficients.size()),
                            at::kFloat);
    }
  }
  return result;
}

void ModuleGradients::load(const std::vector<std::optional<at::Tensor>>& residuals,
                           std::uint64_t backwards) {
  TORCH_CHECK_VALUE(residuals.size() == parameters_.size(), "residuals of ", residuals.size(),
                    " parameters were given where the module has ", parameters_.size());
  std::unordered_map<const void*, std::shared_ptr<plugins::Residual>> loaded;
  for (std::size_t i = 0; i < residuals.size(); ++i) {
    const void* const key = parameters_[i].unsafeGetTensorImpl();
    if (!residuals[i]) {
      continue;
    }
    TORCH_CHECK_VALUE(residuals[i]->numel() == parameters_[i].numel(), "the residual of ",
                      names_.at(key), " has ", residuals[i]->numel(),
                      " values where the parameter has ", parameters_[i].numel(), " elements");
    const at::Tensor values = residuals[i]->detach().to(at::kCPU, at::kFloat).contiguous();
    TORCH_CHECK_VALUE(values.isfinite().all().item<bool>(), "the residual of ", names_.at(key),
                      " is not finite");
    const auto* const data = values.const_data_ptr<float>();
    loaded[key] = std::make_shared<plugins::Residual>(
        plugins::Residual{kernels::HugeVector<float>(data, data + values.numel())});
  }
  const std::lock_guard lock(mutex_);
  residuals_ = std::move(loaded);
  backwards_ = backwards;
}

}  // namespace distro::c10d_backend
