#include "backend/c10d/module_synchroniser.h"

#include <ATen/record_function.h>
#include <fmt/format.h>

#include <cmath>
#include <utility>

#include "backend/c10d/errors.h"
#include "backend/c10d/exact_collectives.h"
#include "backend/c10d/exact_work.h"

namespace distro::c10d_backend {
namespace {

std::vector<exchange::TensorSpec> specs(const std::vector<at::Tensor>& parameters,
                                        const std::vector<std::string>& names) {
  TORCH_CHECK_VALUE(parameters.size() == names.size(),
                    "as many names as parameters are needed, got ", names.size(), " and ",
                    parameters.size());
  std::vector<exchange::TensorSpec> result;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const auto type = codec_type(parameters[i].scalar_type());
    TORCH_CHECK_TYPE(
        type && parameters[i].device().is_cpu() && parameters[i].layout() == at::kStrided,
        "parameter ", names[i], " is not a dense floating-point tensor on the CPU");
    result.push_back({names[i], *type, parameters[i].sizes().vec()});
  }
  return result;
}

// DDP's end of the synchroniser; dies with the reducer.
class CommHook : public c10d::CommHookInterface {
 public:
  explicit CommHook(std::shared_ptr<ModuleSynchroniser> synchroniser)
      : synchroniser_(std::move(synchroniser)) {}
  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    return synchroniser_->on_bucket(bucket);
  }
  at::Tensor parseHookResult(const c10::IValue& result) override {
    return c10d::detail::parseCppCommHookResult(result);
  }

 private:
  const std::shared_ptr<ModuleSynchroniser> synchroniser_;
};

}  // namespace

ModuleSynchroniser::ModuleSynchroniser(const c10::intrusive_ptr<ProcessGroupDistro>& backend,
                                       std::vector<at::Tensor> parameters,
                                       const std::vector<std::string>& names)
    : group_(backend->group()),
      inner_(backend->inner()),
      operations_(backend->operations()),
      parameters_(std::move(parameters)),
      exchange_(group_, specs(parameters_, names)) {}

void ModuleSynchroniser::attach(const std::shared_ptr<ModuleSynchroniser>& synchroniser,
                                const std::shared_ptr<c10d::Reducer>& reducer) {
  reducer->register_comm_hook(std::make_unique<CommHook>(synchroniser));
}

template <typename Use>
void ModuleSynchroniser::with_views(Use&& use, bool writes) {
  const at::NoGradGuard no_grad;
  std::vector<plugins::TensorView> views;
  std::vector<std::pair<at::Tensor, at::Tensor>>
      copies;  // parameters that do not lie in logical order, and their copies
  views.reserve(parameters_.size());
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& parameter = parameters_[i];
    const auto type = codec_type(parameter.scalar_type());
    const auto& spec = exchange_.tensors()[i];
    TORCH_CHECK(
        type && parameter.device().is_cpu() && parameter.sizes() == c10::IntArrayRef(spec.shape),
        "parameter ", spec.name,
        " has changed its type, device or shape since the module was wrapped; wrap it again");
    at::Tensor memory = parameter.detach();
    if (!memory.is_contiguous()) {
      memory = memory.contiguous();
      copies.emplace_back(parameter, memory);
    }
    views.push_back({memory.data_ptr(), *type, static_cast<std::size_t>(memory.numel())});
  }
  use(exchange::WeightsExchange::Views(views));
  if (!writes) {
    return;
  }
  for (auto& [parameter, copy] : copies) {
    parameter.detach().copy_(copy);
  }
  for (const auto& parameter : parameters_) {
    // The write went past autograd: let it know, as the optimizer's own in-place step does.
    parameter.unsafeGetTensorImpl()->bump_version();
  }
}

float ModuleSynchroniser::gain() const {
  if (group_->options().gain) {
    return static_cast<float>(*group_->options().gain);
  }
  if (!normalises_) {
    return exchange::kGainUnknown;
  }
  return *normalises_ ? std::sqrt(static_cast<float>(group_->world_size())) : 1.0F;
}

// Run a step that all ranks run; what fails on this rank alone is told to the others, which would
// wait for it in vain.
template <typename Step>
void ModuleSynchroniser::together(const char* what, Step&& step) {
  try {
    translate(*group_, what, std::forward<Step>(step));
  } catch (const std::exception& error) {
    group_->abort(group_->rank(), error.what());
    throw;
  }
}

void ModuleSynchroniser::before_forward() {
  if (exact_) {
    return;
  }
  together("the exchange of weights", [&] {
    InnerCollectives exact(inner_, group_);
    if (!exchange_.begun()) {
      with_views([&](exchange::WeightsExchange::Views views) { exchange_.begin(views, exact); });
    }
    if (backward_done_) {
      RECORD_FUNCTION("distro:exchange",
                      std::vector<c10::IValue>(parameters_.begin(), parameters_.end()));
      with_views(
          [&](exchange::WeightsExchange::Views views) { exchange_.sync(views, exact, gain()); });
      backward_done_ =
          false;  // only now: after an error the next forward meets the same error again
    }
  });
}

void ModuleSynchroniser::set_optimizer(bool normalises) {
  if (normalises_ && *normalises_ != normalises) {
    group_->log(transport::LogLevel::warning,
                fmt::format("module {} is stepped by SGD and by a normalising optimizer; the gain "
                            "is that of the latter. Set DISTRO_GAIN "
                            "to choose.",
                            exchange_.ordinal()));
    normalises = true;
  }
  normalises_ = normalises;
}

void ModuleSynchroniser::mark() { exchange_.mark(); }

void ModuleSynchroniser::go_exact() { exact_ = true; }

void ModuleSynchroniser::average() {
  together("average()", [&] {
    InnerCollectives exact(inner_, group_);
    with_views([&](exchange::WeightsExchange::Views views) {
      if (exact_) {
        exact.mean(views);
      } else {
        exchange_.average(views, exact);
      }
    });
  });
  backward_done_ = false;
}

c10::intrusive_ptr<c10::ivalue::Future> ModuleSynchroniser::on_bucket(c10d::GradBucket& bucket) {
  at::Tensor& buffer = bucket.getBufferRef();
  if (exact_) {
    // With a hook DDP does not divide.
    buffer.div_(group_->world_size());
    std::vector<at::Tensor> tensors = {buffer};
    group_->counters().exact.fetch_add(1, std::memory_order_relaxed);
    group_->counters().exact_bytes.fetch_add(buffer.nbytes(), std::memory_order_relaxed);
    const auto ticket = operations_->begin("all_reduce", /*point_to_point=*/false, buffer.nbytes());
    return c10::make_intrusive<ExactWork>(
               ExactWork::Call{c10d::OpType::ALLREDUCE, "distro:all_reduce", tensors, tensors,
                               ticket},
               group_, operations_, [&] { return inner_->allreduce(tensors); },
               std::function<void()>{})
        ->getFuture();
  }
  group_->counters().reductions.fetch_add(1, std::memory_order_relaxed);
  if (bucket.isLast()) {
    backward_done_ = true;
  }
  auto future =
      c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
  future->markCompleted(c10::IValue(std::vector<at::Tensor>{buffer}));
  return future;
}

exchange::ModuleState ModuleSynchroniser::state() {
  exchange::ModuleState state;
  with_views([&](exchange::WeightsExchange::Views views) { state = exchange_.state(views); },
             /*writes=*/false);
  return state;
}

void ModuleSynchroniser::load(const exchange::ModuleState& state) {
  with_views([&](exchange::WeightsExchange::Views views) {
    translate(*group_, "load_state_dict()", [&] { exchange_.load(state, views); });
  });
}

}  // namespace distro::c10d_backend
