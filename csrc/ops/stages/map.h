#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/results.h"

namespace fastnas {

using torch::stable::Tensor;

// A map [B, H, W, C] with neighbouring channels; `pixel` elements lie between one pixel and the next, and rows and
// images follow each other without gaps in that unit.
struct Map {
  int64_t batch, height, width, channels, pixel;

  int64_t pixels() const { return height * width; }
  int64_t image() const { return pixels() * pixel; }
};

inline Map map_of(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": a map has four dimensions");
  Map m{t.size(0), t.size(1), t.size(2), t.size(3), 0};
  m.pixel = m.width > 1 ? t.stride(2) : m.height > 1 ? t.stride(1) : m.batch > 1 ? t.stride(0) : m.channels;
  const auto regular = [&](int64_t d, int64_t stride) { return t.size(d) == 1 || t.stride(d) == stride; };
  STD_TORCH_CHECK(t.numel() == 0 || (m.pixel >= m.channels && regular(3, 1) && regular(2, m.pixel) &&
                                     regular(1, m.width * m.pixel) && regular(0, m.image())),
                  op, ": the channels of a map must be neighbours in memory, its pixels evenly spaced");
  return m;
}

// A map that must be like another in size, whatever its spacing.
inline Map map_like(const char* op, const Tensor& t, const Map& like) {
  const Map m = map_of(op, t);
  STD_TORCH_CHECK(
      m.batch == like.batch && m.height == like.height && m.width == like.width && m.channels == like.channels, op,
      ": maps differ in size");
  return m;
}

inline Tensor new_map(const Tensor& like, std::vector<int64_t> size) {
  return on_huge_pages(torch::stable::new_empty(like, size));
}

inline void check_same_dtype(const char* op, const std::vector<Tensor>& tensors, ScalarType dtype) {
  for (const auto& t : tensors) STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": tensors differ in dtype");
}

// A map and where it begins.
template <class T>
struct View {
  const T* data;
  Map map;

  const T* image(int64_t b) const { return data + b * map.image(); }
};

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
T* data(Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// The views of tensors that must all have the size of `like`.
template <class T>
std::vector<View<T>> views_like(const char* op, const std::vector<Tensor>& tensors, const Map& like) {
  std::vector<View<T>> views;
  for (const auto& t : tensors) views.push_back({data<T>(t), map_like(op, t, like)});
  return views;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(float{}) or body(double{}).
template <class Body>
void dispatch_full_width(ScalarType dtype, const char* op, const Body& body) {
  if (dtype == ScalarType::Float) return body(float{});
  STD_TORCH_CHECK(dtype == ScalarType::Double, op, ": dtype must be float32 or float64");
  body(double{});
}

}  // namespace fastnas
