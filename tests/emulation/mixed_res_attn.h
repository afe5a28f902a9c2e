// SPDX-License-Identifier: Apache-2.0
// Test cases of the attention's kernels on the CPU.
#pragma once

#include <string>
#include <vector>

namespace emulation {

struct Outcome {
  bool right;
  std::string text;  // the errors, or why the kernel stopped
};

std::vector<std::string> case_names();

// The template arguments of the kernel that a case runs: type, head dimension, whether it gathers K and V.
std::vector<std::string> kernel_of(const std::string& name);

// Runs a case. seed: of its inputs and of the scheduler. slow_warp: the warp that runs in one of 200 turns, -1 for none.
// Throws std::invalid_argument for an unknown name.
Outcome run_case(const std::string& name, int seed, int slow_warp);

// The same of e4m3 numbers.
std::vector<std::string> fp8_case_names();
Outcome run_fp8_case(const std::string& name, int seed, int slow_warp);

}  // namespace emulation
