// Included by body.inc.h inside its anonymous namespace, once per instruction set. The orthonormal
// DCT-II of a block and its inverse: columns, transposition, columns. Vectors run over independent
// columns, so that their width changes the order of no sum.

#if defined(__AVX512F__)
constexpr std::size_t kVectorBytes = 64;
#elif defined(__AVX__)
constexpr std::size_t kVectorBytes = 32;
#else
constexpr std::size_t kVectorBytes = 16;
#endif
constexpr std::size_t kVectorLanes = kVectorBytes / sizeof(float);
constexpr std::size_t kStripe = 2 * kVectorLanes;  // columns that are transformed together
using Vector __attribute__((vector_size(kVectorBytes))) = float;
using Quad __attribute__((vector_size(16))) = float;

constexpr auto kRow = static_cast<std::ptrdiff_t>(kLargestSide);
static_assert(kLargestSide % kStripe == 0);

/// A block in rows of kLargestSide, for the stack.
struct Plane {
  alignas(64) float at[kLargestSide * kLargestSide];

  void clear() { __builtin_memset(at, 0, sizeof(at)); }
};

inline Vector load_vector(const float* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline void store_vector(float* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

/// Which of the rows that go into a product do: the others are zero, and adding nothing for them
/// gives the same bits as adding zeros.
struct Terms {
  std::uint8_t index[kLargestSide];
  std::size_t count = 0;
};

/// The terms t below n whose row first + t * step is in `rows`, a bit each.
inline void list_terms(Terms& terms, std::uint64_t rows, std::size_t first, std::size_t step,
                       std::size_t n) {
  terms.count = 0;
  for (std::size_t t = 0; t < n; ++t) {
    terms.index[terms.count] = static_cast<std::uint8_t>(t);
    terms.count += (rows >> (first + t * step)) & 1U;
  }
}

/// Factors of a product: that of output r and term t is at[r * output_step + t * term_step].
struct Factors {
  const float* at;
  std::ptrdiff_t output_step;
  std::ptrdiff_t term_step;
};

/// Rows of one stripe: row i is at + i * step.
template <class Float>
struct Rows {
  Float* at;
  std::ptrdiff_t step;
};

template <std::size_t kOutputs>
inline void multiply_some(const Factors& factors, const Terms& terms, const Rows<const float>& in,
                          const Rows<float>& out) {
  Vector left[kOutputs] = {};
  Vector right[kOutputs] = {};
  for (std::size_t t = 0; t < terms.count; ++t) {
    const std::ptrdiff_t term = terms.index[t];
    const float* const row = in.at + term * in.step;
    const Vector row_left = load_vector(row);
    const Vector row_right = load_vector(row + kVectorLanes);
    const float* factor = factors.at + term * factors.term_step;
    for (std::size_t r = 0; r < kOutputs; ++r, factor += factors.output_step) {
      left[r] += *factor * row_left;
      right[r] += *factor * row_right;
    }
  }
  float* row = out.at;
  for (std::size_t r = 0; r < kOutputs; ++r, row += out.step) {
    store_vector(row, left[r]);
    store_vector(row + kVectorLanes, right[r]);
  }
}

/// out[r] = sum over the terms, in order, of factor x in[term], for r below `outputs`.
inline void multiply(Factors factors, const Terms& terms, Rows<const float> in, Rows<float> out,
                     std::size_t outputs) {
  const auto skip = [&](std::ptrdiff_t rows) {
    factors.at += rows * factors.output_step;
    out.at += rows * out.step;
  };
  for (; outputs >= 4; outputs -= 4, skip(4)) {
    multiply_some<4>(factors, terms, in, out);
  }
  for (; outputs > 0; --outputs, skip(1)) {
    multiply_some<1>(factors, terms, in, out);
  }
}

/// (a, b) becomes (a + b, a - b), rows of one stripe.
inline void butterfly(float* a, float* b) {
  for (std::size_t lane = 0; lane < kStripe; lane += kVectorLanes) {
    const Vector x = load_vector(a + lane);
    const Vector y = load_vector(b + lane);
    store_vector(a + lane, x + y);
    store_vector(b + lane, x - y);
  }
}

inline void butterflies(float* rows, std::size_t n) {
  for (std::size_t i = 0; i < n / 2; ++i) {
    butterfly(rows + i * kLargestSide, rows + (n - 1 - i) * kLargestSide);
  }
}

constexpr std::uint64_t kAllRows = ~std::uint64_t{0};

/// The DCT of n rows of one stripe: out = C in. Overwrites in.
void dct_stripe(std::size_t n, float* in, float* out) {
  const float* factor = dct_basis(n);
  Terms terms;
  std::size_t m = n;
  std::ptrdiff_t step = kRow;
  for (; m % 2 == 0; m /= 2, step *= 2) {
    butterflies(in, m);
    const std::size_t half = m / 2;
    const auto width = static_cast<std::ptrdiff_t>(half);
    list_terms(terms, kAllRows, 0, 1, half);
    multiply({factor, 1, width}, terms, {in + (m - 1) * kLargestSide, -kRow},
             {out + step, 2 * step}, half);
    factor += half * half;
  }
  list_terms(terms, kAllRows, 0, 1, m);
  multiply({factor, static_cast<std::ptrdiff_t>(m), 1}, terms, {in, kRow}, {out, step}, m);
}

/// The inverse: out = C' in. The rows of `in` that are not in `present` are zero.
void inverse_dct_stripe(std::size_t n, std::uint64_t present, const float* in, float* out) {
  const float* factor = dct_basis(n);
  std::size_t m = n;
  std::size_t step = 1;
  for (; m % 2 == 0; m /= 2, step *= 2) {
    factor += m / 2 * (m / 2);
  }
  Terms terms;
  list_terms(terms, present, 0, step, m);
  multiply({factor, 1, static_cast<std::ptrdiff_t>(m)}, terms,
           {in, static_cast<std::ptrdiff_t>(step) * kRow}, {out, kRow}, m);
  while (step > 1) {
    step /= 2;
    const std::size_t half = m;
    m *= 2;
    factor -= half * half;
    const auto row_step = static_cast<std::ptrdiff_t>(step) * kRow;
    list_terms(terms, present, step, 2 * step, half);
    multiply({factor, 1, static_cast<std::ptrdiff_t>(half)}, terms, {in + row_step, 2 * row_step},
             {out + (m - 1) * kLargestSide, -kRow}, half);
    butterflies(out, m);
  }
}

/// to = from transposed, where `from` has `rows` x `columns`, rounded up to fours.
void transpose(const Plane& from, Plane& to, std::size_t rows, std::size_t columns) {
  constexpr std::size_t kQuad = 4;
  for (std::size_t r = 0; r < rows; r += kQuad) {
    for (std::size_t c = 0; c < columns; c += kQuad) {
      Quad in[kQuad];
      for (std::size_t i = 0; i < kQuad; ++i) {
        __builtin_memcpy(&in[i], from.at + (r + i) * kLargestSide + c, sizeof(Quad));
      }
      const Quad low01 = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
      const Quad low23 = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
      const Quad high01 = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
      const Quad high23 = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
      const Quad out[kQuad] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                               __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                               __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                               __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
      for (std::size_t i = 0; i < kQuad; ++i) {
        __builtin_memcpy(to.at + (c + i) * kLargestSide + r, &out[i], sizeof(Quad));
      }
    }
  }
}

void load_plane(Plane& plane, const float* block, std::size_t rows, std::size_t columns) {
  for (std::size_t r = 0; r < rows; ++r) {
    __builtin_memcpy(plane.at + r * kLargestSide, block + r * columns, columns * sizeof(float));
  }
}

void store_plane(const Plane& plane, float* block, std::size_t rows, std::size_t columns) {
  for (std::size_t r = 0; r < rows; ++r) {
    __builtin_memcpy(block + r * columns, plane.at + r * kLargestSide, columns * sizeof(float));
  }
}

void dct(const float* block, float* coefficients, std::size_t rows, std::size_t columns) noexcept {
  Plane a;
  Plane b;
  if (rows < kLargestSide || columns < kLargestSide) {  // what pads a stripe
    a.clear();
    b.clear();
  }
  load_plane(a, block, rows, columns);
  for (std::size_t c = 0; c < columns; c += kStripe) {
    dct_stripe(rows, a.at + c, b.at + c);
  }
  transpose(b, a, rows, columns);
  for (std::size_t r = 0; r < rows; r += kStripe) {
    dct_stripe(columns, a.at + r, b.at + r);
  }
  store_plane(b, coefficients, columns, rows);
}

/// The rows of the plane that are not all zero, a bit each.
std::uint64_t rows_present(const Plane& plane, std::size_t rows) {
  std::uint64_t present = 0;
  for (std::size_t r = 0; r < rows; ++r) {
    std::uint32_t any = 0;
    for (std::size_t c = 0; c < kLargestSide; ++c) {
      any |= bits_of(plane.at[r * kLargestSide + c]) & 0x7fffffffU;
    }
    present |= std::uint64_t{any != 0} << r;
  }
  return present;
}

void inverse_dct(const float* coefficients, float* block, std::size_t rows,
                 std::size_t columns) noexcept {
  Plane a;
  Plane b;
  if (rows < kLargestSide || columns < kLargestSide) {
    a.clear();
    b.clear();
  }
  load_plane(a, coefficients, columns, rows);
  const std::uint64_t present = rows_present(a, columns);
  if (present == 0) {
    __builtin_memset(block, 0, rows * columns * sizeof(float));
    return;
  }
  for (std::size_t r = 0; r < rows; r += kStripe) {
    inverse_dct_stripe(columns, present, a.at + r, b.at + r);
  }
  transpose(b, a, columns, rows);
  for (std::size_t c = 0; c < columns; c += kStripe) {
    inverse_dct_stripe(rows, kAllRows, a.at + c, b.at + c);
  }
  store_plane(b, block, rows, columns);
}
