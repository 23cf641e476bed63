#pragma once

// Kernels of gumbel_softmax. Everything is tiny in a supernet and the launch is what it costs: a short row is one
// element a lane of part of a warp, drawn once and reduced by shuffles. A long row is a block that walks it in strides
// and draws the noise again for each pass, so that rows of any length need no memory.

#include <cstdint>
#include <limits>

#include "common/dtype.h"
#include "common/elementary.h"
#include "common/philox.h"
#include "common/reduce.cuh"

namespace fastnas {

// A floating number that may lie on the device, so that a captured graph can change it.
struct Number {
  const void* at;
  ScalarType dtype;
  double value;

  __device__ double get() const {
    if (!at) return value;
    switch (dtype) {
      case ScalarType::Double:
        return *static_cast<const double*>(at);
      case ScalarType::BFloat16:
        return load(*static_cast<const BFloat16*>(at));
      case ScalarType::Half:
        return load(*static_cast<const Half*>(at));
      default:
        return *static_cast<const float*>(at);
    }
  }
};

template <class T>
struct Samples {
  const T* logits;  // [rows, choices]
  int64_t rows, choices;
  uint64_t seed;
  const int64_t* seed_at;  // instead of seed, unless null
  Number tau;
};

// The choices of one row that are this thread's, and what it makes of them together with its team: `lanes` neighbours
// in a warp (kLong = false, at most one choice each), or its block.
template <class T, bool kLong>
struct RowTeam {
  using A = acc_t<T>;
  const Samples<T>& samples;
  int lanes;
  int64_t begin, first, choices;  // elements before the row; the thread's first choice; 0 choices beyond the last row
  uint64_t seed;
  A tau;
  A drawn = 0;
  A largest;

  __device__ RowTeam(const Samples<T>& s, int team) : samples(s), lanes(team) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, row = thread / lanes;
    begin = row * s.choices;
    first = thread % lanes;
    choices = row < s.rows ? s.choices : 0;
    seed = s.seed_at ? static_cast<uint64_t>(*s.seed_at) : s.seed;
    tau = static_cast<A>(s.tau.get());
    if (!kLong && first < choices) drawn = draw(first);
    largest = -std::numeric_limits<A>::infinity();
    each([&](int64_t c) { largest = Larger{}(largest, noisy(c)); });
    largest = reduce(largest, Larger{});
  }

  // Logit and noise: element i takes word i mod 4 of Philox block i div 4. A row need not start at a block, so each
  // thread draws all four words for its one.
  __device__ A draw(int64_t c) const {
    const uint64_t i = static_cast<uint64_t>(begin + c);
    uint32_t words[4];
    philox_blocks(words, static_cast<int64_t>(i / 4), 1, seed);
    const uint32_t low = i % 2 ? words[1] : words[0], high = i % 2 ? words[3] : words[2];
    return load(samples.logits[begin + c]) + gumbel<A>(i % 4 < 2 ? low : high);
  }

  __device__ A noisy(int64_t c) const { return kLong ? draw(c) : drawn; }
  __device__ A score(int64_t c) const { return (noisy(c) - largest) / tau; }

  template <class Body>
  __device__ void each(const Body& body) const {
    for (int64_t c = first; c < choices; c += lanes) body(c);
  }

  template <class V, class Op>
  __device__ V reduce(V value, const Op& op) const {
    return kLong ? reduce_block(value, op) : reduce_lanes(value, lanes, op);
  }
};

// y = softmax((logits + noise) / tau), or the one-hot of each row's first largest entry.
// Reads the logits once (kLong: three times), writes y once. Bound by its launch.
template <class T, bool kLong>
__global__ void gumbel_softmax_fwd_kernel(Samples<T> samples, T* y, bool hard, int lanes) {
  using A = acc_t<T>;
  const RowTeam<T, kLong> row(samples, lanes);
  if (hard) {
    int64_t place = row.choices;
    A nan = 0;  // a row with a NaN is all NaN, as its softmax would be
    row.each([&](int64_t c) {
      const A score = row.score(c);
      if (score == A(0)) place = Smaller{}(place, c);
      if (score != score) nan += score;
    });
    place = row.reduce(place, Smaller{});
    nan = row.reduce(nan, Add{});
    row.each([&](int64_t c) { store(y + row.begin + c, nan + (c == place ? A(1) : A(0))); });
  } else {
    A sum = 0;
    row.each([&](int64_t c) { sum += exp_nonpositive(row.score(c)); });
    sum = row.reduce(sum, Add{});
    row.each([&](int64_t c) { store(y + row.begin + c, exp_nonpositive(row.score(c)) / sum); });
  }
}

// dx = y (g - sum y g) / tau, with y drawn again from the same seed.
// Reads logits and g once (kLong: three times, twice), writes dx once. Bound by its launch.
template <class T, bool kLong>
__global__ void gumbel_softmax_bwd_kernel(Samples<T> samples, const T* g, T* dx, int lanes) {
  using A = acc_t<T>;
  const RowTeam<T, kLong> row(samples, lanes);
  A sum = 0, dot = 0;
  row.each([&](int64_t c) {
    const A e = exp_nonpositive(row.score(c));
    sum += e;
    dot += e * load(g[row.begin + c]);
  });
  sum = row.reduce(sum, Add{});
  dot = row.reduce(dot, Add{}) / sum;
  row.each([&](int64_t c) {
    const A y = exp_nonpositive(row.score(c)) / sum;
    store(dx + row.begin + c, y * (load(g[row.begin + c]) - dot) / row.tau);
  });
}

}  // namespace fastnas
