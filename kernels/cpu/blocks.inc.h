// Included by body.inc.h inside its anonymous namespace, once per instruction set. Blocks of a
// matrix on their way to fp32 and back.

template <class Format>
void gather_as(const void* x_memory, std::size_t stride, float* block, std::size_t rows,
               std::size_t columns) {
  const auto* x = static_cast<const typename Format::Element*>(x_memory);
  for (std::size_t row = 0; row < rows; ++row) {
    adopt_as<Format>(x + row * stride, block + row * columns, columns);
  }
}

void gather(DType dtype, const void* x, std::size_t stride, float* block, std::size_t rows,
            std::size_t columns) noexcept {
  switch (dtype) {
    case DType::f32:
      gather_as<F32>(x, stride, block, rows, columns);
      return;
    case DType::f64:
      gather_as<F64>(x, stride, block, rows, columns);
      return;
    case DType::f16:
      gather_as<F16>(x, stride, block, rows, columns);
      return;
    case DType::bf16:
      gather_as<Bf16>(x, stride, block, rows, columns);
      return;
  }
}

template <class Format>
void scatter_as(const float* __restrict block, void* __restrict x_memory, std::size_t stride,
                std::size_t rows, std::size_t columns) {
  auto* __restrict x = static_cast<typename Format::Element*>(x_memory);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t column = 0; column < columns; ++column) {
      x[row * stride + column] = Format::store(block[row * columns + column]);
    }
  }
}

void scatter(DType dtype, const float* block, void* x, std::size_t stride, std::size_t rows,
             std::size_t columns) noexcept {
  switch (dtype) {
    case DType::f32:
      scatter_as<F32>(block, x, stride, rows, columns);
      return;
    case DType::f64:
      scatter_as<F64>(block, x, stride, rows, columns);
      return;
    case DType::f16:
      scatter_as<F16>(block, x, stride, rows, columns);
      return;
    case DType::bf16:
      scatter_as<Bf16>(block, x, stride, rows, columns);
      return;
  }
}

void decay_and_add(float* __restrict m, const float* __restrict c, std::size_t n,
                   float beta) noexcept {
  for (std::size_t i = 0; i < n; ++i) {
    m[i] = beta * m[i] + c[i];
  }
}

void signs(float* __restrict x, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i) {
    const float positive = x[i] > 0.0F ? 1.0F : 0.0F;
    const float negative = x[i] < 0.0F ? 1.0F : 0.0F;
    x[i] = positive - negative;
  }
}
