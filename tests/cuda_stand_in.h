/* cuda_stand_in.h - as much of CUDA as diffdpo_cuda.cu uses, on the CPU, so that its kernels can be tested without a GPU.

   use     g++ -std=c++11 -O2 -fno-strict-aliasing -DDIFFDPO_CUDA_STAND_IN -x c++ -c diffdpo_cuda.cu; the file then includes this one.

   A kernel runs block by block.  The threads of a block are contexts of their own on one thread of the CPU: each runs
   until it reaches a barrier or a shuffle, then the next one.  A barrier that only some threads of a block or warp reach, or
   that they reach at different lines, ends the program with a message: on a GPU it would hang or give nonsense.  Blocks,
   warps and threads run in rising, falling or shuffled order (stand_in()->order): results that differ show a missing
   barrier.  Shared memory starts out as NaNs in every block; what is fetched asynchronously (cp.async) arrives at once or as
   late as it may, by chance.
   Device memory is host memory with known borders.  A stream does nothing until somebody waits for it, so that a buffer
   which is written again too early shows.  A captured graph is a list of functions; what may not be captured is refused.
   Failures can be asked for, of every call.  Vectors (float4 ...) are aligned types: -fsanitize=alignment finds loads that
   a GPU would refuse.  Matrix instructions (mma, ldmatrix) follow the layouts of the PTX manual.  Speed is not here.   */
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
#include <map>
#include <memory>
#include <deque>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("stand_in_shared")))

struct dim3 { unsigned x, y, z; dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8)  float2 { float x, y; };
struct alignas(16) uint4  { unsigned x, y, z, w; };
struct alignas(8)  uint2  { unsigned x, y; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

/* What a test may set and read. */
typedef struct stand_in_control {
    int    devices, driver, major, minor; /* what is there; driver 0: none */
    int    order;                         /* of threads, warps, blocks: 0 rising, -1 falling, else shuffled by this seed */
    int    deny_alloc, deny_launch, deny_product, deny_call;      /* this many succeed, the next one fails; -1: all succeed */
    int    no_products;                   /* 1: cuBLASLt has a kernel for nothing */
    size_t memory, used;                  /* bytes of the device, and taken */
    int    allocs, launches, graphs, events;         /* counters: cudaMalloc and cudaMallocHost, kernels, graph launches; events alive */
    int    waits, queued;                 /* times that the host waited for the whole stream; calls on it that are not done */
} stand_in_control;
static stand_in_control stand_in_state = { 1, 13000, 9, 0, 0, -1, -1, -1, -1, 0, (size_t)1 << 34, 0, 0, 0, 0, 0, 0, 0 };
extern "C" stand_in_control *stand_in(void);
extern "C" stand_in_control *stand_in(void) { return &stand_in_state; }

static uint64_t stand_in_random_state = 1;
static unsigned stand_in_random(void)
{
    stand_in_random_state = stand_in_random_state*6364136223846793005u + 1442695040888963407u;
    return (unsigned)(stand_in_random_state >> 33);
}
/* An order of n things: number i is (from + i*step) % n, step and n without a common divisor. */
struct stand_in_order {
    uint64_t n, from, step;
    explicit stand_in_order(uint64_t count) : n(count), from(0), step(1)
    {
        if (stand_in_state.order < 0 && n > 1) { from = n - 1;  step = n - 1; }
        if (stand_in_state.order <= 0 || n < 2) return;
        from = stand_in_random() % n;
        for (step = 1 + stand_in_random() % n;; step++) {
            uint64_t a = n, b = step % n;
            while (b) { uint64_t c = a % b;  a = b;  b = c; }
            if (a == 1) break;
        }
        step %= n;
    }
    uint64_t next(void) { uint64_t at = from;  from += step;  if (from >= n) from -= n;  return at; }
};

/* ------------------------------------------------------------------------------------------ threads of a block */

enum { STAND_IN_MOST = 1024, STAND_IN_STACK = 1 << 16 };
enum { STAND_IN_READY, STAND_IN_WARP, STAND_IN_BLOCK, STAND_IN_DONE };

struct stand_in_fiber { jmp_buf at; ucontext_t first; char *stack; int state, started, line; };
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
        stand_in_order order((uint64_t)n);
        for (int i = 0; i < n; i++) {
            int t = first + (int)order.next();
            if (stand_in_fibers[t].state == STAND_IN_READY) stand_in_resume(t);
        }
        for (int t = first; t < end; t++) waiting += stand_in_fibers[t].state == STAND_IN_WARP;
        if (waiting && waiting != n) stand_in_die("a warp's threads part before a shuffle");
        for (int t = first; t < end && waiting; t++) stand_in_fibers[t].state = STAND_IN_READY;
        again = waiting;
    }
}

/* What cp.async has under way for each thread, and how many groups it has closed. */
struct stand_in_copy { char *to; const char *from; unsigned group; };
static std::vector<stand_in_copy> stand_in_copies[STAND_IN_MOST];
static unsigned                   stand_in_groups[STAND_IN_MOST];

static void stand_in_block(int threads)
{
    int warps = (threads + 31) / 32;
    memset(__start_stand_in_shared, 0xff, (size_t)(__stop_stand_in_shared - __start_stand_in_shared));
    for (int t = 0; t < threads; t++) {
        stand_in_fibers[t].state = STAND_IN_READY;
        stand_in_turn[t] = stand_in_groups[t] = 0;
        stand_in_copies[t].clear();
    }
    for (int waiting = 1; waiting;) {
        stand_in_order order((uint64_t)warps);
        for (int i = 0; i < warps; i++) {
            int w = (int)order.next();
            stand_in_warp(w * 32, w * 32 + 32 < threads ? w * 32 + 32 : threads);
        }
        waiting = 0;
        for (int t = 0; t < threads; t++) {
            waiting += stand_in_fibers[t].state == STAND_IN_BLOCK;
            if (stand_in_fibers[t].state == STAND_IN_BLOCK && stand_in_fibers[t].line != stand_in_fibers[0].line)
                stand_in_die("a block's threads wait at different barriers");
        }
        if (waiting && waiting != threads) stand_in_die("a block's threads part before a barrier");
        for (int t = 0; t < threads && waiting; t++) stand_in_fibers[t].state = STAND_IN_READY;
    }
}

static void stand_in_grid(dim3 grid, dim3 block, const std::function<void()> &kernel)
{
    uint64_t blocks = (uint64_t)grid.x*grid.y*grid.z;
    stand_in_order order(blocks);
    gridDim = grid;
    blockDim = block;
    stand_in_kernel = &kernel;
    for (uint64_t i = 0; i < blocks; i++) {
        uint64_t at = order.next();
        blockIdx = dim3((unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y), (unsigned)(at / grid.x / grid.y));
        stand_in_block((int)(block.x * block.y * block.z));
    }
}

static void stand_in_barrier(int line)
{
    stand_in_fibers[stand_in_now].line = line;
    stand_in_wait(STAND_IN_BLOCK);
}
#define __syncthreads() stand_in_barrier(__LINE__)
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
struct stand_in_factors { float a[16][16], b[8][16]; };    /* of a warp: [row][k] and [column][k] */
static stand_in_factors *stand_in_factors_of(void)
{
    static stand_in_factors all[2][STAND_IN_MOST / 32];
    return &all[stand_in_turn[stand_in_now]++ & 1][stand_in_now / 32];
}
/* Once all lanes have shown theirs. */
static void stand_in_multiply(float d[4], const stand_in_factors *f, int depth)
{
    int g = (stand_in_now & 31) / 4, t = stand_in_now % 4;
    __syncwarp();
    for (int e = 0; e < 4; e++) {
        const float *x = f->a[g + e / 2 * 8], *y = f->b[2 * t + e % 2];
        double sum = d[e];
        for (int k = 0; k < depth; k++) sum += (double)x[k] * y[k];
        d[e] = (float)sum;
    }
}
static void stand_in_mma(float d[4], const uint32_t a[4], const uint32_t b[2], float (*widen)(uint16_t))
{
    stand_in_factors *f = stand_in_factors_of();
    int g = (stand_in_now & 31) / 4, t = stand_in_now % 4;
    for (int r = 0; r < 4; r++)
        for (int e = 0; e < 2; e++) {
            f->a[g + r % 2 * 8][2 * t + e + r / 2 * 8] = widen((uint16_t)(a[r] >> e * 16));
            if (r < 2) f->b[g][2 * t + e + r * 8] = widen((uint16_t)(b[r] >> e * 16));
        }
    stand_in_multiply(d, f, 16);
}
/* The same with k of 8 and numbers of 32 bits, whose last 13 the device does not read. */
static void stand_in_mma_tf32(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    stand_in_factors *f = stand_in_factors_of();
    int g = (stand_in_now & 31) / 4, t = stand_in_now % 4;
    for (int r = 0; r < 4; r++) {
        uint32_t x = a[r] & 0xffffe000u, y = b[r % 2] & 0xffffe000u;
        memcpy(&f->a[g + r % 2 * 8][t + r / 2 * 4], &x, 4);
        memcpy(&f->b[g][t + r % 2 * 4], &y, 4);
    }
    stand_in_multiply(d, f, 8);
}
/* cvt.rna.tf32.f32 */
static uint32_t stand_in_to_tf32(uint32_t x) { return (x >> 23 & 255) == 255 ? x : (x + 0x1000) & 0xffffe000u; }

/* An address that ldmatrix or cp.async may have in shared memory. */
static void stand_in_in_shared(const void *p)
{
    if ((const char *)p < __start_stand_in_shared || (const char *)p + 16 > __stop_stand_in_shared) stand_in_die("not in shared memory");
    if ((uintptr_t)p % 16) stand_in_die("not on 16 bytes");
}

/* ldmatrix.x4: lane l shows where row l%8 of piece l/8 lies; with g = lane/4 and t = lane%4, each lane gets numbers 2t, 2t+1 of
   row g of every piece, or turned numbers g of rows 2t, 2t+1. */
static void stand_in_ldmatrix(uint32_t f[4], const uint4 *at, int turned)
{
    static const uint4 *shown[2][STAND_IN_MOST];
    int t = stand_in_now, slot = (int)(stand_in_turn[t]++ & 1), lane = t & 31;
    stand_in_in_shared(at);
    shown[slot][t] = at;
    __syncwarp();
    for (int m = 0; m < 4; m++)
        for (int e = 0; e < 2; e++) {
            int      row = turned ? lane % 4 * 2 + e : lane / 4, col = turned ? lane / 4 : lane % 4 * 2 + e;
            uint16_t h;
            memcpy(&h, (const char *)shown[slot][(t & ~31) + 8 * m + row] + 2 * col, 2);
            f[m] = e ? f[m] | (uint32_t)h << 16 : h;
        }
}

/* cp.async of 16 bytes, its groups, and the wait for all but the newest `late` groups. */
static void stand_in_arrive(const stand_in_copy &c)
{
    if (c.from) memcpy(c.to, c.from, 16);
    else memset(c.to, 0, 16);
}
static void stand_in_fetch16(void *to, const void *from, int really)
{
    stand_in_copy c = { (char *)to, really ? (const char *)from : NULL, stand_in_groups[stand_in_now] };
    stand_in_in_shared(to);
    if (really && (uintptr_t)from % 16) stand_in_die("cp.async from a place that is not on 16 bytes");
    if (stand_in_state.order > 0 && stand_in_random() % 2) stand_in_arrive(c);
    else stand_in_copies[stand_in_now].push_back(c);
}
static void stand_in_fetch_commit(void) { stand_in_groups[stand_in_now]++; }
static void stand_in_fetch_wait(unsigned late)
{
    std::vector<stand_in_copy> &all = stand_in_copies[stand_in_now];
    size_t left = 0;
    for (size_t i = 0; i < all.size(); i++) {
        if (all[i].group + late < stand_in_groups[stand_in_now]) stand_in_arrive(all[i]);
        else all[left++] = all[i];
    }
    all.resize(left);
}

/* ------------------------------------------------------------------------------------------ the runtime */

typedef int cudaError_t;
enum { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100,
       cudaErrorInvalidDevice = 101, cudaErrorLaunchFailure = 719, cudaErrorStreamCaptureUnsupported = 900,
       cudaErrorStreamCaptureInvalidated = 901, cudaErrorUnknown = 999 };
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMultiProcessorCount };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaStreamCaptureModeThreadLocal = 1 };
typedef std::vector<std::function<void()> > stand_in_calls;
typedef struct stand_in_graph { std::shared_ptr<stand_in_calls> calls; } *cudaGraph_t, *cudaGraphExec_t;
typedef int *cudaStream_t;
typedef struct stand_in_event { uint64_t mark; } *cudaEvent_t;
struct cudaDeviceProp { char name[256]; size_t totalGlobalMem; };
static cudaGraph_t stand_in_capture;      /* not NULL: calls are noted, not made */
static cudaError_t stand_in_last;

static const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaSuccess ? "no error" : e == cudaErrorMemoryAllocation ? "out of memory" :
           e == cudaErrorNoDevice ? "no CUDA-capable device is detected" : e == cudaErrorInvalidDevice ? "invalid device ordinal" :
           e == cudaErrorInsufficientDriver ? "CUDA driver version is insufficient for CUDA runtime version" :
           e == cudaErrorLaunchFailure ? "unspecified launch failure" : e == cudaErrorUnknown ? "unknown error" :
           e == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" : "invalid argument";
}

/* Counts down to the failure that was asked for. */
static int stand_in_denies(int *left) { return *left >= 0 && (*left)-- == 0; }

/* The stream: what was asked for and is not done yet.  It runs where somebody waits, or when it is long. */
static std::deque<std::function<void()> > stand_in_queue;
static uint64_t stand_in_done;            /* calls that were taken from it */
static void stand_in_run_to(uint64_t mark)
{
    while (stand_in_done < mark && !stand_in_queue.empty()) {
        std::function<void()> call = std::move(stand_in_queue.front());
        stand_in_queue.pop_front();
        stand_in_done++;
        stand_in_state.queued = (int)stand_in_queue.size();
        call();
    }
}
static uint64_t stand_in_end(void) { return stand_in_done + stand_in_queue.size(); }
static void stand_in_wait_for_all(void)
{
    stand_in_state.waits++;
    stand_in_run_to(stand_in_end());
}
static void stand_in_do(const std::function<void()> &call)
{
    if (stand_in_capture) { stand_in_capture->calls->push_back(call);  return; }
    stand_in_queue.push_back(call);
    stand_in_state.queued = (int)stand_in_queue.size();
    if (stand_in_queue.size() > 1000) stand_in_run_to(stand_in_done + 1);
}
/* A call that can fail for no reason of its own. */
static int stand_in_fails(void) { return stand_in_denies(&stand_in_state.deny_call); }

template<class F> static void stand_in_launch(dim3 grid, dim3 block, const F &kernel)
{
    static_assert(sizeof(F) <= 4096, "what a kernel's arguments may have");
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
        block.x * block.y * block.z > STAND_IN_MOST) { stand_in_last = cudaErrorInvalidValue;  return; }
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
static cudaError_t cudaSetDevice(int d)             { return stand_in_fails() ? (int)cudaErrorUnknown : d >= 0 && d < stand_in_state.devices ? cudaSuccess : cudaErrorInvalidDevice; }
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

/* Where memory was handed out, how much, and whether it is the host's.  Fresh memory is NaNs. */
struct stand_in_piece { size_t n; int host; };
static std::map<const char *, stand_in_piece> stand_in_pieces;

static cudaError_t stand_in_alloc(void **p, size_t n, int host)
{
    stand_in_piece piece = { n, host };
    if (stand_in_capture) return stand_in_last = cudaErrorStreamCaptureUnsupported;
    if (stand_in_denies(&stand_in_state.deny_alloc) || n > stand_in_state.memory - stand_in_state.used) return cudaErrorMemoryAllocation;
    if (posix_memalign((void **)(void *)p, 256, n ? n : 1)) return cudaErrorMemoryAllocation;
    memset(*p, 0xff, n);
    stand_in_pieces[(const char *)*p] = piece;
    stand_in_state.used += n;
    stand_in_state.allocs++;
    return cudaSuccess;
}
static cudaError_t stand_in_free(void *p, int host)
{
    std::map<const char *, stand_in_piece>::iterator at = stand_in_pieces.find((const char *)p);
    if (!p) return cudaSuccess;
    if (at == stand_in_pieces.end() || at->second.host != host) stand_in_die("freed what was not handed out");
    if (stand_in_capture) stand_in_die("freed while capturing");
    stand_in_wait_for_all();              /* both wait for the device */
    stand_in_state.used -= at->second.n;
    stand_in_pieces.erase(at);
    free(p);
    return cudaSuccess;
}
static cudaError_t cudaMalloc(void **p, size_t n)     { return stand_in_alloc(p, n, 0); }
static cudaError_t cudaFree(void *p)                  { return stand_in_free(p, 0); }
static cudaError_t cudaMallocHost(void **p, size_t n) { return stand_in_alloc(p, n, 1); }
static cudaError_t cudaFreeHost(void *p)              { return stand_in_free(p, 1); }

/* n bytes at p lie inside of one piece of the device, or of page-locked memory. */
static void stand_in_within(const void *p, size_t n, int host)
{
    std::map<const char *, stand_in_piece>::iterator at = stand_in_pieces.upper_bound((const char *)p);
    if (at == stand_in_pieces.begin()) stand_in_die("a copy outside of all memory");
    --at;
    if (at->second.host != host || (const char *)p + n > at->first + at->second.n) stand_in_die("a copy across a border of memory");
}

/* Is p page-locked memory? */
static int stand_in_locked(const void *p)
{
    std::map<const char *, stand_in_piece>::iterator at = stand_in_pieces.upper_bound((const char *)p);
    return at != stand_in_pieces.begin() && (--at)->second.host && (const char *)p < at->first + at->second.n;
}

/* Up: from page-locked memory, which stands until somebody waits.  Down: to other memory than that it waits itself.  A
   graph holds copies on the device alone: what the host has may be gone when it is launched. */
static cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, cudaStream_t)
{
    if (stand_in_fails()) return cudaErrorUnknown;
    if (stand_in_capture && kind != cudaMemcpyDeviceToDevice) return cudaErrorStreamCaptureUnsupported;
    if (kind != cudaMemcpyDeviceToHost) stand_in_within(to, n, 0);
    stand_in_within(from, n, kind == cudaMemcpyHostToDevice);
    if (kind == cudaMemcpyDeviceToHost && stand_in_locked(to)) stand_in_within(to, n, 1);
    stand_in_do([=] { memmove(to, from, n); });
    if (kind == cudaMemcpyDeviceToHost && !stand_in_locked(to)) stand_in_wait_for_all();
    return cudaSuccess;
}
static cudaError_t cudaMemsetAsync(void *to, int byte, size_t n, cudaStream_t)
{
    if (stand_in_fails()) return cudaErrorUnknown;
    stand_in_within(to, n, 0);
    stand_in_do([=] { memset(to, byte, n); });
    return cudaSuccess;
}
static cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, int)
{
    static int stream;
    if (stand_in_fails()) return cudaErrorUnknown;
    *s = &stream;
    return cudaSuccess;
}
static cudaError_t cudaStreamDestroy(cudaStream_t) { stand_in_wait_for_all();  return cudaSuccess; }
static cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    if (stand_in_capture) return cudaErrorStreamCaptureUnsupported;
    if (stand_in_fails()) return cudaErrorUnknown;
    stand_in_wait_for_all();
    return cudaSuccess;
}

/* An event holds how far the stream must have come. */
static cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, int)
{
    if (stand_in_fails()) return cudaErrorUnknown;
    *e = new stand_in_event();
    stand_in_state.events++;
    return cudaSuccess;
}
static cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e;  stand_in_state.events--;  return cudaSuccess; }
static cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t)
{
    if (stand_in_capture) return cudaErrorStreamCaptureUnsupported;
    if (stand_in_fails()) return cudaErrorUnknown;
    e->mark = stand_in_end();
    return cudaSuccess;
}
static cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    if (stand_in_capture) return cudaErrorStreamCaptureUnsupported;
    if (stand_in_fails()) return cudaErrorUnknown;
    stand_in_run_to(e->mark);
    return cudaSuccess;
}

static cudaError_t cudaStreamBeginCapture(cudaStream_t, int)
{
    if (stand_in_fails()) return cudaErrorUnknown;
    stand_in_capture = new stand_in_graph();
    stand_in_capture->calls = std::make_shared<stand_in_calls>();
    return cudaSuccess;
}
/* Capturing ends whether this succeeds or not. */
static cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *g)
{
    *g = stand_in_capture;
    stand_in_capture = NULL;
    if (!stand_in_fails()) return cudaSuccess;
    delete *g;
    *g = NULL;
    return cudaErrorUnknown;
}
static cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long)
{
    if (stand_in_fails()) return cudaErrorUnknown;
    *x = new stand_in_graph(*g);
    return cudaSuccess;
}
static cudaError_t cudaGraphDestroy(cudaGraph_t g)         { delete g;  return cudaSuccess; }
static cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { delete g;  return cudaSuccess; }
static cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t)
{
    std::shared_ptr<stand_in_calls> calls = g->calls;
    if (stand_in_fails()) return cudaErrorUnknown;
    stand_in_state.graphs++;
    stand_in_do([=] { for (size_t i = 0; i < calls->size(); i++) (*calls)[i](); });
    return cudaSuccess;
}
#endif
