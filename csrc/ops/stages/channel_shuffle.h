#pragma once

#include <cstdint>
#include <vector>

#include "common/vector.h"

namespace fastnas {

// The channel shuffle of PC-DARTS on pixels: channel g C/K + i becomes channel i K + g; or back.
template <class T>
class ChannelShuffle {
 public:
  ChannelShuffle(int64_t channels, int64_t k, bool back) : channels_(channels), from_(channels) {
    const int64_t selected = channels / k;
    for (int64_t g = 0; g < k; ++g)
      for (int64_t i = 0; i < selected; ++i) {
        const int64_t before = g * selected + i, after = i * k + g;
        from_[back ? before : after] = back ? after : before;
      }
    constexpr int64_t lanes = kLanes<T>;
    if (channels % lanes || channels > 4 * lanes || !permutes_vectors()) return;
    vectors_ = channels / lanes;
    for (int64_t c = 0; c < channels; ++c) {
      lane_.push_back(from_[c] % (2 * lanes));
      in_upper_half_.push_back(from_[c] >= 2 * lanes ? -1 : 0);
    }
  }

  // Pixels in rows, `out_pixel` and `in_pixel` elements apart.
  FASTNAS_INLINE inline void run(T* out, int64_t out_pixel, const T* in, int64_t in_pixel, int64_t pixels) const {
    if (vectors_ == 1) return permute<1>(out, out_pixel, in, in_pixel, pixels);
    if (vectors_ == 2) return permute<2>(out, out_pixel, in, in_pixel, pixels);
    if (vectors_ == 4) return permute<4>(out, out_pixel, in, in_pixel, pixels);
    const int64_t* from = from_.data();
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < channels_; ++c) out[p * out_pixel + c] = in[p * in_pixel + from[c]];
  }

 private:
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

  // AVX-512 has one instruction for any permutation of two vectors, AVX2 a few; without them numbers are moved one by
  // one.
  static bool permutes_vectors() {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
    return kIsa != Isa::kBaseline;
#else
    return false;
#endif
  }

  template <int count>
  FASTNAS_INLINE inline void permute(T* out, int64_t out_pixel, const T* in, int64_t in_pixel, int64_t pixels) const {
#if defined(__GNUC__) && !defined(__clang__)
    constexpr int64_t lanes = kLanes<T>;
    Index<T> lane[count], upper[count];
    for (int v = 0; v < count; ++v) {
      std::memcpy(&lane[v], lane_.data() + v * lanes, sizeof lane[v]);
      std::memcpy(&upper[v], in_upper_half_.data() + v * lanes, sizeof upper[v]);
    }
    for (int64_t p = 0; p < pixels; ++p, in += in_pixel, out += out_pixel) {
      Vec<T> a[count];
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) a[v] = get(in + v * lanes);
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) {
        Vec<T> low = __builtin_shuffle(a[0], a[count > 1 ? 1 : 0], lane[v]);
        if constexpr (count == 4) low = upper[v] ? __builtin_shuffle(a[2], a[3], lane[v]) : low;
        put(out + v * lanes, low);
      }
    }
#endif
  }

  int64_t channels_, vectors_ = 0;
  std::vector<int64_t> from_;  // for each channel of the result the one that comes there
  std::vector<Lane> lane_, in_upper_half_;
};

}  // namespace fastnas
