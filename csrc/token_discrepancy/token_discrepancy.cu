// SPDX-License-Identifier: Apache-2.0
// Discrepancy of two feature tensors: one launch, one pass over each input, sums in a fixed order.
//
// Two kernels, by memory format. channels_last_kernel: a group of lanes reads the channels of a pixel.
// channels_first_kernel: lanes read consecutive pixels of an image row, and the channels are distributed over the
// threads of a CTA. Both load 16 bytes at a time and issue several loads before the first use, so that an SM has about
// 64 KB in flight. Without 16-byte alignment they load single elements.
#include "token_discrepancy/token_discrepancy.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <numeric>
#include <type_traits>

namespace specedit {
namespace {

constexpr int kWarp = 32;
constexpr float kEpsilon = 1e-6f;

// A feature map in elements: pointer and strides over batch, channel, row, column.
struct Map {
  const void* data;
  int64_t sb, sc, sh, sw;
};

// grid_h x grid_w cells of cell_h x cell_w pixels in each batch entry.
struct Grid {
  int batch, channels, grid_h, grid_w, cell_h, cell_w;
};

// ---- Loads ----------------------------------------------------------------------------------------------------------

template <typename T>
struct alignas(16) Vector16 {
  static constexpr int kSize = 16 / sizeof(T);
  uint4 bits;
};

template <typename T>
struct Element {
  static constexpr int kSize = 1;
  T value;
};

// For data that is read once: not kept in L1.
template <typename T>
__device__ inline void load(Vector16<T>& v, const T* at) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.bits.x), "=r"(v.bits.y), "=r"(v.bits.z), "=r"(v.bits.w)
               : "l"(at));
}

template <typename T>
__device__ inline void load(Element<T>& v, const T* at) {
  v.value = __ldg(at);
}

template <typename T>
__device__ inline void clear(Vector16<T>& v) {
  v.bits = make_uint4(0, 0, 0, 0);
}

template <typename T>
__device__ inline void clear(Element<T>& v) {
  v.value = T(0.0f);
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline float element(const Element<T>& v, int) {
  return to_float(v.value);
}

template <typename T>
__device__ inline float element(const Vector16<T>& v, int i) {
  const uint32_t word = (&v.bits.x)[i * sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? word >> 16 : word & 0xffffu)));
  }
}

// ---- The score from three sums --------------------------------------------------------------------------------------

struct Sums {
  float dd = 0.0f, ss = 0.0f, ds = 0.0f;

  __device__ inline void add(float d, float s) {
    dd = fmaf(d, d, dd);
    ss = fmaf(s, s, ss);
    ds = fmaf(d, s, ds);
  }
};

// ||d/m_d - s/m_s||^2 with m = max(||.||, epsilon). Equal inputs give three equal quotients, hence exactly 0. The
// comparisons keep NaN.
__device__ inline float score_of(float dd, float ss, float ds) {
  float d_norm = __fsqrt_rn(dd);
  float s_norm = __fsqrt_rn(ss);
  d_norm = d_norm < kEpsilon ? kEpsilon : d_norm;
  s_norm = s_norm < kEpsilon ? kEpsilon : s_norm;
  float score = __fdiv_rn(dd, d_norm * d_norm) + __fdiv_rn(ss, s_norm * s_norm) -
      2.0f * __fdiv_rn(ds, d_norm * s_norm);
  score = score < 0.0f ? 0.0f : score;
  return score > 4.0f ? 4.0f : score;
}

template <int LANES>
__device__ inline float sum_lanes(float value) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// ---- Channels last --------------------------------------------------------------------------------------------

constexpr int kChannelsLastThreads = 128;

// Adds BATCH vectors of each of PIXELS pixels. All loads are issued first.
template <typename T, typename Load, int LANES, int BATCH, int PIXELS>
__device__ inline void add_vectors(
    Sums (&sums)[PIXELS], const T* const (&d_pixel)[PIXELS], const T* const (&s_pixel)[PIXELS], int v) {
  Load d[PIXELS][BATCH];
  Load s[PIXELS][BATCH];
#pragma unroll
  for (int p = 0; p < PIXELS; ++p) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      load(d[p][i], d_pixel[p] + (v + i * LANES) * Load::kSize);
      load(s[p][i], s_pixel[p] + (v + i * LANES) * Load::kSize);
    }
  }
#pragma unroll
  for (int p = 0; p < PIXELS; ++p) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
#pragma unroll
      for (int e = 0; e < Load::kSize; ++e) sums[p].add(element(d[p][i], e), element(s[p][i], e));
    }
  }
}

// The summed scores of PIXELS pixels of a cell, from pixel `first` on; the same in each of the LANES lanes.
template <typename T, typename Load, int LANES, int BATCH, int PIXELS>
__device__ inline float pixel_scores(
    const T* d_cell, const T* s_cell, const Map& draft, const Map& source, const Grid& g, int first) {
  const T* d_pixel[PIXELS];
  const T* s_pixel[PIXELS];
#pragma unroll
  for (int p = 0; p < PIXELS; ++p) {
    const int64_t y = (first + p) / g.cell_w;
    const int64_t x = (first + p) % g.cell_w;
    d_pixel[p] = d_cell + y * draft.sh + x * draft.sw;
    s_pixel[p] = s_cell + y * source.sh + x * source.sw;
  }
  Sums sums[PIXELS];
  const int vectors = g.channels / Load::kSize;
  int v = threadIdx.x % LANES;
  for (; v + (BATCH - 1) * LANES < vectors; v += BATCH * LANES) {
    add_vectors<T, Load, LANES, BATCH, PIXELS>(sums, d_pixel, s_pixel, v);
  }
  for (; v < vectors; v += LANES) add_vectors<T, Load, LANES, 1, PIXELS>(sums, d_pixel, s_pixel, v);
  __syncwarp();
  float score_sum = 0.0f;
#pragma unroll
  for (int p = 0; p < PIXELS; ++p) {
    score_sum += score_of(sum_lanes<LANES>(sums[p].dd), sum_lanes<LANES>(sums[p].ss), sum_lanes<LANES>(sums[p].ds));
  }
  return score_sum;
}

// LANES lanes compute a cell, PIXELS of its pixels at a time, with BATCH vectors of each in flight.
template <typename T, typename Load, int LANES, int BATCH, int PIXELS>
__global__ void __launch_bounds__(kChannelsLastThreads, PIXELS > 2 ? 5 : 8)
    channels_last_kernel(Map draft, Map source, float* __restrict__ score, Grid g) {
  const unsigned cells = g.batch * g.grid_h * g.grid_w;
  const unsigned own = blockIdx.x * (kChannelsLastThreads / LANES) + threadIdx.x / LANES;
  // Lanes past the last cell compute it again: every lane must take part in the shuffles.
  const unsigned cell = own < cells ? own : cells - 1;
  const unsigned grid_row = cell / g.grid_w;
  const int64_t b = grid_row / g.grid_h;
  const int64_t y = static_cast<int64_t>(grid_row % g.grid_h) * g.cell_h;
  const int64_t x = static_cast<int64_t>(cell % g.grid_w) * g.cell_w;
  const T* d_cell = static_cast<const T*>(draft.data) + b * draft.sb + y * draft.sh + x * draft.sw;
  const T* s_cell = static_cast<const T*>(source.data) + b * source.sb + y * source.sh + x * source.sw;
  const int pixels = g.cell_h * g.cell_w;

  float score_sum = 0.0f;
  int pixel = 0;
  for (; pixel + PIXELS <= pixels; pixel += PIXELS) {
    score_sum += pixel_scores<T, Load, LANES, BATCH, PIXELS>(d_cell, s_cell, draft, source, g, pixel);
  }
  for (; pixel < pixels; ++pixel) {
    score_sum += pixel_scores<T, Load, LANES, BATCH, 1>(d_cell, s_cell, draft, source, g, pixel);
  }
  if (threadIdx.x % LANES == 0 && own < cells) score[cell] = score_sum / static_cast<float>(pixels);
}

template <typename T, typename Load, int LANES, int BATCH, int PIXELS>
void launch_channels_last(const Map& draft, const Map& source, float* score, const Grid& g, cudaStream_t stream) {
  const int cells = g.batch * g.grid_h * g.grid_w;
  const int per_block = kChannelsLastThreads / LANES;
  channels_last_kernel<T, Load, LANES, BATCH, PIXELS>
      <<<(cells - 1) / per_block + 1, kChannelsLastThreads, 0, stream>>>(draft, source, score, g);
}

template <typename T, typename Load>
void launch_channels_last(const Map& draft, const Map& source, float* score, const Grid& g, cudaStream_t stream) {
  // Four pairs of loads in flight for each lane, from one pixel or from several.
  const int vectors = g.channels / Load::kSize;
  const bool one_pixel = g.cell_h * g.cell_w == 1;
  if (vectors <= 8) {
    const auto launch = one_pixel ? launch_channels_last<T, Load, 8, 1, 1> : launch_channels_last<T, Load, 8, 1, 4>;
    launch(draft, source, score, g, stream);
  } else if (vectors <= 32) {
    const auto launch = one_pixel ? launch_channels_last<T, Load, 32, 1, 1> : launch_channels_last<T, Load, 32, 1, 4>;
    launch(draft, source, score, g, stream);
  } else if (vectors <= 64 && !one_pixel) {
    launch_channels_last<T, Load, 32, 2, 2>(draft, source, score, g, stream);
  } else {
    launch_channels_last<T, Load, 32, 4, 1>(draft, source, score, g, stream);
  }
}

// ---- Channels first ----------------------------------------------------------------------------------------------

// A CTA computes `cells` neighbouring cells of one grid row: a strip of `columns` pixel columns. It reads them in tiles
// of `tile` vectors, with `lanes` groups of threads, each of which reads every lanes-th channel.
struct Strip {
  int cells, columns, strips, tile, lanes;
};

constexpr int kChannelsFirstBatch = 4;

template <typename T, typename Load, int THREADS>
__global__ void __launch_bounds__(THREADS, 512 / THREADS)
    channels_first_kernel(Map draft, Map source, float* __restrict__ score, Grid g, Strip strip) {
  // [3][lanes][tile pixels] partial sums, then the scores of the strip's cells.
  extern __shared__ float shared[];
  const int tile_pixels = strip.tile * Load::kSize;
  float* cell_sums = shared + 3 * strip.lanes * tile_pixels;

  const int first_cell = blockIdx.x % strip.strips * strip.cells;
  const int grid_row = blockIdx.x / strip.strips % g.grid_h;
  const int64_t b = blockIdx.x / strip.strips / g.grid_h;
  const int width = g.grid_w * g.cell_w;
  const int strip_pixels = strip.columns * g.cell_h;
  const int slot = threadIdx.x % strip.tile;
  const int channel_lane = threadIdx.x / strip.tile;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;

  for (int k = threadIdx.x; k < strip.cells; k += THREADS) cell_sums[k] = 0.0f;

  for (int tile_start = 0; tile_start < strip_pixels; tile_start += tile_pixels) {
    const int pixel = tile_start + slot * Load::kSize;
    const int x = first_cell * g.cell_w + pixel % strip.columns;
    Sums sums[Load::kSize];
    if (channel_lane < strip.lanes && pixel < strip_pixels && x < width) {
      const int64_t y = static_cast<int64_t>(grid_row) * g.cell_h + pixel / strip.columns;
      const T* d_at = static_cast<const T*>(draft.data) + b * draft.sb + y * draft.sh + x * draft.sw +
          channel_lane * draft.sc;
      const T* s_at = static_cast<const T*>(source.data) + b * source.sb + y * source.sh + x * source.sw +
          channel_lane * source.sc;
      const int64_t d_step = strip.lanes * draft.sc;
      const int64_t s_step = strip.lanes * source.sc;
      int c = channel_lane;
      for (; c + (kChannelsFirstBatch - 1) * strip.lanes < g.channels; c += kChannelsFirstBatch * strip.lanes) {
        Load d[kChannelsFirstBatch];
        Load s[kChannelsFirstBatch];
#pragma unroll
        for (int i = 0; i < kChannelsFirstBatch; ++i) {
          load(d[i], d_at + i * d_step);
          load(s[i], s_at + i * s_step);
        }
        d_at += kChannelsFirstBatch * d_step;
        s_at += kChannelsFirstBatch * s_step;
#pragma unroll
        for (int i = 0; i < kChannelsFirstBatch; ++i) {
#pragma unroll
          for (int e = 0; e < Load::kSize; ++e) sums[e].add(element(d[i], e), element(s[i], e));
        }
      }
      for (; c < g.channels; c += strip.lanes) {
        Load d;
        Load s;
        load(d, d_at);
        load(s, s_at);
        d_at += d_step;
        s_at += s_step;
#pragma unroll
        for (int e = 0; e < Load::kSize; ++e) sums[e].add(element(d, e), element(s, e));
      }
    }
    if (channel_lane < strip.lanes) {
      const int lane_stride = strip.lanes * tile_pixels;
      float* at = shared + channel_lane * tile_pixels + slot * Load::kSize;
#pragma unroll
      for (int e = 0; e < Load::kSize; ++e) {
        at[e] = sums[e].dd;
        at[lane_stride + e] = sums[e].ss;
        at[2 * lane_stride + e] = sums[e].ds;
      }
    }
    __syncthreads();
    // Sums over the channel lanes into the first of them. Then a pixel's three sums become its score, in place.
    for (int i = threadIdx.x; i < 3 * tile_pixels; i += THREADS) {
      float* at = shared + i / tile_pixels * strip.lanes * tile_pixels + i % tile_pixels;
      float sum = 0.0f;
      for (int l = 0; l < strip.lanes; ++l) sum += at[l * tile_pixels];
      *at = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile_pixels; i += THREADS) {
      const int lane_stride = strip.lanes * tile_pixels;
      shared[i] = score_of(shared[i], shared[lane_stride + i], shared[2 * lane_stride + i]);
    }
    __syncthreads();
    const int tile_end = min(tile_start + tile_pixels, strip_pixels);
    const int first_row = tile_start / strip.columns;
    const int rows = (tile_end - 1) / strip.columns - first_row + 1;
    for (int k = warp; k < strip.cells; k += THREADS / kWarp) {
      float part = 0.0f;
      for (int i = lane; i < rows * g.cell_w; i += kWarp) {
        const int at = (first_row + i / g.cell_w) * strip.columns + k * g.cell_w + i % g.cell_w;
        if (at >= tile_start && at < tile_end) part += shared[at - tile_start];
      }
      part = sum_lanes<kWarp>(part);
      if (lane == 0) cell_sums[k] += part;
    }
    __syncthreads();
  }
  for (int k = threadIdx.x; k < strip.cells && first_cell + k < g.grid_w; k += THREADS) {
    score[(b * g.grid_h + grid_row) * g.grid_w + first_cell + k] =
        cell_sums[k] / static_cast<float>(g.cell_h * g.cell_w);
  }
}

template <typename T, typename Load, int THREADS>
void launch_channels_first(
    const Map& draft, const Map& source, float* score, const Grid& g, Strip strip, int blocks,
    cudaStream_t stream) {
  const int tiles = strip.columns / Load::kSize * g.cell_h;
  // At least four channels for each thread; where threads remain, the tile gets more pixels.
  const int max_lanes = std::max(1, g.channels / 4);
  strip.tile = std::min(tiles, std::max(kWarp, THREADS / max_lanes));
  strip.lanes = std::min(max_lanes, THREADS / strip.tile);
  const int bytes = static_cast<int>(sizeof(float)) * (3 * strip.lanes * strip.tile * Load::kSize + strip.cells);
  const auto kernel = channels_first_kernel<T, Load, THREADS>;
  if (bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "token_discrepancy: shared memory");
  }
  kernel<<<blocks, THREADS, bytes, stream>>>(draft, source, score, g, strip);
}

template <typename T, typename Load>
void launch_channels_first(
    const Map& draft, const Map& source, float* score, const Grid& g, int device, cudaStream_t stream) {
  // A strip is a whole number of cells and of vectors, and as wide as a 128-byte cache line where the grid allows.
  const int unit = Load::kSize / std::gcd(Load::kSize, g.cell_w);
  const int line = 128 / static_cast<int>(sizeof(T));
  const int units = std::max(1, std::min(line / (unit * g.cell_w), (g.grid_w + unit - 1) / unit));
  Strip strip{};
  strip.cells = units * unit;
  strip.columns = strip.cells * g.cell_w;
  strip.strips = (g.grid_w + strip.cells - 1) / strip.cells;
  const int blocks = g.batch * g.grid_h * strip.strips;
  int sms = 0;
  check_cuda(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "token_discrepancy: device");
  // With at most 1.5 CTAs for each SM, a CTA is as large as an SM needs for itself.
  if (blocks <= sms + sms / 2) {
    launch_channels_first<T, Load, 512>(draft, source, score, g, strip, blocks, stream);
  } else {
    launch_channels_first<T, Load, 256>(draft, source, score, g, strip, blocks, stream);
  }
}

// ---- Dispatch -------------------------------------------------------------------------------------------------------

// Token features [B, N, C] are a map of one pixel row. The stride of a dimension of size 1 counts as 0.
Map map_of(const Tensor& x) {
  const auto stride = [&](int64_t i) { return x.size(i) == 1 ? int64_t{0} : x.stride(i); };
  if (x.dim() == 3) return {x.data_ptr(), stride(0), x.size(2) == 1 ? 1 : x.stride(2), 0, stride(1)};
  return {x.data_ptr(), stride(0), stride(1), stride(2), stride(3)};
}

bool aligned(const Map& m, int elements, int element_size) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && elements * element_size % 16 == 0;
}

template <typename T>
void launch(const Tensor& draft, const Tensor& source, Tensor& score, const Grid& g, int64_t width) {
  const Map d = map_of(draft);
  const Map s = map_of(source);
  float* out = static_cast<float*>(score.data_ptr());
  const cudaStream_t stream = current_stream(draft);
  const int size = sizeof(T);
  const auto strides = [&](int64_t a, int64_t b, int64_t c) { return (a | b | c) * size % 16 == 0; };
  const auto channels_last_aligned = [&](const Map& m) {
    return aligned(m, g.channels, size) && strides(m.sb, m.sh, m.sw);
  };
  const auto channels_first_aligned = [&](const Map& m) {
    return aligned(m, width, size) && strides(m.sb, m.sh, m.sc);
  };
  if (d.sc == 1 && s.sc == 1) {
    if (channels_last_aligned(d) && channels_last_aligned(s)) {
      launch_channels_last<T, Vector16<T>>(d, s, out, g, stream);
    } else {
      launch_channels_last<T, Element<T>>(d, s, out, g, stream);
    }
  } else if (d.sw == 1 && s.sw == 1 && channels_first_aligned(d) && channels_first_aligned(s)) {
    launch_channels_first<T, Vector16<T>>(d, s, out, g, draft.get_device_index(), stream);
  } else {
    launch_channels_first<T, Element<T>>(d, s, out, g, draft.get_device_index(), stream);
  }
  check_cuda(cudaGetLastError(), "token_discrepancy");
}

}  // namespace

Tensor token_discrepancy(const Tensor& draft, const Tensor& source, int64_t grid_h, int64_t grid_w) {
  const torch::stable::accelerator::DeviceGuard guard(draft.get_device_index());
  const bool tokens = draft.dim() == 3;
  Tensor score = empty_on(draft, {draft.size(0), grid_h * grid_w}, ScalarType::Float);
  if (draft.size(0) == 0) return score;
  const int64_t rows = tokens ? 1 : grid_h;
  const int64_t columns = tokens ? grid_h * grid_w : grid_w;
  const int64_t height = tokens ? 1 : draft.size(2);
  const int64_t width = tokens ? columns : draft.size(3);
  if (draft.size(0) * rows * columns > INT_MAX || height * width > INT_MAX) {
    throw std::invalid_argument(
        "token_discrepancy: draft: expected fewer than 2**31 tokens, and fewer than 2**31 pixels in an image");
  }
  const Grid g{
      static_cast<int>(draft.size(0)),
      static_cast<int>(draft.size(tokens ? 2 : 1)),
      static_cast<int>(rows),
      static_cast<int>(columns),
      static_cast<int>(height / rows),
      static_cast<int>(width / columns)};
  switch (draft.scalar_type()) {
    case ScalarType::Float: launch<float>(draft, source, score, g, width); break;
    case ScalarType::Half: launch<__half>(draft, source, score, g, width); break;
    case ScalarType::BFloat16: launch<__nv_bfloat16>(draft, source, score, g, width); break;
    default: throw std::invalid_argument("token_discrepancy: draft: expected bf16, fp16 or fp32");
  }
  return score;
}

}  // namespace specedit
