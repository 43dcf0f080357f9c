// Tensor shells of local_response_norm and its gradient.
#include "local_response_norm.h"

#include "../common/stable.h"

namespace fastcv {
namespace {

template <class T>
LocalResponseNorm<T> task_of(const Tensor& input, const Tensor* grad, const Tensor& output, int64_t size, double alpha,
                             double beta, double k) {
  using A = accumulate_t<T>;
  const int64_t channels = input.size(1);
  LocalResponseNorm<T> task{};
  task.input = flattened(feature_map<const T>(input));
  task.output = flattened(feature_map<T>(output));
  if (grad) task.grad = flattened(feature_map<const T>(*grad));
  task.channels_last = is_channels_last(input);
  task.before = std::min(channels, size / 2), task.after = std::min(channels, (size - 1) / 2);
  task.factor = A(alpha / double(size)), task.beta = A(beta), task.k = A(k);
  return task;
}

Tensor run(const Tensor& input_any, const Tensor* grad_any, int64_t size, double alpha, double beta, double k) {
  STD_TORCH_CHECK(input_any.dim() == 4, "input: expected shape [N, C, H, W]");
  STD_TORCH_CHECK(size > 0, "size: expected at least 1, got ", size);
  const MemoryFormat format = memory_format(input_any);
  const Tensor input = torch::stable::contiguous(input_any, format);  // itself, unless it is strided otherwise
  Tensor output = empty_cpu({input.size(0), input.size(1), input.size(2), input.size(3)}, input.scalar_type(), format);
  std::optional<Tensor> grad;
  if (grad_any) {
    for (int64_t d = 0; d < 4; ++d)
      STD_TORCH_CHECK(grad_any->dim() == 4 && grad_any->size(d) == input.size(d), "grad: expected the shape of input");
    STD_TORCH_CHECK(grad_any->scalar_type() == input.scalar_type(), "grad: expected the dtype of input");
    grad = torch::stable::contiguous(*grad_any, format);
  }
  if (output.numel() == 0) return output;
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const LocalResponseNorm<T> task = task_of<T>(input, grad ? &*grad : nullptr, output, size, alpha, beta, k);
    const int64_t tasks = input.size(0) * FASTCV_PICK(local_response_norm_parts<T>)(task);
    parallel_dynamic(tasks, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = allocate_scratch<accumulate_t<T>>(FASTCV_PICK(local_response_norm_scratch<T>)(task));
      const auto kernel = grad ? FASTCV_PICK(local_response_norm_backward<T>) : FASTCV_PICK(local_response_norm<T>);
      kernel(task, begin, end, scratch.get());
    });
  });
  return output;
}

Tensor local_response_norm_cpu(const Tensor& input, int64_t size, double alpha, double beta, double k) {
  return run(input, nullptr, size, alpha, beta, k);
}

Tensor local_response_norm_backward_cpu(const Tensor& grad, const Tensor& input, int64_t size, double alpha,
                                        double beta, double k) {
  return run(input, &grad, size, alpha, beta, k);
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("local_response_norm", TORCH_BOX(&fastcv::local_response_norm_cpu));
  m.impl("local_response_norm_backward", TORCH_BOX(&fastcv::local_response_norm_backward_cpu));
}
