// The phases of a training step as torch ops, CPU: checks arguments, allocates, calls the core. What a phase computes
// stands in core/train.h and core/train_window.h. LibTorch's stable ABI only, as in ops.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "core/train.h"
#include "core/train_block.h"
#include "core/train_norm.h"
#include "core/train_window.h"
#include "parallel.h"

namespace {

using mbv2::check;
using mbv2::check_geometry;
using mbv2::check_tensor;
using mbv2::clamp_of;
using mbv2::empty;
using mbv2::empty_image;
using mbv2::LinearNorm;
using mbv2::MemoryFormat;
using mbv2::Norm;
using mbv2::NormSums;
using mbv2::OptionalTensor;
using mbv2::out_size;
using mbv2::ScalarType;
using mbv2::shape_of;
using mbv2::Tensor;
using mbv2::Tier;
using mbv2::TrainArgs;
using mbv2::TrainPhase;
using mbv2::WindowArgs;
using mbv2::WindowPhase;

Tensor none(ScalarType type) { return empty({0}, {1}, type); }

template <class T>
Tensor result(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType dtype,
              T** pointer) {
  Tensor t = empty(sizes, strides, dtype);
  *pointer = static_cast<T*>(t.mutable_data_ptr());
  return t;
}
Tensor doubles(int64_t channels, double** pointer) { return result({channels}, {1}, ScalarType::Double, pointer); }
Tensor floats(int64_t channels, float** pointer) { return result({channels}, {1}, ScalarType::Float, pointer); }
Tensor new_statistics(int64_t channels, double** pointer) {
  return result({3, channels}, {channels, 1}, ScalarType::Double, pointer);
}

// Asked here: the dispatcher takes a while to find out that there is nothing to do.
Tensor channels_last(const Tensor& t) {
  const int64_t channels = t.size(1), height = t.size(2), width = t.size(3);
  const bool is = t.stride(1) == 1 && t.stride(3) == channels && t.stride(2) == width * channels &&
                  t.stride(0) == height * width * channels;
  return is ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

// Contiguous vectors and matrices on the CPU, with the copies that this took. A 1x1 convolution's weight is a matrix.
class Vectors {
 public:
  const float* floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
    return static_cast<const float*>(data(name, t, sizes, ScalarType::Float, "float32"));
  }
  const double* doubles(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
    return static_cast<const double*>(data(name, t, sizes, ScalarType::Double, "float64"));
  }
  Norm norm(const Tensor& statistics, const Tensor& gamma, const Tensor* beta, double eps) {
    check(statistics.dim() == 2 && (statistics.size(0) == 2 || statistics.size(0) == 3),
          "statistics must be [3, channels], or fixed ones [2, channels], got ", shape_of(statistics));
    const int64_t channels = statistics.size(1);
    return {channels,
            doubles("statistics", statistics, {statistics.size(0), channels}),
            statistics.size(0) == 2,
            floats("gamma", gamma, {channels}),
            beta ? floats("beta", *beta, {channels}) : nullptr,
            eps};
  }
  LinearNorm linear(const Tensor& weight, const Norm& norm) {
    check(weight.dim() >= 2, "weight must be [channels, in], got ", shape_of(weight));
    return {norm, weight.size(1), floats("weight", weight, {norm.channels, weight.size(1)})};
  }
  NormSums sums(int64_t channels, const Tensor& g, const Tensor& gv, const Tensor& all_g, const Tensor& all_gv) {
    return {doubles("sum_g", g, {channels}), doubles("sum_gv", gv, {channels}), doubles("all_g", all_g, {channels}),
            doubles("all_gv", all_gv, {channels})};
  }

 private:
  const void* data(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType type,
                   const char* type_name) {
    const int64_t dims = static_cast<int64_t>(sizes.size());
    bool same = t.is_cpu() && t.scalar_type() == type && t.dim() >= dims;
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == (i < dims ? sizes.begin()[i] : 1);
    if (!same) {
      std::ostringstream expected;
      for (int64_t size : sizes) expected << (expected.str().empty() ? "" : ", ") << size;
      check(false, name, " must be a ", type_name, " CPU tensor [", expected.str(), "], got shape ", shape_of(t));
    }
    held_.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return held_.back().const_data_ptr();
  }
  std::vector<Tensor> held_;
};

// A phase's arguments while they are collected, with the tensors that they point into.
class Phase {
 public:
  explicit Phase(TrainPhase phase) { a.phase = phase; }

  // An image, dense channels_last from here on. The first one says what the storage type is.
  const void* image(const char* name, const Tensor& t, int64_t channels, int64_t height, int64_t width) {
    check_tensor(name, t, 4);
    check(t.scalar_type() == type && t.size(0) == a.batch && t.size(1) == channels && t.size(2) == height &&
              t.size(3) == width,
          name, " must be [", a.batch, ", ", channels, ", ", height, ", ", width, "] in the other tensors' type, got ",
          shape_of(t));
    return data(channels_last(t));
  }

  const float* floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
    return vectors_.floats(name, t, sizes);
  }
  const float* floats(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> sizes) {
    return t ? floats(name, *t, sizes) : nullptr;
  }

  void input(const Tensor& x) {
    check_tensor("x", x, 4);
    set_type(x);
    a.batch = x.size(0);
    a.dims.in_channels = x.size(1);
    a.height = x.size(2);
    a.width = x.size(3);
    a.x = image("x", x, x.size(1), x.size(2), x.size(3));
  }

  // z alone, in the phases that see nothing but the block's end
  void output(const Tensor& z, const Tensor& scale3, const Tensor& shift3, const std::string& final_activation) {
    check_tensor("z", z, 4);
    set_type(z);
    a.batch = z.size(0);
    a.dims.out_channels = z.size(1);
    a.out_height = z.size(2);
    a.out_width = z.size(3);
    block_end(z, scale3, shift3, final_activation);
  }
  void block_end(const Tensor& z, const Tensor& scale3, const Tensor& shift3, const std::string& final_activation) {
    const int64_t channels = a.dims.out_channels;
    a.z = image("z", z, channels, a.out_height, a.out_width);
    a.scale3 = floats("scale3", scale3, {channels});
    a.shift3 = floats("shift3", shift3, {channels});
    a.final_activation = clamp_of("final_activation", final_activation);
  }
  // gz = a3 * g3 + b3 * z + c3
  void gradient(const Tensor& gy, const Tensor& a3, const Tensor& b3, const Tensor& c3) {
    gradient(gy);
    a.a3 = floats("a3", a3, {a.dims.out_channels});
    a.b3 = floats("b3", b3, {a.dims.out_channels});
    a.c3 = floats("c3", c3, {a.dims.out_channels});
  }
  void gradient(const Tensor& gy) { a.gy = image("gy", gy, a.dims.out_channels, a.out_height, a.out_width); }

  void hidden(const Tensor& x, const OptionalTensor& w1, const OptionalTensor& b1, const Tensor& wd, int64_t stride,
              int64_t padding, int64_t dilation, const std::string& activation) {
    check(w1.has_value() == b1.has_value(), "w1 and b1 must be given or missing together");
    depthwise(x, w1.has_value(), wd, stride, padding, dilation, activation);
    a.w1 = floats("w1", w1, {a.dims.hidden_channels, a.dims.in_channels});
    a.b1 = floats("b1", b1, {a.dims.hidden_channels});
  }
  void depthwise(const Tensor& x, bool expand, const Tensor& wd, int64_t stride, int64_t padding, int64_t dilation,
                 const std::string& activation) {
    input(x);
    check_geometry(stride, padding, dilation);
    check_tensor("wd", wd, 4);
    const int64_t channels = wd.size(0), kernel = wd.size(2);
    check(channels >= 1 && kernel % 2 == 1 && kernel <= mbv2::kMaxKernel, "wd must be [C, 1, k, k] with odd k up to ",
          mbv2::kMaxKernel, ", got ", shape_of(wd));
    check(expand || channels == a.dims.in_channels, "without w1, wd must have x's ", a.dims.in_channels,
          " channels, got ", channels);
    a.dims.hidden_channels = channels;
    a.dims.kernel = static_cast<int>(kernel);
    a.dims.expand = expand;
    a.stride = stride;
    a.dilation = dilation;
    a.activation = clamp_of("activation", activation);
    a.wd = floats("wd", wd, {channels, 1, kernel, kernel});
    a.out_height = out_size(a.height, kernel, stride, padding, dilation, &a.pad_top);
    a.out_width = out_size(a.width, kernel, stride, padding, dilation, &a.pad_left);
    check(a.batch == 0 || (a.out_height > 0 && a.out_width > 0), "x of shape ", shape_of(x),
          " is smaller than the depthwise kernel with its padding");
  }

  void project(const OptionalTensor& d, const Tensor& scale2, const Tensor& shift2, const Tensor& w2) {
    const int64_t channels = a.dims.hidden_channels;
    if (d) a.d = image("d", *d, channels, a.out_height, a.out_width);
    a.scale2 = floats("scale2", scale2, {channels});
    a.shift2 = floats("shift2", shift2, {channels});
    project(w2);
  }
  void project(const Tensor& w2) {
    const int64_t channels = a.dims.hidden_channels;
    check(w2.dim() >= 2 && w2.size(0) >= 1, "w2 must be [out, ", channels, "], got ", shape_of(w2));
    a.dims.out_channels = w2.size(0);
    a.w2 = floats("w2", w2, {a.dims.out_channels, channels});
  }

  // A lone 1x1 convolution w: `project` with x for d, and no BatchNorm before it.
  void pointwise(const Tensor& x, const Tensor& w) {
    input(x);
    const int64_t channels = a.dims.in_channels;
    a.dims.hidden_channels = channels;
    a.dims.kernel = 1;
    a.stride = a.dilation = 1;
    a.out_height = a.height;
    a.out_width = a.width;
    a.activation = mbv2::kNoClamp;
    a.d = a.x;
    ones_.assign(static_cast<size_t>(channels), 1.0f);
    zeros_.assign(static_cast<size_t>(channels), 0.0f);
    a.scale2 = ones_.data();
    a.shift2 = zeros_.data();
    check(w.dim() == 2 && w.size(0) >= 1, "w must be [out, ", channels, "], got ", shape_of(w));
    a.dims.out_channels = w.size(0);
    a.w2 = floats("w", w, {a.dims.out_channels, channels});
  }

  Tensor new_image(int64_t channels, int64_t height, int64_t width, ScalarType dtype, void** pointer) {
    Tensor t = empty_image(a.batch, channels, height, width, dtype);
    *pointer = t.mutable_data_ptr();
    return t;
  }
  void run() const {
    const Tier tier = mbv2::active_tier();
    mbv2::run_train(a, tier, mbv2::torch_parallel());
    mbv2::count_call(tier);
  }

  TrainArgs a = {};
  ScalarType type = ScalarType::Float;

 private:
  void set_type(const Tensor& t) {
    type = t.scalar_type();
    mbv2::storage_type(type, &a.dtype);
  }
  const void* data(const Tensor& t) {
    held_.push_back(t);
    return t.const_data_ptr();
  }
  std::vector<Tensor> held_;
  std::vector<float> ones_, zeros_;
  Vectors vectors_;
};

std::tuple<Tensor, Tensor> train_gram(Tensor x) {
  Phase p(TrainPhase::gram);
  p.input(x);
  const int64_t channels = x.size(1);
  Tensor sum = doubles(channels, &p.a.sum);
  Tensor gram = result({channels, channels}, {channels, 1}, ScalarType::Double, &p.a.gram);
  p.run();
  return {sum, gram};
}

std::tuple<Tensor, Tensor, Tensor> train_depthwise(Tensor x, OptionalTensor w1, OptionalTensor b1, Tensor wd,
                                                   int64_t stride, int64_t padding, int64_t dilation,
                                                   std::string activation, bool keep) {
  Phase p(TrainPhase::depthwise);
  p.hidden(x, w1, b1, wd, stride, padding, dilation, activation);
  const int64_t channels = wd.size(0);
  Tensor d = keep ? p.new_image(channels, p.a.out_height, p.a.out_width, p.type, &p.a.d_out) : none(p.type);
  Tensor sum = doubles(channels, &p.a.sum), squares = doubles(channels, &p.a.sum_product);
  p.run();
  return {d, sum, squares};
}

std::tuple<Tensor, Tensor, Tensor> train_project(Tensor x, OptionalTensor d, OptionalTensor w1, OptionalTensor b1,
                                                 Tensor wd, Tensor scale2, Tensor shift2, Tensor w2, int64_t stride,
                                                 int64_t padding, int64_t dilation, std::string activation) {
  Phase p(TrainPhase::project);
  p.hidden(x, w1, b1, wd, stride, padding, dilation, activation);
  p.project(d, scale2, shift2, w2);
  const int64_t channels = w2.size(0);
  Tensor z = p.new_image(channels, p.a.out_height, p.a.out_width, p.type, &p.a.z_out);
  Tensor sum = doubles(channels, &p.a.sum), squares = doubles(channels, &p.a.sum_product);
  p.run();
  return {z, sum, squares};
}

Tensor train_finish(Tensor z, OptionalTensor x, Tensor scale3, Tensor shift3, std::string final_activation) {
  Phase p(TrainPhase::finish);
  p.output(z, scale3, shift3, final_activation);
  if (x) p.a.x = p.image("x", *x, z.size(1), z.size(2), z.size(3));
  Tensor y = p.new_image(z.size(1), z.size(2), z.size(3), p.type, &p.a.y);
  p.run();
  return y;
}

std::tuple<Tensor, Tensor> train_finish_backward(Tensor gy, Tensor z, Tensor scale3, Tensor shift3,
                                                 std::string final_activation) {
  Phase p(TrainPhase::finish_backward);
  p.output(z, scale3, shift3, final_activation);
  p.gradient(gy);
  Tensor sum = doubles(z.size(1), &p.a.sum), product = doubles(z.size(1), &p.a.sum_product);
  p.run();
  return {sum, product};
}

void check_needs(const std::vector<bool>& needs) {
  check(needs.size() == 2, "needs must have 2 elements, got ", needs.size());
}

std::tuple<Tensor, Tensor, Tensor> train_project_backward(Tensor gy, Tensor z, Tensor scale3, Tensor shift3, Tensor a3,
                                                          Tensor b3, Tensor c3, std::string final_activation, Tensor x,
                                                          OptionalTensor d, OptionalTensor w1, OptionalTensor b1,
                                                          Tensor wd, Tensor scale2, Tensor shift2, Tensor w2,
                                                          int64_t stride, int64_t padding, int64_t dilation,
                                                          std::string activation, std::vector<bool> needs) {
  check_needs(needs);
  Phase p(TrainPhase::project_backward);
  p.hidden(x, w1, b1, wd, stride, padding, dilation, activation);
  p.project(d, scale2, shift2, w2);
  p.block_end(z, scale3, shift3, final_activation);
  p.gradient(gy, a3, b3, c3);
  const int64_t hidden = wd.size(0), out = w2.size(0);
  Tensor gw2 = needs[0] ? result({out, hidden}, {hidden, 1}, ScalarType::Float, &p.a.gw2) : none(ScalarType::Float);
  Tensor sum = needs[1] ? doubles(hidden, &p.a.sum) : none(ScalarType::Double);
  Tensor product = needs[1] ? doubles(hidden, &p.a.sum_product) : none(ScalarType::Double);
  if (needs[0] || needs[1]) p.run();
  return {gw2, sum, product};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_depthwise_backward(
    Tensor gy, Tensor z, Tensor scale3, Tensor shift3, Tensor a3, Tensor b3, Tensor c3, std::string final_activation,
    Tensor x, OptionalTensor d, OptionalTensor w1, OptionalTensor b1, Tensor wd, Tensor scale2, Tensor shift2,
    Tensor a2, Tensor b2, Tensor c2, Tensor w2, int64_t stride, int64_t padding, int64_t dilation,
    std::string activation, std::vector<bool> needs) {
  check_needs(needs);
  Phase p(TrainPhase::depthwise_backward);
  p.hidden(x, w1, b1, wd, stride, padding, dilation, activation);
  p.project(d, scale2, shift2, w2);
  p.block_end(z, scale3, shift3, final_activation);
  p.gradient(gy, a3, b3, c3);
  const int64_t in = x.size(1), hidden = wd.size(0), kernel = wd.size(2);
  p.a.a2 = p.floats("a2", a2, {hidden});
  p.a.b2 = p.floats("b2", b2, {hidden});
  p.a.c2 = p.floats("c2", c2, {hidden});
  Tensor g = none(ScalarType::Float), t = none(ScalarType::Float), gwd = none(ScalarType::Float);
  Tensor sum = none(ScalarType::Double);
  if (needs[0]) {
    void* pointer;
    g = p.new_image(in, x.size(2), x.size(3), ScalarType::Float, &pointer);
    p.a.g_out = static_cast<float*>(pointer);
  }
  if (needs[0] && w1) {
    t = result({hidden, in}, {in, 1}, ScalarType::Float, &p.a.t);
    sum = doubles(hidden, &p.a.sum);
  }
  if (needs[1]) {
    gwd =
        result({hidden, 1, kernel, kernel}, {kernel * kernel, kernel * kernel, kernel, 1}, ScalarType::Float, &p.a.gwd);
  }
  if (needs[0] || needs[1]) p.run();
  return {g, gwd, t, sum};
}

Tensor train_input_backward(Tensor g, Tensor x, OptionalTensor m, OptionalTensor c0, OptionalTensor gy) {
  Phase p(TrainPhase::input_backward);
  p.input(x);
  const int64_t channels = x.size(1);
  check(g.is_cpu() && g.scalar_type() == ScalarType::Float && g.dim() == 4 && g.size(0) == x.size(0) &&
            g.size(1) == channels && g.size(2) == x.size(2) && g.size(3) == x.size(3),
        "g must be a float32 CPU tensor of x's shape ", shape_of(x), ", got ", shape_of(g));
  const Tensor rows = channels_last(g);
  p.a.g = static_cast<const float*>(rows.const_data_ptr());
  check(m.has_value() == c0.has_value(), "m and c0 must be given or missing together");
  p.a.m = p.floats("m", m, {channels, channels});
  p.a.c0 = p.floats("c0", c0, {channels});
  if (gy) p.a.gy = p.image("gy", *gy, channels, x.size(2), x.size(3));
  Tensor gx = p.new_image(channels, x.size(2), x.size(3), p.type, &p.a.gx);
  p.run();
  return gx;
}

// ---- Dense layers around the blocks ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> train_pointwise(Tensor x, Tensor w) {
  Phase p(TrainPhase::project);
  p.pointwise(x, w);
  const int64_t channels = w.size(0);
  Tensor z = p.new_image(channels, p.a.out_height, p.a.out_width, p.type, &p.a.z_out);
  Tensor sum = doubles(channels, &p.a.sum), squares = doubles(channels, &p.a.sum_product);
  p.run();
  return {z, sum, squares};
}

std::tuple<Tensor, Tensor> train_pointwise_backward(Tensor gy, Tensor z, Tensor scale, Tensor shift, Tensor a, Tensor b,
                                                    Tensor c, std::string activation, Tensor x, Tensor w,
                                                    std::vector<bool> needs) {
  check_needs(needs);
  Phase p(TrainPhase::project_backward);
  p.pointwise(x, w);
  p.block_end(z, scale, shift, activation);
  p.gradient(gy);
  const int64_t in = x.size(1), out = w.size(0);
  p.a.a3 = p.floats("a", a, {out});
  p.a.b3 = p.floats("b", b, {out});
  p.a.c3 = p.floats("c", c, {out});
  Tensor gw = needs[0] ? result({out, in}, {in, 1}, ScalarType::Float, &p.a.gw2) : none(ScalarType::Float);
  Tensor gx = needs[1] ? p.new_image(in, x.size(2), x.size(3), p.type, &p.a.gh) : none(p.type);
  if (needs[0] || needs[1]) p.run();
  return {gw, gx};
}

// A phase of a k x k convolution, but for its results. x is read as it lies.
WindowArgs window_args(WindowPhase phase, const Tensor& x, int64_t out_channels, int64_t kernel, int64_t stride,
                       int64_t padding) {
  check_tensor("x", x, 4);
  check(kernel >= 1 && kernel <= mbv2::kMaxKernel, "the kernel's size must be 1 to ", mbv2::kMaxKernel, ", got ",
        kernel);
  WindowArgs w = {};
  w.phase = phase;
  mbv2::ConvArgs& a = w.conv;
  a.dims = {x.size(1), out_channels, static_cast<int>(kernel)};
  a.batch = x.size(0);
  a.height = x.size(2);
  a.width = x.size(3);
  mbv2::storage_type(x.scalar_type(), &a.dtype);
  mbv2::set_geometry(&a, shape_of(x), stride, padding);
  a.x = x.const_data_ptr();
  a.x_stride_image = x.stride(0);
  a.x_stride_channel = x.stride(1);
  a.x_stride_row = x.stride(2);
  a.x_stride_pixel = x.stride(3);
  return w;
}

void run(const WindowArgs& w) {
  const Tier tier = mbv2::active_tier();
  mbv2::run_window(w, tier, mbv2::torch_parallel());
  mbv2::count_call(tier);
}

std::tuple<Tensor, Tensor> train_window_gram(Tensor x, int64_t kernel_size, int64_t stride, int64_t padding) {
  WindowArgs w = window_args(WindowPhase::gram, x, 1, kernel_size, stride, padding);
  const int64_t depth = x.size(1) * kernel_size * kernel_size;
  Tensor sum = doubles(depth, &w.sum), gram = result({depth, depth}, {depth, 1}, ScalarType::Double, &w.gram);
  run(w);
  return {sum, gram};
}

std::tuple<Tensor, Tensor> train_window_backward(Tensor gy, Tensor x, Tensor w1, Tensor b1, int64_t stride,
                                                 int64_t padding, std::string activation) {
  check_tensor("w1", w1, 4);
  const int64_t channels = w1.size(0), in = w1.size(1), kernel = w1.size(2), depth = in * kernel * kernel;
  WindowArgs w = window_args(WindowPhase::backward, x, channels, kernel, stride, padding);
  w.conv.activation = clamp_of("activation", activation);
  Vectors v;
  w.w1 = v.floats("w1", w1, {channels, x.size(1), kernel, kernel});
  w.b1 = v.floats("b1", b1, {channels});
  check_tensor("gy", gy, 4);
  check(gy.scalar_type() == x.scalar_type() && gy.size(0) == x.size(0) && gy.size(1) == channels &&
            gy.size(2) == w.conv.out_height && gy.size(3) == w.conv.out_width,
        "gy must be [", x.size(0), ", ", channels, ", ", w.conv.out_height, ", ", w.conv.out_width,
        "] in x's type, got ", shape_of(gy));
  const Tensor rows = channels_last(gy);
  w.gy = rows.const_data_ptr();
  Tensor t = result({channels, depth}, {depth, 1}, ScalarType::Float, &w.t), sum = doubles(channels, &w.sum);
  run(w);
  return {t, sum};
}

// ---- Between the phases: BatchNorm ----------------------------------------------------------------------------------

double number(const char* name, const Tensor& t) { return *Vectors().doubles(name, t, {1}); }

Tensor train_statistics(Tensor total, Tensor squares, Tensor pixels) {
  Vectors v;
  check(total.dim() == 1, "total must be [channels], got ", shape_of(total));
  const int64_t channels = total.size(0);
  double* out;
  Tensor statistics = new_statistics(channels, &out);
  mbv2::statistics(channels, v.doubles("total", total, {channels}), v.doubles("squares", squares, {channels}),
                   number("pixels", pixels), out);
  return statistics;
}

std::tuple<Tensor, Tensor> train_linear_statistics(Tensor weight, Tensor sum_x, Tensor gram, Tensor pixels) {
  Vectors v;
  Norm norm = {};
  norm.channels = weight.size(0);
  const LinearNorm linear = v.linear(weight, norm);
  const int64_t in = linear.in_channels;
  double *out, *mean;
  Tensor statistics = new_statistics(norm.channels, &out), mean_x = doubles(in, &mean);
  mbv2::linear_statistics(linear, v.doubles("sum_x", sum_x, {in}), v.doubles("gram", gram, {in, in}),
                          number("pixels", pixels), mbv2::active_tier(), mbv2::torch_parallel(), out, mean);
  return {statistics, mean_x};
}

std::tuple<Tensor, Tensor> train_norm(Tensor statistics, Tensor gamma, Tensor beta, double eps) {
  Vectors v;
  const Norm norm = v.norm(statistics, gamma, &beta, eps);
  float *scale, *shift;
  Tensor scales = floats(norm.channels, &scale), shifts = floats(norm.channels, &shift);
  mbv2::norm(norm, scale, shift);
  return {scales, shifts};
}

std::tuple<Tensor, Tensor> train_fold_expand(Tensor weight, Tensor statistics, Tensor gamma, Tensor beta, double eps,
                                             Tensor mean_x) {
  Vectors v;
  const LinearNorm linear = v.linear(weight, v.norm(statistics, gamma, &beta, eps));
  const int64_t channels = linear.norm.channels, in = linear.in_channels;
  float *w1, *b1;
  Tensor weights = result({channels, in}, {in, 1}, ScalarType::Float, &w1), biases = floats(channels, &b1);
  mbv2::fold(linear, linear.norm.fixed ? nullptr : v.doubles("mean_x", mean_x, {in}), mbv2::active_tier(),
             mbv2::torch_parallel(), w1, b1);
  return {weights, biases};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_norm_backward(Tensor statistics, Tensor gamma,
                                                                               double eps, Tensor sum_g, Tensor sum_gv,
                                                                               Tensor all_g, Tensor all_gv) {
  Vectors v;
  const Norm norm = v.norm(statistics, gamma, nullptr, eps);
  mbv2::NormGradients out;
  Tensor a = floats(norm.channels, &out.a), b = floats(norm.channels, &out.b), c = floats(norm.channels, &out.c);
  Tensor bias = floats(norm.channels, &out.bias), gradient_gamma = floats(norm.channels, &out.gamma);
  Tensor beta = floats(norm.channels, &out.beta);
  mbv2::norm_backward(norm, v.sums(norm.channels, sum_g, sum_gv, all_g, all_gv), out);
  return {a, b, c, bias, gradient_gamma, beta};
}

// As nn.BatchNorm2d keeps them: with the unbiased variance; momentum NaN: the cumulative average.
void update_running(const Tensor& statistics, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                    const Tensor& count, double momentum) {
  const double* found = static_cast<const double*>(statistics.const_data_ptr());
  const float* biases = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  float *means = static_cast<float*>(mean.mutable_data_ptr()), *variances = static_cast<float*>(var.mutable_data_ptr());
  const int64_t batches = ++*static_cast<int64_t*>(count.mutable_data_ptr()), channels = statistics.size(1);
  const float factor = static_cast<float>(std::isnan(momentum) ? 1 / static_cast<double>(batches) : momentum);
  const auto move = [factor](float* running, double now) { *running += factor * (static_cast<float>(now) - *running); };
  for (int64_t c = 0; c < channels; ++c) {
    const double pixels = found[2 * channels + c];
    move(means + c, found[c] + (biases ? static_cast<double>(biases[c]) : 0));
    move(variances + c, found[channels + c] * (pixels / (pixels - 1)));
  }
}

// Of several BatchNorms. False, and nothing has changed, if one's tensors are not such as modules have on the CPU.
bool train_running_statistics(std::vector<Tensor> statistics, std::vector<OptionalTensor> bias,
                              std::vector<Tensor> mean, std::vector<Tensor> var, std::vector<Tensor> count,
                              std::vector<double> momentum) {
  const size_t norms = statistics.size();
  check(bias.size() == norms && mean.size() == norms && var.size() == norms && count.size() == norms &&
            momentum.size() == norms,
        "all lists must have the same length");
  const auto fits = [](const Tensor& t, ScalarType type, int64_t size) {
    return t.is_cpu() && t.scalar_type() == type && t.is_contiguous() && t.numel() == size;
  };
  for (size_t i = 0; i < norms; ++i) {
    check(statistics[i].dim() == 2 && statistics[i].size(0) == 3, "statistics must be [3, channels], got ",
          shape_of(statistics[i]));
    const int64_t channels = statistics[i].size(1);
    if (!fits(statistics[i], ScalarType::Double, 3 * channels) || !fits(mean[i], ScalarType::Float, channels) ||
        !fits(var[i], ScalarType::Float, channels) || !fits(count[i], ScalarType::Long, 1) ||
        (bias[i] && !fits(*bias[i], ScalarType::Float, channels)))
      return false;
  }
  for (size_t i = 0; i < norms; ++i) update_running(statistics[i], bias[i], mean[i], var[i], count[i], momentum[i]);
  return true;
}

Tensor train_linear_sums(Tensor weight, Tensor t) {
  Vectors v;
  Norm norm = {};
  norm.channels = weight.size(0);
  const LinearNorm linear = v.linear(weight, norm);
  double* out;
  Tensor sums = doubles(norm.channels, &out);
  mbv2::linear_sums(linear, v.floats("t", t, {norm.channels, linear.in_channels}), mbv2::active_tier(),
                    mbv2::torch_parallel(), out);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_expand_backward(
    Tensor weight, Tensor w1, Tensor statistics, Tensor gamma, double eps, Tensor t, Tensor sum_g, Tensor sum_gv,
    Tensor all_g, Tensor all_gv, Tensor sum_x, Tensor gram, Tensor mean_x) {
  Vectors v;
  const LinearNorm linear = v.linear(weight, v.norm(statistics, gamma, nullptr, eps));
  const int64_t channels = linear.norm.channels, in = linear.in_channels;
  mbv2::LinearGradients out = {};
  Tensor weights = result({channels, in}, {in, 1}, ScalarType::Float, &out.weight);
  Tensor bias = floats(channels, &out.norm.bias), gradient_gamma = floats(channels, &out.norm.gamma);
  Tensor beta = floats(channels, &out.norm.beta);
  const bool fixed = linear.norm.fixed;
  Tensor m = fixed ? none(ScalarType::Float) : result({in, in}, {in, 1}, ScalarType::Float, &out.m);
  Tensor c0 = fixed ? none(ScalarType::Float) : floats(in, &out.c0);
  mbv2::linear_backward(
      linear, v.floats("w1", w1, {channels, in}), v.floats("t", t, {channels, in}),
      v.sums(channels, sum_g, sum_gv, all_g, all_gv), fixed ? nullptr : v.doubles("sum_x", sum_x, {in}),
      fixed ? nullptr : v.doubles("gram", gram, {in, in}), fixed ? nullptr : v.doubles("mean_x", mean_x, {in}),
      mbv2::active_tier(), mbv2::torch_parallel(), out);
  return {weights, bias, gradient_gamma, beta, m, c0};
}

// ---- A whole block --------------------------------------------------------------------------------------------------
// The chain of phases in core/train_block.h. With more processes that share statistics, it is Python that runs the
// phases, and adds up over them.

// A convolution and its BatchNorm, as they are given.
struct Layer {
  const Tensor* weight;  // null: there is none
  const OptionalTensor &bias, &gamma, &beta, &mean, &var;
};

class Block {
 public:
  Block(const Tensor& x_given, const Layer& expand, const Layer& depthwise, const Layer& project,
        const std::vector<double>& eps, int64_t stride, int64_t padding, int64_t dilation,
        const std::string& activation, const std::string& final_activation, bool residual)
      : layers_{expand, depthwise, project}, eps_(eps), phase_(TrainPhase::depthwise) {
    check(eps.size() == 3, "eps must be 3 (expand, depthwise, project), got ", eps.size());
    check_tensor("x", x_given, 4);
    const Tensor x = channels_last(x_given);
    phase_.depthwise(x, expand.weight != nullptr, fp32(*depthwise.weight), stride, padding, dilation, activation);
    phase_.project(fp32(*project.weight));
    TrainArgs& a = phase_.a;
    a.final_activation = clamp_of("final_activation", final_activation);
    block.w1 = expand.weight ? phase_.floats("weight1", fp32(*expand.weight), {hidden(), in()}) : nullptr;
    block.wd = a.wd;
    block.w2 = a.w2;
    block.residual = residual;
    check(!residual || (in() == out() && a.height == a.out_height && a.width == a.out_width),
          "a block with a residual must keep x's shape ", shape_of(x));
    a.w1 = a.wd = a.w2 = nullptr;  // not what all phases share
    block.shape = a;
  }

  int64_t in() const { return phase_.a.dims.in_channels; }
  int64_t hidden() const { return phase_.a.dims.hidden_channels; }
  int64_t out() const { return phase_.a.dims.out_channels; }
  ScalarType type() const { return phase_.type; }

  // of_batch: the batch's statistics where the layer uses them; null: the running ones, or those of no BatchNorm
  Norm norm(size_t layer, int64_t channels, const Tensor* of_batch) {
    Norm norm = without_statistics(layer, channels);
    if (of_batch)
      norm.statistics = vectors_.doubles("statistics", *of_batch, {3, channels});
    else
      fix(layer, &norm);
    return norm;
  }
  Norm without_statistics(size_t layer, int64_t channels) {
    const Layer& of = layers_[layer];
    const float* gamma = of.gamma ? vectors_.floats("gamma", fp32(*of.gamma), {channels}) : filled(channels, 1);
    const float* beta = of.beta ? vectors_.floats("beta", fp32(*of.beta), {channels}) : filled(channels, 0);
    return {channels, nullptr, false, gamma, beta, eps_[layer]};
  }

  const void* image(const char* name, const Tensor& t, int64_t channels) {
    return phase_.image(name, t, channels, block.shape.out_height, block.shape.out_width);
  }
  // of x's height and width
  const void* image_of_x(const char* name, const Tensor& t, int64_t channels) {
    return phase_.image(name, t, channels, block.shape.height, block.shape.width);
  }
  Tensor new_image(int64_t channels, void** pointer) {
    return phase_.new_image(channels, block.shape.out_height, block.shape.out_width, type(), pointer);
  }
  Tensor new_e(float** pointer) {
    void* memory;
    Tensor e = phase_.new_image(hidden(), block.shape.height, block.shape.width, ScalarType::Float, &memory);
    *pointer = static_cast<float*>(memory);
    return e;
  }
  Tensor new_x(void** pointer) {
    return phase_.new_image(in(), block.shape.height, block.shape.width, type(), pointer);
  }
  const double* doubles(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
    return vectors_.doubles(name, t, sizes);
  }

  mbv2::TrainBlock block = {};

 private:
  const Tensor& fp32(const Tensor& t) {
    if (t.scalar_type() == ScalarType::Float) return t;
    converted_.push_back(torch::stable::to(t, ScalarType::Float));
    return converted_.back();
  }
  const float* filled(int64_t channels, float value) {
    numbers_.emplace_back(static_cast<size_t>(channels), value);
    return numbers_.back().data();
  }
  void fix(size_t layer, Norm* norm) {
    const auto& [weight, bias, gamma, beta, mean, var] = layers_[layer];
    const int64_t channels = norm->channels;
    const auto given = [&](const char* name, const OptionalTensor& t) {
      return t ? vectors_.doubles(name, torch::stable::to(*t, ScalarType::Double), {channels}) : nullptr;
    };
    const bool both = mean && var;
    const double *means = both ? given("mean", mean) : nullptr, *variances = both ? given("var", var) : nullptr;
    const double* biases = given("bias", bias);
    statistics_.emplace_back(static_cast<size_t>(2 * channels));
    double* to = statistics_.back().data();
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = (means ? means[c] : 0) - (biases ? biases[c] : 0);
      to[channels + c] = variances ? variances[c] : 1;
    }
    norm->statistics = to;
    norm->fixed = true;
  }

  const Layer layers_[3];
  const std::vector<double>& eps_;
  Phase phase_;
  Vectors vectors_;
  std::deque<Tensor> converted_;
  std::deque<std::vector<float>> numbers_;
  std::deque<std::vector<double>> statistics_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_block_forward(
    Tensor x, OptionalTensor weight1, OptionalTensor bias1, OptionalTensor gamma1, OptionalTensor beta1,
    OptionalTensor mean1, OptionalTensor var1, Tensor weight2, OptionalTensor bias2, OptionalTensor gamma2,
    OptionalTensor beta2, OptionalTensor mean2, OptionalTensor var2, Tensor weight3, OptionalTensor bias3,
    OptionalTensor gamma3, OptionalTensor beta3, OptionalTensor mean3, OptionalTensor var3, std::vector<double> eps,
    int64_t stride, int64_t padding, int64_t dilation, std::string activation, std::string final_activation,
    bool residual, std::vector<bool> batch, bool keep, bool keep_e) {
  check(batch.size() == 3, "batch must be 3 (expand, depthwise, project), got ", batch.size());
  Block given(x, {weight1 ? &*weight1 : nullptr, bias1, gamma1, beta1, mean1, var1},
              {&weight2, bias2, gamma2, beta2, mean2, var2}, {&weight3, bias3, gamma3, beta3, mean3, var3}, eps, stride,
              padding, dilation, activation, final_activation, residual);
  mbv2::TrainForward to = {};
  const int64_t in = given.in(), hidden = given.hidden(), out = given.out();
  const auto norm = [&](size_t layer, int64_t channels, double** found) {
    if (!batch[layer]) return std::make_pair(given.norm(layer, channels, nullptr), none(ScalarType::Double));
    return std::make_pair(given.without_statistics(layer, channels), new_statistics(channels, found));
  };
  Tensor statistics1 = none(ScalarType::Double), statistics2 = statistics1, statistics3 = statistics1;
  Tensor mean_x = none(ScalarType::Double), sum_x = none(ScalarType::Double), gram = none(ScalarType::Double);
  if (weight1) {
    std::tie(given.block.expand, statistics1) = norm(0, hidden, &to.expand);
    if (batch[0]) {
      mean_x = doubles(in, &to.mean_x);
      sum_x = doubles(in, &to.sum_x);
      gram = result({in, in}, {in, 1}, ScalarType::Double, &to.gram);
    }
  }
  std::tie(given.block.depthwise, statistics2) = norm(1, hidden, &to.depthwise);
  std::tie(given.block.project, statistics3) = norm(2, out, &to.project);
  // d is kept until z is there in lean memory too: one block's d for a moment costs less than computing it again.
  Tensor d = given.new_image(hidden, &to.d), z = given.new_image(out, &to.z), y = given.new_image(out, &to.y);
  Tensor e = none(ScalarType::Float);
  if (keep && keep_e && mbv2::keeps_e(given.block.shape)) e = given.new_e(&to.e);
  const Tier tier = mbv2::active_tier();
  mbv2::train_forward(given.block, to, tier, mbv2::torch_parallel());
  mbv2::count_call(tier);
  if (!keep) d = none(given.type());
  return {y, d, z, statistics1, statistics2, statistics3, mean_x, sum_x, gram, e};
}

using BlockGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BlockGradients train_block_gradients(Tensor grad, Tensor x, OptionalTensor weight1, OptionalTensor bias1,
                                     OptionalTensor gamma1, OptionalTensor beta1, OptionalTensor mean1,
                                     OptionalTensor var1, Tensor weight2, OptionalTensor bias2, OptionalTensor gamma2,
                                     OptionalTensor beta2, OptionalTensor mean2, OptionalTensor var2, Tensor weight3,
                                     OptionalTensor bias3, OptionalTensor gamma3, OptionalTensor beta3,
                                     OptionalTensor mean3, OptionalTensor var3, std::vector<double> eps, int64_t stride,
                                     int64_t padding, int64_t dilation, std::string activation,
                                     std::string final_activation, bool residual, Tensor d, Tensor z,
                                     Tensor statistics1, Tensor statistics2, Tensor statistics3, Tensor mean_x,
                                     Tensor sum_x, Tensor gram, Tensor e, std::vector<bool> needs, bool rounded) {
  constexpr size_t kGradients = std::tuple_size_v<BlockGradients>;
  check(needs.size() == kGradients, "needs must be ", kGradients, ", got ", needs.size());
  Block given(x, {weight1 ? &*weight1 : nullptr, bias1, gamma1, beta1, mean1, var1},
              {&weight2, bias2, gamma2, beta2, mean2, var2}, {&weight3, bias3, gamma3, beta3, mean3, var3}, eps, stride,
              padding, dilation, activation, final_activation, residual);
  const int64_t in = given.in(), hidden = given.hidden(), out = given.out();
  const auto norm = [&](size_t layer, int64_t channels, const Tensor& statistics) {
    return given.norm(layer, channels, statistics.numel() > 0 ? &statistics : nullptr);
  };
  mbv2::TrainSaved saved = {};
  if (weight1) {
    given.block.expand = norm(0, hidden, statistics1);
    if (!given.block.expand.fixed) {
      saved.mean_x = given.doubles("mean_x", mean_x, {in});
      saved.sum_x = given.doubles("sum_x", sum_x, {in});
      saved.gram = given.doubles("gram", gram, {in, in});
    }
  }
  given.block.depthwise = norm(1, hidden, statistics2);
  given.block.project = norm(2, out, statistics3);
  saved.d = d.dim() == 4 ? given.image("d", d, hidden) : nullptr;
  saved.z = given.image("z", z, out);
  if (e.dim() == 4) {
    check(saved.d && mbv2::keeps_e(given.block.shape), "e is not kept of such a block");
    saved.e = static_cast<const float*>(given.image_of_x("e", e, hidden));
  }
  saved.rounded = rounded;
  check_tensor("grad", grad, 4);
  const void* gy = given.image("grad", grad, out);

  mbv2::TrainGradients to = {};
  OptionalTensor grads[kGradients];
  grads[0] = needs[0] ? given.new_x(&to.x) : none(given.type());
  // Like the leaf, but for its type, and strides of memory in another order.
  const auto learned = [&](size_t first, const Tensor* weight, int64_t channels, mbv2::LayerGradients* layer) {
    float** const to_vectors[] = {&layer->bias, &layer->gamma, &layer->beta};
    if (needs[first] && weight) {
      check(weight->dim() == 4, "a weight must have 4 dimensions, got shape ", shape_of(*weight));
      int64_t sizes[4], strides[4], dense = 1;
      const bool contiguous = weight->is_contiguous();
      for (int64_t i = 3; i >= 0; dense *= sizes[i--]) {
        sizes[i] = weight->size(i);
        strides[i] = contiguous ? weight->stride(i) : dense;
      }
      grads[first] = result({sizes[0], sizes[1], sizes[2], sizes[3]}, {strides[0], strides[1], strides[2], strides[3]},
                            ScalarType::Float, &layer->weight);
    } else {
      grads[first] = none(given.type());
    }
    for (size_t i = 1; i < 4; ++i)
      grads[first + i] = needs[first + i] && weight ? floats(channels, to_vectors[i - 1]) : none(given.type());
  };
  learned(1, weight1 ? &*weight1 : nullptr, hidden, &to.expand);
  learned(5, &weight2, hidden, &to.depthwise);
  learned(9, &weight3, out, &to.project);

  std::vector<Tensor> images;
  const auto image = [&images](int64_t bytes) {
    images.push_back(empty({bytes}, {1}, ScalarType::Byte));
    return images.back().mutable_data_ptr();
  };
  const Tier tier = mbv2::active_tier();
  mbv2::train_backward(given.block, gy, saved, to, image, tier, mbv2::torch_parallel());
  mbv2::count_call(tier);
  return {*grads[0], *grads[1], *grads[2], *grads[3],  *grads[4],  *grads[5], *grads[6],
          *grads[7], *grads[8], *grads[9], *grads[10], *grads[11], *grads[12]};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mbv2, m) {
  m.def("train_gram(Tensor x) -> (Tensor, Tensor)");
  m.def(
      "train_depthwise(Tensor x, Tensor? w1, Tensor? b1, Tensor wd, int stride, int padding, int dilation, "
      "str activation, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def(
      "train_project(Tensor x, Tensor? d, Tensor? w1, Tensor? b1, Tensor wd, Tensor scale2, Tensor shift2, Tensor w2, "
      "int stride, int padding, int dilation, str activation) -> (Tensor, Tensor, Tensor)");
  m.def("train_finish(Tensor z, Tensor? x, Tensor scale3, Tensor shift3, str final_activation) -> Tensor");
  m.def(
      "train_finish_backward(Tensor gy, Tensor z, Tensor scale3, Tensor shift3, str final_activation) "
      "-> (Tensor, Tensor)");
  m.def(
      "train_project_backward(Tensor gy, Tensor z, Tensor scale3, Tensor shift3, Tensor a3, Tensor b3, Tensor c3, "
      "str final_activation, Tensor x, Tensor? d, Tensor? w1, Tensor? b1, Tensor wd, Tensor scale2, Tensor shift2, "
      "Tensor w2, int stride, int padding, int dilation, str activation, bool[2] needs) -> (Tensor, Tensor, Tensor)");
  m.def(
      "train_depthwise_backward(Tensor gy, Tensor z, Tensor scale3, Tensor shift3, Tensor a3, Tensor b3, Tensor c3, "
      "str final_activation, Tensor x, Tensor? d, Tensor? w1, Tensor? b1, Tensor wd, Tensor scale2, Tensor shift2, "
      "Tensor a2, Tensor b2, Tensor c2, Tensor w2, int stride, int padding, int dilation, str activation, "
      "bool[2] needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("train_input_backward(Tensor g, Tensor x, Tensor? m, Tensor? c0, Tensor? gy) -> Tensor");
  m.def("train_pointwise(Tensor x, Tensor w) -> (Tensor, Tensor, Tensor)");
  m.def(
      "train_pointwise_backward(Tensor gy, Tensor z, Tensor scale, Tensor shift, Tensor a, Tensor b, Tensor c, "
      "str activation, Tensor x, Tensor w, bool[2] needs) -> (Tensor, Tensor)");
  m.def("train_window_gram(Tensor x, int kernel_size, int stride, int padding) -> (Tensor, Tensor)");
  m.def(
      "train_window_backward(Tensor gy, Tensor x, Tensor w1, Tensor b1, int stride, int padding, str activation) "
      "-> (Tensor, Tensor)");
  m.def("train_statistics(Tensor total, Tensor squares, Tensor pixels) -> Tensor");
  m.def("train_linear_statistics(Tensor weight, Tensor sum_x, Tensor gram, Tensor pixels) -> (Tensor, Tensor)");
  m.def("train_norm(Tensor statistics, Tensor gamma, Tensor beta, float eps) -> (Tensor, Tensor)");
  m.def(
      "train_fold_expand(Tensor weight, Tensor statistics, Tensor gamma, Tensor beta, float eps, Tensor mean_x) "
      "-> (Tensor, Tensor)");
  m.def(
      "train_norm_backward(Tensor statistics, Tensor gamma, float eps, Tensor sum_g, Tensor sum_gv, Tensor all_g, "
      "Tensor all_gv) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "train_running_statistics(Tensor[] statistics, Tensor?[] bias, Tensor(a!)[] mean, Tensor(b!)[] var, "
      "Tensor(c!)[] count, float[] momentum) -> bool");
  m.def("train_linear_sums(Tensor weight, Tensor t) -> Tensor");
  m.def(
      "train_expand_backward(Tensor weight, Tensor w1, Tensor statistics, Tensor gamma, float eps, Tensor t, "
      "Tensor sum_g, Tensor sum_gv, Tensor all_g, Tensor all_gv, Tensor sum_x, Tensor gram, Tensor mean_x) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
#define MBV2_BLOCK                                                                               \
  "Tensor? weight1, Tensor? bias1, Tensor? gamma1, Tensor? beta1, Tensor? mean1, Tensor? var1, " \
  "Tensor weight2, Tensor? bias2, Tensor? gamma2, Tensor? beta2, Tensor? mean2, Tensor? var2, "  \
  "Tensor weight3, Tensor? bias3, Tensor? gamma3, Tensor? beta3, Tensor? mean3, Tensor? var3, "  \
  "float[] eps, int stride, int padding, int dilation, str activation, str final_activation, bool residual, "
  m.def("train_block_forward(Tensor x, " MBV2_BLOCK
        "bool[3] batch, bool keep, bool keep_e) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
        "Tensor, Tensor)");
  m.def("train_block_gradients(Tensor grad, Tensor x, " MBV2_BLOCK
        "Tensor d, Tensor z, Tensor statistics1, Tensor statistics2, Tensor statistics3, Tensor mean_x, Tensor sum_x, "
        "Tensor gram, Tensor e, bool[13] needs, bool rounded) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
        "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
#undef MBV2_BLOCK
}

STABLE_TORCH_LIBRARY_IMPL(mbv2, CPU, m) {
  m.impl("train_gram", TORCH_BOX(&train_gram));
  m.impl("train_depthwise", TORCH_BOX(&train_depthwise));
  m.impl("train_project", TORCH_BOX(&train_project));
  m.impl("train_finish", TORCH_BOX(&train_finish));
  m.impl("train_finish_backward", TORCH_BOX(&train_finish_backward));
  m.impl("train_project_backward", TORCH_BOX(&train_project_backward));
  m.impl("train_depthwise_backward", TORCH_BOX(&train_depthwise_backward));
  m.impl("train_input_backward", TORCH_BOX(&train_input_backward));
  m.impl("train_pointwise", TORCH_BOX(&train_pointwise));
  m.impl("train_pointwise_backward", TORCH_BOX(&train_pointwise_backward));
  m.impl("train_window_gram", TORCH_BOX(&train_window_gram));
  m.impl("train_window_backward", TORCH_BOX(&train_window_backward));
  m.impl("train_statistics", TORCH_BOX(&train_statistics));
  m.impl("train_linear_statistics", TORCH_BOX(&train_linear_statistics));
  m.impl("train_norm", TORCH_BOX(&train_norm));
  m.impl("train_fold_expand", TORCH_BOX(&train_fold_expand));
  m.impl("train_norm_backward", TORCH_BOX(&train_norm_backward));
  m.impl("train_running_statistics", TORCH_BOX(&train_running_statistics));
  m.impl("train_linear_sums", TORCH_BOX(&train_linear_sums));
  m.impl("train_expand_backward", TORCH_BOX(&train_expand_backward));
  m.impl("train_block_forward", TORCH_BOX(&train_block_forward));
  m.impl("train_block_gradients", TORCH_BOX(&train_block_gradients));
}
