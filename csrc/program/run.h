// Running a plan: threads go through its steps together.
//
// A step's tasks are cut into as many portions as there are threads (common/portions.h). A thread claims tasks, its own
// first, waits until all are done, and goes to the next step. Nobody counts threads: one that comes late joins the step
// at work, and one alone does everything, so that it does not matter how many the pool gives.
#pragma once

#include <atomic>
#include <chrono>

#include "../common/portions.h"
#include "program.h"

namespace fastcv::program {

struct Pointers {
  float* arena = nullptr;
  std::vector<PixelMap<const float>> inputs;
  std::vector<float*> outputs;
};

// Of weights that are made at each run.
struct Preparation {
  const float *weight, *scale;  // of all outputs; scale may be null
  float* to;
  int64_t outputs;  // of the layer

  void run(const PlannedStep& planned, int64_t task) const;
};
int64_t preparation_tasks(const PlannedStep& planned);

struct BoundStep {
  const PlannedStep* planned;
  Conv2d conv;
  StepTask task;
  Preparation preparation;
};

BoundStep bind_step(const Program& program, const Plan& plan, const PlannedStep& planned, const Pointers& pointers);

// What a run needs beside the plan; kept from one to the next.
struct Run {
  std::vector<BoundStep> steps;
  int64_t portions = 1;
  std::unique_ptr<Counter[]> counters;  // for each step: tasks done, then tasks claimed of each portion
  std::vector<int64_t> nanoseconds;     // of each step, where it was sized so
  std::atomic<int64_t> arrived{0};

  void start(const Program& program, const Plan& plan, const Pointers& pointers, int64_t threads);
  // By every thread; returns when all steps are done.
  void work(float* scratch);

 private:
  void work_step(const BoundStep& step, Counter* counter, int64_t own, float* scratch);
};

}  // namespace fastcv::program
