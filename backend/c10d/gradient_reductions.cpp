#include "backend/c10d/gradient_reductions.h"

#include <fmt/format.h>

#include <utility>

#include "backend/c10d/errors.h"
#include "backend/c10d/recognition.h"
#include "backend/c10d/reduction.h"
#include "backend/c10d/reduction_work.h"
#include "backend/c10d/tensors.h"
#include "backend/exchange/reductions.h"

namespace distro::c10d_backend {
namespace {

// Memory without a structure that is known.
exchange::TensorSpec flat_spec(const at::Tensor& tensor) {
  return {"flat", *codec_type(tensor.scalar_type()), {tensor.numel()}};
}

}  // namespace

GradientReductions::GradientReductions(std::shared_ptr<exchange::Group> group, InnerBackend ordered,
                                       std::shared_ptr<Operations> operations)
    : group_(std::move(group)),
      ordered_(std::move(ordered)),
      operations_(std::move(operations)),
      residuals_(std::make_shared<ResidualTable>()) {}

// The callbacks run on the engine's thread, which the group joins before it goes: they borrow the
// group, for whoever holds it there last would wait for itself.
void GradientReductions::submit(const c10::intrusive_ptr<ReductionWork>& work,
                                exchange::Reduction reduction) {
  reduction.complete = [work, group = group_.get()](const std::exception_ptr& error) {
    work->complete(error ? translated(*group, work->name(), error) : nullptr);
  };
  group_->reductions()->submit(std::move(reduction));
}

void GradientReductions::count_exact(const at::Tensor& input) {
  group_->counters().exact.fetch_add(1, std::memory_order_relaxed);
  group_->counters().exact_bytes.fetch_add(input.nbytes(), std::memory_order_relaxed);
}

void GradientReductions::recognise(exchange::Reduction& reduction, std::size_t inputs,
                                   std::size_t elements) {
  const auto place = recognises_ ? gradient_place() : std::nullopt;
  if (place) {
    auto [slot, own] = residuals_->own(*place, inputs, elements);
    reduction.slot = slot;
    reduction.residuals = [own = std::move(own)](std::uint32_t) { return own; };
    return;
  }
  reduction.exact = true;
  reduction.residuals = [table = residuals_, inputs, elements](std::uint32_t slot) {
    return table->adopted(slot, inputs, elements);
  };
}

bool GradientReductions::takes(const std::vector<at::Tensor>& tensors,
                               const c10d::AllreduceOptions& options) const {
  return tensors.size() == 1 &&
         is_candidate(tensors[0], options.reduceOp, group_->options().min_elements);
}

c10::intrusive_ptr<c10d::Work> GradientReductions::allreduce(const std::vector<at::Tensor>& tensors,
                                                             const c10d::AllreduceOptions& options,
                                                             const Operations::Ticket& ticket) {
  const at::Tensor& tensor = tensors[0];
  exchange::Reduction reduction;
  reduction.what = "all-reduce " + text_of(options.reduceOp);
  reduction.tensors = {flat_spec(tensor)};
  reduction.input = reduction.output = {view_of(memory_of(tensor))};
  reduction.weight = weight_of(options.reduceOp, group_->world_size());
  recognise(reduction, 1, static_cast<std::size_t>(tensor.numel()));
  auto work = c10::make_intrusive<ReductionWork>(group_->rank(), c10d::OpType::ALLREDUCE,
                                                 "distro:all_reduce", tensors, operations_, ticket);
  reduction.run_exact = [this, work, tensors, options, group = group_.get()] {
    count_exact(tensors[0]);
    const Reduction exact(options.reduceOp, group->world_size());
    auto inner_options = options;
    inner_options.reduceOp = exact.inner_op();
    auto reduced = exact.prepare(tensors);
    const auto inner = ordered_->allreduce(reduced, inner_options);
    // Runs on Gloo's thread, at the latest while the ordered backend is destroyed.
    inner->getFuture()->addCallback(
        [work, group, conclude = exact.conclude(reduced, tensors)](c10::ivalue::Future& done) {
          if (done.hasError()) {
            return work->complete(translated(*group, work->name(), done.exception_ptr()));
          }
          if (conclude) {
            conclude();
          }
          work->complete(nullptr);
        });
  };
  submit(work, std::move(reduction));
  return work;
}

bool GradientReductions::takes(const at::Tensor& output, const at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) const {
  const auto& settings = group_->options();
  return settings.compress_reduce_scatter &&
         is_candidate(input, options.reduceOp, settings.min_elements) && input.is_contiguous() &&
         is_candidate(output, options.reduceOp, 0) && output.is_contiguous() &&
         input.scalar_type() == output.scalar_type() &&
         input.numel() == group_->world_size() * output.numel();
}

c10::intrusive_ptr<c10d::Work> GradientReductions::reduce_scatter(
    const at::Tensor& output, const at::Tensor& input, const c10d::ReduceScatterOptions& options,
    const Operations::Ticket& ticket) {
  exchange::Reduction reduction;
  reduction.what = "reduce-scatter " + text_of(options.reduceOp);
  reduction.scatter = true;
  reduction.tensors = {flat_spec(output)};
  for (const at::Tensor& slice : input.view({group_->world_size(), -1}).unbind()) {
    reduction.input.push_back(view_of(slice));
  }
  reduction.output = {view_of(output)};
  reduction.weight = weight_of(options.reduceOp, group_->world_size());
  recognise(reduction, reduction.input.size(), static_cast<std::size_t>(output.numel()));
  auto work = c10::make_intrusive<ReductionWork>(
      group_->rank(), c10d::OpType::_REDUCE_SCATTER_BASE, "distro:_reduce_scatter_base",
      std::vector<at::Tensor>{output}, operations_, ticket);
  reduction.run_exact = [this, work, input, output, options, group = group_.get()] {
    count_exact(input);
    const Reduction exact(options.reduceOp, group_->world_size());
    auto inner_options = options;
    inner_options.reduceOp = exact.inner_op();
    auto prepared = exact.prepare({input});
    auto reduced = exact.receive({output});
    // Gloo's has no future, so that the engine waits.
    const auto inner = ordered_->_reduce_scatter_base(reduced[0], prepared[0], inner_options);
    try {
      inner->wait();
    } catch (const std::exception&) {  // whoever is to blame, it is not this rank's own error
      return work->complete(translated(*group, work->name(), std::current_exception()));
    }
    if (const auto conclude = exact.conclude(reduced, {output})) {
      conclude();
    }
    work->complete(nullptr);
  };
  submit(work, std::move(reduction));
  return work;
}

c10::intrusive_ptr<c10d::Work> GradientReductions::mean(const at::Tensor& buffer,
                                                        std::vector<exchange::TensorSpec> tensors,
                                                        const std::vector<at::Tensor>& gradients,
                                                        Residuals residuals) {
  exchange::Reduction reduction;
  reduction.what = "mean of a gradient bucket";
  reduction.tensors = std::move(tensors);
  for (const auto& gradient : gradients) {
    reduction.input.push_back(view_of(memory_of(gradient)));
  }
  reduction.output = reduction.input;
  reduction.weight = 1.0F / static_cast<float>(group_->world_size());
  reduction.residuals = [own = std::move(residuals)](std::uint32_t) { return own; };
  const auto ticket =
      operations_->begin("gradient_bucket", /*point_to_point=*/false, buffer.nbytes());
  auto work = c10::make_intrusive<ReductionWork>(
      group_->rank(), c10d::OpType::ALLREDUCE, "distro:gradient_bucket",
      std::vector<at::Tensor>{buffer}, operations_, ticket);
  submit(work, std::move(reduction));
  return work;
}

void GradientReductions::stop_recognising(const std::string& reason) {
  if (recognises_.exchange(false)) {
    group_->log(transport::LogLevel::warning,
                fmt::format("all-reduces inside backward are exact from now on ({})", reason));
  }
}

void GradientReductions::abort() { ordered_->abort(); }

void GradientReductions::set_timeout(std::chrono::milliseconds timeout) {
  ordered_->setTimeout(timeout);
}

}  // namespace distro::c10d_backend
