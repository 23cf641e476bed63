// Samples of concrete distributions with counter-based noise, and their gradient, which draws the noise
// again. Schema: fastnas/ops/gumbel_softmax.py. Everything is tiny in a supernet: what counts is the cost of
// the call.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "common/elementary.h"
#include "common/philox.h"

namespace fastnas {
namespace {

template <class T>
struct Rows {
  using A = acc_t<T>;
  const T* logits;
  int64_t choices;
  uint64_t seed;
  A tau;

  // Rows worked on at a time; their noise stays in the level 1 cache.
  int64_t rows_a_block() const { return std::max<int64_t>(1, 1024 / choices); }

  // body(choices), the usual numbers of candidates as constants: short loops of unknown length are not vectorised well.
  template <class Body>
  FASTNAS_INLINE void with_choices(const Body& body) const {
    switch (choices) {
      case 4:
        return body(std::integral_constant<int64_t, 4>{});
      case 8:
        return body(std::integral_constant<int64_t, 8>{});
      default:
        return body(choices);
    }
  }

  // A long row is added in double: one by one, as a compiler without wide vectors does, floats would lose digits.
  template <class Count>
  using Sum = std::conditional_t<std::is_same_v<Count, int64_t>, double, A>;

  // a[i] = (logit + noise - largest of the row) / tau for rows [row, row + n); `words` is scratch memory.
  FASTNAS_INLINE void scores(A* a, uint32_t* words, int64_t row, int64_t n) const {
    const int64_t begin = row * choices, count = n * choices, skip = begin % 4;
    philox_blocks(words, begin / 4, (skip + count + 3) / 4, seed);
    const T* x = logits + begin;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) a[i] = load(x[i]) + gumbel<A>(words[skip + i]);
    with_choices([&](auto count) FASTNAS_INLINE {
      for (int64_t r = 0; r < n; ++r) {
        A* ar = a + r * count;
        A largest = ar[0];
        for (int64_t i = 1; i < count; ++i) largest = ar[i] > largest ? ar[i] : largest;
        for (int64_t i = 0; i < count; ++i) ar[i] = (ar[i] - largest) / tau;
      }
    });
  }

  // Softmax of n rows of scores in place.
  FASTNAS_INLINE void softmax(A* a, int64_t n) const {
#pragma omp simd
    for (int64_t i = 0; i < n * choices; ++i) a[i] = exp_nonpositive(a[i]);
    with_choices([&](auto count) FASTNAS_INLINE {
      for (int64_t r = 0; r < n; ++r) {
        A* ar = a + r * count;
        Sum<decltype(count)> sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i) sum += ar[i];
        const A total = static_cast<A>(sum);
        for (int64_t i = 0; i < count; ++i) ar[i] /= total;
      }
    });
  }

  // One-hot of the first largest score, which is 0; all NaN when a score is NaN.
  FASTNAS_INLINE void one_hot(A* a, int64_t n) const {
    for (int64_t r = 0; r < n; ++r) {
      A* ar = a + r * choices;
      A sum = 0;
      int64_t place = -1;
      for (int64_t i = 0; i < choices; ++i) {
        sum += ar[i] != ar[i] ? ar[i] : A(0);
        if (place < 0 && ar[i] == A(0)) place = i;
      }
      for (int64_t i = 0; i < choices; ++i) ar[i] = sum + (i == place ? A(1) : A(0));
    }
  }

  // dx = y (g - sum y g) / tau for n rows.
  template <class Y>
  FASTNAS_INLINE void gradient(T* dx, const Y* y, const T* g, int64_t n) const {
    with_choices([&](auto count) FASTNAS_INLINE {
      for (int64_t r = 0; r < n; ++r) {
        const int64_t at = r * count;
        Sum<decltype(count)> sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i) sum += load(y[at + i]) * load(g[at + i]);
        const A dot = static_cast<A>(sum);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(dx + at + i, load(y[at + i]) * (load(g[at + i]) - dot) / tau);
      }
    });
  }

  // Calls body(first row, rows) for parts of the rows, without scores.
  template <class Body>
  void for_rows(int64_t rows, const Body& body) const {
    constexpr int64_t kElementsAThread = 1 << 15;
    torch::stable::parallel_for(
        0, rows, std::max<int64_t>(1, kElementsAThread / choices),
        [&](int64_t begin, int64_t end) { vectorised([&]() FASTNAS_INLINE { body(begin, end - begin); }); });
  }

  // Calls body(a, first row, rows) block by block, `a` holding the scores.
  template <class Body>
  void for_blocks(int64_t rows, const Body& body) const {
    const int64_t step = rows_a_block(), blocks = (rows + step - 1) / step;
    constexpr int64_t kBlocksAThread = 4;
    torch::stable::parallel_for(0, blocks, kBlocksAThread, [&](int64_t begin, int64_t end) {
      std::vector<A> a(step * choices);
      std::vector<uint32_t> words(step * choices + 8);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * step, n = std::min(step, rows - row);
        vectorised([&]() FASTNAS_INLINE {
          scores(a.data(), words.data(), row, n);
          body(a.data(), row, n);
        });
      }
    });
  }
};

double tau_of(double tau, const std::optional<Tensor>& tensor) {
  if (!tensor) return tau;
  STD_TORCH_CHECK(tensor->numel() == 1, "gumbel_softmax: tau must be one number");
  dispatch_floating(tensor->scalar_type(), "gumbel_softmax",
                    [&](auto tag) { tau = load(*static_cast<const decltype(tag)*>(tensor->data_ptr())); });
  return tau;
}

uint64_t seed_of(int64_t seed, const std::optional<Tensor>& tensor) {
  if (!tensor) return static_cast<uint64_t>(seed);
  STD_TORCH_CHECK(tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Long,
                  "gumbel_softmax: seed must be one int64");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(tensor->data_ptr()));
}

int64_t choices_of(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() > 0, "gumbel_softmax: logits must have at least one dimension");
  return logits.size(logits.dim() - 1);
}

Tensor gumbel_softmax_fwd(Tensor logits, int64_t seed, double tau, std::optional<Tensor> seed_tensor,
                          std::optional<Tensor> tau_tensor, bool hard) {
  const Tensor x = logits.is_contiguous() ? logits : torch::stable::contiguous(logits);
  Tensor y = torch::stable::empty_like(x);
  const int64_t count = x.numel(), choices = choices_of(x);
  if (count == 0) return y;
  dispatch_floating(x.scalar_type(), "gumbel_softmax", [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> rows{static_cast<const T*>(x.data_ptr()), choices, seed_of(seed, seed_tensor),
                       static_cast<acc_t<T>>(tau_of(tau, tau_tensor))};
    T* out = static_cast<T*>(y.data_ptr());
    rows.for_blocks(count / choices, [&](acc_t<T>* a, int64_t row, int64_t n) FASTNAS_INLINE {
      if (hard) {
        rows.one_hot(a, n);
      } else {
        rows.softmax(a, n);
      }
#pragma omp simd
      for (int64_t i = 0; i < n * choices; ++i) store(out + row * choices + i, a[i]);
    });
  });
  return y;
}

Tensor gumbel_softmax_bwd(Tensor g, Tensor logits, int64_t seed, double tau, std::optional<Tensor> seed_tensor,
                          std::optional<Tensor> tau_tensor, std::optional<Tensor> kept) {
  STD_TORCH_CHECK(g.scalar_type() == logits.scalar_type() && same_sizes(g, logits),
                  "gumbel_softmax: the gradient must have the shape and dtype of logits");
  STD_TORCH_CHECK(!kept || (kept->scalar_type() == logits.scalar_type() && same_sizes(*kept, logits)),
                  "gumbel_softmax: the sample must have the shape and dtype of logits");
  const Tensor x = logits.is_contiguous() ? logits : torch::stable::contiguous(logits);
  const Tensor gy = g.is_contiguous() ? g : torch::stable::contiguous(g);
  Tensor dx = torch::stable::empty_like(x);
  if (kept && !kept->is_contiguous()) kept = torch::stable::contiguous(*kept);
  const int64_t count = x.numel(), choices = choices_of(x);
  if (count == 0) return dx;
  dispatch_floating(x.scalar_type(), "gumbel_softmax", [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Rows<T> rows{static_cast<const T*>(x.data_ptr()), choices, seed_of(seed, seed_tensor),
                       static_cast<A>(tau_of(tau, tau_tensor))};
    const T* in = static_cast<const T*>(gy.data_ptr());
    T* out = static_cast<T*>(dx.data_ptr());
    if (kept) {
      const T* y = static_cast<const T*>(kept->data_ptr());
      return rows.for_rows(count / choices, [&](int64_t row, int64_t n) FASTNAS_INLINE {
        const int64_t at = row * choices;
        rows.gradient(out + at, y + at, in + at, n);
      });
    }
    rows.for_blocks(count / choices, [&](A* a, int64_t row, int64_t n) FASTNAS_INLINE {
      rows.softmax(a, n);
      rows.gradient(out + row * choices, a, in + row * choices, n);
    });
  });
  return dx;
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("gumbel_softmax_fwd", TORCH_BOX(&fastnas::gumbel_softmax_fwd));
  m.impl("gumbel_softmax_bwd", TORCH_BOX(&fastnas::gumbel_softmax_bwd));
}
