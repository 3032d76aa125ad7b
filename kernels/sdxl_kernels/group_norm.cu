// Group normalisation, alone and followed by SiLU, of images whose channels are last in memory.
//
// Given from outside: KIND_float32, KIND_float16 or KIND_bfloat16; WIDE, how many of them a thread reads at once;
// AT_ONCE, of how many pixels; MOST_THREADS of a block, MOST_CHANNELS, MOST_GROUPS.

#ifdef KIND_float32
typedef float Number;
__device__ float widened(Number x) { return x; }
__device__ Number narrowed(float x) { return x; }
__device__ float silu(float x) { return x / (1.0f + expf(-x)); }
#else
typedef unsigned short Number;
__device__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
#endif

#ifdef KIND_bfloat16
__device__ float widened(Number x) { return __uint_as_float((unsigned)x << 16); }
__device__ Number narrowed(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    Number rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    return rounded;
#else
    unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
#endif
}
#endif

#ifdef KIND_float16
#ifdef __CUDA_ARCH__
__device__ float widened(Number x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}
__device__ Number narrowed(float x) {
    Number rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    return rounded;
}
#else
__device__ float widened(Number x) { return half_to_float(x); }
__device__ Number narrowed(float x) { return float_to_half(x); }
#endif
#endif

// the mean may be taken off after scaling where numbers are too coarse for it to be many thousand deviations
const bool FOLDS = sizeof(Number) == 2;

template <int WIDTH> struct alignas(sizeof(Number) * WIDTH) Pack { Number of[WIDTH]; };
struct alignas(8) Part { float mean, squares; };  // squares: of what numbers differ from their mean, added up
struct Moments { float count, mean, squares; };

// Chan, Golub, LeVeque 1979: moments of two sets together, without adding up squares of large numbers
__device__ Moments together(Moments a, Moments b) {
    if (a.count == 0.0f) return b;
    if (b.count == 0.0f) return a;
    float count = a.count + b.count, share = b.count / count, apart = b.mean - a.mean;
    return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

__device__ Moments of_warp(Moments mine) {
    for (int step = 16; step > 0; step /= 2) {
        Moments other;
        other.count = __shfl_xor_sync(0xffffffffu, mine.count, step);
        other.mean = __shfl_xor_sync(0xffffffffu, mine.mean, step);
        other.squares = __shfl_xor_sync(0xffffffffu, mine.squares, step);
        // in the same order on both sides, so that all lanes have the same bits
        mine = threadIdx.x & step ? together(other, mine) : together(mine, other);
    }
    return mine;
}

// Moments of the pixels of one part of an image, by group. A thread has WIDTH channels of every rows-th pixel.
// x: [images, pixels, channels]; parts: [images, groups, gridDim.x]; a part has per_part pixels, the last may have less.
template <int WIDTH>
__device__ void count(const Number* x, Part* parts, long long pixels, int channels, int groups, int rows,
                      long long per_part) {
    __shared__ Part seen[MOST_CHANNELS];  // [rows, channels]
    int vectors = channels / WIDTH, vector = threadIdx.x % vectors, row = threadIdx.x / vectors;
    long long first = blockIdx.x * per_part, end = first + per_part < pixels ? first + per_part : pixels;
    int here = (int)(end - first);
    if (row < rows && row < here) {
        const Pack<WIDTH>* image = (const Pack<WIDTH>*)x + (blockIdx.y * pixels + first) * vectors + vector;
        // sums of differences to one of the numbers: a mean that is large beside the deviation costs nothing
        Pack<WIDTH> one = image[(long long)row * vectors];
        float sum[WIDTH] = {}, square[WIDTH] = {};
        for (int start = row; start < here; start += rows * AT_ONCE) {
            Pack<WIDTH> some[AT_ONCE];
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int pixel = start + i * rows;
                some[i] = pixel < here ? image[(long long)pixel * vectors] : one;  // which adds zero
            }
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                #pragma unroll
                for (int j = 0; j < WIDTH; j++) {
                    float apart = widened(some[i].of[j]) - widened(one.of[j]);
                    sum[j] += apart;
                    square[j] += apart * apart;
                }
            }
        }
        float number = (here - row + rows - 1) / rows;
        #pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            float squares = square[j] - sum[j] * sum[j] / number;
            seen[row * channels + vector * WIDTH + j] = {
                widened(one.of[j]) + sum[j] / number, squares < 0.0f ? 0.0f : squares};
        }
    }
    __syncthreads();
    int lane = threadIdx.x % 32, width = channels / groups;
    for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
        Moments mine = {0.0f, 0.0f, 0.0f};
        for (int i = lane; i < rows * width; i += 32) {
            int row = i / width;
            if (row >= here) continue;
            Part part = seen[row * channels + group * width + i % width];
            mine = together(mine, {(float)((here - row + rows - 1) / rows), part.mean, part.squares});
        }
        mine = of_warp(mine);
        if (lane == 0) parts[((long long)blockIdx.y * groups + group) * gridDim.x + blockIdx.x] = {mine.mean, mine.squares};
    }
}

// The result for per_block pixels of an image: (x - mean) / deviation * weight + bias, and SiLU of that.
template <int WIDTH, bool SILU>
__device__ void normalize(const Number* x, Number* out, const Number* weight, const Number* bias, const Part* parts,
                          long long pixels, int channels, int groups, int rows, long long per_part, int many,
                          long long per_block, float eps) {
    __shared__ float means[MOST_GROUPS], scales[MOST_GROUPS];
    int lane = threadIdx.x % 32, width = channels / groups;
    for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
        const Part* of_group = parts + ((long long)blockIdx.y * groups + group) * many;
        Moments mine = {0.0f, 0.0f, 0.0f};
        for (int i = lane; i < many; i += 32) {
            long long left = pixels - i * per_part;
            Part part = of_group[i];
            mine = together(mine, {(float)((left < per_part ? left : per_part) * width), part.mean, part.squares});
        }
        mine = of_warp(mine);
        if (lane == 0) {
            means[group] = mine.mean;
            scales[group] = 1.0f / sqrtf(mine.squares / mine.count + eps);
        }
    }
    __syncthreads();
    int vectors = channels / WIDTH, vector = threadIdx.x % vectors, row = threadIdx.x / vectors;
    if (row >= rows) return;
    float mean[WIDTH], scale[WIDTH], offset[WIDTH];
    #pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        int channel = vector * WIDTH + j, group = channel / width;
        mean[j] = means[group];
        scale[j] = scales[group] * widened(weight[channel]);
        offset[j] = widened(bias[channel]) - (FOLDS ? mean[j] * scale[j] : 0.0f);
    }
    long long first = blockIdx.x * per_block, left = pixels - first;
    int here = (int)(left < per_block ? left : per_block);
    long long place = (blockIdx.y * pixels + first) * vectors + vector;
    const Pack<WIDTH>* from = (const Pack<WIDTH>*)x + place;
    Pack<WIDTH>* to = (Pack<WIDTH>*)out + place;
    for (int start = row; start < here; start += rows * AT_ONCE) {
        Pack<WIDTH> some[AT_ONCE];
        #pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int pixel = start + i * rows;
            if (pixel < here) some[i] = from[(long long)pixel * vectors];
        }
        #pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int pixel = start + i * rows;
            if (pixel >= here) continue;
            #pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                float x = widened(some[i].of[j]), y = (FOLDS ? x : x - mean[j]) * scale[j] + offset[j];
                some[i].of[j] = narrowed(SILU ? silu(y) : y);
            }
            to[(long long)pixel * vectors] = some[i];
        }
    }
}

#define COUNT(NAME, WIDTH)                                                                                           \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS) NAME(                                                 \
        const Number* x, Part* parts, long long pixels, long long channels, long long groups, long long rows,        \
        long long per_part) {                                                                                        \
        count<WIDTH>(x, parts, pixels, channels, groups, rows, per_part);                                            \
    }
#define NORMALIZE(NAME, WIDTH, SILU)                                                                                 \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS) NAME(                                                 \
        const Number* x, Number* out, const Number* weight, const Number* bias, const Part* parts, long long pixels, \
        long long channels, long long groups, long long rows, long long per_part, long long many,                    \
        long long per_block, float eps) {                                                                            \
        normalize<WIDTH, SILU>(x, out, weight, bias, parts, pixels, channels, groups, rows, per_part, many,          \
                               per_block, eps);                                                                      \
    }
COUNT(count_wide, WIDE)
COUNT(count_single, 1)
NORMALIZE(normalize_wide, WIDE, false)
NORMALIZE(normalize_single, 1, false)
NORMALIZE(normalize_silu_wide, WIDE, true)
NORMALIZE(normalize_silu_single, 1, true)
