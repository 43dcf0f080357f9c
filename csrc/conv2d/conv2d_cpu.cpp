// Tensor shells of conv2d: checks, memory formats, the choice of kernel, threads.
#include "conv2d_kernels.h"
#include "conv2d_tensors.h"

namespace fastcv {
namespace {

const Conv2dKernel& kernel_for(const std::string& name, const Conv2dShape& shape) {
  const Conv2dKernel* kernel = conv2d_kernel(name, shape);
  STD_TORCH_CHECK(kernel, "kernel: \"", name, "\" does not serve this convolution, or does not exist");
  return *kernel;
}

Conv2dShape make_shape(const std::vector<int64_t>& input, const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.size() == 4 && weight.size() == 4, "input, weight: expected shapes [N, C, H, W] and [K, C / groups, KH, KW]");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding, dilation: expected two numbers each");
  Conv2dShape s{};
  s.threads = torch::stable::get_num_threads();
  s.images = input[0], s.channels = input[1], s.height = input[2], s.width = input[3];
  s.out_channels = weight[0], s.kernel_h = weight[2], s.kernel_w = weight[3];
  s.stride_h = stride[0], s.stride_w = stride[1], s.pad_h = padding[0], s.pad_w = padding[1];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1], s.groups = groups;
  STD_TORCH_CHECK(groups > 0 && s.out_channels > 0 && s.out_channels % groups == 0 && weight[1] > 0 &&
                      s.channels == weight[1] * groups && s.kernel_h > 0 && s.kernel_w > 0,
                  "weight: expected [K, ", s.channels, " / groups, KH, KW] with K a multiple of groups (", groups, ")");
  STD_TORCH_CHECK(s.stride_h > 0 && s.stride_w > 0 && s.dilation_h > 0 && s.dilation_w > 0 && s.pad_h >= 0 && s.pad_w >= 0,
                  "stride, dilation: expected positive numbers; padding: numbers that are not negative");
  STD_TORCH_CHECK(set_output_size(s), "input: ", s.height, " x ", s.width, " with its padding is smaller than the kernel");
  return s;
}

Tensor conv2d_prepare_cpu(const Tensor& weight, int64_t groups, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                          const std::string& kernel_name) {
  check_float(weight, "weight");
  // An input on which the kernel fits once; no preparation depends on its size.
  std::vector<int64_t> input{1, weight.size(1) * groups, 0, 0};
  for (int i = 0; i < 2; ++i) input[2 + i] = std::max<int64_t>(1, dilation.at(i) * (weight.size(2 + i) - 1) + 1);
  const Conv2dShape shape = make_shape(input, size_of(weight), stride, padding, dilation, groups);
  const Conv2dKernel& kernel = kernel_for(kernel_name, shape);
  const Tensor contiguous = as_contiguous(weight, ScalarType::Float);
  Tensor prepared = empty_cpu({kernel.weights(shape)}, ScalarType::Float);
  kernel.prepare(shape, data<float>(contiguous), mutable_data<float>(prepared));
  return prepared;
}

Tensor conv2d_cpu(const Tensor& input_any, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const std::optional<Tensor>& prepared_or_none, int64_t groups,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, const std::string& activation, double slope,
                  const std::string& kernel_name) {
  check_float(input_any, "input"), check_float(weight, "weight");
  STD_TORCH_CHECK(input_any.dim() == 4, "input: expected shape [N, C, H, W]");
  const Conv2dShape shape = make_shape(size_of(input_any), size_of(weight), stride,
                                       padding, dilation, groups);
  const Conv2dKernel& kernel = kernel_for(kernel_name, shape);
  const Tensor prepared = prepared_or_none
                              ? *prepared_or_none
                              : conv2d_prepare_cpu(weight, groups, stride, padding, dilation, kernel.name);
  STD_TORCH_CHECK(prepared.scalar_type() == ScalarType::Float && prepared.is_contiguous() &&
                      prepared.numel() == kernel.weights(shape),
                  "prepared: expected what conv2d_prepare gives for the same weight and kernel");
  Conv2d conv{};
  conv.shape = shape;
  conv.weight = data<float>(prepared);
  conv.activation = activation_of(activation), conv.slope = float(slope);
  const Tensor input = with_channels_last(input_any);
  Tensor output = empty_cpu({shape.images, shape.out_channels, shape.out_height, shape.out_width}, ScalarType::Float,
                            MemoryFormat::ChannelsLast);
  const Epilogue epilogue(bias, residual, output, conv);
  conv.input = pixel_map<const float>(input), conv.output = pixel_map<float>(output);
  if (output.numel() > 0) {
    const int64_t scratch_size = kernel.scratch(shape);
    parallel_dynamic(kernel.tasks(shape), 1, [&](int64_t begin, int64_t end) {
      const Scratch<float> scratch = allocate_scratch<float>(scratch_size);
      kernel.run(conv, begin, end, scratch.get());
    });
  }
  return is_channels_last(input_any) ? output : torch::stable::contiguous(output);
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
  m.impl("conv2d_kernel", TORCH_BOX(&fastcv::conv2d_kernel_cpu));
  m.impl("conv2d_prepare", TORCH_BOX(&fastcv::conv2d_prepare_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fastcv, CompositeExplicitAutograd, m) {
  m.impl("conv2d_choose", TORCH_BOX(&fastcv::conv2d_choose));
}
