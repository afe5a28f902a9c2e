// SPDX-License-Identifier: Apache-2.0
#include "mixed_res_attn/launch.cuh"

namespace specedit::attn {

template void launch<__nv_bfloat16, 128, false>(const Params&, int, cudaStream_t);
template void launch<__nv_bfloat16, 128, true>(const Params&, int, cudaStream_t);

}  // namespace specedit::attn
