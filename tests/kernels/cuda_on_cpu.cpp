// Enough of CUDA for its source to run on a CPU: a fiber for each thread of a block, blocks one after another.
//
// -DSOURCE='"file.cu"' names it, and -DKERNELS='ADD(name) ...' its kernels. Fibers change only where threads wait for each other, and run in order, or in
// the reverse one with BACKWARDS in the environment: results that differ show that somebody did not wait.
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__ static
#define __shared__ static
#define __launch_bounds__(...)

struct Dim { unsigned x, y, z; };
static Dim threadIdx, blockIdx, blockDim, gridDim;

static std::vector<ucontext_t> fibers;
static ucontext_t scheduler;
static unsigned now;

static void let_others() { swapcontext(&fibers[now], &scheduler); }

struct Meeting {
    unsigned arrived = 0, times = 0;
    void wait(unsigned expected) {
        unsigned mine = times;
        if (++arrived == expected) {
            arrived = 0;
            times++;
        }
        while (times == mine) let_others();
    }
};
static Meeting of_block, of_warps[32];
static void __syncthreads() { of_block.wait(blockDim.x); }

static float held[1024];
static float __shfl_xor_sync(unsigned, float value, int lanes) {
    Meeting& warp = of_warps[threadIdx.x / 32];
    held[threadIdx.x] = value;
    warp.wait(32);
    float found = held[threadIdx.x ^ lanes];
    warp.wait(32);
    return found;
}

static float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
#define __expf expf
static float __fdividef(float a, float b) { return a / b; }
static float half_to_float(unsigned short x) { _Float16 half; memcpy(&half, &x, 2); return half; }
static unsigned short float_to_half(float x) { _Float16 half = x; unsigned short bits; memcpy(&bits, &half, 2); return bits; }

#include SOURCE

static std::function<void()> work;
static std::vector<char> done;
static void begin() {
    work();
    done[now] = true;  // and on to the scheduler
}

static void run_block() {
    static std::vector<std::vector<char>> stacks;
    unsigned threads = blockDim.x;
    while (stacks.size() < threads) stacks.emplace_back(64 << 10);
    fibers.assign(threads, {});
    done.assign(threads, false);
    for (unsigned i = 0; i < threads; i++) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks[i].data();
        fibers[i].uc_stack.ss_size = stacks[i].size();
        fibers[i].uc_link = &scheduler;
        makecontext(&fibers[i], begin, 0);
    }
    bool backwards = getenv("BACKWARDS") != nullptr;
    for (unsigned left = threads; left > 0;) {
        left = 0;
        for (unsigned i = 0; i < threads; i++) {
            now = backwards ? threads - 1 - i : i;
            if (done[now]) continue;
            threadIdx = {now, 0, 0};
            swapcontext(&scheduler, &fibers[now]);
            left += !done[now];
        }
    }
}

// what of the driver is needed to load and to start kernels
using Given = void**;
static std::map<std::string, std::function<void(Given)>> kernels;
template <class... A, size_t... I>
static void call(void (*kernel)(A...), Given given, std::index_sequence<I...>) { kernel(*(A*)given[I]...); }
template <class... A>
static bool add(const char* name, void (*kernel)(A...)) {
    kernels[name] = [=](Given given) { call(kernel, given, std::index_sequence_for<A...>()); };
    return true;
}

#define ADD(NAME) static bool has_##NAME = add(#NAME, NAME);
KERNELS

extern "C" int cuCtxGetCurrent(void**) { return 0; }
extern "C" int cuCtxPushCurrent_v2(void*) { return 0; }
extern "C" int cuCtxPopCurrent_v2(void**) { return 0; }
extern "C" int cuModuleLoadData(void**, const void*) { return 0; }
extern "C" int cuGetErrorString(int, const char** text) { *text = "named symbol not found"; return 0; }
extern "C" int cuModuleGetFunction(void** found, void*, const char* name) {
    auto place = kernels.find(name);
    if (place == kernels.end()) return 500;
    *found = &place->second;
    return 0;
}
extern "C" int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                              unsigned bz, unsigned, void*, Given given, Given) {
    gridDim = {gx, gy, gz};
    blockDim = {bx, by, bz};
    if (gz != 1 || by != 1 || bz != 1 || bx > 1024) return 1;
    work = [=] { (*(std::function<void(Given)>*)function)(given); };
    for (unsigned y = 0; y < gy; y++) {
        for (unsigned x = 0; x < gx; x++) {
            blockIdx = {x, y, 0};
            run_block();
        }
    }
    return 0;
}
