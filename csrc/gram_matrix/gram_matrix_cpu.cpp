// Tensor shells of gram_matrix, its gradient and style_loss.
#include "gram_matrix.h"

#include <string>

#include "../common/stable.h"

namespace fastcv {
namespace {

// 1 / (C * H * W), 1 / (H * W) or 1; 0 where there is nothing to sum.
double scale_of(const std::string& normalize, const Tensor& features) {
  const int64_t positions = features.size(2) * features.size(3), elements = features.size(1) * positions;
  STD_TORCH_CHECK(normalize == "elements" || normalize == "positions" || normalize == "none",
                  "normalize: expected \"elements\", \"positions\" or \"none\", got \"", normalize, "\"");
  if (elements == 0) return 0;
  return normalize == "none" ? 1 : 1 / double(normalize == "positions" ? positions : elements);
}

void check_features(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 4, "features: expected shape [N, C, H, W]");
}

template <class T>
using GramKernel = void (*)(const FeatureMap<const T>& map, const GramPlan& plan, int64_t begin, int64_t end,
                            accumulate_t<T>* sums, accumulate_t<T>* scratch);

struct GramSums {
  GramPlan plan;
  Tensor sums;
};

template <class T>
GramSums sums_of_map(const FeatureMap<const T>& map, GramKernel<T> kernel,
                     int64_t (*scratch_size)(const GramPlan&) = FASTCV_PICK(gram_scratch<T>)) {
  using A = accumulate_t<T>;
  const GramPlan plan = FASTCV_PICK(gram_plan<T>)(map.images, map.channels, map.height * map.width);
  Tensor sums =
      empty_cpu({FASTCV_PICK(gram_sums<T>)(plan)}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  A* const to = mutable_data<A>(sums);
  parallel_dynamic(plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch = allocate_scratch<A>(scratch_size(plan));
    kernel(map, plan, begin, end, to, scratch.get());
  });
  return {plan, sums};
}

// Whether neighbouring positions of a channel are words.
bool has_words(const FeatureMap<const bfloat16_t>& map) {
  const int64_t all = map.width | map.stride_n | map.stride_c | (map.height > 1 ? map.stride_y : 0);
  return map.stride_x == 1 && all % 2 == 0 && uintptr_t(map.data) % 4 == 0;
}

template <class T>
GramSums sums_of(const Tensor& features) {
  const FeatureMap<const T> map = flattened(feature_map<const T>(features));
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    if ((amx_products() || bf16_products()) && has_words(map)) {
      const auto* const data = reinterpret_cast<const float*>(map.data);
      const FeatureMap<const float> words{data, map.images, map.channels, map.height, map.width / 2, map.stride_n / 2,
                                          map.stride_c / 2, map.stride_y / 2, 1};
      if (amx_products())
        return sums_of_map<float>(words, FASTCV_PICK(gram_sum_tiles), FASTCV_PICK(gram_sum_tiles_scratch));
      return sums_of_map<float>(words, FASTCV_PICK(gram_sum_pairs));
    }
  }
  return sums_of_map<T>(map, FASTCV_PICK(gram_sum<T>));
}

Tensor gram_matrix_cpu(const Tensor& features, const std::string& normalize) {
  check_features(features);
  const int64_t images = features.size(0), channels = features.size(1);
  Tensor gram = empty_cpu({images, channels, channels}, features.scalar_type());
  if (gram.numel() == 0) return gram;
  dispatch_floating(features.scalar_type(), "features", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const auto [made, sums] = sums_of<T>(features);
    const GramPlan& plan = made;
    const GramFinish<T, T> task{data<A>(sums), A(scale_of(normalize, features)), mutable_data<T>(gram), nullptr, 0};
    parallel_for(plan.images * plan.blocks, 1, [&](int64_t begin, int64_t end) {
      FASTCV_PICK(gram_finish<T, T>)(task, plan, begin, end, nullptr);
    });
  });
  return gram;
}

template <class T>
void backward(const Tensor& grad, const Tensor& features, double scale, const Tensor& output) {
  using A = accumulate_t<T>;
  const int64_t images = features.size(0), channels = features.size(1);
  const bool channels_last = is_channels_last(features);
  const int64_t size = FASTCV_PICK(gram_symmetric_size<A>)(channels, channels_last);
  const Tensor symmetric = empty_cpu({images, size}, grad.scalar_type());
  const int64_t strip = 64;
  const int64_t strips = (channels + strip - 1) / strip;
  parallel_for(images * strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      FASTCV_PICK(gram_symmetrize<A>)(data<A>(grad) + t / strips * channels * channels, channels, A(scale),
                                      channels_last, mutable_data<A>(symmetric) + t / strips * size, t % strips * strip,
                                      std::min(channels, (t % strips + 1) * strip));
  });
  const GramBackward<T> task{flattened(feature_map<const T>(features)), flattened(feature_map<T>(output)),
                             channels_last, data<A>(symmetric), size};
  parallel_dynamic(FASTCV_PICK(gram_backward_tasks<T>)(task), 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch = allocate_scratch<A>(FASTCV_PICK(gram_backward_scratch<T>)(task));
    FASTCV_PICK(gram_backward<T>)(task, begin, end, scratch.get());
  });
}

Tensor gram_matrix_backward_cpu(const Tensor& grad_any, const Tensor& features_any, const std::string& normalize) {
  check_features(features_any);
  const int64_t images = features_any.size(0), channels = features_any.size(1);
  STD_TORCH_CHECK(grad_any.dim() == 3 && grad_any.size(0) == images && grad_any.size(1) == channels &&
                      grad_any.size(2) == channels,
                  "grad: expected shape [", images, ", ", channels, ", ", channels, "]");
  const MemoryFormat format = memory_format(features_any);
  const Tensor features = torch::stable::contiguous(features_any, format);  // itself, unless it is strided otherwise
  Tensor output = empty_cpu({images, channels, features.size(2), features.size(3)}, features.scalar_type(), format);
  if (output.numel() == 0) return output;
  dispatch_floating(features.scalar_type(), "features", [&](auto zero) {
    using T = decltype(zero);
    const bool wide = std::is_same_v<T, double>;
    const Tensor grad = as_contiguous(grad_any, wide ? ScalarType::Double : ScalarType::Float);
    backward<T>(grad, features, scale_of(normalize, features), output);
  });
  return output;
}

// ---- style loss -----------------------------------------------------------------------------------------------------

// The differences of Gram matrices from their target, and a quarter of their squares, summed, as a mean over images.
template <class T>
std::pair<Tensor, double> style_layer(const Tensor& features, const Tensor& target_any) {
  using A = accumulate_t<T>;
  const ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const int64_t images = features.size(0), channels = features.size(1);
  const Tensor target = as_contiguous(target_any, type);
  Tensor difference = empty_cpu({images, channels, channels}, type);
  if (difference.numel() == 0) return {difference, 0};
  const auto [made, sums] = sums_of<T>(features);
  const GramPlan& plan = made;
  const GramFinish<T, A> task{data<A>(sums), A(scale_of("elements", features)), mutable_data<A>(difference),
                              data<A>(target), target.size(0) == 1 ? 0 : channels * channels};
  std::vector<double> squares(plan.images * plan.blocks);
  parallel_for(plan.images * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    FASTCV_PICK(gram_finish<T, A>)(task, plan, begin, end, squares.data());
  });
  double sum = 0;
  for (double s : squares) sum += s;
  return {difference, sum / (4 * double(images))};
}

std::vector<Tensor> style_loss_cpu(const std::vector<Tensor>& features, const std::vector<Tensor>& targets,
                                   const std::vector<double>& weights) {
  STD_TORCH_CHECK(features.size() == targets.size() && features.size() == weights.size() && !features.empty(),
                  "features, targets, weights: expected lists of one length, at least 1");
  std::vector<Tensor> results(1);
  double loss = 0;
  for (size_t l = 0; l < features.size(); ++l) {
    const Tensor &f = features[l], &target = targets[l];
    check_features(f);
    STD_TORCH_CHECK(target.dim() == 3 && (target.size(0) == 1 || target.size(0) == f.size(0)) &&
                        target.size(1) == f.size(1) && target.size(2) == f.size(1),
                    "targets[", l, "]: expected shape [1 or ", f.size(0), ", ", f.size(1), ", ", f.size(1), "]");
    STD_TORCH_CHECK(f.scalar_type() == features[0].scalar_type(), "features[", l,
                    "]: expected the dtype of features[0]");
    dispatch_floating(f.scalar_type(), "features", [&](auto zero) {
      const auto [difference, term] = style_layer<decltype(zero)>(f, target);
      results.push_back(difference);
      loss += weights[l] * term;
    });
  }
  results[0] = empty_cpu({}, results[1].scalar_type());
  if (results[0].scalar_type() == ScalarType::Double)
    *mutable_data<double>(results[0]) = loss;
  else
    *mutable_data<float>(results[0]) = float(loss);
  return results;
}

}  // namespace
}  // namespace fastcv

STABLE_TORCH_LIBRARY_IMPL(fastcv, CPU, m) {
  m.impl("gram_matrix", TORCH_BOX(&fastcv::gram_matrix_cpu));
  m.impl("gram_matrix_backward", TORCH_BOX(&fastcv::gram_matrix_backward_cpu));
  m.impl("style_loss", TORCH_BOX(&fastcv::style_loss_cpu));
}
