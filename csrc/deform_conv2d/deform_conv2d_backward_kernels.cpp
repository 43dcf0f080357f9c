// Backward pass of deformable convolution without a column buffer.
#include "deform_conv2d_derivatives.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int64_t kBlockRows = 1152;   // rows (channel, kernel element) of a block
constexpr int64_t kPlanesAtOnce = 8;   // as in the forward pass
constexpr int64_t kPlanesScattered = 4;
constexpr int64_t kDotBlockRows = 96;  // rows of columns that stay in the second-level cache in the weight's gradient
constexpr int64_t kDotOutputs = 8;     // outputs that stay in the first-level cache there

// ---- a block of channels and pixels ---------------------------------------------------------------------------------

// Rows of a panel with those that keep panels apart: `tile` rows of all panels are read at a time, and a distance near
// a multiple of 4096 bytes would put them all in the same sets of the first-level cache.
template <class A>
int64_t pad_rows(int64_t rows, int tile) {
  constexpr int64_t period = 4096 / (kPanel<A> * sizeof(A));
  return rows + (tile - rows % period + period) % period;
}

// What is computed once for each panel, offset group and kernel element.
template <class A>
struct Tap {
  Positions<A> positions;
  PairTaps<A> pairs;  // or corners, as the input lies
  CornerTaps<A> corners;
  PairSlopes<A> slopes;
  Totals<A> totals;
};

template <class T>
class Block {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>, kP = kPanel<A>;

 public:
  explicit Block(const DeformConv2dBackward<T>& conv, void* scratch = nullptr)
      : conv_(conv), s_(conv.shape), taps_(static_cast<Tap<A>*>(scratch)) {
    const int64_t in_group = s_.group_channels();
    first_group_ = conv.first_channel / in_group, last_group_ = (conv.last_channel + in_group - 1) / in_group;
    first_output_ = first_group_ * s_.group_outputs(), outputs_ = (last_group_ - first_group_) * s_.group_outputs();
    group_channels_ = conv.last_channel - conv.first_channel;
    if (group_channels_ > in_group) group_channels_ = in_group;
    group_rows_ = group_channels_ * s_.taps();
    rows_ = (conv.last_channel - conv.first_channel) * s_.taps();
    grad_panel_ = pad_rows<A>(outputs_, kDotOutputs) * kP, panel_ = pad_rows<A>(rows_, kDotColumns) * kP;
    panels_ = (conv.last_pixel - conv.first_pixel + kP - 1) / kP;
  }

  // Chunks of packed weights: [group][chunk of kRows rows][output][kRows].
  int64_t chunks() const { return (last_group_ - first_group_) * ((group_rows_ + kRows - 1) / kRows); }

  void pack_weights(int64_t first, int64_t last) const {
    const int64_t in_group = (group_rows_ + kRows - 1) / kRows, *stride = conv_.weight.stride;
    for (int64_t k = first; k < last; ++k) {
      const int64_t row = k % in_group * kRows, outputs = s_.group_outputs();
      const int rows = int(min_of(kRows, group_rows_ - row));
      int64_t at[kRows] = {};
      for (int r = 0; r < rows; ++r) {
        const int64_t t = (row + r) % s_.taps(), c = conv_.first_channel % s_.group_channels() + (row + r) / s_.taps();
        at[r] = c * stride[1] + t / s_.kernel_w * stride[2] + t % s_.kernel_w * stride[3];
      }
      A* to = conv_.weights + k * kRows * outputs;
      const int64_t output = first_output_ + k / in_group * outputs;
      for (int64_t o = output; o < output + outputs; ++o, to += kRows)
        for (int r = 0; r < kRows; ++r) to[r] = load_element<A>(conv_.weight, o * stride[0] + at[r]);
    }
  }

  int64_t panels() const { return panels_; }

  void run_panel(int64_t p) {
    open_panel(p);
    Addresses<A> grad_at;
    find_addresses(pixels_, conv_.grad.stride, grad_at);
    const int64_t plane = s_.out_height * s_.out_width, mask_image = s_.offset_groups * s_.taps() * plane;
    const int64_t offset_stride[4] = {2 * mask_image, plane, s_.out_width, 1};
    const int64_t mask_stride[4] = {mask_image, plane, s_.out_width, 1};
    if (conv_.grad_offset) find_addresses(pixels_, offset_stride, grad_offset_at_);
    if (conv_.grad_mask) find_addresses(pixels_, mask_stride, grad_mask_at_);
    A* grad = conv_.grad_block + p * grad_panel_;
    load_rows(conv_.grad, first_output_, outputs_, grad_at, grad);
    for (int64_t o = 0; o < outputs_; ++o)
      for (int i = pixels_.count; i < kP; ++i) grad[o * kP + i] = 0;
    const bool slopes = conv_.grad_offset || conv_.grad_mask;
    if (slopes || conv_.grad_input) multiply_weights(p);
    if (!slopes && !conv_.grad_weight) return;
    each_offset_group(conv_.first_channel, conv_.last_channel, [&](int64_t group, int64_t first, int64_t last) {
      const int64_t at = p * panel_ + (first - conv_.first_channel) * s_.taps() * kP;
      make_taps(group, conv_.input.stride, slopes ? Use::slopes : Use::columns);
      differentiate(first, last, slopes, conv_.grad_columns + at, conv_.columns + at);
      if (slopes) add_totals(group);
    });
  }

  void scatter_panel(int64_t p, int64_t first, int64_t last) {
    const int64_t* stride = conv_.grad_input_stride;
    open_panel(p);
    first += conv_.first_channel, last += conv_.first_channel;
    each_offset_group(first, last, [&](int64_t group, int64_t begin, int64_t end) {
      make_taps(group, stride, Use::scatter);
      scatter(begin, end, conv_.grad_columns + p * panel_ + (begin - conv_.first_channel) * s_.taps() * kP, stride);
    });
  }

  // Gradient of the weights of channels [first, last) of the block.
  void weight_gradient(int64_t first, int64_t last) const {
    const int64_t in_group = s_.group_channels(), row_length = in_group * s_.taps(), outputs = s_.group_outputs();
    for (int64_t g = first_group_; g < last_group_; ++g) {
      const int64_t begin = max_of(g * in_group, conv_.first_channel + first);
      const int64_t end = min_of((g + 1) * in_group, conv_.first_channel + last);
      const int64_t first_row = (begin - conv_.first_channel) * s_.taps(), rows = (end - begin) * s_.taps();
      A* to = conv_.grad_weight + g * outputs * row_length + (begin - g * in_group) * s_.taps();
      const A* grad = conv_.grad_block + (g - first_group_) * outputs * kP;
      for (int64_t k0 = 0; k0 < rows; k0 += kDotBlockRows)
        for (int64_t o0 = 0; o0 < outputs; o0 += kDotOutputs)
          for (int64_t k = k0; k < min_of(rows, k0 + kDotBlockRows); k += kDotColumns)
            for (int64_t o = o0; o < min_of(outputs, o0 + kDotOutputs); o += kDotRows) {
              const int n = int(min_of(kDotRows, outputs - o));
              const int m = int(min_of(kDotColumns, min_of(rows, k0 + kDotBlockRows) - k));
              dot_rows(n, m, grad + o * kP, grad_panel_, conv_.columns + (first_row + k) * kP, panel_, panels_,
                       to + o * row_length + k, row_length);
            }
    }
  }

 private:
  void open_panel(int64_t p) {
    locate_pixels(s_, conv_.first_pixel + p * kP, conv_.last_pixel, pixels_);
    find_addresses(pixels_, conv_.offset.stride, offset_at_);
    if (conv_.mask.data) find_addresses(pixels_, conv_.mask.stride, mask_at_);
  }

  // f(offset group, first, last) for the parts of channels [first, last) in one offset group each.
  template <class F>
  void each_offset_group(int64_t first, int64_t last, const F& f) {
    const int64_t in_group = s_.offset_group_channels();
    for (int64_t c = first; c < last;) {
      const int64_t end = min_of((c / in_group + 1) * in_group, last);
      f(c / in_group, c, end);
      c = end;
    }
  }

  // grad_columns = transposed weights times grad.
  void multiply_weights(int64_t p) const {
    const int64_t outputs = s_.group_outputs();
    const A* a = conv_.weights;
    for (int64_t g = 0; g < last_group_ - first_group_; ++g) {
      const A* b = conv_.grad_block + p * grad_panel_ + g * outputs * kP;
      A* c = conv_.grad_columns + p * panel_ + g * group_rows_ * kP;
      for (int64_t row = 0; row < group_rows_; row += kRows, a += kRows * outputs)
        multiply_rows(int(min_of(kRows, group_rows_ - row)), a, int64_t(1), int64_t(kRows), b, c + row * kP, outputs,
                      false);
    }
  }

  enum class Use { columns, slopes, scatter };

  void make_taps(int64_t group, const int64_t* stride, Use use) {
    const bool modulate = use != Use::slopes && conv_.mask.data;
    for (int64_t t = 0; t < s_.taps(); ++t) {
      Tap<A>& tap = taps_[t];
      Positions<A>& at = tap.positions;
      read_positions<A, true>(s_, pixels_, conv_.offset, offset_at_, conv_.mask, mask_at_, group, t, at);
      if (use == Use::scatter)  // a sample at NaN has no neighbours
        for (int i = 0; i < kP; ++i) at.valid[i] = at.fy[i] == at.fy[i] ? at.valid[i] : 0;
      if (conv_.input.channels_last) {
        make_corner_taps(stride, pixels_, at, modulate, tap.corners);
        continue;
      }
      make_pair_taps(s_, stride, pixels_, at, modulate, tap.pairs);
      if (use != Use::slopes) continue;
      pair_weights(s_, at, tap.pairs, false, Slope{}, Bilinear{}, tap.slopes.y_upper, tap.slopes.y_lower);
      pair_weights(s_, at, tap.pairs, false, Bilinear{}, Slope{}, tap.slopes.x_upper, tap.slopes.x_lower);
    }
  }

  // Channels [first, last) of one offset group: columns, and totals where `slopes`.
  void differentiate(int64_t first, int64_t last, bool slopes, const A* grad, A* columns) {
    const int64_t taps = s_.taps(), row_step = taps * kP;
    const T* channel = conv_.input.data + first * conv_.input.stride[1];
    if (conv_.input.channels_last) {
      for (int64_t t = 0; t < taps; ++t) {
        if (slopes)
          differentiate_channels_last(channel, last - first, taps_[t], grad + t * kP, columns + t * kP);
        else
          sample_channels_last(channel, last - first, conv_.input.stride, taps_[t].corners, columns + t * kP, row_step);
      }
      return;
    }
    for (int64_t t = 0; t < taps; ++t) taps_[t].totals = Totals<A>{};
    const int64_t pair_step = pair_row_step(s_, conv_.input.stride), plane_step = conv_.input.stride[1];
    for (int64_t c = 0; c < last - first; c += kPlanesAtOnce)
      for (int64_t t = 0; t < taps; ++t) {
        Tap<A>& tap = taps_[t];
        const int64_t n = min_of(kPlanesAtOnce, last - first - c), row = c * row_step + t * kP;
        const T* planes = channel + c * plane_step;
        const auto sample = tap.pairs.all_inside ? &sample_planes<false, T, A> : &sample_planes<true, T, A>;
        const auto run = tap.pairs.all_inside ? &differentiate_planes<false, T, A> : &differentiate_planes<true, T, A>;
        if (slopes)
          run(planes, plane_step, n, pair_step, tap.pairs, tap.slopes, tap.positions.mask, grad + row, columns + row,
              row_step, tap.totals);
        else
          sample(planes, plane_step, n, pair_step, tap.pairs, columns + row, row_step);
      }
  }

  void differentiate_channels_last(const T* channel, int64_t n, Tap<A>& tap, const A* grad, A* columns) {
    const int64_t row_step = s_.taps() * kP;
    VectorTotals<A> totals = {};
    for (int64_t c = 0; c < n; c += L)
      for (int half = 0; half < kP; half += L) {
        const auto run = n - c >= L ? &differentiate_square<true, T, A> : &differentiate_square<false, T, A>;
        run(channel + c, int(min_of(n - c, L)), conv_.input.stride, tap.corners, tap.positions, half,
            grad + c * row_step + half, columns + c * row_step + half, row_step, totals);
      }
    sum_totals(totals, tap.positions.mask, tap.totals);
  }

  void add_totals(int64_t group) {
    for (int64_t t = 0; t < s_.taps(); ++t) {
      const int64_t channel = group * s_.taps() + t;
      if (conv_.grad_offset) {
        add_row(taps_[t].totals.y, grad_offset_at_, conv_.grad_offset, 2 * channel);
        add_row(taps_[t].totals.x, grad_offset_at_, conv_.grad_offset, 2 * channel + 1);
      }
      if (conv_.grad_mask) add_row(taps_[t].totals.mask, grad_mask_at_, conv_.grad_mask, channel);
    }
  }

  void add_row(const A* row, const Addresses<A>& at, A* tensor, int64_t channel) const {
    tensor += channel * s_.out_height * s_.out_width;
    if (at.run) {
      tensor += at.at[0];
      for (int i = 0; i < kP; i += L) store(tensor + i, load(tensor + i) + load(row + i));
    } else {
      for (int i = 0; i < pixels_.count; ++i) tensor[at.at[i]] += row[i];
    }
  }

  // Rows of channels [first, last) of one offset group, to the gradient of the input.
  void scatter(int64_t first, int64_t last, const A* grad, const int64_t* stride) const {
    const int64_t taps = s_.taps(), row_step = taps * kP;
    const int64_t step = conv_.input.channels_last ? L : kPlanesScattered;
    for (int64_t c = first; c < last; c += step)
      for (int64_t t = 0; t < taps; ++t) {
        const A* rows = grad + (c - first) * row_step + t * kP;
        const int64_t n = min_of(step, last - c);
        A* to = conv_.grad_input + c * stride[1];
        if (!conv_.input.channels_last) {
          scatter_planes(rows, row_step, n, taps_[t].pairs, pair_row_step(s_, stride), to, stride[1]);
          continue;
        }
        const auto run = n == L ? &scatter_square<true, A> : &scatter_square<false, A>;
        for (int half = 0; half < kP; half += L) run(rows + half, row_step, int(n), stride, taps_[t].corners, half, to);
      }
  }

  const DeformConv2dBackward<T>& conv_;
  const DeformConv2dShape& s_;
  Tap<A>* taps_;
  int64_t first_group_, last_group_, first_output_, outputs_, group_channels_, group_rows_, rows_, panels_;
  int64_t grad_panel_, panel_;  // distance of panels of grad_block, and of the other two
  Pixels<A> pixels_;
  Addresses<A> offset_at_, mask_at_, grad_offset_at_, grad_mask_at_;
};

}  // namespace

template <class T>
int64_t deform_conv2d_backward_channels(const DeformConv2dShape& s) {
  constexpr int64_t unit = kLanes<accumulate_t<T>>;
  int64_t channels = kBlockRows / s.taps() / unit * unit;
  if (channels < unit) channels = unit;
  const int64_t in_group = s.group_channels();
  return in_group >= channels ? channels : channels / in_group * in_group;
}

template <class T>
int64_t deform_conv2d_weight_chunks(const DeformConv2dBackward<T>& conv) {
  return Block<T>(conv).chunks();
}

template <class T>
DeformConv2dBackwardSizes deform_conv2d_backward_sizes(const DeformConv2dShape& s) {
  using A = accumulate_t<T>;
  const int64_t in_group = s.group_channels(), channels = min_of(deform_conv2d_backward_channels<T>(s), s.channels);
  const int64_t groups = channels > in_group ? channels / in_group : 1;
  const int64_t group_rows = min_of(channels, in_group) * s.taps();
  return {pad_rows<A>(groups * s.group_outputs(), kDotOutputs), pad_rows<A>(channels * s.taps(), kDotColumns),
          groups * s.group_outputs() * ((group_rows + kRows - 1) / kRows * kRows)};
}

template <class T>
size_t deform_conv2d_backward_scratch(const DeformConv2dShape& s) {
  return size_t(s.taps()) * sizeof(Tap<accumulate_t<T>>);
}

template <class T>
void deform_conv2d_pack_weights(const DeformConv2dBackward<T>& conv, int64_t first, int64_t last) {
  Block<T>(conv).pack_weights(first, last);
}

template <class T>
void deform_conv2d_backward_panels(const DeformConv2dBackward<T>& conv, int64_t first, int64_t last, void* scratch) {
  Block<T> block(conv, scratch);
  for (int64_t p = first; p < last; ++p) block.run_panel(p);
}

template <class T>
void deform_conv2d_backward_input(const DeformConv2dBackward<T>& conv, int64_t first, int64_t last, void* scratch) {
  Block<T> block(conv, scratch);
  for (int64_t p = 0; p < block.panels(); ++p) block.scatter_panel(p, first, last);
}

template <class T>
void deform_conv2d_backward_weight(const DeformConv2dBackward<T>& conv, int64_t first, int64_t last) {
  Block<T>(conv).weight_gradient(first, last);
}

template <class T>
void deform_conv2d_backward_bias(const DeformConv2dBackward<T>& conv, int64_t first, int64_t last) {
  using A = accumulate_t<T>;
  constexpr int kOutputs = 32, kP = kPanel<A>;
  constexpr int64_t kFlushPanels = 64;  // a lane adds so many numbers in A before it is added in double
  Pixels<A> pixels;
  Addresses<A> at;
  for (int64_t o = first; o < last; o += kOutputs) {
    const int n = int(last - o < kOutputs ? last - o : kOutputs);
    double total[kOutputs] = {};
    for (int64_t begin = 0; begin < conv.shape.pixels(); begin += kFlushPanels * kP) {
      A lanes[kOutputs][kP] = {};
      for (int64_t p = begin; p < begin + kFlushPanels * kP && p < conv.shape.pixels(); p += kP) {
        locate_pixels(conv.shape, p, conv.shape.pixels(), pixels);
        find_addresses(pixels, conv.grad.stride, at);
        for (int r = 0; r < n; ++r) {
          A row[kP];
          load_row(conv.grad, o + r, at, row);
          for (int i = 0; i < kP; ++i) lanes[r][i] += i < pixels.count ? row[i] : A(0);
        }
      }
      for (int r = 0; r < n; ++r)
        for (int i = 0; i < kP; ++i) total[r] += double(lanes[r][i]);
    }
    for (int r = 0; r < n; ++r) conv.grad_bias[o + r] = A(total[r]);
  }
}

#define FASTCV_INSTANTIATE(T)                                                                                  \
  template int64_t deform_conv2d_backward_channels<T>(const DeformConv2dShape&);                               \
  template int64_t deform_conv2d_weight_chunks<T>(const DeformConv2dBackward<T>&);                             \
  template DeformConv2dBackwardSizes deform_conv2d_backward_sizes<T>(const DeformConv2dShape&);                \
  template size_t deform_conv2d_backward_scratch<T>(const DeformConv2dShape&);                                 \
  template void deform_conv2d_pack_weights<T>(const DeformConv2dBackward<T>&, int64_t, int64_t);               \
  template void deform_conv2d_backward_panels<T>(const DeformConv2dBackward<T>&, int64_t, int64_t, void*);     \
  template void deform_conv2d_backward_input<T>(const DeformConv2dBackward<T>&, int64_t, int64_t, void*);      \
  template void deform_conv2d_backward_weight<T>(const DeformConv2dBackward<T>&, int64_t, int64_t);            \
  template void deform_conv2d_backward_bias<T>(const DeformConv2dBackward<T>&, int64_t, int64_t);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)
#undef FASTCV_INSTANTIATE

}  // namespace fastcv::FASTCV_ISA
