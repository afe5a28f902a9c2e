// SPDX-License-Identifier: Apache-2.0
// Runs a block that export.py compiled, without Python: ./run FOLDER [--device cuda] [--extension _C.abi3.so]
// Compares each result, and the keys and values that were written, with the Python process's. Exit code 1: they differ.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <dlfcn.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

namespace {

constexpr size_t kInputs = 7;

std::vector<char> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kCPU, at::kFloat) - b.to(at::kCPU, at::kFloat)).abs().max().item<double>();
}

int run(int count, char** arguments) {
  std::string folder, device = "cpu", extension;
  for (int i = 1; i < count; ++i) {
    const std::string text = arguments[i];
    if (text == "--device" && i + 1 < count) {
      device = arguments[++i];
    } else if (text == "--extension" && i + 1 < count) {
      extension = arguments[++i];
    } else {
      folder = text;
    }
  }
  if (folder.empty()) throw std::runtime_error("usage: run FOLDER [--device cuda] [--extension _C.abi3.so]");
  // The kernels of sm_90a: its constructors register them for the ops that libspecedit_ops.so has defined.
  if (!extension.empty() && dlopen(extension.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw std::runtime_error(dlerror());
  }
  torch::inductor::AOTIModelPackageLoader block(folder + "/block.pt2");
  const c10::IValue cases = torch::jit::pickle_load(bytes_of(folder + "/cases.pt"));
  double largest = 0;
  for (const auto& found : cases.toListRef()) {
    std::vector<at::Tensor> tensors;
    for (const auto& value : found.toListRef()) tensors.push_back(value.toTensor().to(device));
    std::vector<at::Tensor> inputs(tensors.begin(), tensors.begin() + kInputs);
    const at::Tensor result = block.run(inputs).at(0);
    const double of_result = difference(result, tensors[kInputs]);
    const double written =
        std::max(difference(inputs[1], tensors[kInputs + 1]), difference(inputs[2], tensors[kInputs + 2]));
    std::cout << "batch " << inputs[0].size(0) << ", " << inputs[0].size(1) << " of " << inputs[1].size(1)
              << " tokens: result differs by " << of_result << ", keys and values by " << written << "\n";
    largest = std::max({largest, of_result, written});
  }
  // fp32 rounds sums in another order; bf16 results of about 4 may be two roundings apart
  const double allowed = device == "cpu" ? 1e-5 : 0.07;
  std::cout << (largest <= allowed ? "equal" : "NOT equal") << " within " << allowed << "\n";
  return largest <= allowed ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run(count, arguments);
  } catch (const c10::Error& error) {
    std::cerr << "run: " << error.what_without_backtrace() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "run: " << error.what() << "\n";
    return 2;
  }
}
