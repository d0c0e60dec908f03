#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>

#include <functional>
#include <optional>
#include <vector>

namespace distro::c10d_backend {

/// Host memory that stands in for one collective's tensors on a device, in stream order: what the
/// current stream has written when a tensor is taken in is what the host sees, and what the host
/// leaves is copied back by a stream of its own, after all that the current stream held at
/// ready(). Pinned; tensors on the CPU get stand-ins, too, for tests.
class Staging {
 public:
  /// `device`: that of all tensors.
  explicit Staging(at::Device device) : device_(device) {}

  /// A stand-in that will have the tensor's values: not before ready().
  [[nodiscard]] at::Tensor input(const at::Tensor& tensor);
  [[nodiscard]] std::vector<at::Tensor> inputs(const std::vector<at::Tensor>& tensors);
  /// A stand-in whose values deliver() copies to the tensor.
  [[nodiscard]] at::Tensor output(const at::Tensor& tensor);
  [[nodiscard]] std::vector<at::Tensor> outputs(const std::vector<at::Tensor>& tensors);
  /// Both.
  [[nodiscard]] at::Tensor in_place(const at::Tensor& tensor);
  [[nodiscard]] std::vector<at::Tensor> in_place(const std::vector<at::Tensor>& tensors);

  /// Wait until the inputs are there. On the thread that has taken them in, before the collective
  /// begins.
  void ready();

  /// Copy the outputs to the device and run `done` while the copying stream is the current one. On
  /// any thread, once.
  void deliver(const std::function<void()>& done);

  /// The tensors that deliver() writes, in the order in which they were taken.
  [[nodiscard]] std::vector<at::Tensor> delivered() const;
  [[nodiscard]] at::Device device() const noexcept { return device_; }

 private:
  struct Pair {
    at::Tensor tensor;
    at::Tensor host;
  };

  at::Device device_;
  std::vector<Pair> outputs_;
  std::vector<at::Tensor> inputs_;  // stand-ins, kept until the collective is over
  std::optional<c10::Event> begun_;
};

}  // namespace distro::c10d_backend
