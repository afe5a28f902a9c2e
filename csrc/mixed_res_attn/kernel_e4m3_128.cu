// SPDX-License-Identifier: Apache-2.0
#include "mixed_res_attn/launch.cuh"

namespace specedit::attn {

template void launch<E4m3, 128, false>(const Params&, int, cudaStream_t);
template void launch<E4m3ByRow, 128, false>(const Params&, int, cudaStream_t);

}  // namespace specedit::attn
