#include "bindings/codec.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/c10d/device_codec.h"
#include "backend/c10d/tensors.h"
#include "plugins/weights.h"
#include "plugins/weights_defaults.h"

namespace py = pybind11;

namespace distro::bindings {
namespace {

// (records of all participants, the index of the own one, gain, the number of the exchange); every
// participant has the same weight.
using Arrived = std::tuple<std::vector<std::string>, std::size_t, float, std::uint64_t>;
using Tensors = std::vector<at::Tensor>;

py::bytes bytes_of(const std::vector<std::byte>& record) {
  return {reinterpret_cast<const char*>(record.data()), record.size()};
}

/// A codec as Python drives it: tensors are contiguous and floating-point, records are bytes.
class Codec {
 public:
  Codec(const std::vector<std::size_t>& elements, std::uint32_t k, std::uint32_t value_bits,
        const std::optional<at::Device>& device, std::size_t turns, std::uint32_t spread_steps,
        std::uint32_t residual_bits) {
    const plugins::WeightsConfig config{.k = k,
                                        .value_bits = value_bits,
                                        .isa = kernels::best_isa(),
                                        .arena = nullptr,
                                        .spread_steps = spread_steps,
                                        .residual_bits = residual_bits};
    plugins::Geometry geometry(elements, turns);
    codec_ = device ? c10d_backend::device_codecs(with_index(*device))(std::move(geometry), config)
                    : plugins::make_host_codec(std::move(geometry), config);
  }

  std::optional<std::size_t> begin(const Tensors& x) { return codec_->begin(views(x)); }

  // (record, or the first non-finite tensor; mean move)
  py::object advance(const Tensors& x, std::uint64_t number, const std::optional<Arrived>& arrived,
                     float share_before, float share_after) {
    const Exchange exchange(*codec_, arrived);
    return outcome(codec_->advance(views(x), number, exchange.due(), share_before, share_after));
  }

  py::object follow(const Tensors& x, std::uint64_t number, const std::optional<Arrived>& arrived,
                    float share_before, float share_after) {
    const Exchange exchange(*codec_, arrived);
    return outcome(codec_->follow(views(x), number, exchange.due(), share_before, share_after));
  }

  py::object encode(const Tensors& x, std::uint64_t number, float share_before) {
    return outcome(codec_->encode(views(x), number, share_before));
  }

  void settle(const Tensors& x, const Arrived& arrived, float share_after) {
    codec_->settle(views(x), *Exchange(*codec_, arrived).due(), share_after);
  }

  void apply(const Arrived& arrived) { codec_->apply(*Exchange(*codec_, arrived).due()); }

  void leave(const Tensors& x, float share) { codec_->leave(views(x), share); }

  void reshare(const Tensors& x, float share_before, float share_after) {
    codec_->reshare(views(x), share_before, share_after);
  }

  // (W, R, P) of each tensor: flat fp32 tensors in host memory; P is empty where no gain is spread.
  using State = std::vector<std::tuple<at::Tensor, at::Tensor, at::Tensor>>;

  State state(const Tensors& x, float share) {
    State result;
    for (const auto& tensor : codec_->state(views(x), share)) {
      result.emplace_back(tensor_of(tensor.reference), tensor_of(tensor.residual),
                          tensor_of(tensor.pending));
    }
    return result;
  }

  void restore_state(const State& tensors) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const auto& [reference, residual, pending] = tensors[i];
      codec_->restore_state(i, values_of(reference), values_of(residual), values_of(pending));
    }
    codec_->rehash();
  }

  py::bytes empty_record(std::uint64_t number) const {
    return bytes_of(codec_->empty_record(number));
  }
  std::uint64_t checksum() const { return codec_->checksum(); }

 private:
  class Exchange {
   public:
    Exchange(const plugins::ModuleCodec& codec, const std::optional<Arrived>& arrived) {
      if (!arrived) {
        return;
      }
      const auto& [bodies, own, gain, number] = *arrived;
      for (const auto& body : bodies) {
        records_.push_back(codec.parse(std::as_bytes(std::span(body)), number));
      }
      for (const auto& record : records_) {
        contributions_.push_back({&record, 1.0F / static_cast<float>(records_.size())});
      }
      due_ = {contributions_, own, gain};
    }
    [[nodiscard]] const plugins::Due* due() const { return due_ ? &*due_ : nullptr; }

   private:
    std::vector<plugins::ParsedRecord> records_;
    std::vector<plugins::Contribution> contributions_;
    std::optional<plugins::Due> due_;
  };

  /// The current one of its type where none is said, as everywhere in torch.
  static at::Device with_index(at::Device device) {
    return device.is_cpu() || device.has_index()
               ? device
               : c10::impl::VirtualGuardImpl(device.type()).getDevice();
  }

  static at::Tensor tensor_of(const std::vector<float>& values) {
    at::Tensor tensor = at::empty({static_cast<std::int64_t>(values.size())}, at::kFloat);
    std::ranges::copy(values, tensor.mutable_data_ptr<float>());
    return tensor;
  }

  static std::span<const float> values_of(const at::Tensor& tensor) {
    return {tensor.const_data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
  }

  static std::vector<plugins::TensorView> views(const Tensors& x) {
    std::vector<plugins::TensorView> result;
    for (const auto& tensor : x) {
      result.push_back(c10d_backend::view_of(tensor));
    }
    return result;
  }

  static py::object outcome(const plugins::Step& step) {
    return step.non_finite ? py::object(py::int_(*step.non_finite))
                           : py::object(py::make_tuple(bytes_of(step.record), step.move_mean));
  }

  std::unique_ptr<plugins::ModuleCodec> codec_;
};

}  // namespace

void bind_codec(py::module_& module) {
  module.def("default_turns", &plugins::default_turns, py::arg("k"),
             "Turns that weights take where Options.turns is auto; for studies.");
  module.def("default_spread_steps", &plugins::default_spread_steps, py::arg("k"), py::arg("delay"),
             "Steps that gains are spread over where Options.spread is auto; for studies.");
  module.def(
      "default_share",
      [](float gain, int participants, std::uint32_t k, std::uint32_t spread_steps) {
        const float sent = gain / static_cast<float>(participants);
        return plugins::default_share(sent, gain, k, spread_steps);
      },
      py::arg("gain"), py::arg("participants"), py::arg("k"), py::arg("spread_steps"),
      "Share of unsent moves where Options.share is auto, of participants that weigh the same; for "
      "studies.");
  py::class_<Codec>(module, "Codec", "The weights mode codec of one module; for tests.")
      .def(py::init<const std::vector<std::size_t>&, std::uint32_t, std::uint32_t,
                    const std::optional<at::Device>&, std::size_t, std::uint32_t, std::uint32_t>(),
           py::arg("elements"), py::arg("k"), py::arg("value_bits"), py::arg("device") = py::none(),
           py::arg("turns") = 1, py::arg("spread_steps") = 0, py::arg("residual_bits") = 32)
      .def("begin", &Codec::begin)
      .def("advance", &Codec::advance)
      .def("follow", &Codec::follow)
      .def("encode", &Codec::encode)
      .def("settle", &Codec::settle)
      .def("apply", &Codec::apply)
      .def("leave", &Codec::leave)
      .def("reshare", &Codec::reshare)
      .def("state", &Codec::state)
      .def("restore_state", &Codec::restore_state)
      .def("empty_record", &Codec::empty_record)
      .def_property_readonly("checksum", &Codec::checksum);
}

}  // namespace distro::bindings
