// Forward pass of deformable convolution without a column buffer.
#include "deform_conv2d_sample.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int64_t kBlockRows = 160;  // rows (channel, kernel element) of a block of columns: 20 KB a panel with AVX-512

constexpr int64_t kPlanesAtOnce = 8;

// Channels that are sampled and multiplied at once: part of a group, or several whole groups.
template <class A>
int64_t channels_of_block(const DeformConv2dShape& s, bool channels_last) {
  int64_t channels = kBlockRows / s.taps();
  const int64_t unit = channels_last ? kLanes<A> : 4;
  channels = channels < unit ? unit : channels / unit * unit;
  const int64_t in_group = s.group_channels();
  return in_group >= channels ? channels : channels / in_group * in_group;
}

// Scratch memory handed out piece by piece; with a null start it only counts.
struct Arena {
  char* start;
  size_t used = 0;
  template <class P>
  P* take(int64_t n) {
    P* p = reinterpret_cast<P*>(start + used);
    used += (size_t(n) * sizeof(P) + 63) / 64 * 64;
    return p;
  }
};

template <class T>
class Tiles {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>, kP = kPanel<A>;

 public:
  Tiles(const DeformConv2dForward<T>& conv, void* scratch) : conv_(conv), s_(conv.shape), arena_{(char*)scratch} {
    block_channels_ = channels_of_block<A>(s_, conv.input.channels_last);
    const int64_t groups = block_channels_ > s_.group_channels() ? block_channels_ / s_.group_channels() : 1;
    outputs_ = groups * s_.group_outputs();
    depth_ = (block_channels_ < s_.group_channels() ? block_channels_ : s_.group_channels()) * s_.taps();
    const int64_t* w = conv.weight.stride;
    weight_in_place_ = conv.weight.type == (sizeof(A) == 8 ? FloatType::f64 : FloatType::f32) && w[3] == 1 &&
                       w[2] == s_.kernel_w && w[1] == s_.taps();
    panels_ = arena_.template take<Panel>(conv.panels);
    columns_ = arena_.template take<A>(block_channels_ * s_.taps() * kP);
    sums_ = arena_.template take<A>(conv.panels * outputs_ * kP);
    weights_ = arena_.template take<A>(weight_in_place_ ? 0 : outputs_ * depth_);
    if (conv.input.channels_last)
      corners_ = arena_.template take<CornerTaps<A>>(conv.panels * s_.taps());
    else
      pairs_ = arena_.template take<PairTaps<A>>(conv.panels * s_.taps());
  }

  size_t bytes() const { return arena_.used; }

  void run(int64_t tile) {
    const int64_t first = tile * conv_.panels * kP, last = s_.pixels();
    int count = 0;
    for (; count < conv_.panels && first + count * kP < last; ++count) {
      Panel& panel = panels_[count];
      locate_pixels(s_, first + count * kP, last, panel.pixels);
      find_addresses(panel.pixels, conv_.offset.stride, panel.offset_at);
      if (conv_.mask.data) find_addresses(panel.pixels, conv_.mask.stride, panel.mask_at);
      panel.offset_group = -1;
      panel.first = first + count * kP;
    }
    const int64_t in_group = s_.group_channels();
    for (int64_t c = 0; c < s_.channels;) {
      const int64_t group_end = (c / in_group + 1) * in_group;
      int64_t end = c + block_channels_;
      if (block_channels_ < in_group)
        end = end < group_end ? end : group_end;
      else
        end = end < s_.channels ? end : s_.channels;
      run_block(c, end, count);
      c = end;
    }
  }

 private:
  struct Panel {
    Pixels<A> pixels;
    Addresses<A> offset_at, mask_at;
    int64_t first, offset_group;  // the first pixel; the group whose taps are at hand
  };

  // Adds the channels [first, last) to the sums of their groups' outputs; stores these when they are complete.
  void run_block(int64_t first, int64_t last, int count) {
    const int64_t in_group = s_.group_channels(), outputs = s_.group_outputs();
    const int64_t first_group = first / in_group, last_group = (last + in_group - 1) / in_group;
    if (!weight_in_place_) pack_weights(first, last, first_group, last_group);
    for (int p = 0; p < count; ++p) {
      sample(first, last, p);
      A* sums = sums_ + p * outputs_ * kP;
      for (int64_t g = first_group; g < last_group; ++g) {
        const int64_t begin = g * in_group > first ? g * in_group : first;
        const int64_t end = (g + 1) * in_group < last ? (g + 1) * in_group : last;
        const int64_t depth = (end - begin) * s_.taps();
        const A* b = columns_ + (begin - first) * s_.taps() * kP;
        const int64_t a_row = weight_in_place_ ? conv_.weight.stride[0] : depth;
        const A* a = weight_in_place_ ? static_cast<const A*>(conv_.weight.data) + g * outputs * a_row +
                                            (begin - g * in_group) * s_.taps()
                                      : weights_ + (g - first_group) * outputs * depth;
        A* group_sums = sums + (g - first_group) * outputs * kP;
        for (int64_t o = 0; o < outputs; o += kRows) {
          const int rows = int(outputs - o < kRows ? outputs - o : kRows);
          multiply_rows(rows, a + o * a_row, a_row, int64_t(1), b, group_sums + o * kP, depth, begin != g * in_group);
        }
      }
      if (last == last_group * in_group)
        finish(panels_[p], first_group * outputs, (last_group - first_group) * outputs, sums);
    }
  }

  // The weights of channels [first, last) as [group, output, channel, tap].
  void pack_weights(int64_t first, int64_t last, int64_t first_group, int64_t last_group) {
    const int64_t in_group = s_.group_channels(), *stride = conv_.weight.stride;
    A* to = weights_;
    for (int64_t o = first_group * s_.group_outputs(); o < last_group * s_.group_outputs(); ++o) {
      const int64_t start = o / s_.group_outputs() * in_group;
      const int64_t begin = start > first ? start : first, end = start + in_group < last ? start + in_group : last;
      for (int64_t c = begin - start; c < end - start; ++c)
        for (int64_t y = 0; y < s_.kernel_h; ++y)
          for (int64_t x = 0; x < s_.kernel_w; ++x)
            *to++ = load_element<A>(conv_.weight, o * stride[0] + c * stride[1] + y * stride[2] + x * stride[3]);
    }
  }

  // columns[channel][tap][pixel] of channels [first, last).
  void sample(int64_t first, int64_t last, int p) {
    const int64_t taps = s_.taps(), in_offset_group = s_.offset_group_channels();
    for (int64_t c = first; c < last;) {
      const int64_t group = c / in_offset_group, group_end = (group + 1) * in_offset_group;
      const int64_t end = group_end < last ? group_end : last;
      if (panels_[p].offset_group != group) make_taps(group, p);
      // Planes go by few channels through all kernel elements, whose samples lie near each other: planes of a size that
      // is a power of two would otherwise drive each other from the cache.
      const int64_t step = conv_.input.channels_last ? end - c : kPlanesAtOnce;
      for (int64_t first_of_step = c; first_of_step < end; first_of_step += step) {
        const T* channel = conv_.input.data + first_of_step * conv_.input.stride[1];
        const int64_t n = end - first_of_step < step ? end - first_of_step : step;
        for (int64_t t = 0; t < taps; ++t)
          sample_tap(channel, n, p, t, columns_ + ((first_of_step - first) * taps + t) * kP);
      }
      c = end;
    }
  }

  void sample_tap(const T* channel, int64_t n, int p, int64_t t, A* rows) {
    const int64_t taps = s_.taps();
    if (conv_.input.channels_last)
      return sample_channels_last(channel, n, conv_.input.stride, corners_[p * taps + t], rows, taps * kP);
    const PairTaps<A>& pairs = pairs_[p * taps + t];
    const auto run = pairs.all_inside ? &sample_planes<false, T, A> : &sample_planes<true, T, A>;
    run(channel, conv_.input.stride[1], n, pair_row_step(s_, conv_.input.stride), pairs, rows, taps * kP);
  }

  void make_taps(int64_t group, int p) {
    Panel& panel = panels_[p];
    panel.offset_group = group;
    for (int64_t t = 0; t < s_.taps(); ++t) {
      Positions<A> positions;
      read_positions<A, false>(s_, panel.pixels, conv_.offset, panel.offset_at, conv_.mask, panel.mask_at, group, t,
                               positions);
      const bool modulate = conv_.mask.data;
      if (conv_.input.channels_last)
        make_corner_taps(conv_.input.stride, panel.pixels, positions, modulate, corners_[p * s_.taps() + t]);
      else
        make_pair_taps(s_, conv_.input.stride, panel.pixels, positions, modulate, pairs_[p * s_.taps() + t]);
    }
  }

  // Sums of outputs [first, first + n), [n][kPanel], plus bias, to the output tensor.
  void finish(const Panel& panel, int64_t first, int64_t n, const A* sums) {
    if (conv_.output_channels_last)
      finish_channels_last(panel, first, n, sums);
    else
      finish_planes(panel, first, n, sums);
  }

  void finish_planes(const Panel& panel, int64_t first, int64_t n, const A* sums) {
    const int64_t plane = s_.out_height * s_.out_width;
    const bool one_image = panel.pixels.image[kP - 1] == panel.pixels.image[0];
    for (int64_t o = 0; o < n; ++o, sums += kP) {
      const Vec<A> bias = broadcast(conv_.bias ? conv_.bias[first + o] : A(0));
      const Vec<A> left = load(sums) + bias, right = load(sums + L) + bias;
      if (one_image && panel.pixels.count == kP) {
        T* to = output_at(panel, 0, first + o, plane);
        store(to, left);
        store(to + L, right);
        continue;
      }
      T row[kP];
      store(row, left);
      store(row + L, right);
      for (int i = 0; i < panel.pixels.count; ++i) *output_at(panel, i, first + o, plane) = row[i];
    }
  }

  T* output_at(const Panel& panel, int i, int64_t output, int64_t plane) const {
    const int64_t image = panel.pixels.image[i];
    return conv_.output + (image * s_.out_channels + output) * plane + (panel.first + i - image * plane);
  }

  void finish_channels_last(const Panel& panel, int64_t first, int64_t n, const A* sums) {
    for (int64_t o = 0; o < n; o += L)
      for (int half = 0; half < panel.pixels.count; half += L) {
        const int rows = int(n - o < L ? n - o : L), columns = panel.pixels.count - half;
        Vec<A> square[L] = {};
        for (int r = 0; r < rows; ++r) square[r] = load(sums + (o + r) * kP + half);
        transpose(square);
        const Vec<A> bias = conv_.bias ? load_first(conv_.bias + first + o, rows) : Vec<A>{};
        for (int i = 0; i < L && i < columns; ++i) {
          T* to = conv_.output + (panel.first + half + i) * s_.out_channels + first + o;
          if (rows == L)
            store(to, square[i] + bias);
          else
            store_first(to, square[i] + bias, rows);
        }
      }
  }

  const DeformConv2dForward<T>& conv_;
  const DeformConv2dShape& s_;
  Arena arena_;
  int64_t block_channels_, outputs_, depth_;
  bool weight_in_place_;
  Panel* panels_;
  A *columns_, *sums_, *weights_;
  PairTaps<A>* pairs_ = nullptr;
  CornerTaps<A>* corners_ = nullptr;
};

}  // namespace

template <class T>
int64_t deform_conv2d_panel() {
  return kPanel<accumulate_t<T>>;
}

template <class T>
size_t deform_conv2d_forward_scratch(const DeformConv2dForward<T>& conv) {
  return Tiles<T>(conv, nullptr).bytes();
}

template <class T>
void deform_conv2d_forward(const DeformConv2dForward<T>& conv, int64_t first, int64_t last, void* scratch) {
  Tiles<T> tiles(conv, scratch);
  for (int64_t tile = first; tile < last; ++tile) tiles.run(tile);
}

#define FASTCV_INSTANTIATE(T)                                                         \
  template int64_t deform_conv2d_panel<T>();                                          \
  template size_t deform_conv2d_forward_scratch<T>(const DeformConv2dForward<T>&);    \
  template void deform_conv2d_forward<T>(const DeformConv2dForward<T>&, int64_t, int64_t, void*);
FASTCV_INSTANTIATE(float)
FASTCV_INSTANTIATE(double)
FASTCV_INSTANTIATE(half_t)
FASTCV_INSTANTIATE(bfloat16_t)
#undef FASTCV_INSTANTIATE

}  // namespace fastcv::FASTCV_ISA
