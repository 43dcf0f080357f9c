// Convolution in float32, what all its kernels share.
//
//     output = activation(input * weight + bias + residual)
//
// Activations are channels-last: the channels of a pixel lie side by side, pixels at any stride, so that input,
// residual and output may be slices of wider maps. There is one kernel for each kind of convolution; each lays the
// weights out in its own way, once (conv2d_*_prepare, times the scale of each output where there is one), and computes
// any range of its tasks, which do not meet in memory.
#pragma once

#include <cstdint>

#include "../common/cpu_isa.h"

namespace fastcv {

struct Conv2dShape {
  int64_t images, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t threads = 1;      // among which tasks should be divided evenly; results do not depend on it
  bool input_norm = false;  // the input is relu(x * scale + shift), as Conv2d has them; of gemm only

  __attribute__((always_inline)) int64_t group_channels() const { return channels / groups; }
  __attribute__((always_inline)) int64_t group_outputs() const { return out_channels / groups; }
};

enum class Activation : int32_t { none, relu, relu6, leaky_relu, silu, hardswish, hardsigmoid, sigmoid, gelu, tanh };

// [N, H, W, C], strides in elements; stride_x >= C, and channels are 1 apart. An element of a packed map of floats is
// two channels in bfloat16: maps between kernels that round their operands to it (amx), which read and write no others.
template <class T>
struct PixelMap {
  T* data;
  int64_t stride_n, stride_y, stride_x;
  bool packed = false;
};

// Inlined always: a copy of its own would be that of one instruction set.
template <class T>
__attribute__((always_inline)) inline T* pixel(const PixelMap<T>& map, int64_t image, int64_t y, int64_t x) {
  return map.data + image * map.stride_n + y * map.stride_y + x * map.stride_x;
}

struct Conv2d {
  Conv2dShape shape;
  PixelMap<const float> input;
  const float* weight;  // prepared
  const float* output_scale;  // [out_channels], or null: of kernels that read weights where they lie
  const float* bias;    // [out_channels], or null
  PixelMap<const float> residual;  // data null: none
  PixelMap<float> output;
  Activation activation;
  float slope;  // of leaky_relu
  const float *input_scale, *input_shift;  // [channels], where shape.input_norm
  bool stream;  // the output is larger than the caches, and nobody reads it at once: gemm writes past them
};

}  // namespace fastcv

// Of every kernel: elements of its prepared weights; their preparation from [K, C / groups, KH, KW]; how many tasks a
// convolution has; floats of scratch that a thread needs; and the tasks begin <= i < end.
#define FASTCV_CONV2D_KERNEL(name)                                                                         \
  int64_t name##_weights(const Conv2dShape& shape);                                                        \
  void name##_prepare(const Conv2dShape& shape, const float* weight, const float* scale, float* prepared); \
  int64_t name##_tasks(const Conv2dShape& shape);                                                          \
  int64_t name##_scratch(const Conv2dShape& shape);                                                        \
  void name(const Conv2d& conv, int64_t begin, int64_t end, float* scratch);

FASTCV_EACH_ISA(
    // Any convolution, as a matrix product without a column buffer; groups of 16 channels and more.
    FASTCV_CONV2D_KERNEL(conv2d_gemm)
    // The same with operands rounded to bfloat16.
    FASTCV_CONV2D_KERNEL(conv2d_bf16)
    // And in the processor's tiles (AMX).
    bool conv2d_amx_serves(const Conv2dShape& shape);
    FASTCV_CONV2D_KERNEL(conv2d_amx)
    // 3x3, stride 1, one group, dilation 1 or as large as the padding: 36 products instead of 144 (Lavin and Gray, CVPR
    // 2016). Also other kernels of up to 3 elements along each axis, without dilation.
    FASTCV_CONV2D_KERNEL(conv2d_winograd)
    // The same in smaller tiles of 5x5 and 4x4 input pixels, named by their outputs for 3x3: fit some sizes better, and
    // have less prepared weights: for few pixels.
    FASTCV_CONV2D_KERNEL(conv2d_winograd_3x3)
    FASTCV_CONV2D_KERNEL(conv2d_winograd_2x2)
    // The same with 64 products instead of 324, for 6 x 6 pixels; less exact.
    FASTCV_CONV2D_KERNEL(conv2d_winograd_6x6)
    // 5x5 in the same way: 36 products instead of 100 for 2 x 2 pixels, and, less exact, 64 instead of 400 for 4 x 4.
    FASTCV_CONV2D_KERNEL(conv2d_winograd_5x5)
    FASTCV_CONV2D_KERNEL(conv2d_winograd_5x5_4x4)
    // One input and one output channel to a group, any kernel.
    FASTCV_CONV2D_KERNEL(conv2d_depthwise)
    // 1x1 on few pixels: reads the weights where they lie.
    bool conv2d_gemv_serves(const Conv2dShape& shape);
    FASTCV_CONV2D_KERNEL(conv2d_gemv)
    // 3x3 in groups of few channels, as many out as in: several groups side by side in a vector.
    bool conv2d_grouped_serves(const Conv2dShape& shape);
    FASTCV_CONV2D_KERNEL(conv2d_grouped))
