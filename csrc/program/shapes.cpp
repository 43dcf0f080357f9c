// Sizes of what each step computes.
//
// Params of steps:
//     conv                         stride (2), padding (2), dilation (2), groups, activation, slope
//     max_pool                     kernel (2), stride (2), padding (2), dilation (2), with indices, ceil_mode
//     avg_pool                     kernel (2), stride (2), padding (2), dilation (2), count_include_pad, ceil_mode
//     adaptive_avg_pool            output height and width, 0: the input's
//     add, mul, activate, affine   activation, slope
//     merge                        the same
//     slice                        first channel, number of channels
//     resize                       bilinear, align_corners, by (0: size, 1: the second input's, 2: factor), height,
//                                  width, factors (2)
//     layer_norm                   epsilon
//     conv_transpose               stride (2), padding (2), output padding (2), dilation (2), groups, activation, slope
//     max_unpool                   kernel (2), which is the stride too; the output as it was asked for: height and
//                                  width, or 0: as many windows as there are
#include <cstring>

#include "program.h"

namespace fastcv::program {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

std::string text(const Extent& e) {
  return "[" + std::to_string(e.n) + ", " + std::to_string(e.c) + ", " + std::to_string(e.h) + ", " +
         std::to_string(e.w) + "]";
}

int64_t pooled(int64_t size, const std::vector<int64_t>& p, int axis) {
  const int64_t kernel = p[0 + axis], stride = p[2 + axis], pad = p[4 + axis], dilation = p[6 + axis];
  const int64_t room = size + 2 * pad - dilation * (kernel - 1) - 1;
  if (room < 0) fail("pooling: an input of " + std::to_string(size) + " with its padding is smaller than the kernel");
  int64_t out = (room + (p[9] ? stride - 1 : 0)) / stride + 1;
  if (p[9] && (out - 1) * stride >= size + pad) --out;  // the last window must begin inside
  return out;
}

Extent resized(const Step& step, const Extent& in, const Extent* like) {
  if (step.params[2] == 1) return {in.n, in.c, like->h, like->w};
  if (step.params[2] == 0) return {in.n, in.c, step.params[3], step.params[4]};
  return {in.n, in.c, int64_t(double(in.h) * step.real(5)), int64_t(double(in.w) * step.real(6))};
}

// Indices of a pixel are bytes, as many as it has channels, and take the place of so many floats.
int64_t index_channels(int64_t channels) { return (channels + 3) / 4; }

// Indices count the pixels of a window here, and those of a map in torch: they mean the same in a map of the size
// pooled.
Extent unpooled(const Step& step, const std::vector<Extent>& extents) {
  const auto extent = [&](size_t i) { return extents[size_t(step.inputs[i])]; };
  const Extent in = extent(0), indices = extent(1), from = extent(2);
  const int64_t kh = step.params[0], kw = step.params[1];
  const Extent like = step.inputs.size() > 3 ? extent(3) : Extent{0, 0, step.params[2], step.params[3]};
  const int64_t h = like.h ? like.h : in.h * kh, w = like.w ? like.w : in.w * kw;
  if (indices.n != in.n || indices.h != in.h || indices.w != in.w || indices.c != index_channels(in.c) ||
      from.n != in.n || from.c != in.c || (from.h + kh - 1) / kh < in.h || (from.w + kw - 1) / kw < in.w)
    fail("unpooling " + text(in) + " with indices of other maps");
  if (h != from.h || w != from.w)
    fail("unpooling to " + std::to_string(h) + "x" + std::to_string(w) + " what was pooled from " +
         std::to_string(from.h) + "x" + std::to_string(from.w) + ": give its size as output_size");
  return from;
}

}  // namespace

double Step::real(size_t i) const {
  double value;
  std::memcpy(&value, &params.at(i), sizeof value);
  return value;
}

const float* Step::weight(const Program& program, size_t i) const {
  return i < weights.size() && weights[i] >= 0 ? program.weights.at(size_t(weights[i])).data : nullptr;
}

Conv2dShape conv_shape(const Program& program, const Step& step, const std::vector<Extent>& extents) {
  Extent in = extents[size_t(step.inputs[0])];
  const Weight& weight = program.weights.at(size_t(step.weights[0]));
  const auto& p = step.params;
  Conv2dShape s{};
  s.out_channels = weight.size[0];
  s.kernel_h = weight.size.size() == 4 ? weight.size[2] : 1, s.kernel_w = weight.size.size() == 4 ? weight.size[3] : 1;
  // Vectors are the pixels of one image: a kernel may take several at a time.
  if (in.h == 1 && in.w == 1 && s.kernel_h == 1 && s.kernel_w == 1 && p[2] == 0 && p[3] == 0) in = {1, in.c, 1, in.n};
  s.images = in.n, s.channels = in.c, s.height = in.h, s.width = in.w;
  s.stride_h = p[0], s.stride_w = p[1], s.pad_h = p[2], s.pad_w = p[3], s.dilation_h = p[4], s.dilation_w = p[5];
  s.groups = p[6], s.input_norm = step.weights[3] >= 0;
  if (in.h == 1 && in.n == 1 && s.kernel_h == 1 && s.kernel_w == 1) s.stride_h = 1;
  if (weight.size[1] * s.groups != s.channels)
    fail("an input of " + text(in) + " does not fit weights for " + std::to_string(weight.size[1] * s.groups) +
         " channels");
  if (!is_valid_window(s)) fail(std::string("a convolution of ") + text(in) + ": " + kValidWindow);
  if (!set_output_size(s)) fail("an input of " + text(in) + " with its padding is smaller than the kernel");
  return s;
}

Conv2dShape transposed_shape(const Program& program, const Step& step, const std::vector<Extent>& extents) {
  const Extent in = extents[size_t(step.inputs[0])];
  const Weight& weight = program.weights.at(size_t(step.weights[0]));
  const auto& p = step.params;
  Conv2dShape s{};
  s.images = in.n, s.channels = in.c, s.height = in.h, s.width = in.w;
  s.out_channels = weight.size[1] * p[8], s.kernel_h = weight.size[2], s.kernel_w = weight.size[3];
  s.stride_h = p[0], s.stride_w = p[1], s.pad_h = p[2], s.pad_w = p[3], s.dilation_h = p[6], s.dilation_w = p[7],
  s.groups = p[8];
  if (weight.size[0] != in.c)
    fail("an input of " + text(in) + " does not fit weights for " + std::to_string(weight.size[0]) + " channels");
  if (!set_transposed_output_size(s, p[4], p[5]))
    fail("a transposed convolution of " + text(in) + " leaves nothing, or too much");
  return s;
}

Extent output_extent(const Program& program, const Step& step, const std::vector<Extent>& extents) {
  const Extent in = extents[size_t(step.inputs[0])];
  const Extent* second = step.inputs.size() > 1 ? &extents[size_t(step.inputs[1])] : nullptr;
  switch (step.op) {
    case Op::conv: {
      const Conv2dShape s = conv_shape(program, step, extents);
      const bool vectors = s.images == 1 && s.height == 1 && s.width == in.n && in.h == 1 && in.w == 1;
      const Extent out =
          vectors ? Extent{in.n, s.out_channels, 1, 1} : Extent{in.n, s.out_channels, s.out_height, s.out_width};
      if (second && !(*second == out)) fail("a residual of " + text(*second) + " for an output of " + text(out));
      return out;
    }
    case Op::conv_transpose: {
      const Conv2dShape s = transposed_shape(program, step, extents);
      const Extent out{in.n, s.out_channels, s.out_height, s.out_width};
      if (second && !(*second == out)) fail("a residual of " + text(*second) + " for an output of " + text(out));
      return out;
    }
    case Op::max_pool:
    case Op::avg_pool: {
      const int64_t indices = step.op == Op::max_pool && step.params[8] ? index_channels(in.c) : 0;
      return {in.n, in.c + indices, pooled(in.h, step.params, 0), pooled(in.w, step.params, 1)};
    }
    case Op::max_unpool: return unpooled(step, extents);
    case Op::adaptive_avg_pool:
      return {in.n, in.c, step.params[0] ? step.params[0] : in.h, step.params[1] ? step.params[1] : in.w};
    case Op::add:
    case Op::mul:
      if (!(*second == in || *second == Extent{in.n, in.c, 1, 1}))
        fail("cannot combine values of " + text(in) + " and " + text(*second));
      return in;
    case Op::merge:
      if (second->n != in.n || second->c != in.c)
        fail("cannot combine values of " + text(in) + " and " + text(*second));
      return in;
    case Op::affine:
    case Op::layer_norm:
    case Op::prelu:
      for (int64_t weight : step.weights)
        if (weight >= 0 && program.weights.at(size_t(weight)).size[0] != in.c)
          fail("an input of " + text(in) + " does not fit");
      return in;
    case Op::activate: return in;
    case Op::cat: {
      Extent out = in;
      for (size_t i = 1; i < step.inputs.size(); ++i) {
        const Extent& e = extents[size_t(step.inputs[i])];
        if (e.n != in.n || e.h != in.h || e.w != in.w) fail("cannot join values of " + text(in) + " and " + text(e));
        out.c += e.c;
      }
      return out;
    }
    case Op::interleave:
      if (!(*second == in)) fail("cannot interleave values of " + text(in) + " and " + text(*second));
      return {in.n, 2 * in.c, in.h, in.w};
    case Op::slice:
      if (step.params[0] < 0 || step.params[1] <= 0 || step.params[0] + step.params[1] > in.c)
        fail("channels " + std::to_string(step.params[0]) + " + " + std::to_string(step.params[1]) + " of " + text(in));
      return {in.n, step.params[1], in.h, in.w};
    case Op::flatten: return {in.n, in.c * in.h * in.w, 1, 1};
    case Op::resize: {
      const Extent out = resized(step, in, second);
      if (out.h < 1 || out.w < 1) fail("resizing " + text(in) + " leaves nothing");
      return out;
    }
  }
  fail("a step of an unknown kind");
}

}  // namespace fastcv::program
