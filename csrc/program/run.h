// Running a plan: threads go through its steps together.
//
// A step's tasks are claimed one by one from a counter; who finds none left waits until all are done, and goes to the
// next step. Nobody counts threads: one that comes late joins the step at work, and one alone does everything, so that it
// does not matter how many the pool gives.
#pragma once

#include <atomic>
#include <chrono>

#include "program.h"

namespace fastcv::program {

struct Pointers {
  float* arena = nullptr;
  std::vector<PixelMap<const float>> inputs;
  std::vector<float*> outputs;
};

struct BoundStep {
  const PlannedStep* planned;
  Conv2d conv;
  StepTask task;
};

BoundStep bind_step(const Program& program, const Plan& plan, const PlannedStep& planned, const Pointers& pointers);

struct alignas(128) Progress {
  std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
};

// What a run needs beside the plan; kept from one to the next.
struct Run {
  std::vector<BoundStep> steps;
  std::unique_ptr<Progress[]> progress;
  std::vector<int64_t> nanoseconds;  // of each step, where it was sized so
  std::atomic<int> timers{0};

  void start(const Program& program, const Plan& plan, const Pointers& pointers);
  // By every thread; returns when all steps are done.
  void work(float* scratch);
};

}  // namespace fastcv::program
