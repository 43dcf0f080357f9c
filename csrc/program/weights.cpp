// Weights of convolutions: prepared once and kept, or, in programs of low memory, made at each run.
//
// Prepared weights lie beside the layer's own, and Winograd's are four times as large: 180 MB for Faster R-CNN with
// ResNet-50. Made at each run they lie in the arena, where maps do that are not needed meanwhile. A layer may fall into
// parts of its outputs. Kernel and arithmetic are the same, and so are the results, to the bit.
//
// Kept are weights in chains of bands, which are needed again for each band, small ones, of layers with groups, in
// bfloat16, and of transposed convolutions whose phases are columns of one product.
//
// Measured (2 cores of Zen 4; peaks beside model and libraries, kept and made at each run, torch's in brackets; how
// many times as long it takes): Faster R-CNN 740 and 511 MB (560), 1.03; FCN-ResNet-50 581 and 248 MB (232 to 316),
// 1.09; U-Net at 512 pixels 753 and 410 MB (503), 1.11; VGG-16 at 224 pixels 280 and 53 MB (85), 1.2; ResNet-18 126 and
// 38 MB (24), 1.6; ResNet-50 197 and 42 MB (31), 1.6. On a Xeon: DeconvNet 961 and 483 MB (483), 1.8; DCGAN's
// generator, batch 16, 315 and 73 MB (71 to 90), 2.1. Parts of 4 MB save 6 MB of ResNet-18's and take half as long
// again. To make just some weights, as far as that takes 2.5 % of a plan's time, gains too little: Faster R-CNN is then
// at 577 MB and 4 % slower.
#include <algorithm>

#include "run.h"

namespace fastcv::program {
namespace {

constexpr int64_t kPartBytes = int64_t(10) << 20;
constexpr int64_t kLeastFloats = int64_t(1) << 14;  // less is not worth a meeting of threads

int64_t together(const PlannedStep& planned) {
  if (planned.conv) return outputs_prepared_together(*planned.conv, planned.shape);
  return planned.shape.groups == 1 ? planned.transposed->outputs_prepared_together() : 0;
}

Conv2dShape with_outputs(const PlannedStep& planned, int64_t outputs) {
  Conv2dShape shape = planned.shape;
  shape.out_channels = outputs;
  return shape;
}

std::shared_ptr<const ConvTranspose2dPlan> transposed_with_outputs(const PlannedStep& planned, int64_t outputs) {
  return std::make_shared<const ConvTranspose2dPlan>(with_outputs(planned, outputs), planned.transposed->kernel());
}

int64_t floats_for(const PlannedStep& planned, int64_t outputs) {
  return planned.conv ? planned.conv->weights(with_outputs(planned, outputs))
                      : transposed_with_outputs(planned, outputs)->weights();
}

const float* prepared(Program& program, const PlannedStep& planned) {
  const Step& step = program.steps[planned.step];
  return planned.conv ? program.prepared(step, *planned.conv, planned.shape)
                      : program.prepared(step, *planned.transposed, planned.shape);
}

// How many threads the outputs that are prepared together occupy: phases are prepared one by one.
int64_t tasks_of_together(const PlannedStep& planned) {
  return planned.conv ? 1 : transposed_with_outputs(planned, together(planned))->preparation_tasks();
}

bool is_made_at_each_run(const Program& program, const Plan& plan, const PlannedStep& planned) {
  if (!program.low_memory || !together(planned)) return false;
  const Span span = plan.spans[planned.step];
  return span.first == span.last && floats_for(planned, planned.shape.out_channels) >= kLeastFloats;
}

}  // namespace

void find_weights(Program& program, Plan& plan, int64_t threads) {
  for (PlannedStep& planned : plan.steps) {
    if (!planned.conv && !planned.transposed) continue;
    if (!is_made_at_each_run(program, plan, planned)) {
      planned.weight = prepared(program, planned);
      continue;
    }
    const int64_t fit = kPartBytes / (4 * floats_for(planned, together(planned))), tasks = tasks_of_together(planned);
    const int64_t least = (threads + tasks - 1) / tasks;  // for all threads to prepare some
    const int64_t outputs = std::min(planned.shape.out_channels, together(planned) * std::max(fit, least));
    planned.transient.outputs = outputs;
    planned.transient.floats = floats_for(planned, outputs) + 16;  // kernels fetch one line ahead
  }
}

void cut_into_parts(Plan& plan) {
  std::vector<PlannedStep> cut;
  for (const PlannedStep& whole : plan.steps) {
    if (!whole.transient.floats) {
      cut.push_back(whole);
      continue;
    }
    const int64_t outputs = whole.shape.out_channels;
    for (int64_t first = 0; first < outputs; first += whole.transient.outputs) {
      PlannedStep part = whole;
      part.transient.first_output = first;
      part.shape.out_channels = std::min(whole.transient.outputs, outputs - first);
      if (whole.transposed) part.transposed = transposed_with_outputs(whole, part.shape.out_channels);
      part.transient.makes = true;
      cut.push_back(part);
      part.transient.makes = false;
      cut.push_back(part);
    }
  }
  plan.steps = std::move(cut);
}

int64_t preparation_tasks(const PlannedStep& planned) {
  if (planned.transposed) return planned.transposed->preparation_tasks();
  return (planned.shape.out_channels + together(planned) - 1) / together(planned);
}

void Preparation::run(const PlannedStep& planned, int64_t task) const {
  if (planned.transposed)
    return planned.transposed->prepare({weight, scale, planned.transient.first_output, outputs}, task, to);
  const int64_t first = task * together(planned), k = planned.transient.first_output + first;
  const Conv2dShape shape = with_outputs(planned, std::min(together(planned), planned.shape.out_channels - first));
  const float* const filters = weight + k * shape.channels * shape.kernel_h * shape.kernel_w;
  planned.conv->prepare(shape, filters, scale ? scale + k : nullptr, to + floats_for(planned, first));
}

}  // namespace fastcv::program
