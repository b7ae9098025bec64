// torch.ops.mbv2.*, CPU: checks arguments, allocates, calls the core. LibTorch's stable ABI only, so that an object
// built against one torch runs on the next. The schemas are here; fakes, autograd and autocast are in
// _registrations.py.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "beside.h"
#include "checks.h"
#include "core/block.h"
#include "core/conv.h"
#include "core/linear.h"
#include "core/pages.h"
#include "core/scratch.h"
#include "parallel.h"

namespace {

using mbv2::BlockArgs;
using mbv2::BlockDims;
using mbv2::check;
using mbv2::check_geometry;
using mbv2::check_tensor;
using mbv2::Clamp;
using mbv2::clamp_of;
using mbv2::ConvDims;
using mbv2::empty_image;
using mbv2::kInfinity;
using mbv2::kNoClamp;
using mbv2::MemoryFormat;
using mbv2::OptionalTensor;
using mbv2::out_size;
using mbv2::ScalarType;
using mbv2::shape_of;
using mbv2::storage_type;
using mbv2::Tensor;
using mbv2::Tier;

// Images in memory: a tensor's, or what one step of a chain leaves for the next.
struct Images {
  const void* data;
  int64_t batch, channels, height, width;
  int64_t stride_image, stride_channel, stride_row, stride_pixel;  // in elements
  ScalarType type;

  int64_t numel() const { return batch * channels * height * width; }
};

std::ostream& operator<<(std::ostream& text, const mbv2::ShapeOf<Images>& shape) {
  const Images& x = shape.of;
  return text << "[" << x.batch << ", " << x.channels << ", " << x.height << ", " << x.width << "]";
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor plain(const Tensor& t) {
  return dense(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

// The six weights as plain fp32 arrays, and what they say about the block.
struct Weights {
  BlockDims dims;
  Tensor w_depthwise, w_project;
  OptionalTensor w_expand, b_expand, b_depthwise, b_project;

  mbv2::RawWeights raw() const {
    const auto data = [](const OptionalTensor& t) {
      return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
    };
    return {data(w_expand),    data(b_expand),  static_cast<const float*>(w_depthwise.const_data_ptr()),
            data(b_depthwise), data(w_project), data(b_project)};
  }
};

OptionalTensor plain_bias(const char* name, const OptionalTensor& bias, int64_t channels) {
  if (!bias) return std::nullopt;
  check_tensor(name, *bias, 1);
  check(bias->size(0) == channels, name, " must have ", channels, " elements, got ", bias->size(0));
  return plain(*bias);
}

Weights checked_weights(const OptionalTensor& w_expand, const OptionalTensor& b_expand, const Tensor& w_depthwise,
                        const OptionalTensor& b_depthwise, const Tensor& w_project, const OptionalTensor& b_project) {
  check_tensor("w_depthwise", w_depthwise, 4);
  check_tensor("w_project", w_project, 4);
  const int64_t hidden = w_depthwise.size(0), kernel = w_depthwise.size(2), out = w_project.size(0);
  check(hidden >= 1 && w_depthwise.size(1) == 1 && w_depthwise.size(3) == kernel && kernel % 2 == 1 &&
            kernel <= mbv2::kMaxKernel,
        "w_depthwise must be [hidden, 1, k, k] with odd k up to ", mbv2::kMaxKernel, ", got ", shape_of(w_depthwise));
  check(out >= 1 && w_project.size(1) == hidden && w_project.size(2) == 1 && w_project.size(3) == 1,
        "w_project must be [out, ", hidden, ", 1, 1], got ", shape_of(w_project));
  int64_t in = hidden;
  if (w_expand) {
    check_tensor("w_expand", *w_expand, 4);
    in = w_expand->size(1);
    check(in >= 1 && w_expand->size(0) == hidden && w_expand->size(2) == 1 && w_expand->size(3) == 1,
          "w_expand must be [", hidden, ", in, 1, 1], got ", shape_of(*w_expand));
  } else {
    check(!b_expand, "b_expand was given without w_expand");
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(in <= kMost && hidden <= kMost && out <= kMost, "more than 2^31 - 1 channels");
  return {{in, hidden, out, static_cast<int>(kernel), w_expand.has_value()},
          plain(w_depthwise),
          plain(w_project),
          w_expand ? OptionalTensor(plain(*w_expand)) : std::nullopt,
          plain_bias("b_expand", b_expand, hidden),
          plain_bias("b_depthwise", b_depthwise, hidden),
          plain_bias("b_project", b_project, out)};
}

// For packed weights.
Tensor packed_array(int64_t floats) {
  const auto release = [](void* memory) { mbv2::release(static_cast<float*>(memory)); };
  return torch::stable::from_blob(mbv2::allocate(static_cast<size_t>(floats)), {floats}, {1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float,
                                  release);
}

// The tier to pack for: the one called `name`, or the fp32 tier that runs now.
Tier tier_for(const std::optional<std::string>& name) {
  if (!name) return mbv2::active_tier();
  try {
    return mbv2::runnable_tier(*name).tier;
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(std::string("mbv2: ") + error.what());  // as `check` does
  }
}

void check_fits(bool fits) {
  check(fits,
        "with fp16 accumulation, weights and biases (BatchNorm folded into them) may be 65504 at most in magnitude");
}

Tensor packed_from(const Weights& weights, Tier tier) {
  Tensor packed = packed_array(mbv2::packed_layout(weights.dims, tier).size);
  check_fits(mbv2::pack(weights.dims, weights.raw(), tier, static_cast<float*>(packed.mutable_data_ptr())));
  return packed;
}

// The tiers for 16-bit images read and write those and nothing else.
void check_stored_as_packed(Tier tier, ScalarType type) {
  const mbv2::TierStatus &bf16 = mbv2::bf16_tier(), &fp16 = mbv2::fp16_tier();
  check(tier != bf16.tier || type == ScalarType::BFloat16, "packed was made for tier ", bf16.name,
        ": x must be bfloat16");
  check(tier != fp16.tier || type == ScalarType::Half, "packed was made for tier ", fp16.name, ": x must be float16");
}

bool is_packed_array(const Tensor& packed) {
  return packed.is_cpu() && packed.dim() == 1 && packed.is_contiguous() && packed.scalar_type() == ScalarType::Float;
}

Images images_of(const Tensor& x) {
  return {x.const_data_ptr(), x.size(0),   x.size(1),   x.size(2),   x.size(3),
          x.stride(0),        x.stride(1), x.stride(2), x.stride(3), x.scalar_type()};
}

// Dense channels_last images of `type` at `data`.
Images dense_images(const void* data, int64_t batch, int64_t channels, int64_t height, int64_t width, ScalarType type) {
  return {data, batch, channels, height, width, height * width * channels, 1, width * channels, channels, type};
}

// What the blocks' kernel can read: channels next to each other.
Tensor with_adjoining_channels(const Tensor& x) {
  const bool adjoin = x.stride(1) == 1 || x.size(1) == 1;
  return adjoin ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

// A checked call that lacks only its output: block or convolution.
struct BlockCall {
  BlockArgs args;
  Tier tier;
  mbv2::Parallel parallel;
  mbv2::Plan plan;

  Images output(const void* data, ScalarType type) const {
    return dense_images(data, args.batch, args.dims.out_channels, args.out_height, args.out_width, type);
  }
  void run(void* y) {
    args.y = y;
    mbv2::run_block(args, tier, plan, parallel);
    mbv2::count_call(tier);
  }
};

struct ConvCall {
  mbv2::ConvArgs args;
  Tier tier;
  mbv2::Parallel parallel;

  Images output(const void* data, ScalarType type) const {
    return dense_images(data, args.batch, args.dims.out_channels, args.out_height, args.out_width, type);
  }
  void run(void* y) {
    args.y = y;
    mbv2::run_conv(args, tier, parallel);
    mbv2::count_call(tier);
  }
};

template <class Call>
Tensor run_into_tensor(Call call, ScalarType type) {
  const Images out = call.output(nullptr, type);
  Tensor y = empty_image(out.batch, out.channels, out.height, out.width, type);
  if (out.numel() > 0) call.run(y.mutable_data_ptr());
  return y;
}

BlockCall block_call(const Images& x, const Tensor& packed, const BlockDims& dims, int64_t stride, int64_t padding,
                     int64_t dilation, Clamp activation, Clamp final_activation, bool residual) {
  check(x.channels == dims.in_channels, "x must have ", dims.in_channels, " channels, got shape ", shape_of(x));
  check_geometry(stride, padding, dilation);

  BlockCall call;
  BlockArgs& a = call.args;
  a.dims = dims;
  a.stride = stride;
  a.dilation = dilation;
  a.activation = activation;
  a.final_activation = final_activation;
  a.residual = residual;
  storage_type(x.type, &a.dtype);
  a.batch = x.batch;
  a.height = x.height;
  a.width = x.width;
  a.out_height = out_size(a.height, dims.kernel, stride, padding, dilation, &a.pad_top);
  a.out_width = out_size(a.width, dims.kernel, stride, padding, dilation, &a.pad_left);
  check(a.batch == 0 || (a.out_height > 0 && a.out_width > 0), "x of shape ", shape_of(x),
        " is smaller than the depthwise kernel with its padding");
  if (residual) {
    check(final_activation.lo == kNoClamp.lo && final_activation.hi == kNoClamp.hi,
          "residual and final_activation cannot be combined");
    check(dims.in_channels == dims.out_channels && a.out_height == a.height && a.out_width == a.width,
          "residual needs an output of x's shape: x ", shape_of(x), ", output [", a.batch, ", ", dims.out_channels,
          ", ", a.out_height, ", ", a.out_width, "]");
  }
  check(is_packed_array(packed) &&
            mbv2::packed_tier(static_cast<const float*>(packed.const_data_ptr()), packed.numel(), dims, &call.tier),
        "packed does not hold this block's weights: pack them with pack_inverted_residual");
  check_stored_as_packed(call.tier, x.type);
  a.x = x.data;
  a.x_stride_image = x.stride_image;
  a.x_stride_row = x.stride_row;
  a.x_stride_pixel = x.stride_pixel;
  a.packed = static_cast<const float*>(packed.const_data_ptr());
  call.parallel = mbv2::torch_parallel();
  if (call.output(nullptr, x.type).numel() > 0)
    call.plan = mbv2::make_plan(a, mbv2::packed_layout(dims, call.tier), call.parallel.threads);
  return call;
}

Tensor run(const Tensor& x_given, const Tensor& packed, const BlockDims& dims, int64_t stride, int64_t padding,
           int64_t dilation, const std::string& activation, const std::string& final_activation, bool residual) {
  check_tensor("x", x_given, 4);
  const Tensor x = with_adjoining_channels(x_given);
  return run_into_tensor(
      block_call(images_of(x), packed, dims, stride, padding, dilation, clamp_of("activation", activation),
                 clamp_of("final_activation", final_activation), residual),
      x.scalar_type());
}

Tensor pack_inverted_residual(OptionalTensor w_expand, OptionalTensor b_expand, Tensor w_depthwise,
                              OptionalTensor b_depthwise, Tensor w_project, OptionalTensor b_project,
                              std::optional<std::string> tier) {
  return packed_from(checked_weights(w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project),
                     tier_for(tier));
}

// Takes what fakes need to know without reading `packed`; packed_tier() compares it with the array's header.
Tensor inverted_residual_packed(Tensor x, Tensor packed, int64_t hidden_channels, int64_t out_channels,
                                int64_t kernel_size, bool expand, int64_t stride, int64_t padding, int64_t dilation,
                                std::string activation, std::string final_activation, bool residual) {
  check_tensor("x", x, 4);
  check(kernel_size >= 1 && kernel_size <= mbv2::kMaxKernel, "kernel_size must be 1 to ", mbv2::kMaxKernel, ", got ",
        kernel_size);
  const BlockDims dims{x.size(1), hidden_channels, out_channels, static_cast<int>(kernel_size), expand};
  return run(x, packed, dims, stride, padding, dilation, activation, final_activation, residual);
}

Tensor inverted_residual(Tensor x, OptionalTensor w_expand, OptionalTensor b_expand, Tensor w_depthwise,
                         OptionalTensor b_depthwise, Tensor w_project, OptionalTensor b_project, int64_t stride,
                         int64_t padding, int64_t dilation, std::string activation, std::string final_activation,
                         bool residual) {
  const Weights weights = checked_weights(w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project);
  const Tier tier = x.scalar_type() == ScalarType::BFloat16 ? mbv2::active_bf16_tier() : mbv2::active_tier();
  return run(x, packed_from(weights, tier), weights.dims, stride, padding, dilation, activation, final_activation,
             residual);
}

// ---- Dense convolutions around the blocks ---------------------------------------------------------------------------

ConvDims checked_conv(const Tensor& weight, const OptionalTensor& bias) {
  check_tensor("weight", weight, 4);
  const int64_t out = weight.size(0), in = weight.size(1), kernel = weight.size(2);
  check(out >= 1 && in >= 1 && weight.size(3) == kernel && kernel >= 1 && kernel <= mbv2::kMaxKernel,
        "weight must be [out, in, k, k] with k up to ", mbv2::kMaxKernel, ", got ", shape_of(weight));
  check(out < (int64_t{1} << 31) && in < (int64_t{1} << 31), "more than 2^31 - 1 channels");
  if (bias) {
    check_tensor("bias", *bias, 1);
    check(bias->size(0) == out, "bias must have ", out, " elements, got ", bias->size(0));
  }
  return {in, out, static_cast<int>(kernel)};
}

Tensor pack_conv(Tensor weight, OptionalTensor bias, std::optional<std::string> tier_name) {
  const ConvDims dims = checked_conv(weight, bias);
  const Tier tier = tier_for(tier_name);
  const Tensor w = plain(weight);
  const OptionalTensor b = bias ? OptionalTensor(plain(*bias)) : std::nullopt;
  Tensor packed = packed_array(mbv2::conv_layout(dims, tier).size);
  check_fits(mbv2::pack_conv(dims, static_cast<const float*>(w.const_data_ptr()),
                             b ? static_cast<const float*>(b->const_data_ptr()) : nullptr, tier,
                             static_cast<float*>(packed.mutable_data_ptr())));
  return packed;
}

ConvCall conv_call(const Images& x, const Tensor& packed, int64_t out_channels, int64_t kernel_size, int64_t stride,
                   int64_t padding, Clamp activation) {
  check(kernel_size >= 1 && kernel_size <= mbv2::kMaxKernel, "kernel_size must be 1 to ", mbv2::kMaxKernel, ", got ",
        kernel_size);
  ConvCall call;
  mbv2::ConvArgs& a = call.args;
  a.dims = {x.channels, out_channels, static_cast<int>(kernel_size)};
  a.activation = activation;
  storage_type(x.type, &a.dtype);
  a.batch = x.batch;
  a.height = x.height;
  a.width = x.width;
  mbv2::set_geometry(&a, shape_of(x), stride, padding);
  check(is_packed_array(packed) && mbv2::packed_conv_tier(static_cast<const float*>(packed.const_data_ptr()),
                                                          packed.numel(), a.dims, &call.tier),
        "packed does not hold this convolution's weights: pack them with pack_conv");
  check_stored_as_packed(call.tier, x.type);
  a.x = x.data;
  a.x_stride_image = x.stride_image;
  a.x_stride_channel = x.stride_channel;
  a.x_stride_row = x.stride_row;
  a.x_stride_pixel = x.stride_pixel;
  a.packed = static_cast<const float*>(packed.const_data_ptr());
  call.parallel = mbv2::torch_parallel();
  return call;
}

Tensor conv_act_packed(Tensor x, Tensor packed, int64_t out_channels, int64_t kernel_size, int64_t stride,
                       int64_t padding, std::string activation) {
  check_tensor("x", x, 4);
  return run_into_tensor(
      conv_call(images_of(x), packed, out_channels, kernel_size, stride, padding, clamp_of("activation", activation)),
      x.scalar_type());
}

// In the fp32 tier, whatever x: a phase of training steps, too.
Tensor conv_act(Tensor x, Tensor weight, OptionalTensor bias, int64_t stride, int64_t padding, std::string activation) {
  const Tensor packed = pack_conv(weight, bias, std::nullopt);
  return conv_act_packed(x, packed, weight.size(0), weight.size(2), stride, padding, activation);
}

// ---- Classifier -----------------------------------------------------------------------------------------------------

// For `rows` rows of x, dense.
Tensor linear_of(const void* x, int64_t rows, int64_t in_features, ScalarType type, const Tensor& weight_given,
                 const OptionalTensor& bias_given) {
  check_tensor("weight", weight_given, 2);
  mbv2::LinearArgs a = {};
  a.rows = rows;
  a.in_features = in_features;
  a.out_features = weight_given.size(0);
  check(weight_given.size(1) == in_features, "weight must be [out, ", in_features, "] for x of shape [", rows, ", ",
        in_features, "], got ", shape_of(weight_given));
  check(weight_given.scalar_type() == type, "weight must have x's dtype");
  if (bias_given) {
    check_tensor("bias", *bias_given, 1);
    check(bias_given->size(0) == a.out_features && bias_given->scalar_type() == type, "bias must have ", a.out_features,
          " elements of x's dtype, got ", bias_given->size(0));
  }
  storage_type(type, &a.dtype);
  const Tensor weight = dense(weight_given);
  const OptionalTensor bias = bias_given ? OptionalTensor(dense(*bias_given)) : std::nullopt;
  Tensor y = mbv2::empty({rows, a.out_features}, {a.out_features, 1}, type);
  a.x = x;
  a.weight = weight.const_data_ptr();
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  a.y = y.mutable_data_ptr();
  const Tier tier = mbv2::active_tier();
  mbv2::run_linear(a, tier, mbv2::torch_parallel());
  mbv2::count_call(tier);
  return y;
}

Tensor linear(Tensor x_given, Tensor weight, OptionalTensor bias) {
  check_tensor("x", x_given, 2);
  const Tensor x = dense(x_given);
  return linear_of(x.const_data_ptr(), x.size(0), x.size(1), x.scalar_type(), weight, bias);
}

// ---- Chains: blocks and convolutions back to back -------------------------------------------------------------------

// One step of a chain in pack_chain's list of numbers. kind: 0 block, 1 convolution, which leaves hidden_channels,
// expand, dilation, final_activation and residual unread. Activations: 0 none, 1 relu, 2 relu6.
struct Step {
  int64_t kind, hidden_channels, out_channels, kernel_size, expand, stride, padding, dilation, activation,
      final_activation, residual;
};
constexpr int64_t kStepNumbers = sizeof(Step) / sizeof(int64_t);

Clamp clamp_of(int64_t activation) {
  check(activation >= 0 && activation <= 2, "steps: an activation must be 0, 1 or 2, got ", activation);
  return activation == 0 ? kNoClamp : Clamp{0.0f, activation == 1 ? kInfinity : 6.0f};
}

// A chain's calls for images of one size, strides and type, and one number of threads: checked and planned, they lack
// only where the images lie.
struct ChainCalls {
  Images x;  // without data
  int threads;
  std::vector<std::variant<BlockCall, ConvCall>> calls;

  bool fit(const Images& other, int threads_now) const {
    const auto numbers = [](const Images& i) {
      return std::tie(i.batch, i.channels, i.height, i.width, i.stride_image, i.stride_channel, i.stride_row,
                      i.stride_pixel, i.type);
    };
    return threads == threads_now && numbers(x) == numbers(other);
  }
  Images output() const { return output(calls.size() - 1); }
  Images output(size_t step) const {
    return std::visit([&](const auto& call) { return call.output(nullptr, x.type); }, calls[step]);
  }
};

// Steps and their packed weights, and the calls that were made last: making them anew, one by one, takes as long as
// half a block.
class Chain {
 public:
  Chain(std::vector<Tensor> packed, const std::vector<int64_t>& numbers) : packed_(std::move(packed)) {
    const auto count = static_cast<int64_t>(packed_.size());
    check(count >= 1 && static_cast<int64_t>(numbers.size()) == count * kStepNumbers, "steps must hold ", kStepNumbers,
          " numbers for each of ", count, " packed arrays (at least one), got ", numbers.size());
    steps_.resize(packed_.size());
    std::memcpy(steps_.data(), numbers.data(), numbers.size() * sizeof(int64_t));
    for (const Step& step : steps_) {
      check(step.kind == 0 || step.kind == 1, "steps: a kind must be 0 (block) or 1 (convolution), got ", step.kind);
      check(step.kernel_size >= 1 && step.kernel_size <= mbv2::kMaxKernel, "kernel_size must be 1 to ",
            mbv2::kMaxKernel, ", got ", step.kernel_size);
      clamp_of(step.activation);
      clamp_of(step.final_activation);
    }
  }

  bool starts_with_block() const { return steps_[0].kind == 0; }

  std::shared_ptr<const ChainCalls> calls(const Images& x) {
    const auto threads = static_cast<int>(torch::stable::get_num_threads());
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!calls_ || !calls_->fit(x, threads)) calls_ = std::make_shared<const ChainCalls>(new_calls(x, threads));
    return calls_;
  }

 private:
  ChainCalls new_calls(const Images& x, int threads) const {
    ChainCalls made{x, threads, {}};
    made.x.data = nullptr;
    Images images = x;
    for (size_t i = 0; i < steps_.size(); ++i) {
      const Step& step = steps_[i];
      const auto add = [&](auto call) {
        images = call.output(nullptr, x.type);
        made.calls.emplace_back(call);
      };
      if (step.kind == 0) {
        const BlockDims dims{images.channels, step.hidden_channels, step.out_channels,
                             static_cast<int>(step.kernel_size), step.expand != 0};
        add(block_call(images, packed_[i], dims, step.stride, step.padding, step.dilation, clamp_of(step.activation),
                       clamp_of(step.final_activation), step.residual != 0));
      } else {
        add(conv_call(images, packed_[i], step.out_channels, step.kernel_size, step.stride, step.padding,
                      clamp_of(step.activation)));
      }
    }
    return made;
  }

  const std::vector<Tensor> packed_;
  std::vector<Step> steps_;
  std::mutex mutex_;
  std::shared_ptr<const ChainCalls> calls_;
};

// All chains. A chain passes through the dispatcher as a tensor of one number, which the chain is found by, and lives
// as long as this tensor. Numbers begin anywhere, so that a tensor of another process finds nothing.
class Chains {
 public:
  Tensor add(std::shared_ptr<Chain> chain) {
    struct Owner {
      int64_t shown, number;  // the tensor's element, which anybody may write to, and what it was
    };
    const std::lock_guard<std::mutex> lock(mutex_);
    auto owner = std::make_unique<Owner>(Owner{next_, next_});
    const auto release = [](void* memory) {
      const std::unique_ptr<Owner> last(static_cast<Owner*>(memory));
      all().remove(last->number);
    };
    Tensor tensor = torch::stable::from_blob(
        &owner->shown, {1}, {1}, torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Long, release);
    chains_[next_++] = std::move(chain);
    owner.release();
    return tensor;
  }
  // Shared: the tensor may be a copy, and the one that the chain lives by go meanwhile.
  std::shared_ptr<Chain> find(const Tensor& tensor) {
    check(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long && tensor.numel() == 1,
          "chain must be what pack_chain returned, got a tensor of shape ", shape_of(tensor));
    std::shared_ptr<Chain> found = find(*static_cast<const int64_t*>(tensor.const_data_ptr()));
    check(found != nullptr, "chain must be what pack_chain returned in this process, and not be gone");
    return found;
  }
  std::shared_ptr<Chain> find(int64_t number) {  // null if there is none
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = chains_.find(number);
    return found == chains_.end() ? nullptr : found->second;
  }

  // Never destroyed: tensors may be released after the destructors of globals have run.
  static Chains& all() {
    static Chains* const chains = new Chains;
    return *chains;
  }

 private:
  void remove(int64_t number) {
    std::shared_ptr<Chain> removed;  // its tensors are released without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = chains_.find(number);
    removed = std::move(found->second);
    chains_.erase(found);
  }

  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<Chain>> chains_;
  int64_t next_ = static_cast<int64_t>(std::random_device()()) << 30;
};

Tensor pack_chain(std::vector<Tensor> packed, std::vector<int64_t> steps) {
  return Chains::all().add(std::make_shared<Chain>(std::move(packed), steps));
}

// ---- The first layer, while a thread looks whether it may be called (beside.h) ----

// A look that this thread is at. What it runs into must not write to the first layer's result.
struct Looking {
  void (*look)(void* context);
  void* context;
  std::thread::id thread;
  bool done;
};
thread_local Looking* looking = nullptr;

// A result in the first buffer between steps: of which calls, on what.
struct FirstLayer {
  std::shared_ptr<const ChainCalls> calls;
  const void* x = nullptr;
};
thread_local FirstLayer first_layer;

// Where the steps of a chain leave their images: one of two buffers that stay, in turns; if they are large, memory that
// is given back: then a batch of images is computed, and an allocation is nothing beside it.
constexpr int64_t kKeptFloats = 2 << 20;
class Between {
 public:
  void* reserve(size_t step, const Images& images) {
    if (images.numel() <= kKeptFloats && !looking)
      return mbv2::chain_buffer(step).reserve(static_cast<size_t>(images.numel()));
    OptionalTensor& held = held_[step % 2];
    held = empty_image(images.batch, images.channels, images.height, images.width, images.type);
    return held->mutable_data_ptr();
  }

 private:
  OptionalTensor held_[2];
};

// All steps, the last one into y; null: in between as the others. Returns where that is.
void* run_chain(const ChainCalls& chain, const void* x, void* y, Between& between) {
  size_t begin = 0;
  if (first_layer.calls.get() == &chain && first_layer.x == x) {
    x = between.reserve(begin++, chain.output(0));
    first_layer = {};
  }
  for (size_t i = begin; i < chain.calls.size(); ++i)
    x = std::visit(
        [&](auto call) -> void* {
          const Images out = call.output(nullptr, chain.x.type);
          void* to = y && i + 1 == chain.calls.size() ? y : between.reserve(i, out);
          call.args.x = x;
          if (out.numel() > 0) call.run(to);
          return to;
        },
        chain.calls[i]);
  return const_cast<void*>(x);
}

// As Parallel has it: the items go to whoever is free, on this thread after the look. It begins with the first ones and
// the others with the last ones, for the next layer goes to them in this order, and each finds its share in its caches.
void run_beside_look(int64_t n, void* context, mbv2::ParallelBody body) {
  struct Work {
    Looking& looking;
    int64_t n;
    void* context;
    mbv2::ParallelBody body;
    std::atomic<int64_t> taken, of_others;
    int64_t own;
  } work = {*looking, n, context, body, {0}, {0}, 0};
  const mbv2::Parallel pool = mbv2::torch_parallel();
  pool.parallel_for(pool.threads, &work, [](void* of, int64_t, int64_t) {
    Work& w = *static_cast<Work*>(of);
    const bool looks = w.looking.thread == std::this_thread::get_id();
    if (looks && !w.looking.done) {
      w.looking.look(w.looking.context);
      w.looking.done = true;
    }
    while (w.taken.fetch_add(1, std::memory_order_relaxed) < w.n) {
      const int64_t i = looks ? w.own++ : w.n - 1 - w.of_others.fetch_add(1, std::memory_order_relaxed);
      w.body(w.context, i, i + 1);
    }
  });
}

// False if there is no first layer worth it, or none that takes x: then the call will say why. Several items a thread,
// as the one that looks comes late.
bool run_first_layer(Chain& chain, const mbv2::DlpackTensor& x) {
  constexpr int kItems = 4;
  if (chain.starts_with_block() || x.dims != 4) return false;
  const bool halves = x.bits == 16;
  const ScalarType type = x.code == mbv2::kDlpackBfloat ? ScalarType::BFloat16
                          : halves                      ? ScalarType::Half
                                                        : ScalarType::Float;
  const char* const data = static_cast<const char*>(x.data) + x.byte_offset;
  std::shared_ptr<const ChainCalls> calls;
  try {
    calls = chain.calls({data, x.shape[0], x.shape[1], x.shape[2], x.shape[3], x.strides[0], x.strides[1], x.strides[2],
                         x.strides[3], type});
  } catch (const std::exception&) {
    return false;
  }
  const Images out = calls->output(0);
  if (calls->calls.size() < 2 || out.numel() == 0 || out.numel() > kKeptFloats) return false;
  ConvCall call = std::get<ConvCall>(calls->calls[0]);
  call.args.x = data;
  call.parallel = {run_beside_look, kItems * call.parallel.threads};
  call.run(mbv2::chain_buffer(0).reserve(static_cast<size_t>(out.numel())));
  first_layer = {std::move(calls), data};
  return true;
}

Tensor for_chain(const Tensor& x, const Chain& chain) {
  check_tensor("x", x, 4);
  return chain.starts_with_block() ? with_adjoining_channels(x) : x;
}

Tensor chain_packed(Tensor x_given, Tensor chain_given) {
  const auto chain = Chains::all().find(chain_given);
  const Tensor x = for_chain(x_given, *chain);
  const auto calls = chain->calls(images_of(x));
  const Images out = calls->output();
  Tensor y = empty_image(out.batch, out.channels, out.height, out.width, out.type);
  Between between;
  run_chain(*calls, x.const_data_ptr(), y.mutable_data_ptr(), between);
  return y;
}

// A whole network: the chain's images, their means over all pixels, and the classifier on these.
Tensor chain_classify(Tensor x_given, Tensor chain_given, Tensor weight, OptionalTensor bias) {
  const auto chain = Chains::all().find(chain_given);
  const Tensor x = for_chain(x_given, *chain);
  const auto calls = chain->calls(images_of(x));
  const Images images = calls->output();
  Between between;
  mbv2::PoolArgs a = {};
  a.batch = images.batch;
  a.channels = images.channels;
  a.pixels = images.height * images.width;
  storage_type(images.type, &a.dtype);
  a.x = run_chain(*calls, x.const_data_ptr(), nullptr, between);
  a.y = mbv2::chain_buffer(calls->calls.size()).reserve(static_cast<size_t>(a.batch * a.channels));
  mbv2::tier_kernels(mbv2::active_tier())->pool_work(a);
  return linear_of(a.y, a.batch, a.channels, images.type, weight, bias);
}

}  // namespace

namespace mbv2 {

void look_beside_first_layer(const int64_t* chain, const DlpackTensor& x, void* context, void (*look)(void* context)) {
  if (looking || torch::stable::get_num_threads() == 1) return look(context);
  Looking now = {look, context, std::this_thread::get_id(), false};
  looking = &now;
  const auto found = chain ? Chains::all().find(*chain) : nullptr;
  if (!found || !run_first_layer(*found, x)) run_beside_look(0, nullptr, nullptr);
  looking = nullptr;
  if (!now.done) look(context);
}

void forget_first_layer() { first_layer = {}; }

}  // namespace mbv2

STABLE_TORCH_LIBRARY(mbv2, m) {
  m.def(
      "inverted_residual(Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_depthwise, Tensor? b_depthwise, "
      "Tensor w_project, Tensor? b_project, int stride, int padding, int dilation, str activation, "
      "str final_activation, bool residual) -> Tensor");
  m.def(
      "pack_inverted_residual(Tensor? w_expand, Tensor? b_expand, Tensor w_depthwise, Tensor? b_depthwise, "
      "Tensor w_project, Tensor? b_project, str? tier=None) -> Tensor");
  m.def(
      "inverted_residual_packed(Tensor x, Tensor packed, int hidden_channels, int out_channels, int kernel_size, "
      "bool expand, int stride, int padding, int dilation, str activation, str final_activation, bool residual) "
      "-> Tensor");
  m.def("conv_act(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, str activation) -> Tensor");
  m.def("pack_conv(Tensor weight, Tensor? bias, str? tier=None) -> Tensor");
  m.def(
      "conv_act_packed(Tensor x, Tensor packed, int out_channels, int kernel_size, int stride, int padding, "
      "str activation) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("pack_chain(Tensor[] packed, int[] steps) -> Tensor");
  m.def("chain_packed(Tensor x, Tensor chain) -> Tensor");
  m.def("chain_classify(Tensor x, Tensor chain, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mbv2, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&inverted_residual));
  m.impl("pack_inverted_residual", TORCH_BOX(&pack_inverted_residual));
  m.impl("inverted_residual_packed", TORCH_BOX(&inverted_residual_packed));
  m.impl("conv_act", TORCH_BOX(&conv_act));
  m.impl("pack_conv", TORCH_BOX(&pack_conv));
  m.impl("conv_act_packed", TORCH_BOX(&conv_act_packed));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("pack_chain", TORCH_BOX(&pack_chain));
  m.impl("chain_packed", TORCH_BOX(&chain_packed));
  m.impl("chain_classify", TORCH_BOX(&chain_classify));
}
