// SPDX-License-Identifier: Apache-2.0
// The CUDA implementations of internal ops whose schemas specedit_kernels/ops defines.
#include <torch/csrc/stable/library.h>

#include "mixed_res_attn/mixed_res_attn.h"
#include "select_tokens/select_tokens.h"
#include "token_discrepancy/token_discrepancy.h"

// A copy of the package with an op namespace of its own needs a build of its own: setup.py passes its name.
#ifndef SPECEDIT_NAMESPACE
#define SPECEDIT_NAMESPACE specedit
#endif

STABLE_TORCH_LIBRARY_IMPL(SPECEDIT_NAMESPACE, CUDA, m) {
  m.impl("token_discrepancy_csrc", TORCH_BOX(&specedit::token_discrepancy));
  m.impl("mixed_res_attn_csrc", TORCH_BOX(&specedit::mixed_res_attn));
  m.impl("mixed_res_attn_fp8_csrc", TORCH_BOX(&specedit::mixed_res_attn_fp8));
  m.impl("select_tokens_csrc", TORCH_BOX(&specedit::select_tokens));
}

// What these ops take and write: CONTRACT of specedit_kernels/_extension.py, which refuses a file with another number.
constexpr int kContract = 2;

extern "C" __attribute__((visibility("default"))) int specedit_contract() {
  return kContract;
}

extern "C" __attribute__((visibility("default"))) const char* specedit_build_info() {
  return SPECEDIT_BUILD_INFO;
}
