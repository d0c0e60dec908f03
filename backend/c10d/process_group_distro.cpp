#include "backend/c10d/process_group_distro.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <string_view>
#include <torch/csrc/distributed/c10d/ParamCommsUtils.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <utility>

#include "backend/c10d/python_lock.h"
#include "backend/c10d/tensors.h"

namespace distro::c10d_backend {
namespace {

// The name without the backend's: "all_reduce" of "distro:all_reduce".
const char* name_of(const char* title) { return title + std::string_view("distro:").size(); }

std::size_t bytes_of_all(const std::vector<at::Tensor>& tensors) {
  std::size_t bytes = 0;
  for (const auto& tensor : tensors) {
    bytes += bytes_of(tensor);
  }
  return bytes;
}

std::int64_t elements_of(const std::vector<at::Tensor>& tensors) {
  std::int64_t elements = 0;
  for (const auto& tensor : tensors) {
    elements += tensor.numel();
  }
  return elements;
}

// Ranks in the world as first and stride, which is how the profiler wants them; a stride of 0: not
// evenly spaced, or one rank.
std::pair<int, int> spacing(const std::vector<std::uint64_t>& ranks) {
  if (ranks.empty()) {
    return {0, 1};  // the world
  }
  const auto first = static_cast<int>(ranks.front());
  const int stride = ranks.size() > 1 ? static_cast<int>(ranks[1]) - first : 0;
  for (std::size_t i = 1; i < ranks.size(); ++i) {
    if (static_cast<int>(ranks[i]) - static_cast<int>(ranks[i - 1]) != stride) {
      return {first, 0};
    }
  }
  return {first, stride};
}

}  // namespace

ProcessGroupDistro::ProcessGroupDistro(std::shared_ptr<exchange::Group> group, InnerBackend inner,
                                       const std::optional<InnerBackend>& ordered,
                                       std::optional<InnerBackend> site,
                                       c10::intrusive_ptr<Options> options, MakeChild make_child)
    : Backend(group->rank(), group->world_size()),
      group_(std::move(group)),
      inner_(std::move(inner)),
      site_(std::move(site)),
      options_(std::move(options)),
      make_child_(std::move(make_child)),
      operations_(std::make_shared<Operations>()),
      gradients_(ordered && group_->reductions() != nullptr
                     ? std::make_shared<GradientReductions>(group_, *ordered, operations_)
                     : nullptr),
      last_split_(c10::intrusive_ptr<c10d::Backend>()) {
  init();
  group_->on_close([backend = inner_, ordered, of_site = site_] {
    backend.release();
    for (const auto& other : {ordered, of_site}) {
      if (other) {
        other->release();
      }
    }
  });
  observe_failures();
}

// The first error from which the group does not recover: what led to it goes to the log, and
// torch's flight recorder writes its trace. Later errors follow from it.
void ProcessGroupDistro::observe_failures() {
  group_->observe_failure([group = group_.get(), operations = operations_,
                           failed = std::make_shared<std::atomic<bool>>(false)](std::string_view) {
    if (failed->exchange(true)) {
      return;
    }
    group->log(transport::LogLevel::error,
               fmt::format("this process group cannot go on; its last operations, oldest first: {}",
                           operations->text()));
    operations->run_abort_hooks();
  });
}

ProcessGroupDistro::~ProcessGroupDistro() {
  const WithoutPythonLock without_lock;  // closing may wait for peers
  group_->close();
}

c10::intrusive_ptr<c10d::Work> ProcessGroupDistro::recorded(
    c10d::OpType operation, const char* title, const std::vector<at::Tensor>& inputs,
    const std::vector<at::Tensor>& outputs,
    const std::function<c10::intrusive_ptr<c10d::Work>(const Operations::Ticket&)>& start) {
  const bool point_to_point = c10d::isP2POp(operation);
  const auto ticket = operations_->begin(name_of(title), point_to_point, bytes_of_all(inputs));
  const auto [first, stride] = spacing(options_->global_ranks_in_group);
  RECORD_PARAM_COMMS_DATA(
      std::make_tuple(static_cast<std::int64_t>(ticket.sequence), point_to_point),
      std::make_tuple(getGroupUid(), getGroupDesc()), inputs, outputs, getRank(), name_of(title),
      elements_of(inputs), elements_of(outputs),
      inputs.empty() ? at::kByte : inputs.front().scalar_type(), std::vector<std::int64_t>(),
      std::vector<std::int64_t>(), first, stride, getSize());
  return start(ticket);
}

c10::intrusive_ptr<c10d::Work> ProcessGroupDistro::exact(c10d::OpType operation, const char* title,
                                                         std::vector<at::Tensor> inputs,
                                                         std::vector<at::Tensor> outputs,
                                                         const ExactWork::Start& start,
                                                         std::function<void()> last_act) {
  std::call_once(described_, [this] { inner_->setGroupDesc(getGroupDesc()); });
  group_->counters().exact.fetch_add(1, std::memory_order_relaxed);
  group_->counters().exact_bytes.fetch_add(bytes_of_all(inputs), std::memory_order_relaxed);
  return recorded(operation, title, inputs, outputs, [&](const Operations::Ticket& ticket) {
    return c10::make_intrusive<ExactWork>(
        ExactWork::Call{operation, title, std::move(inputs), std::move(outputs), ticket}, group_,
        operations_, start, std::move(last_act));
  });
}

void ProcessGroupDistro::monitoredBarrier(const c10d::BarrierOptions& options,
                                          bool wait_all_ranks) {
  // Its own errors name the ranks that did not come.
  inner_->monitoredBarrier(options, wait_all_ranks);
}

void ProcessGroupDistro::setGroupUid(const std::string& uid) {
  Backend::setGroupUid(uid);
  inner_->setGroupUid(uid);
  options_->group_name = uid;
}

void ProcessGroupDistro::hand_replicas_to(std::shared_ptr<ReplicaGradients> replicas) {
  const std::lock_guard lock(replicas_mutex_);
  replicas_ = std::move(replicas);
}

std::shared_ptr<ReplicaGradients> ProcessGroupDistro::replicas() {
  const std::lock_guard lock(replicas_mutex_);
  return replicas_;
}

void ProcessGroupDistro::setTimeout(std::chrono::milliseconds timeout) {
  group_->set_timeout(timeout);
  inner_->setTimeout(timeout);
  if (site_) {
    (*site_)->setTimeout(timeout);
  }
  if (gradients_) {
    gradients_->set_timeout(timeout);
  }
  options_->timeout = timeout;
}

c10::intrusive_ptr<c10d::Backend> ProcessGroupDistro::split(
    const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
    const c10::intrusive_ptr<c10d::Backend::Options>& options) {
  const auto own = std::ranges::find(ranks, getRank());
  if (own == ranks.end()) {
    return nullptr;  // nothing to tell the members, which meet in the store
  }
  TORCH_CHECK_VALUE(options && !options->group_name.empty(),
                    "a group that is split off needs options with a group_name that no other has");
  const std::lock_guard lock(split_mutex_);
  // torch asks once for each device type; one object serves them all.
  if (auto made = last_split_.lock(); made && options->group_name == last_split_name_) {
    return made;
  }
  auto child = c10::make_intrusive<Options>(*options_);
  child->timeout = options->timeout;
  child->group_name = options->group_name;
  child->global_ranks_in_group.clear();
  for (const int rank : ranks) {
    const auto index = static_cast<std::size_t>(rank);
    child->global_ranks_in_group.push_back(options_->global_ranks_in_group.empty()
                                               ? static_cast<std::uint64_t>(rank)
                                               : options_->global_ranks_in_group.at(index));
  }
  auto made =
      make_child_(c10::make_intrusive<c10d::PrefixStore>(
                      fmt::format("distro/split/{}", options->group_name), store),
                  static_cast<int>(own - ranks.begin()), static_cast<int>(ranks.size()), child);
  last_split_ = made;
  last_split_name_ = options->group_name;
  return made;
}

void ProcessGroupDistro::shutdown() {
  const WithoutPythonLock without_lock;
  group_->close();
}

void ProcessGroupDistro::abort() {
  operations_->run_abort_hooks();
  group_->abort(getRank(), fmt::format("rank {} has aborted its process group", getRank()));
  inner_->abort();
  if (site_) {
    (*site_)->abort();
  }
  if (gradients_) {
    gradients_->abort();
  }
}

}  // namespace distro::c10d_backend
