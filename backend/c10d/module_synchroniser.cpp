#include "backend/c10d/module_synchroniser.h"

#include <ATen/record_function.h>
#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "backend/c10d/device_codec.h"
#include "backend/c10d/errors.h"
#include "backend/c10d/exact_collectives.h"
#include "backend/c10d/exact_work.h"
#include "backend/c10d/tensors.h"

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
    TORCH_CHECK_TYPE(type && parameters[i].layout() == at::kStrided &&
                         parameters[i].device() == parameters[0].device(),
                     "parameter ", names[i], " is not a dense floating-point tensor on ",
                     parameters[0].device(), ", as the first one is");
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
                                       const std::vector<std::string>& names, bool device_codec)
    : group_(backend->group()),
      inner_(backend->inner()),
      site_(backend->site()),
      operations_(backend->operations()),
      parameters_(std::move(parameters)),
      device_(parameters_.empty() ? at::Device(at::kCPU) : parameters_[0].device()),
      exchange_(group_, specs(parameters_, names),
                device_codec || !device_.is_cpu()
                    ? device_codecs(device_)
                    : plugins::CodecFactory(plugins::make_host_codec)),
      training_(parameters_.size(), 1) {}

void ModuleSynchroniser::attach(const std::shared_ptr<ModuleSynchroniser>& synchroniser,
                                const std::shared_ptr<c10d::Reducer>& reducer) {
  reducer->register_comm_hook(std::make_unique<CommHook>(synchroniser));
}

template <typename Use>
void ModuleSynchroniser::with_views(Use&& use, bool writes) {
  const PlainArithmetic plain;
  std::vector<plugins::TensorView> views;
  std::vector<std::pair<at::Tensor, at::Tensor>>
      copies;  // parameters that do not lie in logical order, and their copies
  views.reserve(parameters_.size());
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor& parameter = parameters_[i];
    const auto type = codec_type(parameter.scalar_type());
    const auto& spec = exchange_.tensors()[i];
    TORCH_CHECK(
        type && parameter.device() == device_ && parameter.sizes() == c10::IntArrayRef(spec.shape),
        "parameter ", spec.name,
        " has changed its type, device or shape since the module was wrapped; wrap it again");
    at::Tensor memory = parameter.detach();
    if (!memory.is_contiguous()) {
      memory = memory.contiguous();
      copies.emplace_back(parameter, memory);
    }
    views.push_back(view_of(memory));
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
  return *normalises_ ? group_->sites().gain() : 1.0F;
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
  check_own_weights("a training forward");
  together("the exchange of weights", [&] {
    InnerCollectives exact(inner_, group_, device_);
    if (!reason_exact_.empty() && (backward_done_ || !exchange_.begun())) {
      with_views([&](exchange::WeightsExchange::Views views) {
        exchange_.stay_exact(views, exact, reason_exact_);
      });
      exact_ = true;
      return;
    }
    if (!exchange_.begun()) {
      with_views([&](exchange::WeightsExchange::Views views) { exchange_.begin(views, exact); });
    }
    heed_edit();
    if (backward_done_) {
      heed_training();
      RECORD_FUNCTION("distro:exchange",
                      std::vector<c10::IValue>(parameters_.begin(), parameters_.end()));
      with_views(
          [&](exchange::WeightsExchange::Views views) { exchange_.sync(views, exact, gain()); });
      backward_done_ =
          false;  // only now: after an error the next forward meets the same error again
    }
  });
}

void ModuleSynchroniser::take_site(std::optional<bool> joined) {
  if (exact_ || !site_ || (!joined && !apart_)) {
    return;
  }
  together("the weights of the site under join()", [&] {
    const auto members = group_->sites().site_of(group_->rank());
    const auto own = std::ranges::find(members, group_->rank()) - members.begin();
    const bool without_data = joined.value_or(false);
    // Largest over the site: the last that has data, whether one has none, which optimizer it is.
    std::vector<at::Tensor> largest = {
        at::tensor({without_data ? std::int64_t{-1} : std::int64_t{own}, std::int64_t{without_data},
                    normalises_ ? std::int64_t{*normalises_} : std::int64_t{-1}})};
    c10d::AllreduceOptions options;
    options.reduceOp = c10d::ReduceOp::MAX;
    (*site_)->allreduce(largest, options)->wait();
    const auto* const of_site = largest[0].const_data_ptr<std::int64_t>();
    if (!normalises_ && of_site[2] >= 0) {
      normalises_ = of_site[2] > 0;
    }
    // Where none has data any more the one that had some last has stepped last.
    const auto source = of_site[0] >= 0 ? of_site[0] : last_with_data_;
    last_with_data_ = of_site[0];
    note_apart(of_site[0] >= 0 && of_site[1] > 0);
    if (!apart_ || source < 0) {
      return;
    }
    c10d::BroadcastOptions from;
    from.rootRank = source;
    with_views([&](exchange::WeightsExchange::Views views) {
      for (const auto& view : views) {
        std::vector<at::Tensor> weights = {tensor_of(view, device_)};
        (*site_)->broadcast(weights, from)->wait();
        group_->counters().site_bytes.fetch_add(weights[0].nbytes(), std::memory_order_relaxed);
      }
    });
  });
}

void ModuleSynchroniser::note_apart(bool some_without_data) {
  if (!some_without_data || std::exchange(apart_, true)) {
    return;
  }
  const auto& sites = group_->sites();
  if (sites.leads(group_->rank())) {
    group_->log(transport::LogLevel::warning,
                fmt::format("module {}: ranks of {} ran out of data at different steps, and their "
                            "optimizers differ from then on: at each exchange all of them take the "
                            "weights of one.",
                            exchange_.ordinal(), sites.name(sites.participant_of(group_->rank()))));
  }
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

std::uint64_t ModuleSynchroniser::fingerprint() const {
  const at::NoGradGuard no_grad;
  std::uint64_t hash = 0;
  for (const auto& parameter : parameters_) {
    const at::Tensor host = parameter.detach().cpu().contiguous();
    hash = XXH3_64bits_withSeed(host.const_data_ptr(), host.nbytes(), hash);
  }
  return hash;
}

void ModuleSynchroniser::before_edit() {
  if (exchange_.begun() && !before_edit_) {
    before_edit_ = fingerprint();
  }
}

void ModuleSynchroniser::after_edit() {
  if (!before_edit_) {
    exchange_.mark();
  }
}

void ModuleSynchroniser::heed_edit() {
  if (before_edit_ && fingerprint() != *before_edit_) {
    exchange_.mark();
  }
  before_edit_.reset();
}

void ModuleSynchroniser::stay_exact(const std::string& reason) { reason_exact_ = reason; }

void ModuleSynchroniser::watch_frozen(std::vector<at::Tensor> parameters,
                                      std::vector<std::string> names) {
  frozen_ = std::move(parameters);
  frozen_names_ = std::move(names);
}

// On autograd's thread, between two sync points.
void ModuleSynchroniser::note_training() {
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const char training = parameters_[i].requires_grad() ? 1 : 0;
    if (training < training_[i]) {
      newly_frozen_ = true;
    }
    training_[i] = training;
  }
  for (std::size_t i = 0; i < frozen_.size(); ++i) {
    if (frozen_[i].requires_grad()) {
      thawed_ = static_cast<std::ptrdiff_t>(i);
      break;
    }
  }
}

// A frozen parameter is to rest, but its residual would go on to be sent, and the other ranks' to
// be added. After the mean of all ranks there is no residual.
void ModuleSynchroniser::heed_training() {
  if (newly_frozen_.exchange(false)) {
    group_->log(transport::LogLevel::info,
                fmt::format("module {}: parameters were frozen; all ranks take the mean of their "
                            "weights once, after which these rest.",
                            exchange_.ordinal()));
    exchange_.mark();
  }
  if (const auto index = thawed_.load(); index >= 0 && !warned_thawed_) {
    warned_thawed_ = true;
    group_->log(
        transport::LogLevel::warning,
        fmt::format("module {}: parameter {} was frozen when the module was wrapped and is trained "
                    "now. Neither DistributedDataParallel nor distro shares it: each rank trains "
                    "its own. Wrap the model again after changing requires_grad.",
                    exchange_.ordinal(), frozen_names_[static_cast<std::size_t>(index)]));
  }
}

void ModuleSynchroniser::average() {
  check_own_weights("torch_distro.average()");
  together("average()", [&] {
    InnerCollectives exact(inner_, group_, device_);
    with_views([&](exchange::WeightsExchange::Views views) {
      if (exact_) {
        exact.mean(views);
      } else {
        exchange_.average(views, exact);
      }
    });
  });
  backward_done_ = false;
  before_edit_.reset();
}

c10::intrusive_ptr<c10::ivalue::Future> ModuleSynchroniser::on_bucket(c10d::GradBucket& bucket) {
  at::Tensor& buffer = bucket.getBufferRef();
  if (exact_) {
    return exact_mean_of_bucket(buffer, group_, inner_, operations_)->getFuture();
  }
  group_->counters().reductions.fetch_add(1, std::memory_order_relaxed);
  if (bucket.isLast()) {
    note_training();
    backward_done_ = true;
  }
  if (site_) {
    const auto ticket =
        operations_->begin("all_reduce", /*point_to_point=*/false, bytes_of(buffer));
    return exact_mean_in_site(buffer, group_, *site_, operations_, ticket)->getFuture();
  }
  auto future = c10::make_intrusive<c10::ivalue::Future>(
      c10::ListType::create(c10::TensorType::get()), devices_of({buffer}));
  future->markCompleted(c10::IValue(std::vector<at::Tensor>{buffer}));
  return future;
}

bool ModuleSynchroniser::take(at::Tensor& gradient, const c10d::ReduceOp& op) {
  if (exact_) {
    return false;
  }
  as_if_reduced(gradient, op, group_->world_size());
  group_->counters().reductions.fetch_add(1, std::memory_order_relaxed);
  backward_done_ = true;
  return true;
}

void ModuleSynchroniser::check_own_weights(const char* what) const {
  TORCH_CHECK(!own_, "rank ", group_->rank(), ": ", what,
              " inside `with torch_distro.reference(module)`, where the module's weights are not "
              "the rank's own; leave it first");
}

void ModuleSynchroniser::show_reference() {
  check_own_weights("torch_distro.reference()");
  own_.emplace();
  if (exact_ || !exchange_.begun()) {
    return;
  }
  for (const auto& parameter : parameters_) {
    own_->push_back(parameter.detach().clone());
  }
  with_views([&](exchange::WeightsExchange::Views views) { exchange_.show_reference(views); });
}

void ModuleSynchroniser::hide_reference() {
  TORCH_CHECK(own_, "rank ", group_->rank(), ": there is no reference to hide");
  for (std::size_t i = 0; i < own_->size(); ++i) {
    parameters_[i].detach().copy_((*own_)[i]);
    parameters_[i].unsafeGetTensorImpl()->bump_version();
  }
  own_.reset();
}

exchange::ModuleState ModuleSynchroniser::state() {
  check_own_weights("torch_distro.state_dict()");
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
