// What the files of torch ops share: checks of arguments, and tensors made through LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/block.h"
#include "core/conv.h"

namespace mbv2 {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Plain words instead of STD_TORCH_CHECK, whose text begins with a source path.
template <class... Words>
void check(bool ok, const Words&... words) {
  if (ok) return;
  std::ostringstream text;
  text << "mbv2: ";
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// For `check`, which writes it down only if it has to: a stream costs as much as a small layer.
template <class Shaped>
struct ShapeOf {
  const Shaped& of;
};
template <class Shaped>
ShapeOf<Shaped> shape_of(const Shaped& of) {
  return {of};
}
inline std::ostream& operator<<(std::ostream& text, const ShapeOf<Tensor>& shape) {
  text << "[";
  for (int64_t i = 0; i < shape.of.dim(); ++i) text << (i ? ", " : "") << shape.of.size(i);
  return text << "]";
}

inline bool storage_type(ScalarType type, DType* out) {
  switch (type) {
    case ScalarType::Float:
      *out = DType::f32;
      return true;
    case ScalarType::BFloat16:
      *out = DType::bf16;
      return true;
    case ScalarType::Half:
      *out = DType::f16;
      return true;
    default:
      return false;
  }
}

inline void check_tensor(const char* name, const Tensor& t, int64_t dims) {
  DType unused;
  check(t.is_cpu(), name, " must be a CPU tensor here");
  check(storage_type(t.scalar_type(), &unused), name, " must be float32, bfloat16 or float16");
  check(t.dim() == dims, name, " must have ", dims, " dimensions, got shape ", shape_of(t));
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Clamp kNoClamp{-kInfinity, kInfinity};

inline Clamp clamp_of(const char* name, const std::string& activation) {
  if (activation == "none") return kNoClamp;
  if (activation == "relu") return {0.0f, kInfinity};
  check(activation == "relu6", name, " must be 'none', 'relu' or 'relu6', got '", activation, "'");
  return {0.0f, 6.0f};
}

inline Tensor empty(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType type) {
  AtenTensorHandle handle;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Output size along one axis and the padding before it; padding -1 is "same" as TensorFlow means it.
inline int64_t out_size(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                        int64_t* before) {
  const int64_t reach = (kernel - 1) * dilation + 1;
  if (padding < 0) {
    const int64_t out = (in + stride - 1) / stride, total = (out - 1) * stride + reach - in;
    *before = total > 0 ? total / 2 : 0;
    return out;
  }
  *before = padding;
  const int64_t span = in + 2 * padding - reach;
  return span < 0 ? 0 : span / stride + 1;
}

// Dense channels_last memory.
inline Tensor empty_image(int64_t batch, int64_t channels, int64_t height, int64_t width, ScalarType type) {
  return empty({batch, channels, height, width}, {height * width * channels, 1, width * channels, channels}, type);
}

inline void check_geometry(int64_t stride, int64_t padding, int64_t dilation) {
  constexpr int64_t kMost = 1 << 20;
  check(stride >= 1 && stride <= kMost, "stride must be at least 1, got ", stride);
  check(dilation >= 1 && dilation <= kMost, "dilation must be at least 1, got ", dilation);
  check(padding >= -1 && padding <= kMost, "padding must be at least 0, or -1 for 'same', got ", padding);
}

// Of a dense convolution whose kernel, batch, height and width are set: stride, padding and the output's size.
template <class Shape>
void set_geometry(ConvArgs* conv, const Shape& shape, int64_t stride, int64_t padding) {
  check_geometry(stride, padding, 1);
  conv->stride = stride;
  conv->out_height = out_size(conv->height, conv->dims.kernel, stride, padding, 1, &conv->pad_top);
  conv->out_width = out_size(conv->width, conv->dims.kernel, stride, padding, 1, &conv->pad_left);
  check(conv->batch == 0 || (conv->out_height > 0 && conv->out_width > 0), "x of shape ", shape,
        " is smaller than the kernel with its padding");
}

}  // namespace mbv2
