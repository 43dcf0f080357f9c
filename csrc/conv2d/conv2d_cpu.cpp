// Tensor shells of conv2d: checks, memory formats, the choice of kernel, threads.
#include "../common/window_size.h"
#include "conv2d_kernels.h"
#include "conv2d_tensors.h"

namespace fastcv {
namespace {

const Conv2dKernel& kernel_for(const std::string& name, const Conv2dShape& shape) {
  const Conv2dKernel* kernel = conv2d_kernel(name, shape);
  STD_TORCH_CHECK(kernel, "kernel: \"", name, "\" does not serve this convolution, or does not exist");
  return *kernel;
}

Conv2dShape make_shape(const std::vector<int64_t>& input, const std::vector<int64_t>& weight,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.size() == 4 && weight.size() == 4,
                  "input, weight: expected shapes [N, C, H, W] and [K, C / groups, KH, KW]");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding, dilation: expected two numbers each");
  Conv2dShape s{};
  s.images = input[0], s.channels = input[1], s.height = input[2], s.width = input[3];
  s.out_channels = weight[0], s.kernel_h = weight[2], s.kernel_w = weight[3];
  s.stride_h = stride[0], s.stride_w = stride[1], s.pad_h = padding[0], s.pad_w = padding[1];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1], s.groups = groups;
  STD_TORCH_CHECK(is_window_number(groups, 1) && s.out_channels > 0 && s.out_channels % groups == 0 && weight[1] > 0 &&
                      s.channels == weight[1] * groups && s.kernel_h > 0 && s.kernel_w > 0,
                  "weight: expected [K, ", s.channels, " / groups, KH, KW] with K a multiple of groups (", groups, ")");
  STD_TORCH_CHECK(is_valid_window(s), kValidWindow);
  STD_TORCH_CHECK(set_output_size(s), "input: ", s.height, " x ", s.width,
                  " with its padding is smaller than the kernel");
  s.threads = threads_for(weight[0] * weight[1] * weight[2] * weight[3], s.images * s.out_height * s.out_width);
  return s;
}

// Where the weights [K, C / groups, KH, KW] of a convolution lie.
struct WeightView {
  const float* data;
  int64_t step_k, step_c, step_y, step_x;

  explicit WeightView(const Tensor& w)
      : data(fastcv::data<float>(w)),
        step_k(w.stride(0)),
        step_c(w.stride(1)),
        step_y(w.stride(2)),
        step_x(w.stride(3)) {}

  // Those of the gradient of the input: each filter turned round, and outputs and inputs exchanged.
  WeightView transposed(const Conv2dShape& of) const {
    WeightView view = *this;
    view.data += (of.kernel_h - 1) * step_y + (of.kernel_w - 1) * step_x;
    view.step_k = step_c, view.step_c = step_k, view.step_y = -step_y, view.step_x = -step_x;
    return view;
  }

  bool is_contiguous(const Conv2dShape& s) const {
    return step_x == 1 && step_y == s.kernel_w && step_c == s.kernel_h * s.kernel_w &&
           step_k == s.group_channels() * step_c;
  }

  // Outputs first to last, contiguous; neighbours in memory one after the other.
  void copy(const Conv2dShape& s, int64_t first, int64_t last, float* to) const {
    const int64_t channels = s.group_channels(), area = s.kernel_h * s.kernel_w, outputs = last - first;
    const bool channels_inside = step_c <= step_k;
    for (int64_t i = 0; i < outputs * channels; ++i) {
      const int64_t k = channels_inside ? i / channels : i % outputs, c = channels_inside ? i % channels : i / outputs;
      const float* from = data + (first + k) * step_k + c * step_c;
      float* filter = to + (k * channels + c) * area;
      for (int64_t y = 0; y < s.kernel_h; ++y)
        for (int64_t x = 0; x < s.kernel_w; ++x) *filter++ = from[y * step_y + x * step_x];
    }
  }
};

// Weights laid out for the kernel, by several threads where its layout allows.
Tensor prepare_weights(const Conv2dKernel& kernel, const Conv2dShape& shape, const WeightView& weight) {
  const int64_t together = outputs_prepared_together(kernel, shape), most = together ? together : shape.out_channels;
  const int64_t parts = (shape.out_channels + most - 1) / most;
  const bool contiguous = weight.is_contiguous(shape);
  Tensor prepared = empty_cpu({kernel.weights(shape)}, ScalarType::Float);
  float* const out = mutable_data<float>(prepared);
  parallel_dynamic(parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t filters = most * shape.group_channels() * shape.kernel_h * shape.kernel_w;
    const Scratch<float> copy = allocate_scratch<float>(contiguous ? 0 : filters);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * most, last = std::min(shape.out_channels, first + most);
      Conv2dShape before = shape, part = shape;
      before.out_channels = first, part.out_channels = last - first;
      if (!contiguous) weight.copy(shape, first, last, copy.get());
      kernel.prepare(part, contiguous ? weight.data + first * weight.step_k : copy.get(), nullptr,
                     out + (first ? kernel.weights(before) : 0));
    }
  });
  return prepared;
}

Tensor conv2d_prepare_cpu(const Tensor& weight, int64_t groups, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                          const std::string& kernel_name) {
  check_float(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 4 && dilation.size() == 2 && is_window_number(groups, 1),
                  "weight, dilation, groups: expected shape [K, C / groups, KH, KW], two numbers, and a positive one");
  // An input on which the kernel fits once; no preparation depends on its size.
  std::vector<int64_t> input{1, weight.size(1) * groups, 0, 0};
  for (int i = 0; i < 2; ++i) input[2 + i] = window_reach(weight.size(2 + i), dilation[i]);
  const Conv2dShape shape = make_shape(input, size_of(weight), stride, padding, dilation, groups);
  return prepare_weights(kernel_for(kernel_name, shape), shape, WeightView(weight));
}

// Runs `conv`, whose shape, weights and epilogue are set, on an input; the output has its memory format.
Tensor run_conv2d(const Conv2dKernel& kernel, Conv2d& conv, const Tensor& input_any) {
  const Conv2dShape& shape = conv.shape;
  const Tensor input = with_channels_last(input_any);
  Tensor output = empty_cpu({shape.images, shape.out_channels, shape.out_height, shape.out_width}, ScalarType::Float,
                            MemoryFormat::ChannelsLast);
  conv.input = pixel_map<const float>(input), conv.output = pixel_map<float>(output);
  conv.stream = exceeds_caches<float>(output);
  if (output.numel() > 0)
    run_tasks(shape, kernel.tasks(shape), kernel.scratch(shape),
              [&](int64_t begin, int64_t end, float* scratch) { kernel.run(conv, begin, end, scratch); });
  return is_channels_last(input_any) ? output : torch::stable::contiguous(output);
}

Tensor conv2d_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const std::optional<Tensor>& prepared_or_none, int64_t groups,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, const std::string& activation, double slope,
                  const std::string& kernel_name) {
  check_float(input, "input"), check_float(weight, "weight");
  STD_TORCH_CHECK(input.dim() == 4, "input: expected shape [N, C, H, W]");
  const Conv2dShape shape = make_shape(size_of(input), size_of(weight), stride, padding, dilation, groups);
  const Conv2dKernel& kernel = kernel_for(kernel_name, shape);
  const Tensor prepared = prepared_or_none ? *prepared_or_none : prepare_weights(kernel, shape, WeightView(weight));
  STD_TORCH_CHECK(prepared.scalar_type() == ScalarType::Float && prepared.is_contiguous() &&
                      prepared.numel() == kernel.weights(shape),
                  "prepared: expected what conv2d_prepare gives for the same weight and kernel");
  Conv2d conv{};
  conv.shape = shape;
  conv.weight = data<float>(prepared);
  conv.activation = activation_of(activation), conv.slope = float(slope);
  const Epilogue epilogue(bias, residual, conv);
  return run_conv2d(kernel, conv, input);
}

// What a layer is called with, in few arguments: each of them takes as long to hand over as a small convolution to
// compute. code: numbers of kernel and activation, groups, stride, padding, dilation, and K, KH, KW of the weight that
// was prepared.
Tensor conv2d_prepared_cpu(const Tensor& input, const Tensor& prepared, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual, const std::vector<int64_t>& code, double slope) {
  check_float(input, "input"), check_float(prepared, "prepared");
  STD_TORCH_CHECK(input.dim() == 4 && code.size() == 12, "input, code: expected shape [N, C, H, W] and 12 numbers");
  STD_TORCH_CHECK(is_activation(code[1]) && is_window_number(code[2], 1) && input.size(1) % code[2] == 0,
                  "code: activation or groups");
  const Conv2dShape shape =
      make_shape(size_of(input), {code[9], input.size(1) / code[2], code[10], code[11]}, {code[3], code[4]},
                 {code[5], code[6]}, {code[7], code[8]}, code[2]);
  const Conv2dKernel* kernel = conv2d_kernel(code[0], shape);
  STD_TORCH_CHECK(kernel, "code: kernel ", code[0], " does not serve this convolution, or does not exist");
  STD_TORCH_CHECK(prepared.is_contiguous() && prepared.numel() == kernel->weights(shape),
                  "prepared: expected what conv2d_prepare gives for this convolution");
  Conv2d conv{};
  conv.shape = shape;
  conv.weight = data<float>(prepared);
  conv.activation = Activation(code[1]), conv.slope = float(slope);
  const Epilogue epilogue(bias, residual, conv);
  return run_conv2d(*kernel, conv, input);
}

// The gradient of the input of a convolution with stride 1, no dilation and one group: a convolution itself, of the
// output's gradient, with the weights turned round and K - 1 - padding.
Tensor conv2d_input_gradient_cpu(const Tensor& grad, const Tensor& weight, const std::vector<int64_t>& padding,
                                 const std::string& kernel_name) {
  check_float(grad, "grad"), check_float(weight, "weight");
  STD_TORCH_CHECK(grad.dim() == 4 && weight.dim() == 4 && padding.size() == 2,
                  "grad, weight, padding: expected shapes [N, K, OH, OW] and [K, C, KH, KW], and two numbers");
  std::vector<int64_t> size = size_of(weight), rest(2);
  std::swap(size[0], size[1]);
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(padding[i] >= 0 && padding[i] < size[2 + i], "padding: expected 0 to ", size[2 + i] - 1, ", got ",
                    padding[i]);
    rest[i] = size[2 + i] - 1 - padding[i];
  }
  Conv2d conv{};
  conv.shape = make_shape(size_of(grad), size, {1, 1}, rest, {1, 1}, 1);
  const Conv2dKernel& kernel = kernel_for(kernel_name, conv.shape);
  const Tensor prepared = prepare_weights(kernel, conv.shape, WeightView(weight).transposed(conv.shape));
  conv.weight = data<float>(prepared);
  return run_conv2d(kernel, conv, grad);
}

// Number of the kernel that "auto" stands for, as fastcv.ops.conv2d.KERNELS counts them.
int64_t conv2d_kernel_cpu(const Tensor& input, const Tensor& weight, int64_t groups, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected shape [N, C, H, W]");
  const Conv2dShape shape = make_shape(size_of(input), size_of(weight), stride, padding, dilation, groups);
  return kernel_for("auto", shape).number;
}

// Has "auto" choose `kernel` for this shape of input and weight; "auto" undoes it.
void conv2d_choose(const std::vector<int64_t>& input, const std::vector<int64_t>& weight, int64_t groups,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, const std::string& kernel_name) {
  const Conv2dShape shape = make_shape(input, weight, stride, padding, dilation, groups);
  choose_conv2d_kernel(shape, kernel_name == "auto" ? nullptr : &kernel_for(kernel_name, shape));
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&fastcv::conv2d_cpu));
  m.impl("conv2d_input_gradient", TORCH_BOX(&fastcv::conv2d_input_gradient_cpu));
  m.impl("conv2d_kernel", TORCH_BOX(&fastcv::conv2d_kernel_cpu));
  m.impl("conv2d_prepare", TORCH_BOX(&fastcv::conv2d_prepare_cpu));
  m.impl("conv2d_prepared", TORCH_BOX(&fastcv::conv2d_prepared_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fastcv, CompositeExplicitAutograd, m) {
  m.impl("conv2d_choose", TORCH_BOX(&fastcv::conv2d_choose));
}
