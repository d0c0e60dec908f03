#include "bindings/codec.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/c10d/device_codec.h"
#include "backend/c10d/tensors.h"
#include "plugins/weights.h"

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
        const std::optional<at::Device>& device, std::size_t turns) {
    const plugins::WeightsConfig config{k, value_bits, kernels::best_isa()};
    plugins::Geometry geometry(elements, turns);
    codec_ = device ? c10d_backend::device_codecs(*device)(std::move(geometry), config)
                    : plugins::make_host_codec(std::move(geometry), config);
  }

  std::optional<std::size_t> begin(const Tensors& x) { return codec_->begin(views(x)); }

  // (record, or the first non-finite tensor; mean move)
  py::object advance(const Tensors& x, std::uint64_t number, const std::optional<Arrived>& arrived,
                     float share_before, float share_after) {
    const Exchange exchange(*codec_, arrived);
    return outcome(codec_->advance(views(x), number, exchange.due(), share_before, share_after));
  }

  py::object encode(const Tensors& x, std::uint64_t number, float share_before) {
    return outcome(codec_->encode(views(x), number, share_before));
  }

  void settle(const Tensors& x, const Arrived& arrived, float share_after) {
    codec_->settle(views(x), *Exchange(*codec_, arrived).due(), share_after);
  }

  void apply(const Arrived& arrived) { codec_->apply(*Exchange(*codec_, arrived).due()); }

  void leave(const Tensors& x, float share) { codec_->leave(views(x), share); }

  std::vector<std::pair<std::vector<float>, std::vector<float>>> state(const Tensors& x,
                                                                       float share) {
    std::vector<std::pair<std::vector<float>, std::vector<float>>> result;
    for (auto& tensor : codec_->state(views(x), share)) {
      result.emplace_back(std::move(tensor.reference), std::move(tensor.residual));
    }
    return result;
  }

  void restore_state(
      const std::vector<std::pair<std::vector<float>, std::vector<float>>>& tensors) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      codec_->restore_state(i, tensors[i].first, tensors[i].second);
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
  py::class_<Codec>(module, "Codec", "The weights mode codec of one module; for tests.")
      .def(py::init<const std::vector<std::size_t>&, std::uint32_t, std::uint32_t,
                    const std::optional<at::Device>&, std::size_t>(),
           py::arg("elements"), py::arg("k"), py::arg("value_bits"), py::arg("device") = py::none(),
           py::arg("turns") = 1)
      .def("begin", &Codec::begin)
      .def("advance", &Codec::advance)
      .def("encode", &Codec::encode)
      .def("settle", &Codec::settle)
      .def("apply", &Codec::apply)
      .def("leave", &Codec::leave)
      .def("state", &Codec::state)
      .def("restore_state", &Codec::restore_state)
      .def("empty_record", &Codec::empty_record)
      .def_property_readonly("checksum", &Codec::checksum);
}

}  // namespace distro::bindings
