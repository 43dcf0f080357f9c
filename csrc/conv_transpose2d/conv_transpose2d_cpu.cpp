// Tensor shells of conv_transpose2d: checks, memory formats, threads.
#include "conv_transpose2d_plan.h"

#include "../common/stable.h"
#include "../common/window_size.h"
#include "../conv2d/conv2d_tensors.h"

namespace fastcv {
namespace {

struct Geometry {
  const std::vector<int64_t>&stride, &padding, &output_padding, &dilation;
  int64_t groups;
};

Conv2dShape make_shape(const std::vector<int64_t>& input, const Tensor& weight, const Geometry& g) {
  STD_TORCH_CHECK(input.size() == 4 && weight.dim() == 4,
                  "input, weight: expected shapes [N, C, H, W] and [C, K / groups, KH, KW]");
  for (const std::vector<int64_t>* pair : {&g.stride, &g.padding, &g.output_padding, &g.dilation})
    STD_TORCH_CHECK(pair->size() == 2, "stride, padding, output_padding, dilation: expected two numbers each");
  STD_TORCH_CHECK(is_window_number(g.groups, 1), "groups: expected a positive number, got ", g.groups);
  Conv2dShape s{};
  s.images = input[0], s.channels = input[1], s.height = input[2], s.width = input[3];
  s.out_channels = weight.size(1) * g.groups, s.kernel_h = weight.size(2), s.kernel_w = weight.size(3);
  s.stride_h = g.stride[0], s.stride_w = g.stride[1], s.pad_h = g.padding[0], s.pad_w = g.padding[1];
  s.dilation_h = g.dilation[0], s.dilation_w = g.dilation[1], s.groups = g.groups;
  STD_TORCH_CHECK(g.groups > 0 && s.channels > 0 && s.channels == weight.size(0) && s.channels % g.groups == 0 &&
                      s.out_channels > 0 && s.kernel_h > 0 && s.kernel_w > 0,
                  "weight: expected [", s.channels, ", K / groups, KH, KW] with ", s.channels,
                  " a multiple of groups (", g.groups, ")");
  STD_TORCH_CHECK(is_valid_window(s), kValidWindow);
  STD_TORCH_CHECK(s.stride_h * s.stride_w <= kMostPhases, "stride: expected at most ", kMostPhases, " phases, got ",
                  s.stride_h, " x ", s.stride_w);
  STD_TORCH_CHECK(set_transposed_output_size(s, g.output_padding[0], g.output_padding[1]), "input: ", s.height, " x ",
                  s.width, " with this padding and output_padding has no output, or one of 2^31 pixels along an axis");
  s.threads = threads_for(weight.numel(), s.images * s.height * s.width);
  return s;
}

TransposedKernel kernel_for(const std::string& name, const Conv2dShape& shape) {
  const TransposedKernel kernel = conv_transpose2d_kernel(name, shape);
  if (name == "auto" && kernel == TransposedKernel::torch) return TransposedKernel::merged;  // there is no torch here
  STD_TORCH_CHECK(kernel != TransposedKernel::torch, "kernel: \"", name,
                  "\" does not serve this convolution, or does not exist");
  return kernel;
}

Tensor prepare(const ConvTranspose2dPlan& plan, const Tensor& weight) {
  const Tensor contiguous = as_contiguous(weight, ScalarType::Float);
  Tensor prepared = empty_cpu({plan.weights()}, ScalarType::Float);
  plan.prepare({data<float>(contiguous)}, mutable_data<float>(prepared));
  return prepared;
}

Tensor conv_transpose2d_prepare_cpu(const Tensor& input, const Tensor& weight, int64_t groups,
                                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                    const std::vector<int64_t>& output_padding, const std::vector<int64_t>& dilation,
                                    const std::string& kernel_name) {
  check_float(weight, "weight");
  const Conv2dShape shape = make_shape(size_of(input), weight, {stride, padding, output_padding, dilation, groups});
  return prepare(ConvTranspose2dPlan(shape, kernel_for(kernel_name, shape)), weight);
}

Tensor conv_transpose2d_cpu(const Tensor& input_any, const Tensor& weight, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& residual, const std::optional<Tensor>& prepared_or_none,
                            int64_t groups, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& output_padding, const std::vector<int64_t>& dilation,
                            const std::string& activation, double slope, const std::string& kernel_name) {
  check_float(input_any, "input"), check_float(weight, "weight");
  const Conv2dShape shape = make_shape(size_of(input_any), weight, {stride, padding, output_padding, dilation, groups});
  const ConvTranspose2dPlan plan(shape, kernel_for(kernel_name, shape));
  const Tensor prepared = plan.reads_in_place() ? as_contiguous(weight, ScalarType::Float)
                          : prepared_or_none    ? *prepared_or_none
                                                : prepare(plan, weight);
  const bool fits = prepared.is_contiguous() && prepared.numel() == plan.weights();
  STD_TORCH_CHECK(prepared.scalar_type() == ScalarType::Float && (fits || plan.reads_in_place()),
                  "prepared: expected what conv_transpose2d_prepare gives for the same weight and kernel");
  const Tensor input = with_channels_last(input_any);
  Tensor output = empty_cpu({shape.images, shape.out_channels, shape.out_height, shape.out_width}, ScalarType::Float,
                            MemoryFormat::ChannelsLast);
  Conv2d conv{};
  conv.shape = shape, conv.weight = data<float>(prepared);
  conv.activation = activation_of(activation), conv.slope = float(slope);
  conv.input = pixel_map<const float>(input), conv.output = pixel_map<float>(output);
  conv.stream = exceeds_caches<float>(output);
  const Epilogue epilogue(bias, residual, conv);
  run_tasks(shape, plan.tasks(), plan.scratch(),
            [&](int64_t begin, int64_t end, float* scratch) { plan.run(conv, begin, end, scratch); });
  return is_channels_last(input_any) ? output : torch::stable::contiguous(output);
}

// Number of the kernel that "auto" stands for, as fastcv.ops.conv_transpose2d.KERNELS counts them.
int64_t conv_transpose2d_kernel_cpu(const Tensor& input, const Tensor& weight, int64_t groups,
                                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                    const std::vector<int64_t>& output_padding, const std::vector<int64_t>& dilation) {
  const Conv2dShape shape = make_shape(size_of(input), weight, {stride, padding, output_padding, dilation, groups});
  return int64_t(conv_transpose2d_kernel("auto", shape));
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("conv_transpose2d", TORCH_BOX(&fastcv::conv_transpose2d_cpu));
  m.impl("conv_transpose2d_kernel", TORCH_BOX(&fastcv::conv_transpose2d_kernel_cpu));
  m.impl("conv_transpose2d_prepare", TORCH_BOX(&fastcv::conv_transpose2d_prepare_cpu));
}
