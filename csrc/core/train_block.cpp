#include "train_block.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace mbv2 {
namespace {

// A few numbers for one call each; all are gone when it ends.
class Numbers {
 public:
  double* doubles(int64_t count) {
    held_.emplace_back(new double[static_cast<size_t>(count)]);
    return held_.back().get();
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(doubles((count + 1) / 2)); }

 private:
  std::vector<std::unique_ptr<double[]>> held_;
};

// A BatchNorm as the phases apply it, forward and back.
struct Applied {
  float *scale, *shift;
  const float *a, *b, *c;
};

struct Sums {
  double *of, *product;
};

// The phases of one block, and what each takes beside its results.
class Phases {
 public:
  Phases(const TrainBlock& block, Tier tier, const Parallel& parallel)
      : block_(block),
        tier_(tier),
        parallel_(parallel),
        in_(block.shape.dims.in_channels),
        hidden_(block.shape.dims.hidden_channels) {}

  // Without an expand layer there is none to fold.
  void fold(const Norm& norm, const double* mean_x) {
    if (!block_.shape.dims.expand) return;
    w1_ = numbers.floats(hidden_ * in_);
    b1_ = numbers.floats(hidden_);
    mbv2::fold(linear(norm), norm.fixed ? nullptr : mean_x, tier_, parallel_, w1_, b1_);
  }
  const float* folded() const { return w1_; }
  LinearNorm linear(const Norm& norm) const { return {norm, in_, block_.w1}; }

  // A phase that takes nothing but sizes and clamps; `with_...` add what it reads.
  TrainArgs phase(TrainPhase phase) const {
    TrainArgs a = block_.shape;
    a.phase = phase;
    a.x = nullptr;
    return a;
  }
  TrainArgs with_x(TrainArgs a) const {
    a.x = block_.shape.x;
    return a;
  }
  TrainArgs with_depthwise(TrainArgs a) const {
    a = with_x(a);
    a.w1 = w1_;
    a.b1 = b1_;
    a.wd = block_.wd;
    return a;
  }
  // d, or what it is computed from
  TrainArgs with_d(TrainArgs a, const void* d, const Applied& norm) const {
    if (!d) a = with_depthwise(a);
    a.d = d;
    a.scale2 = norm.scale;
    a.shift2 = norm.shift;
    return a;
  }
  static TrainArgs with_z(TrainArgs a, const void* z, const Applied& norm) {
    a.z = z;
    a.scale3 = norm.scale;
    a.shift3 = norm.shift;
    return a;
  }
  static TrainArgs with_gz(TrainArgs a, const void* gy, const void* z, const Applied& norm) {
    a = with_z(a, z, norm);
    a.gy = gy;
    a.a3 = norm.a;
    a.b3 = norm.b;
    a.c3 = norm.c;
    return a;
  }

  void run(const TrainArgs& a) const { run_train(a, tier_, parallel_); }
  // The phase, and its two sums of `channels` numbers.
  Sums run_sums(TrainArgs a, int64_t channels) {
    const Sums found = {numbers.doubles(channels), numbers.doubles(channels)};
    a.sum = found.of;
    a.sum_product = found.product;
    run(a);
    return found;
  }

  Applied apply(const Norm& norm) {
    Applied to = {numbers.floats(norm.channels), numbers.floats(norm.channels), nullptr, nullptr, nullptr};
    mbv2::norm(norm, to.scale, to.shift);
    return to;
  }
  // The way back with fixed statistics, where nobody asks for the gradients of the BatchNorm's parameters.
  void back_fixed(Applied* to, int64_t channels) {
    float* zeros = numbers.floats(channels);
    std::fill(zeros, zeros + channels, 0.0f);
    to->a = to->scale;
    to->b = to->c = zeros;
  }
  void back(const Norm& norm, const Sums& sums, const LayerGradients& out, Applied* to) {
    const int64_t n = norm.channels;
    float *a = numbers.floats(n), *b = numbers.floats(n), *c = numbers.floats(n);
    norm_backward(norm, {sums.of, sums.product, sums.of, sums.product}, {a, b, c, out.bias, out.gamma, out.beta});
    *to = {to->scale, to->shift, a, b, c};
  }

  Numbers numbers;

 private:
  const TrainBlock& block_;
  const Tier tier_;
  const Parallel& parallel_;
  const int64_t in_, hidden_;
  float *w1_ = nullptr, *b1_ = nullptr;
};

double pixels(int64_t batch, int64_t height, int64_t width) { return static_cast<double>(batch * height * width); }

// With the batch's statistics, from a phase's sums, unless it has others.
Norm with_statistics(Norm norm, const Sums& sums, double pixels, double* out) {
  if (norm.statistics) return norm;
  statistics(norm.channels, sums.of, sums.product, pixels, out);
  norm.statistics = out;
  return norm;
}

}  // namespace

void train_forward(const TrainBlock& block, const TrainForward& out, Tier tier, const Parallel& parallel) {
  const TrainArgs& s = block.shape;
  const double out_pixels = pixels(s.batch, s.out_height, s.out_width);
  Phases phases(block, tier, parallel);
  Norm expand = block.expand;
  if (s.dims.expand && !expand.statistics) {
    TrainArgs gram = phases.with_x(phases.phase(TrainPhase::gram));
    gram.sum = out.sum_x;
    gram.gram = out.gram;
    phases.run(gram);
    linear_statistics(phases.linear(expand), out.sum_x, out.gram, pixels(s.batch, s.height, s.width), tier, parallel,
                      out.expand, out.mean_x);
    expand.statistics = out.expand;
  }
  phases.fold(expand, out.mean_x);

  TrainArgs depthwise = phases.with_depthwise(phases.phase(TrainPhase::depthwise));
  depthwise.d_out = out.d;
  depthwise.e_out = out.e;
  const Sums of_d = phases.run_sums(depthwise, s.dims.hidden_channels);
  const Applied norm2 = phases.apply(with_statistics(block.depthwise, of_d, out_pixels, out.depthwise));

  TrainArgs project = phases.with_d(phases.phase(TrainPhase::project), out.d, norm2);
  project.w2 = block.w2;
  project.z_out = out.z;
  const Sums of_z = phases.run_sums(project, s.dims.out_channels);
  const Applied norm3 = phases.apply(with_statistics(block.project, of_z, out_pixels, out.project));

  TrainArgs finish = phases.with_z(phases.phase(TrainPhase::finish), out.z, norm3);
  if (block.residual) finish = phases.with_x(finish);
  finish.y = out.y;
  phases.run(finish);
}

void train_backward(const TrainBlock& block, const void* gy, const TrainSaved& saved, const TrainGradients& out,
                    const std::function<void*(int64_t)>& image, Tier tier, const Parallel& parallel) {
  const TrainArgs& s = block.shape;
  const int64_t in = s.dims.in_channels, hidden = s.dims.hidden_channels;
  const bool below_depthwise = out.x || out.expand.any(), of_depthwise = below_depthwise || out.depthwise.weight;
  const bool below_project = below_depthwise || out.depthwise.any(), of_project = below_project || out.project.weight;
  const auto asked = [](const LayerGradients& layer) { return layer.bias || layer.gamma || layer.beta; };
  Phases phases(block, tier, parallel);

  Applied norm3 = phases.apply(block.project);
  if (asked(out.project) || (!block.project.fixed && of_project)) {
    TrainArgs finish = phases.with_z(phases.phase(TrainPhase::finish_backward), saved.z, norm3);
    finish.gy = gy;
    const Sums sums = phases.run_sums(finish, s.dims.out_channels);
    phases.back(block.project, sums, out.project, &norm3);
  } else {
    phases.back_fixed(&norm3, s.dims.out_channels);
  }
  if (!of_project) return;

  const int64_t values_of_d = s.batch * s.out_height * s.out_width * hidden;
  phases.fold(block.expand, saved.mean_x);
  const void* d = saved.d;
  if (!d && saved.rounded) {
    TrainArgs again = phases.with_depthwise(phases.phase(TrainPhase::depthwise));
    d = again.d_out = image(values_of_d * (s.dtype == DType::f32 ? 4 : 2));
    phases.run_sums(again, hidden);
  }
  Applied norm2 = phases.apply(block.depthwise);
  const bool need_sums = asked(out.depthwise) || (!block.depthwise.fixed && of_depthwise);
  // Where d was not kept, which is for the sake of memory, neither is g2, which is as large.
  float* g2 = nullptr;
  if (need_sums || out.project.weight) {
    if (saved.d && of_depthwise && keeps_g2(s.dims)) g2 = static_cast<float*>(image(4 * values_of_d));
    TrainArgs project = phases.with_d(phases.phase(TrainPhase::project_backward), d, norm2);
    project = phases.with_gz(project, gy, saved.z, norm3);
    project.w2 = block.w2;
    project.gw2 = out.project.weight;
    project.g2_out = g2;
    if (need_sums)
      phases.back(block.depthwise, phases.run_sums(project, hidden), out.depthwise, &norm2);
    else
      phases.run(project);
  }
  if (!of_depthwise) return;
  if (!need_sums) phases.back_fixed(&norm2, hidden);

  // g lies where the gradient of x will, in fp32, and is that where nothing is to be added.
  const bool in_place = out.x && s.dtype == DType::f32;
  const bool linear = s.dims.expand && !block.expand.fixed;  // m x + c0 belongs to it
  const int64_t values_of_x = s.batch * s.height * s.width * in;
  TrainArgs depthwise = phases.with_depthwise(phases.phase(TrainPhase::depthwise_backward));
  depthwise = phases.with_d(depthwise, d, norm2);
  depthwise.e = saved.e;
  depthwise = phases.with_gz(depthwise, gy, saved.z, norm3);
  depthwise.a2 = norm2.a;
  depthwise.b2 = norm2.b;
  depthwise.c2 = norm2.c;
  depthwise.w2 = block.w2;
  depthwise.g2 = g2;
  depthwise.gwd = out.depthwise.weight;
  if (below_depthwise) depthwise.g_out = static_cast<float*>(in_place ? out.x : image(4 * values_of_x));
  const bool expand = s.dims.expand && below_depthwise;
  if (expand) {
    depthwise.t = phases.numbers.floats(hidden * in);
    depthwise.sum = phases.numbers.doubles(hidden);
  }
  phases.run(depthwise);

  TrainArgs input = phases.phase(TrainPhase::input_backward);
  if (expand) {
    const LinearNorm layer = phases.linear(block.expand);
    double* sum_gv = phases.numbers.doubles(hidden);
    linear_sums(layer, depthwise.t, tier, parallel, sum_gv);
    const LayerGradients& to = out.expand;
    LinearGradients gradients = {{nullptr, nullptr, nullptr, to.bias, to.gamma, to.beta}, to.weight, nullptr, nullptr};
    if (!gradients.weight) gradients.weight = phases.numbers.floats(hidden * in);
    if (linear) {
      input.m = gradients.m = phases.numbers.floats(in * in);
      input.c0 = gradients.c0 = phases.numbers.floats(in);
    }
    linear_backward(layer, phases.folded(), depthwise.t, {depthwise.sum, sum_gv, depthwise.sum, sum_gv}, saved.sum_x,
                    saved.gram, saved.mean_x, tier, parallel, gradients);
  }
  if (!out.x || (in_place && !linear && !block.residual)) return;
  input = phases.with_x(input);
  input.g = depthwise.g_out;
  if (block.residual) input.gy = gy;
  input.gx = out.x;
  phases.run(input);
}

}  // namespace mbv2
