#include <fmt/format.h>
#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "backend/c10d/capabilities.h"
#include "backend/c10d/device_dispatch.h"
#include "backend/c10d/errors.h"
#include "backend/c10d/interpreter_end.h"
#include "backend/c10d/module_gradients.h"
#include "backend/c10d/module_synchroniser.h"
#include "backend/c10d/process_group_distro.h"
#include "backend/c10d/store.h"
#include "backend/c10d/transport_backend.h"
#include "backend/exchange/group.h"
#include "backend/exchange/stats_path.h"
#include "bindings/codec.h"

namespace py = pybind11;

namespace {

using distro::c10d_backend::DeviceDispatch;
using distro::c10d_backend::InnerBackend;
using distro::c10d_backend::ModuleGradients;
using distro::c10d_backend::ModuleSynchroniser;
using distro::c10d_backend::ProcessGroupDistro;
using distro::c10d_backend::TransportBackend;
using BackendOptions = ProcessGroupDistro::Options;
using distro::exchange::Group;
using distro::exchange::StringMap;

double seconds(std::uint64_t nanoseconds) { return static_cast<double>(nanoseconds) * 1e-9; }

// The counters of a group, under the names of the public contract.
py::dict stats(Group& group) {
  const auto& counters = group.counters();
  const auto channel = group.channel_counters();
  py::dict result;
  result["rank"] = group.rank();
  result["world_size"] = group.world_size();
  result["mode"] = distro::exchange::name_of(group.options().mode);
  result["participants"] = group.sites().participants();
  result["exchanges"] = counters.exchanges.load();
  result["reductions"] = counters.reductions.load();
  result["exact"] = counters.exact.load();
  result["gradient_bytes"] = counters.gradient_bytes.load();
  result["payload_bytes_sent"] = counters.payload_bytes_sent.load();
  result["payload_bytes_received"] = counters.payload_bytes_received.load();
  result["socket_bytes_sent"] = channel.socket_bytes_sent;
  result["socket_bytes_received"] = channel.socket_bytes_received;
  result["exact_bytes"] = counters.exact_bytes.load();
  result["site_bytes"] = counters.site_bytes.load();
  result["encode_seconds"] = seconds(counters.encode_nanoseconds);
  result["decode_seconds"] = seconds(counters.decode_nanoseconds);
  result["wait_seconds"] = seconds(counters.wait_nanoseconds);
  result["resent_frames"] = channel.resent_frames;
  result["reconnects"] = channel.reconnects;
  result["rejected_frames"] = channel.rejected_frames;
  result["rejected_connections"] = channel.rejected_connections;
  result["resyncs"] = counters.resyncs.load();
  result["orphaned_records"] = counters.orphaned_records.load();
  result["reference_checksum"] = counters.reference_checksum.load();
  return result;
}

at::Tensor tensor_of(const std::vector<float>& values) {
  return at::from_blob(const_cast<float*>(values.data()),
                       {static_cast<std::int64_t>(values.size())}, at::kFloat)
      .clone();
}

std::vector<float> values_of(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.detach().to(at::kCPU, at::kFloat).contiguous();
  const auto* data = flat.const_data_ptr<float>();
  return {data, data + flat.numel()};
}

// reference, residual: flat fp32 tensors by parameter, pending too where a gain was spread;
// exchanges; share; mean_at.
py::dict state_of(ModuleSynchroniser& synchroniser) {
  distro::exchange::ModuleState state;
  {
    const py::gil_scoped_release release;
    state = synchroniser.state();
  }
  py::dict result;
  std::vector<at::Tensor> reference;
  std::vector<at::Tensor> residual;
  std::vector<at::Tensor> pending;
  for (std::size_t i = 0; i < state.reference.size(); ++i) {
    reference.push_back(tensor_of(state.reference[i]));
    residual.push_back(tensor_of(state.residual[i]));
    pending.push_back(tensor_of(state.pending[i]));
  }
  result["reference"] = reference;
  result["residual"] = residual;
  if (std::ranges::any_of(pending, [](const auto& tensor) { return tensor.numel() > 0; })) {
    result["pending"] = pending;
  }
  result["exchanges"] = state.exchanges;
  result["share"] = state.share;
  result["mean_at"] = state.mean_at;
  return result;
}

void load(ModuleSynchroniser& synchroniser, const std::vector<at::Tensor>& reference,
          const std::vector<at::Tensor>& residual, const std::vector<at::Tensor>& pending,
          std::uint64_t exchanges, float share, std::uint64_t mean_at) {
  distro::exchange::ModuleState state{{}, {}, {}, exchanges, share, mean_at};
  for (const auto& tensor : reference) {
    state.reference.push_back(values_of(tensor));
  }
  for (const auto& tensor : residual) {
    state.residual.push_back(values_of(tensor));
  }
  for (const auto& tensor : pending) {
    state.pending.push_back(values_of(tensor));
  }
  synchroniser.load(state);
}

std::shared_ptr<Group> join(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world_size,
                            std::chrono::milliseconds timeout, const StringMap& overrides,
                            const std::vector<std::string>& devices,
                            const std::vector<int>& world_ranks) {
  distro::c10d_backend::C10dStore blobs(store, timeout);
  const distro::exchange::Identity identity{
      rank, world_size, timeout, distro::c10d_backend::route_to(store), devices, world_ranks};
  try {
    const auto options =
        distro::exchange::resolve_options(distro::exchange::distro_environment(), overrides);
    distro::exchange::check_stats_path(options.stats_path);
    return Group::join(identity, options, blobs);
  } catch (const distro::exchange::OptionError& error) {
    if (world_size > 1) {
      distro::exchange::decline(blobs, identity, error.what());
    }
    throw;
  } catch (const distro::transport::TransportError& error) {
    C10_THROW_ERROR(DistBackendError, error.what());
  } catch (const distro::exchange::ExchangeError& error) {
    C10_THROW_ERROR(DistBackendError, error.what());
  }
}

// The backend of a group that is split off is made as every other is: in Python, where torch lets
// the inner one be made.
c10::intrusive_ptr<c10d::Backend> make_child(const c10::intrusive_ptr<c10d::Store>& store, int rank,
                                             int size,
                                             const c10::intrusive_ptr<BackendOptions>& options) {
  const py::gil_scoped_acquire lock;
  return py::module_::import("torch_distro._backend")
      .attr("make")(store, rank, size, options)
      .cast<c10::intrusive_ptr<c10d::Backend>>();
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "C++ side of torch_distro, built for one torch minor.";

  py::register_exception<distro::exchange::OptionError>(module, "OptionError", PyExc_ValueError);

  using release_gil = py::call_guard<py::gil_scoped_release>;

  module.def("begin_interpreter_end", &distro::c10d_backend::begin_interpreter_end,
             "To be called at exit, before the groups are closed.");
  module.def(
      "check_options",
      [](const StringMap& environment, const StringMap& overrides) {
        return distro::exchange::resolve_options(environment, overrides).agreed();
      },
      py::arg("environment"), py::arg("overrides"),
      "Resolve options without a group; raises OptionError. Returns those that all ranks must "
      "share.");

  module.def(
      "check_keys",
      [](const std::string& secret_file, const std::string& peers_file) {
        try {
          const auto peers = distro::transport::read_peers_file(peers_file);
          const auto own = distro::transport::read_secret_file(secret_file);
          std::string owner;
          for (const auto& [rank, entry] : peers.ranks) {
            owner = entry.public_key == own.public_key ? fmt::format("rank {}", rank) : owner;
          }
          return py::make_tuple(owner, peers.ranks.size());
        } catch (const distro::transport::ConfigError& error) {
          throw py::value_error(error.what());
        }
      },
      py::arg("secret_file"), py::arg("peers_file"),
      "Whose line of the peers file has the public key of this secret one (text; empty: nobody's), "
      "and how many ranks the file has. Raises ValueError.");

  module.def(
      "instruction_set",
      [] {
        static constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};
        return kNames[static_cast<std::size_t>(distro::kernels::best_isa())];
      },
      "Name of the best instruction set of this CPU that the kernels have.");

  py::class_<Group, std::shared_ptr<Group>>(module, "Group",
                                            "One process group of this rank: channel and counters.")
      .def_property_readonly("rank", &Group::rank)
      .def_property_readonly("world_size", &Group::world_size)
      .def_property_readonly("bind_address", &Group::bind_address)
      .def_property_readonly("round", &Group::round)
      .def_property_readonly("own_devices", &Group::own_devices)
      .def_property_readonly("site_own_devices", &Group::site_own_devices)
      .def_property_readonly(
          "sites",
          [](const Group& group) {
            std::vector<std::vector<int>> sites;
            for (int participant = 0; participant < group.sites().participants(); ++participant) {
              const auto members = group.sites().members(participant);
              sites.emplace_back(members.begin(), members.end());
            }
            return sites;
          },
          "Ranks by participant: those that act as one.")
      .def_property_readonly(
          "has_keys", [](const Group& group) { return group.options().has_keys(); },
          "The group's channel is encrypted.")
      .def_property_readonly(
          "own_transport", [](const Group& group) { return group.options().own_transport(); },
          "Exact collectives run over the group's own transport: by TransportBackend.")
      .def_property_readonly("closed", &Group::closed)
      .def_property_readonly("stats_path",
                             [](const Group& group) { return group.options().stats_path; })
      .def_property_readonly(
          "mode",
          [](const Group& group) { return distro::exchange::name_of(group.options().mode); })
      .def_property_readonly("transform",
                             [](const Group& group) {
                               const bool dct =
                                   group.options().transform == distro::plugins::Transform::dct;
                               return dct ? "dct" : "none";
                             })
      .def_property_readonly("exchanges_gradients",
                             [](Group& group) { return group.reductions() != nullptr; })
      .def("stats", &stats)
      .def("log",
           [](const Group& group, const std::string& level, const std::string& message) {
             using distro::transport::LogLevel;
             group.log(level == "warning" ? LogLevel::warning : LogLevel::info, message);
           })
      .def("close", &Group::close, release_gil())
      .def("leave", &Group::leave, py::arg("reason"), release_gil(),
           "Close because this rank has failed: the others are told why.")
      .def(
          "fail",
          [](Group& group, const std::string& operation, const std::string& reason) {
            distro::c10d_backend::fail_inner(group, operation, reason);
          },
          py::arg("operation"), py::arg("reason"), release_gil(),
          "Raise DistBackendError for a failure of the inner backend, naming the rank to blame.");

  module.def(
      "join", &join, py::arg("store"), py::arg("rank"), py::arg("world_size"), py::arg("timeout"),
      py::arg("overrides"), py::arg("devices") = std::vector<std::string>(),
      py::arg("world_ranks") = std::vector<int>(), release_gil(),
      "Meet the other ranks in the store. `world_ranks`: ranks in the world by rank of the group; "
      "empty: the same. Raises OptionError, torch.distributed.DistBackendError.");

  py::class_<BackendOptions, c10d::Backend::Options, c10::intrusive_ptr<BackendOptions>>(
      module, "BackendOptions", "What a group was made with, so that one like it can be split off.")
      .def(py::init([](std::chrono::milliseconds timeout, StringMap overrides,
                       std::vector<std::uint64_t> global_ranks) {
             auto options = c10::make_intrusive<BackendOptions>(timeout);
             options->overrides = std::move(overrides);
             options->global_ranks_in_group = std::move(global_ranks);
             return options;
           }),
           py::arg("timeout"), py::arg("overrides"), py::arg("global_ranks"))
      .def_readonly("overrides", &BackendOptions::overrides)
      .def("__deepcopy__", [](const BackendOptions& options, const py::dict&) {
        return c10::make_intrusive<BackendOptions>(options);
      });

  py::dict inherited;
  for (const auto& member : distro::c10d_backend::kInheritedMembers) {
    inherited[member.name] = member.reason;
  }
  module.attr("INHERITED_MEMBERS") = inherited;

  py::class_<DeviceDispatch, c10d::Backend, c10::intrusive_ptr<DeviceDispatch>>(module,
                                                                                "DeviceDispatch")
      .def(py::init([](const c10::intrusive_ptr<c10d::Backend>& host,
                       DeviceDispatch::MakeBackend make_device, bool stage_host) {
             return c10::make_intrusive<DeviceDispatch>(distro::c10d_backend::share(host),
                                                        std::move(make_device), stage_host);
           }),
           py::arg("host"), py::arg("make_device") = py::none(), py::arg("stage_host") = false);

  py::class_<TransportBackend, c10d::Backend, c10::intrusive_ptr<TransportBackend>>(
      module, "TransportBackend")
      .def(py::init<std::shared_ptr<Group>, std::chrono::milliseconds, std::uint32_t,
                    std::vector<int>>(),
           py::arg("group"), py::arg("timeout"), py::arg("stream"), py::arg("members"),
           release_gil());

  py::class_<ProcessGroupDistro, c10d::Backend, c10::intrusive_ptr<ProcessGroupDistro>>(
      module, "ProcessGroupDistro")
      .def(py::init([](std::shared_ptr<Group> group, const c10::intrusive_ptr<c10d::Backend>& inner,
                       const c10::intrusive_ptr<c10d::Backend>& ordered,
                       const c10::intrusive_ptr<c10d::Backend>& site,
                       c10::intrusive_ptr<BackendOptions> options) {
             return c10::make_intrusive<ProcessGroupDistro>(
                 std::move(group), InnerBackend(inner),
                 ordered ? std::optional<InnerBackend>(ordered) : std::nullopt,
                 site ? std::optional<InnerBackend>(site) : std::nullopt, std::move(options),
                 &make_child);
           }),
           py::arg("group"), py::arg("inner"), py::arg("ordered"), py::arg("site"),
           py::arg("options"))
      .def_property_readonly("group", &ProcessGroupDistro::group)
      .def(
          "hand_replicas_to",
          [](ProcessGroupDistro& backend, std::shared_ptr<ModuleSynchroniser> synchroniser) {
            backend.hand_replicas_to(std::move(synchroniser));
          },
          py::arg("synchroniser").none(true),
          "Until the next call, all-reduces are the gradients of a sharded module's replicas.")
      // split_group() of older torches copies the parent's options, which there only some backends
      // show.
      .def_property_readonly(
          "options", [](ProcessGroupDistro& backend) { return backend.getBackendOptions(); })
      .def(
          "perform_nocolor_split", [](const ProcessGroupDistro&, const py::object&) {},
          py::arg("device"),
          "What torch calls on ranks that are not in a group that is split off: nothing to do.")
      .def(
          "_set_default_timeout",
          [](ProcessGroupDistro& backend, std::chrono::milliseconds timeout) {
            backend.setTimeout(timeout);
          },
          py::arg("timeout"), "As torch's own backends have it.")
      .def(
          "last_operations",
          [](const ProcessGroupDistro& backend) { return backend.operations()->text(); },
          "The last operations of this rank, oldest first, as an error's log line has them.")
      .def(
          "stop_recognising",
          [](const ProcessGroupDistro& backend, const std::string& reason) {
            if (backend.gradients()) {
              backend.gradients()->stop_recognising(reason);
            }
          },
          py::arg("reason"),
          "Modes ef and demo: reduce nothing but what modules with their own hook here give.");

  py::class_<ModuleGradients, std::shared_ptr<ModuleGradients>>(module, "ModuleGradients")
      .def(py::init<const c10::intrusive_ptr<ProcessGroupDistro>&, std::vector<at::Tensor>,
                    const std::vector<std::string>&>(),
           py::arg("backend"), py::arg("parameters"), py::arg("names"))
      .def_static("attach", &ModuleGradients::attach, py::arg("module"), py::arg("reducer"))
      .def_property_readonly("backwards", &ModuleGradients::backwards)
      .def("residuals", &ModuleGradients::residuals, release_gil())
      .def("load", &ModuleGradients::load, py::arg("residuals"), py::arg("backwards"),
           release_gil());

  py::class_<ModuleSynchroniser, std::shared_ptr<ModuleSynchroniser>>(module, "ModuleSynchroniser")
      .def(py::init<const c10::intrusive_ptr<ProcessGroupDistro>&, std::vector<at::Tensor>,
                    const std::vector<std::string>&, bool>(),
           py::arg("backend"), py::arg("parameters"), py::arg("names"),
           py::arg("device_codec") = false)
      .def_static("attach", &ModuleSynchroniser::attach, py::arg("synchroniser"),
                  py::arg("reducer"))
      .def("before_forward", &ModuleSynchroniser::before_forward, release_gil())
      .def("take_site", &ModuleSynchroniser::take_site, py::arg("joined"), release_gil())
      .def("set_optimizer", &ModuleSynchroniser::set_optimizer, py::arg("normalises"))
      .def("watch_frozen", &ModuleSynchroniser::watch_frozen, py::arg("parameters"),
           py::arg("names"))
      .def("mark", &ModuleSynchroniser::mark, release_gil())
      .def("before_edit", &ModuleSynchroniser::before_edit, release_gil())
      .def("after_edit", &ModuleSynchroniser::after_edit, release_gil())
      .def("stay_exact", &ModuleSynchroniser::stay_exact, py::arg("reason"))
      .def("average", &ModuleSynchroniser::average, release_gil())
      .def("show_reference", &ModuleSynchroniser::show_reference, release_gil())
      .def("hide_reference", &ModuleSynchroniser::hide_reference, release_gil())
      .def_property_readonly("exact", &ModuleSynchroniser::exact)
      .def_property_readonly("backward_done", &ModuleSynchroniser::backward_done)
      .def_property_readonly("exchanges",
                             py::cpp_function(&ModuleSynchroniser::exchanges, release_gil()))
      .def_property_readonly("checksum",
                             py::cpp_function(&ModuleSynchroniser::checksum, release_gil()))
      .def("state", &state_of)
      .def("load", &load, py::arg("reference"), py::arg("residual"), py::arg("pending"),
           py::arg("exchanges"), py::arg("share"), py::arg("mean_at"));

  distro::bindings::bind_codec(module);
}
