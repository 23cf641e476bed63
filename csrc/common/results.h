#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <optional>

namespace fastnas {

using torch::stable::Tensor;

// Fresh tensors for results. The first touch of a fresh page costs several times what a kernel spends on it, so large
// results ask the system for huge pages.

inline Tensor on_huge_pages(Tensor t) {
#ifdef __linux__
  constexpr uintptr_t kLarge = 1 << 19, kPage = 4096;  // results lie side by side: several share a huge page
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), bytes = t.numel() * t.element_size();
  // A hint: nothing depends on whether it is granted.
  if (bytes >= kLarge) madvise(reinterpret_cast<void*>(begin / kPage * kPage), bytes + begin % kPage, MADV_HUGEPAGE);
#endif
  return t;
}

inline Tensor result_like(const Tensor& like) { return on_huge_pages(torch::stable::empty_like(like)); }

// Whether results that follow a [B, C, H, W] tensor are in channels last; fastnas/_layout.py has the same rule.
inline bool is_channels_last(const Tensor& like) { return like.stride(1) == 1 && like.stride(3) > 1; }

inline torch::headeronly::MemoryFormat map_format(bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor result_map(const Tensor& like, int64_t b, int64_t c, int64_t h, int64_t w, bool channels_last) {
  const int64_t sizes[] = {b, c, h, w};
  return on_huge_pages(torch::stable::empty({sizes, 4}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                                            map_format(channels_last)));
}

}  // namespace fastnas
