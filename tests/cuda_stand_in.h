/* cuda_stand_in.h - as much of CUDA as diffdpo_cuda.cu uses, on the CPU, so that its kernels can be tested without a GPU.

   use     g++ -std=c++11 -O2 -fno-strict-aliasing -DDIFFDPO_CUDA_STAND_IN -x c++ -c diffdpo_cuda.cu; the file then includes this one.

   A kernel runs block by block.  The threads of a block are contexts of their own on one thread of the CPU: each runs
   until it reaches a barrier or a shuffle, then the next one.  A barrier that only some threads of a block or warp reach
   ends the program with a message: on a GPU it would hang or give nonsense.  Threads run in rising or falling order
   (stand_in()->backwards): results that differ show a missing barrier.  Shared memory starts out as NaNs in every block.
   Device memory is host memory, streams run at once, a captured graph is a list of functions, failures can be asked for,
   and what a device cannot be told apart by, its speed, is not here.  A matrix product instruction (mma) follows the
   layout of the PTX manual, so that the kernels which use it can be tested too.                                     */
#ifndef CUDA_STAND_IN_H
#define CUDA_STAND_IN_H
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("stand_in_shared")))

struct dim3 { unsigned x, y, z; dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
struct float4 { float x, y, z, w; };
struct uint4  { unsigned x, y, z, w; };
struct uint2  { unsigned x, y; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

/* What a test may set and read. */
typedef struct stand_in_control {
    int    devices, driver, major, minor; /* what is there; driver 0: none */
    int    backwards;                     /* order of threads */
    int    deny_alloc, deny_launch, deny_product;   /* this many succeed, the next one fails; -1: all succeed */
    size_t memory, used;                  /* bytes of the device, and taken */
    int    allocs, launches, graphs;      /* counters: cudaMalloc and cudaMallocHost, kernels, graph launches */
} stand_in_control;
static stand_in_control stand_in_state = { 1, 13000, 9, 0, 0, -1, -1, -1, (size_t)1 << 34, 0, 0, 0, 0 };
extern "C" stand_in_control *stand_in(void);
extern "C" stand_in_control *stand_in(void) { return &stand_in_state; }

/* ------------------------------------------------------------------------------------------ threads of a block */

enum { STAND_IN_MOST = 1024, STAND_IN_STACK = 1 << 16 };
enum { STAND_IN_READY, STAND_IN_WARP, STAND_IN_BLOCK, STAND_IN_DONE };

struct stand_in_fiber { jmp_buf at; ucontext_t first; char *stack; int state, started; };
static stand_in_fiber                stand_in_fibers[STAND_IN_MOST];
static jmp_buf                       stand_in_scheduler;
static int                           stand_in_now;        /* the thread that runs */
static unsigned                      stand_in_turn[STAND_IN_MOST];         /* exchanges that it took part in */
static const std::function<void()>  *stand_in_kernel;
extern "C" char __start_stand_in_shared[], __stop_stand_in_shared[];

static void stand_in_die(const char *why)
{
    fprintf(stderr, "cuda_stand_in: %s (block %u,%u,%u thread %d)\n", why, blockIdx.x, blockIdx.y, blockIdx.z, stand_in_now);
    abort();
}

/* The thread stops in `state`; the scheduler goes on with it once all others that it waits for are there. */
static void stand_in_wait(int state)
{
    stand_in_fibers[stand_in_now].state = state;
    if (_setjmp(stand_in_fibers[stand_in_now].at) == 0) _longjmp(stand_in_scheduler, 1);
}

/* A fiber lives as long as the program and runs one thread of the kernel after the other. */
static void stand_in_fiber_main(void)
{
    for (;;) {
        (*stand_in_kernel)();
        stand_in_wait(STAND_IN_DONE);
    }
}

static void stand_in_resume(int t)
{
    stand_in_fiber *f = &stand_in_fibers[t];
    stand_in_now = t;
    threadIdx = dim3((unsigned)t % blockDim.x, (unsigned)t / blockDim.x % blockDim.y, (unsigned)t / blockDim.x / blockDim.y);
    if (_setjmp(stand_in_scheduler)) return;
    if (f->started) _longjmp(f->at, 1);
    f->started = 1;
    if (!(f->stack = (char *)malloc(STAND_IN_STACK)) || getcontext(&f->first)) stand_in_die("no memory for a thread");
    f->first.uc_stack.ss_sp = f->stack;
    f->first.uc_stack.ss_size = STAND_IN_STACK;
    makecontext(&f->first, stand_in_fiber_main, 0);
    setcontext(&f->first);
}

/* Threads of a warp until all wait for the block or are done.  A barrier of the warp needs all of its threads. */
static void stand_in_warp(int first, int end)
{
    for (int again = 1; again;) {
        int waiting = 0, n = end - first;
        for (int i = 0; i < n; i++) {
            int t = stand_in_state.backwards ? end - 1 - i : first + i;
            if (stand_in_fibers[t].state == STAND_IN_READY) stand_in_resume(t);
        }
        for (int t = first; t < end; t++) waiting += stand_in_fibers[t].state == STAND_IN_WARP;
        if (waiting && waiting != n) stand_in_die("a warp's threads part before a shuffle");
        for (int t = first; t < end && waiting; t++) stand_in_fibers[t].state = STAND_IN_READY;
        again = waiting;
    }
}

static void stand_in_block(int threads)
{
    memset(__start_stand_in_shared, 0xff, (size_t)(__stop_stand_in_shared - __start_stand_in_shared));
    for (int t = 0; t < threads; t++) { stand_in_fibers[t].state = STAND_IN_READY;  stand_in_turn[t] = 0; }
    for (int waiting = 1; waiting;) {
        int warps = (threads + 31) / 32;
        for (int i = 0; i < warps; i++) {
            int w = stand_in_state.backwards ? warps - 1 - i : i;
            stand_in_warp(w * 32, w * 32 + 32 < threads ? w * 32 + 32 : threads);
        }
        waiting = 0;
        for (int t = 0; t < threads; t++) waiting += stand_in_fibers[t].state == STAND_IN_BLOCK;
        if (waiting && waiting != threads) stand_in_die("a block's threads part before a barrier");
        for (int t = 0; t < threads && waiting; t++) stand_in_fibers[t].state = STAND_IN_READY;
    }
}

static void stand_in_grid(dim3 grid, dim3 block, const std::function<void()> &kernel)
{
    gridDim = grid;
    blockDim = block;
    stand_in_kernel = &kernel;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y, z);
                stand_in_block((int)(block.x * block.y * block.z));
            }
}

static inline void __syncthreads(void)               { stand_in_wait(STAND_IN_BLOCK); }
static inline void __syncwarp(unsigned = ~0u)         { stand_in_wait(STAND_IN_WARP); }

/* What each thread of the block shows to its warp: two slots in turn, so that one barrier an exchange is enough. */
static char     stand_in_shown[2][STAND_IN_MOST][16];

template<class T> static T stand_in_exchange(T x, int lane)
{
    int t = stand_in_now, slot = (int)(stand_in_turn[t]++ & 1);
    T   y;
    memcpy(stand_in_shown[slot][t], &x, sizeof x);
    __syncwarp();
    memcpy(&y, stand_in_shown[slot][(t & ~31) + (lane & 31)], sizeof y);
    return y;
}
template<class T> static T __shfl_xor_sync(unsigned, T x, int mask)  { return stand_in_exchange(x, (stand_in_now & 31) ^ mask); }
template<class T> static T __shfl_sync(unsigned, T x, int lane)      { return stand_in_exchange(x, lane); }

/* ------------------------------------------------------------------------------------------ mma.sync.m16n8k16

   d [16][8] += a [16][16] b [16][8], shared out over a warp as the PTX manual says: with g = lane/4 and t = lane%4,
     a[0..3] hold (row, column pairs) (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8)
     b[0..1] hold (row pairs, column) (2t, g), (2t+8, g)
     d[0..3] are (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)                                                           */
static void stand_in_mma(float d[4], const uint32_t a[4], const uint32_t b[2], float (*widen)(uint16_t))
{
    static uint32_t shown[STAND_IN_MOST][6];
    int first = stand_in_now & ~31, lane = stand_in_now & 31, g = lane / 4, t = lane % 4;
    memcpy(shown[stand_in_now], a, 16);
    memcpy(shown[stand_in_now] + 4, b, 8);
    __syncwarp();
    for (int e = 0; e < 4; e++) {
        int    row = g + e / 2 * 8, col = 2 * t + e % 2;
        double sum = d[e];
        for (int k = 0; k < 16; k++) {
            const uint32_t *pa = shown[first + row % 8 * 4 + k % 8 / 2], *pb = shown[first + col * 4 + k % 8 / 2];
            uint32_t wa = pa[row / 8 + k / 8 * 2], wb = pb[4 + k / 8];
            sum += (double)widen((uint16_t)(wa >> k % 2 * 16)) * widen((uint16_t)(wb >> k % 2 * 16));
        }
        d[e] = (float)sum;
    }
    __syncwarp();
}

/* ------------------------------------------------------------------------------------------ the runtime */

typedef int cudaError_t;
enum { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100,
       cudaErrorInvalidDevice = 101, cudaErrorLaunchFailure = 719, cudaErrorStreamCaptureInvalidated = 901 };
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMultiProcessorCount };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaStreamCaptureModeThreadLocal = 1 };
typedef struct stand_in_graph { std::vector<std::function<void()>> calls; } *cudaGraph_t, *cudaGraphExec_t;
typedef int *cudaStream_t, *cudaEvent_t;
struct cudaDeviceProp { char name[256]; size_t totalGlobalMem; };
static cudaGraph_t stand_in_capture;      /* not NULL: calls are noted, not made */
static cudaError_t stand_in_last;

static const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaSuccess ? "no error" : e == cudaErrorMemoryAllocation ? "out of memory" :
           e == cudaErrorNoDevice ? "no CUDA-capable device is detected" : e == cudaErrorInvalidDevice ? "invalid device ordinal" :
           e == cudaErrorInsufficientDriver ? "CUDA driver version is insufficient for CUDA runtime version" :
           e == cudaErrorLaunchFailure ? "unspecified launch failure" : "invalid argument";
}

/* Counts down to the failure that was asked for. */
static int stand_in_denies(int *left) { return *left >= 0 && (*left)-- == 0; }

static void stand_in_do(const std::function<void()> &call)
{
    if (stand_in_capture) stand_in_capture->calls.push_back(call);
    else call();
}

static void stand_in_launch(dim3 grid, dim3 block, const std::function<void()> &kernel)
{
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || block.x * block.y * block.z > STAND_IN_MOST)
        { stand_in_last = cudaErrorInvalidValue;  return; }
    if (stand_in_denies(&stand_in_state.deny_launch)) { stand_in_last = cudaErrorLaunchFailure;  return; }
    stand_in_state.launches++;
    stand_in_do([=] { stand_in_grid(grid, block, kernel); });
}

static cudaError_t cudaGetLastError(void) { cudaError_t e = stand_in_last;  stand_in_last = cudaSuccess;  return e; }
static cudaError_t cudaGetDeviceCount(int *n)
{
    *n = stand_in_state.devices;
    return !stand_in_state.driver ? cudaErrorInsufficientDriver : *n ? cudaSuccess : cudaErrorNoDevice;
}
static cudaError_t cudaSetDevice(int d)             { return d >= 0 && d < stand_in_state.devices ? cudaSuccess : cudaErrorInvalidDevice; }
static cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int)
{
    snprintf(p->name, sizeof p->name, "stand-in");
    p->totalGlobalMem = stand_in_state.memory;
    return cudaSuccess;
}
static cudaError_t cudaDeviceGetAttribute(int *v, int which, int)
{
    *v = which == cudaDevAttrComputeCapabilityMajor ? stand_in_state.major
       : which == cudaDevAttrComputeCapabilityMinor ? stand_in_state.minor : 4;
    return cudaSuccess;
}

/* The size stands in front of what is handed out, 64 bytes before it.  Fresh memory is NaNs. */
static cudaError_t cudaMalloc(void **p, size_t n)
{
    char *q = NULL;
    if (stand_in_capture) return stand_in_last = cudaErrorStreamCaptureInvalidated;
    if (stand_in_denies(&stand_in_state.deny_alloc) || n > stand_in_state.memory - stand_in_state.used) return cudaErrorMemoryAllocation;
    if (posix_memalign((void **)(void *)&q, 256, n + 256)) return cudaErrorMemoryAllocation;
    memset(q, 0xff, n + 256);
    memcpy(q, &n, sizeof n);
    stand_in_state.used += n;
    stand_in_state.allocs++;
    *p = q + 256;
    return cudaSuccess;
}
static cudaError_t cudaFree(void *p)
{
    size_t n;
    if (!p) return cudaSuccess;
    memcpy(&n, (char *)p - 256, sizeof n);
    stand_in_state.used -= n;
    free((char *)p - 256);
    return cudaSuccess;
}
static cudaError_t cudaMallocHost(void **p, size_t n) { return cudaMalloc(p, n); }
static cudaError_t cudaFreeHost(void *p)              { return cudaFree(p); }
static cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, int, cudaStream_t)
{
    stand_in_do([=] { memmove(to, from, n); });
    return cudaSuccess;
}
static cudaError_t cudaMemsetAsync(void *to, int byte, size_t n, cudaStream_t)
{
    stand_in_do([=] { memset(to, byte, n); });
    return cudaSuccess;
}
static cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, int) { *s = NULL;  return cudaSuccess; }
static cudaError_t cudaStreamDestroy(cudaStream_t)                 { return cudaSuccess; }
static cudaError_t cudaStreamSynchronize(cudaStream_t)             { return stand_in_capture ? cudaErrorStreamCaptureInvalidated : cudaSuccess; }
static cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, int)   { *e = NULL;  return cudaSuccess; }
static cudaError_t cudaEventDestroy(cudaEvent_t)                   { return cudaSuccess; }
static cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t)      { return cudaSuccess; }
static cudaError_t cudaEventSynchronize(cudaEvent_t)               { return cudaSuccess; }

static cudaError_t cudaStreamBeginCapture(cudaStream_t, int)       { stand_in_capture = new stand_in_graph;  return cudaSuccess; }
static cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *g)
{
    *g = stand_in_capture;
    stand_in_capture = NULL;
    return cudaSuccess;
}
static cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long) { *x = new stand_in_graph(*g);  return cudaSuccess; }
static cudaError_t cudaGraphDestroy(cudaGraph_t g)                 { delete g;  return cudaSuccess; }
static cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g)         { delete g;  return cudaSuccess; }
static cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t)
{
    stand_in_state.graphs++;
    for (size_t i = 0; i < g->calls.size(); i++) g->calls[i]();
    return cudaSuccess;
}
#endif
