// Deformable convolution (Dai et al. 2017; with modulation Zhu et al. 2019): shapes, parameters and kernel signatures.
//
//     y[n, o, p] = bias[o] + sum over c, t of weight[o, c, t] * mask[n, t, p] * x(n, c, p * stride - pad + t * dilation
//                                                                                 + offset[n, t, p])
//
// for output pixels p and kernel elements t, both two-dimensional; x(.) samples bilinearly and is zero outside.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/types.h"

namespace fastcv {

enum class FloatType : uint8_t { f32, f64, f16, bf16 };

// A tensor of four dimensions, any floating type and any strides (in elements); data is null where it is absent.
struct AnyTensor {
  const void* data;
  FloatType type;
  int64_t stride[4];
};

struct DeformConv2dShape {
  int64_t batch, channels, height, width;       // of the input
  int64_t out_channels, out_height, out_width;  // of the output
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, offset_groups;

  // Inlined by force: a copy compiled for AVX-512 must not be what other files link to.
#define FASTCV_MEMBER FASTCV_HOST_DEVICE inline __attribute__((always_inline))
  FASTCV_MEMBER int64_t taps() const { return kernel_h * kernel_w; }
  FASTCV_MEMBER int64_t group_channels() const { return channels / groups; }
  FASTCV_MEMBER int64_t group_outputs() const { return out_channels / groups; }
  FASTCV_MEMBER int64_t offset_group_channels() const { return channels / offset_groups; }
  FASTCV_MEMBER int64_t pixels() const { return batch * out_height * out_width; }
#undef FASTCV_MEMBER
};

// The input is read in place in one of two ways: as planes (stride of w is 1, width at least 2) or channels-last
// (stride of c is 1).
template <class T>
struct DeformConv2dInput {
  const T* data;
  int64_t stride[4];
  bool channels_last;
};

template <class T>
struct DeformConv2dForward {
  DeformConv2dShape shape;
  DeformConv2dInput<T> input;
  AnyTensor weight;             // [out_channels, channels / groups, kernel_h, kernel_w]
  AnyTensor offset;             // [batch, offset_groups * taps * 2, out_height, out_width], y before x
  AnyTensor mask;               // [batch, offset_groups * taps, out_height, out_width], or absent
  const accumulate_t<T>* bias;  // [out_channels] or null
  T* output;                    // [batch, out_channels, out_height, out_width], dense
  bool output_channels_last;
  int panels;  // panels of output pixels that a tile holds
};

template <class T>
struct DeformConv2dBackward {
  using A = accumulate_t<T>;
  DeformConv2dShape shape;
  DeformConv2dInput<T> input;
  AnyTensor weight, offset, mask;
  AnyTensor grad;      // of the output
  A* grad_input;       // added to; planes or channels-last, as the input; these five are null where not wanted
  int64_t grad_input_stride[4];
  A* grad_weight;      // added to; contiguous, as the following ones
  A* grad_offset;      // added to
  A* grad_mask;        // added to
  A* grad_bias;        // written
  // The block of work at hand: some channels of some output pixels.
  int64_t first_channel, last_channel;  // whole groups, or part of one
  int64_t first_pixel, last_pixel;
  // Scratch shared by the threads, in panels of pixels: [panels][rows][pixels of a panel].
  A* grad_block;    // the outputs of the channels' groups: grad
  A* grad_columns;  // a row for each channel and tap: gradient of the sampled values
  A* columns;       // the same: sampled values, modulated
  A* weights;       // the block's weights, packed by deform_conv2d_pack_weights
};

// How large that scratch is, for the largest block.
struct DeformConv2dBackwardSizes {
  int64_t grad_rows;    // of a panel of grad_block
  int64_t column_rows;  // of a panel of grad_columns and of columns
  int64_t weights;      // elements
};

}  // namespace fastcv

FASTCV_EACH_ISA(
    // Output pixels in a panel.
    template <class T> int64_t deform_conv2d_panel();
    // Bytes of scratch, aligned to 64, that a thread needs.
    template <class T> size_t deform_conv2d_forward_scratch(const DeformConv2dForward<T>& conv);
    // Computes tiles [first, last) of panels * deform_conv2d_panel() output pixels.
    template <class T> void deform_conv2d_forward(const DeformConv2dForward<T>& conv, int64_t first, int64_t last,
                                                  void* scratch);

    // Channels that a block of the backward pass takes: whole groups, or part of one.
    template <class T> int64_t deform_conv2d_backward_channels(const DeformConv2dShape& shape);
    template <class T> DeformConv2dBackwardSizes deform_conv2d_backward_sizes(const DeformConv2dShape& shape);
    template <class T> size_t deform_conv2d_backward_scratch(const DeformConv2dShape& shape);
    // The steps of a block, in this order; each may be split over threads. Chunks [first, last) of the weights:
    template <class T> int64_t deform_conv2d_weight_chunks(const DeformConv2dBackward<T>& conv);
    template <class T> void deform_conv2d_pack_weights(const DeformConv2dBackward<T>& conv, int64_t first,
                                                       int64_t last);
    // Panels [first, last) of the block: gradients of offset and mask; fills grad_block, grad_columns and columns.
    template <class T> void deform_conv2d_backward_panels(const DeformConv2dBackward<T>& conv, int64_t first,
                                                          int64_t last, void* scratch);
    // Channels [first, last) of the block: gradient of the input.
    template <class T> void deform_conv2d_backward_input(const DeformConv2dBackward<T>& conv, int64_t first,
                                                         int64_t last, void* scratch);
    // Channels [first, last) of the block: gradient of the weight.
    template <class T> void deform_conv2d_backward_weight(const DeformConv2dBackward<T>& conv, int64_t first,
                                                          int64_t last);
    // Output channels [first, last): gradient of the bias, whole.
    template <class T> void deform_conv2d_backward_bias(const DeformConv2dBackward<T>& conv, int64_t first,
                                                        int64_t last);)
