/* diffdpo_cuda.cu - the backend of diffdpo.h for one NVIDIA GPU.  Public domain or MIT, see the end of diffdpo.h.

   BUILD     nvcc -O3 -arch=sm_90 -DDIFFDPO_CUDA program.c diffdpo_cuda.cu -lcublasLt -o program
             CUDA 12 or newer, sm_80 or newer; -gencode lines for several of them make a fat binary.  -DDIFFDPO_CUDNN
             -lcudnn lets cuDNN do the 3x3 convolutions, -DDIFFDPO_NCCL -lnccl adds dpo_cuda_reduce.
   USE       dpo_desc d = {0};  d.backend = dpo_cuda_open(0, DIFFDPO_VERSION);  dpo_ctx *c = dpo_open(&d);
             Without a usable device dpo_error(c) says why; a host that wants to go on opens another context without it.
   CPU       g++ -std=c++11 -DDIFFDPO_CUDA_STAND_IN -x c++ runs the same kernels on the CPU, see tests/cuda_stand_in.h.

   CONTENTS  search for the tag
       >>state       the backend's struct, errors, options
       >>memory      device memory, copies, staging
       >>numbers     types of storage, sums over a block
       >>elements    functions of one and two numbers, moves, tables, random numbers
       >>sums        sums, errors, norms of gradients
       >>norms       group norm, layer norm
       >>products    cuBLASLt, finishing
       >>convolution implicit products, plain and on tensor cores
       >>attention   plain and on tensor cores
       >>optimizer   loss, clipping, AdamW, Adafactor
       >>steps       recording, capture, replay
       >>open        table of ops, dpo_backend

   HOW IT WORKS   Everything runs on one stream in the order of the calls.  An op is one function here, called twice:
   once to count the scratch that it needs, once to run; scratch is handed out in the same order both times.  Storage is
   F32, BF16 or F16 and is read and written as it lies; sums are F32, over long rows double.  Sums are cut by shape
   alone and joined in a fixed order, no atomics: the same bits every time.  dpoc_ is what dpoi_ is in diffdpo.h:
   private. */
#ifndef DIFFDPO_CUDA
#define DIFFDPO_CUDA
#endif
#include "diffdpo.h"
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef DIFFDPO_CUDA_STAND_IN
#include "tests/cuda_stand_in.h"
#define DPOC_UNROLL
#define DPOC_ROLLED
#define DPOC_START(kernel, grid, block, args, stream) stand_in_launch(grid, block, [=] { kernel args; })
#else
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cublasLt.h>
#ifdef DIFFDPO_CUDNN
#include <cudnn.h>
#endif
#ifdef DIFFDPO_NCCL
#include <nccl.h>
#endif
#define DPOC_UNROLL _Pragma("unroll")
#define DPOC_ROLLED _Pragma("unroll 1")
#define DPOC_START(kernel, grid, block, args, stream) kernel<<<grid, block, 0, stream>>> args
#endif

/* ==========================================================================================================
   >>state                                                                    the backend's struct, errors, options
   ========================================================================================================== */

/* One step as it was noted, see >>steps. */
typedef struct dpoc_recording dpoc_recording;
enum { DPOC_RECORDINGS = 4, DPOC_STAGES = 2, DPOC_BATCH = 40, DPOC_WAITING = 2 };
enum { DPOC_STAGE_BYTES = 4 << 20, DPOC_SCRATCH_BYTES = 32 << 20 };

/* Tensors that one launch works on together, see >>optimizer. */
typedef struct dpoc_one {
    const float *g;                       /* the gradient, or what is squared */
    float  *m, *v, *w;                    /* moments, codes or factors, and the weight; w alone: where a sum goes */
    float  *ms, *vs;                      /* scales of codes */
    int64_t n;                            /* numbers */
    int     O, kh, kw, I;                 /* Adafactor: the weight's shape */
    int     kind, aligned;                /* DPOC_WHOLE ...; g, m, v and w start on 16 bytes */
} dpoc_one;

typedef struct dpoc_pending {
    int        op, count;                 /* the op of all of them */
    dpo_params p;                         /* what they have in common, beside the record */
    const float *record;                  /* the step record */
    dpoc_one   one[DPOC_BATCH];
} dpoc_pending;

/* Numbers on their way to the host, see dpo_backend.send. */
typedef struct dpoc_box {
    char       *p;                        /* page-locked, `room` bytes */
    size_t      room;
    cudaEvent_t came;                     /* they are there */
    int         used;                     /* sent and not taken */
    struct dpoc_box *next;
} dpoc_box;

typedef struct dpoc {
    dpo_backend  backend;
    int          device, major, minor, processors;  /* its number, compute capability, multiprocessors */
    int          open;                    /* 0: there is no device; every call answers with `text` */
    int          options[DPO_CUDA_OPTIONS];
    cudaStream_t stream;                  /* everything is on it */
    char        *stage[DPOC_STAGES];      /* page-locked: what the host hands over is copied here, and nobody waits */
    cudaEvent_t  staged[DPOC_STAGES];     /* the copy out of it is over */
    int          turn;                    /* the stage that is being filled */
    size_t       stage_used;              /* bytes of it */
    dpoc_box    *boxes;                   /* all there are */
    void        *blas, *dnn;              /* handles */
    void        *scratch;                 /* of cuBLASLt and cuDNN, DPOC_SCRATCH_BYTES */
    struct dpoc_plans *plans;             /* what cuBLASLt chose, by shape */
    double      *sums;                    /* of dpoc_pending: [DPOC_PARTS], and two a tensor */
    dpoc_pending pending[DPOC_WAITING];   /* what waits for one launch: codes of 8 bits, and all else */
    dpoc_recording *steps;                /* >>steps */
    const char  *op;                      /* of the call that runs, for errors */
    char         text[320], about[320];   /* the last failure; the device in words */
} dpoc;

static const char *const dpoc_names[DPO_OP_COUNT] = {
#define DPOC_NAME(name, inputs, grads, keeps) #name,
    DPO_OPS(DPOC_NAME)
};

/* Keeps what went wrong: the call, its reason, the op.  A kernel that fails while it runs is found by a later call. */
static int dpoc_fail(dpoc *d, int status, const char *call, const char *why)
{
    snprintf(d->text, sizeof d->text, "%.200s: %.80s%s%.20s", call, why, d->op ? " in " : "", d->op ? d->op : "");
    return status;
}

/* No memory is a status of its own: the context above then gives back what lies idle and asks again. */
static int dpoc_check(dpoc *d, cudaError_t e, const char *call)
{
    if (e == cudaSuccess) return DPO_OK;
    return dpoc_fail(d, e == cudaErrorMemoryAllocation ? DPO_OUT_OF_MEMORY : DPO_DEVICE, call, cudaGetErrorString(e));
}

/* One call of an op: counting its scratch, or running it. */
typedef struct dpoc_run {
    dpoc           *d;
    const dpo_args *a;
    int             counting, status;     /* counting: nothing runs; status: the first failure */
    size_t          at;                   /* scratch handed out */
} dpoc_run;

/* The next piece of scratch, on a line of 256 bytes, which is what the widest loads want. */
static void *dpoc_carve(dpoc_run *r, size_t bytes)
{
    char *p = r->counting ? NULL : (char *)r->a->work + r->at;
    r->at += (bytes + 255) & ~(size_t)255;
    return p;
}

/* A launch reports at once what is wrong with its grid; what goes wrong inside comes out at a later call, unless
   DPO_CUDA_SYNC waits for it here. */
static void dpoc_launched(dpoc_run *r, const char *kernel)
{
    char        call[128];
    cudaError_t e = cudaGetLastError();
    if (e == cudaSuccess && r->d->options[DPO_CUDA_SYNC]) e = cudaStreamSynchronize(r->d->stream);
    if (e == cudaSuccess) return;
    kernel += *kernel == '(';             /* names with a list of template arguments stand in brackets */
    snprintf(call, sizeof call, "launch of %.*s", (int)strcspn(kernel, ")"), kernel);
    r->status = dpoc_check(r->d, e, call);
}

/* Every kernel is launched here.  args: a list in brackets of local variables alone, for the stand-in copies them. */
#define DPOC_LAUNCH(r, kernel, grid, block, args) do { \
    if (!(r)->counting && (r)->status == DPO_OK) { \
        DPOC_START(kernel, grid, block, args, (r)->d->stream); \
        dpoc_launched(r, #kernel); } } while (0)

/* Threads of most kernels: 8 warps; a processor holds 8 such blocks, which hides the latency of memory. */
enum { DPOC_THREADS = 256 };

/* n/piece rounded up, and the smaller one. */
static int64_t dpoc_pieces(int64_t n, int64_t piece) { return (n + piece - 1)/piece; }
static int64_t dpoc_least(int64_t a, int64_t b)      { return a < b ? a : b; }

/* Blocks for n units, DPOC_THREADS a block.  Beyond 2^20 blocks each thread takes several units. */
static dim3 dpoc_grid(int64_t n)
{
    int64_t blocks = dpoc_pieces(n, DPOC_THREADS);
    return dim3((unsigned)(blocks < 1 ? 1 : blocks > 1 << 20 ? 1 << 20 : blocks));
}

/* Elements of a view; the size of its last axis; bytes of a number; whether gradient i is added to what is there. */
static int64_t dpoc_count(const dpo_view *v)    { return v->shape[0]*v->shape[1]*v->shape[2]*v->shape[3]; }
static int64_t dpoc_channels(const dpo_view *v) { return v->shape[v->rank > 0 ? v->rank - 1 : 0]; }
static size_t  dpoc_size(int type)              { return type == DPO_BF16 || type == DPO_F16 ? 2 : 4; }
static int     dpoc_adds(const dpo_args *a, int i) { return (int)(a->add >> i & 1); }

/* ==========================================================================================================
   >>memory                                                                        device memory, copies, staging
   ========================================================================================================== */

/* Three kinds of memory.  Tensors and scratch of ops: the context's, in regions that it gets here.  Scratch of cuBLASLt
   and cuDNN, and partial sums of the optimizer: two blocks for as long as the backend lives, since a captured graph
   holds their addresses.  On the host: page-locked stages and mailboxes, from which the device copies by itself. */

/* The context above cuts its tensors from regions and gives none back while it works, so that this is called a few
   dozen times before the first step ends and never after it.  Blocks of cudaMalloc start on lines of 256 bytes. */
static int dpoc_step_stop(dpoc *d);
static int dpoc_flush(dpoc *d);

/* The last failure stays in `text`, for the context asks three times in different sizes before it gives up. */
static void *dpoc_alloc(void *self, size_t bytes)
{
    dpoc *d = (dpoc *)self;
    void *p = NULL;
    d->op = NULL;
    if (!d->open || dpoc_check(d, cudaSetDevice(d->device), "cudaSetDevice") != DPO_OK || dpoc_step_stop(d) != DPO_OK)
        return NULL;
    if (dpoc_check(d, cudaMalloc(&p, bytes ? bytes : 1), "cudaMalloc") == DPO_OK) return p;
    (void)cudaGetLastError();             /* no memory is no reason to fail later calls */
    return NULL;
}

/* A context gives memory back where it trims or closes, never inside a step. */
static void dpoc_release(void *self, void *data, size_t bytes)
{
    dpoc *d = (dpoc *)self;
    (void)bytes;
    if (!data) return;
    (void)cudaSetDevice(d->device);
    (void)dpoc_step_stop(d);
    (void)cudaFree(data);                 /* waits for the kernels that use it */
}

/* Room for `bytes` in page-locked memory, at most DPOC_STAGE_BYTES.  Two stages take turns: before one is written
   again, the copies out of it, which lie a whole stage back, must be over. */
static char *dpoc_stage(dpoc *d, size_t bytes)
{
    char *p;
    if (d->stage_used + bytes > DPOC_STAGE_BYTES) {
        if (dpoc_check(d, cudaEventRecord(d->staged[d->turn], d->stream), "cudaEventRecord") != DPO_OK) return NULL;
        d->turn = (d->turn + 1) % DPOC_STAGES;
        if (dpoc_check(d, cudaEventSynchronize(d->staged[d->turn]), "cudaEventSynchronize") != DPO_OK) return NULL;
        d->stage_used = 0;
    }
    p = d->stage[d->turn] + d->stage_used;
    d->stage_used += (bytes + 63) & ~(size_t)63;
    return p;
}

/* From the host: through the stages, so that `from` may change as soon as this returns, and the host does not wait. */
static int dpoc_upload(dpoc *d, char *to, const char *from, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += DPOC_STAGE_BYTES) {
        size_t n = bytes - at < DPOC_STAGE_BYTES ? bytes - at : (size_t)DPOC_STAGE_BYTES;
        char  *p = dpoc_stage(d, n);
        int    status;
        if (!p) return DPO_DEVICE;
        memcpy(p, from + at, n);          /* `from` is the caller's again */
        status = dpoc_check(d, cudaMemcpyAsync(to + at, p, n, cudaMemcpyHostToDevice, d->stream), "cudaMemcpyAsync");
        if (status != DPO_OK) return status;
    }
    return DPO_OK;
}

/* A copy at once, in the order of the stream; one that goes down waits until it is there. */
static int dpoc_copy_now(dpoc *d, void *to, const void *from, size_t bytes, int direction)
{
    int status = dpoc_flush(d);
    if (status != DPO_OK || !bytes) return status;
    if (direction == DPO_COPY_UP) return dpoc_upload(d, (char *)to, (const char *)from, bytes);
    status = dpoc_check(d, cudaMemcpyAsync(to, from, bytes, direction == DPO_COPY_DOWN ? cudaMemcpyDeviceToHost
                                           : cudaMemcpyDeviceToDevice, d->stream), "cudaMemcpyAsync");
    if (status != DPO_OK || direction != DPO_COPY_DOWN) return status;
    return dpoc_check(d, cudaStreamSynchronize(d->stream), "cudaStreamSynchronize");
}

/* One more box, in the list even where something failed: dpoc_close frees what there is. */
static int dpoc_box_new(dpoc *d, size_t bytes)
{
    dpoc_box *b = (dpoc_box *)calloc(1, sizeof *b);
    int       status;
    if (!b) return dpoc_fail(d, DPO_OUT_OF_MEMORY, "send", "no memory on the host");
    b->next = d->boxes;
    d->boxes = b;
    status = dpoc_check(d, cudaEventCreateWithFlags(&b->came, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    if (status == DPO_OK) status = dpoc_check(d, cudaMallocHost((void **)&b->p, bytes), "cudaMallocHost");
    if (status == DPO_OK) b->room = bytes;
    return status;
}

/* A free box of at least `bytes`; NULL: a failure.  Where there is none two are made: the next one is wanted before the
   first is free again, and no later step should have to ask for memory. */
static dpoc_box *dpoc_box_for(dpoc *d, size_t bytes)
{
    for (int made = 0; made < 2; made++) {
        for (dpoc_box *b = d->boxes; b; b = b->next) if (!b->used && b->room >= bytes) return b;
        if (dpoc_box_new(d, bytes) != DPO_OK || dpoc_box_new(d, bytes) != DPO_OK) return NULL;
    }
    return NULL;
}

/* At once, in the order of the stream.  All bits 0 is 0 in every type of storage. */
static int dpoc_zero_now(dpoc *d, void *data, size_t bytes)
{
    int status = dpoc_flush(d);
    if (status != DPO_OK || !bytes) return status;
    return dpoc_check(d, cudaMemsetAsync(data, 0, bytes, d->stream), "cudaMemsetAsync");
}

/* ==========================================================================================================
   >>numbers                                                                  types of storage, sums over a block
   ========================================================================================================== */

/* The same roundings as diffdpo.h's: single instructions on the device, bit by bit in the stand-in. */
static __device__ __forceinline__ float dpoc_float(uint32_t u)   { float x;  memcpy(&x, &u, 4);  return x; }
static __device__ __forceinline__ float dpoc_of_bf16(uint16_t h) { return dpoc_float((uint32_t)h << 16); }
#ifndef DIFFDPO_CUDA_STAND_IN
static __device__ __forceinline__ uint16_t dpoc_to_bf16(float x)
{
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
static __device__ __forceinline__ uint16_t dpoc_to_f16(float x)    { return __half_as_ushort(__float2half_rn(x)); }
static __device__ __forceinline__ float    dpoc_of_f16(uint16_t h) { return __half2float(__ushort_as_half(h)); }
#else
static uint32_t dpoc_bits(float x) { uint32_t u;  memcpy(&u, &x, 4);  return u; }
static uint16_t dpoc_to_bf16(float x)
{
    uint32_t u = dpoc_bits(x);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static uint16_t dpoc_to_f16(float x)
{
    uint32_t u = dpoc_bits(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000)  return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);              /* 65520 and above round to infinity */
    if (a >= 0x38800000) return (uint16_t)(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13));
    return (uint16_t)(sign | (dpoc_bits(dpoc_float(a) + 0.5f) - 0x3f000000));        /* below 2^-14 */
}
static float dpoc_of_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 0x3ff;
    if (e == 31) return dpoc_float(sign | 0x7f800000 | m << 13 | (m ? 0x400000 : 0));
    if (e)       return dpoc_float(sign | (e + 112) << 23 | m << 13);
    return sign ? -((float)m*(1.0f/16777216)) : (float)m*(1.0f/16777216);
}
#endif

/* As dpoc_least, on the device. */
static __device__ __forceinline__ int64_t dpoc_min(int64_t a, int64_t b) { return a < b ? a : b; }

/* Number i of an array, whatever it is stored as.  The type is the same for all threads: the branch costs nothing
   beside the load. */
static __device__ __forceinline__ float dpoc_get(const void *p, int type, int64_t i)
{
    if (type == DPO_BF16) return dpoc_of_bf16(((const uint16_t *)p)[i]);
    if (type == DPO_F16)  return dpoc_of_f16(((const uint16_t *)p)[i]);
    return ((const float *)p)[i];
}
/* The way back, rounded to nearest even. */
static __device__ __forceinline__ void dpoc_put(void *p, int type, int64_t i, float x)
{
    if (type == DPO_BF16)     ((uint16_t *)p)[i] = dpoc_to_bf16(x);
    else if (type == DPO_F16) ((uint16_t *)p)[i] = dpoc_to_f16(x);
    else                      ((float *)p)[i] = x;
}

/* Four numbers from i on, i a multiple of 4: one load of 16 or 8 bytes. */
static __device__ __forceinline__ void dpoc_get4(const void *p, int type, int64_t i, float x[4])
{
    if (type == DPO_F32) {
        float4 v = ((const float4 *)p)[i >> 2];
        x[0] = v.x;  x[1] = v.y;  x[2] = v.z;  x[3] = v.w;
        return;
    }
    uint2    v = ((const uint2 *)p)[i >> 2];
    uint16_t h[4] = { (uint16_t)v.x, (uint16_t)(v.x >> 16), (uint16_t)v.y, (uint16_t)(v.y >> 16) };
    for (int k = 0; k < 4; k++) x[k] = type == DPO_BF16 ? dpoc_of_bf16(h[k]) : dpoc_of_f16(h[k]);
}
/* The way back. */
static __device__ __forceinline__ void dpoc_put4(void *p, int type, int64_t i, const float x[4])
{
    if (type == DPO_F32) {
        float4 v = { x[0], x[1], x[2], x[3] };
        ((float4 *)p)[i >> 2] = v;
        return;
    }
    uint32_t h[4];
    for (int k = 0; k < 4; k++) h[k] = type == DPO_BF16 ? dpoc_to_bf16(x[k]) : dpoc_to_f16(x[k]);
    uint2 v = { h[0] | h[1] << 16, h[2] | h[3] << 16 };
    ((uint2 *)p)[i >> 2] = v;
}

/* Four numbers, or the first alone: kernels that come in both widths. */
static __device__ __forceinline__ void dpoc_take(const void *p, int type, int64_t i, int quads, float x[4])
{
    if (quads) dpoc_get4(p, type, i, x);
    else x[0] = dpoc_get(p, type, i);
}
/* The way back. */
static __device__ __forceinline__ void dpoc_give(void *p, int type, int64_t i, int quads, const float x[4])
{
    if (quads) dpoc_put4(p, type, i, x);
    else dpoc_put(p, type, i, x[0]);
}
/* For each number that dpoc_take took; unrolled, so that arrays stay in registers. */
#define DPOC_EACH(k, quads) DPOC_UNROLL for (int k = 0; k < 4; k++) if (k == 0 || (quads))

/* May quads be read from p?  NULL: it is not read at all. */
static int dpoc_quads(const void *p, int type) { return (uintptr_t)p % (4*dpoc_size(type)) == 0; }

/* i / n and i % n; both below 2^32 is the usual case and takes a fifth of the time. */
static __device__ __forceinline__ int64_t dpoc_div(int64_t i, int64_t n)
{
    return ((i | n) >> 32) == 0 ? (int64_t)((uint32_t)i/(uint32_t)n) : i/n;
}

/* The first unit of a thread, and how far apart its units are. */
static __device__ __forceinline__ int64_t dpoc_unit(void)  { return (int64_t)blockIdx.x*blockDim.x + threadIdx.x; }
/* Grids are cut off at 2^20 blocks: then a thread goes on by this many. */
static __device__ __forceinline__ int64_t dpoc_units(void) { return (int64_t)gridDim.x*blockDim.x; }

/* The sum of x over a warp, in a fixed order, for all of its threads. */
static __device__ __forceinline__ double dpoc_warp_sum(double x)
{
    for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(~0u, x, k);
    return x;
}
/* The same over a block of DPOC_THREADS.  The first barrier: the last sum may still be read. */
static __device__ double dpoc_block_sum(double x)
{
    __shared__ double part[DPOC_THREADS/32];
    double sum = 0;
    x = dpoc_warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x/32] = x;
    __syncthreads();
    for (int k = 0; k < DPOC_THREADS/32; k++) sum += part[k];
    return sum;
}

/* ==========================================================================================================
   >>elements                                  functions of one and two numbers, moves, tables, random numbers
   ========================================================================================================== */

/* The formulas of >>impl rows in diffdpo.h, where their reasons stand. */
static __device__ __forceinline__ float dpoc_sigmoid(float x)     { return 1/(1 + expf(-x)); }
/* -log(1 + exp(-x)), in the form whose exponential cannot overflow. */
static __device__ __forceinline__ float dpoc_log_sigmoid(float x)
{
    return x < 0 ? x - log1pf(expf(x)) : -log1pf(expf(-x));
}
/* P(x), the chance that a normal number lies below x, and its density: gelu(x) = x P(x). */
static __device__ __forceinline__ float dpoc_normal(float x)      { return 0.5f*erfcf(-0.70710678f*x); }
static __device__ __forceinline__ float dpoc_density(float x)     { return 0.39894228f*expf(-0.5f*x*x); }

/* act(x); a branch that all threads take alike. */
static __device__ float dpoc_act(int act, float x)
{
    switch (act) {
    case DPO_SILU:        return x*dpoc_sigmoid(x);
    case DPO_GELU:        return x*dpoc_normal(x);
    case DPO_QUICK_GELU:  return x*dpoc_sigmoid(1.702f*x);
    case DPO_SIGMOID:     return dpoc_sigmoid(x);
    case DPO_TANH:        return tanhf(x);
    case DPO_EXP:         return expf(x);
    case DPO_LOG:         return logf(x);
    case DPO_SQRT:        return sqrtf(x);
    case DPO_SQUARE:      return x*x;
    case DPO_ABS:         return fabsf(x);
    case DPO_RELU:        return x > 0 ? x : 0;
    case DPO_LOG_SIGMOID: return dpoc_log_sigmoid(x);
    default:              return x;
    }
}

/* act'(x); 0 at the corners of abs and relu, as PyTorch has it. */
static __device__ float dpoc_act_slope(int act, float x)
{
    float s;
    switch (act) {
    case DPO_SILU:        s = dpoc_sigmoid(x);         return s*(1 + x*(1 - s));
    case DPO_GELU:        return dpoc_normal(x) + x*dpoc_density(x);
    case DPO_QUICK_GELU:  s = dpoc_sigmoid(1.702f*x);  return s*(1 + 1.702f*x*(1 - s));
    case DPO_SIGMOID:     s = dpoc_sigmoid(x);         return s*(1 - s);
    case DPO_TANH:        s = tanhf(x);                return 1 - s*s;
    case DPO_EXP:         return expf(x);
    case DPO_LOG:         return 1/x;
    case DPO_SQRT:        return 0.5f/sqrtf(x);
    case DPO_SQUARE:      return 2*x;
    case DPO_ABS:         return x > 0 ? 1.0f : x < 0 ? -1.0f : 0;
    case DPO_RELU:        return x > 0 ? 1.0f : 0;
    case DPO_LOG_SIGMOID: return dpoc_sigmoid(-x);
    default:              return 1;
    }
}

/* Codes below DPO_ACTS are the activations, DPOC_BACK + act is b*act'(a). */
enum {
    DPOC_BACK   = DPO_ACTS,
    DPOC_AFFINE = 2*DPO_ACTS,             /* s0 a + s1 */
    DPOC_CLAMP,                           /* min(max(a, s0), s1) */
    DPOC_CLAMP_BACK,                      /* b where s0 <= a <= s1, else 0 */
    DPOC_LERP                             /* b + s0 (a - b) */
};

/* f(a, b; s0, s1) for one number. */
static __device__ __forceinline__ float dpoc_map_one(int op, float a, float b, float s0, float s1)
{
    if (op < DPO_ACTS)    return dpoc_act(op, a);
    if (op < DPOC_AFFINE) return b*dpoc_act_slope(op - DPOC_BACK, a);
    switch (op) {
    case DPOC_AFFINE:     return s0*a + s1;
    case DPOC_CLAMP:      return a < s0 ? s0 : a > s1 ? s1 : a;
    case DPOC_CLAMP_BACK: return a < s0 || a > s1 ? 0 : b;
    default:              return b + s0*(a - b);
    }
}

/* y[i] = f(a[i], b[i]; s0, s1), or y[i] += f. */
typedef struct dpoc_map {
    int op, add, quads, atype, btype, ytype;  /* quads: all three can be read four at a time */
    int64_t n;                            /* numbers of each */
    const void *a, *b;                    /* b NULL: not used */
    void *y;
    float s0, s1;                         /* what the formula takes along */
    const float *vary;                    /* s0 as it stands in the step's mailbox, or NULL: see >>steps */
} dpoc_map;

/* A unit is four numbers.  Nothing but loads and stores counts here: 256 threads, one unit each. */
static __global__ void dpoc_map_kernel(dpoc_map g)
{
    float s0 = g.vary ? *g.vary : g.s0;
    for (int64_t u = dpoc_unit(); 4*u < g.n; u += dpoc_units()) {
        int64_t i = 4*u;                  /* the first of four; the last unit may have fewer */
        float   a[4], b[4] = { 0, 0, 0, 0 }, y[4] = { 0, 0, 0, 0 };
        if (g.quads && i + 4 <= g.n) {
            dpoc_get4(g.a, g.atype, i, a);
            if (g.b) dpoc_get4(g.b, g.btype, i, b);
            if (g.add) dpoc_get4(g.y, g.ytype, i, y);
            for (int k = 0; k < 4; k++) y[k] += dpoc_map_one(g.op, a[k], b[k], s0, g.s1);
            dpoc_put4(g.y, g.ytype, i, y);
            continue;
        }
        /* the end of an array, or one that cannot be read four at a time */
        for (int64_t k = i; k < i + 4 && k < g.n; k++) {
            float f = dpoc_map_one(g.op, dpoc_get(g.a, g.atype, k), g.b ? dpoc_get(g.b, g.btype, k) : 0, s0, g.s1);
            dpoc_put(g.y, g.ytype, k, g.add ? dpoc_get(g.y, g.ytype, k) + f : f);
        }
    }
}

/* f over whole views; b may be NULL. */
static void dpoc_each(dpoc_run *r, int op, const dpo_view *a, const dpo_view *b, float s0, float s1, const dpo_view *y,
                      int add,
                      const float *vary)
{
    dpoc_map g;
    memset(&g, 0, sizeof g);
    g.op = op;  g.add = add;  g.n = dpoc_count(y);
    g.a = a->data;  g.atype = a->dtype;
    g.y = y->data;  g.ytype = y->dtype;
    if (b) { g.b = b->data;  g.btype = b->dtype; }
    g.s0 = s0;  g.s1 = s1;  g.vary = vary;
    g.quads = dpoc_quads(g.a, g.atype) && dpoc_quads(g.b, g.btype) && dpoc_quads(g.y, g.ytype);
    DPOC_LAUNCH(r, dpoc_map_kernel, dpoc_grid(dpoc_pieces(g.n, 4)), DPOC_THREADS, (g));
}

/* A flat array as a view. */
static dpo_view dpoc_flat(void *data, int type, int64_t n)
{
    dpo_view v;
    memset(&v, 0, sizeof v);
    v.data = data;  v.dtype = type;  v.rank = 1;
    v.shape[0] = n;  v.shape[1] = v.shape[2] = v.shape[3] = 1;
    return v;
}

/* v's numbers in another type, in scratch; v's own data where that is the type it has. */
static const void *dpoc_as(dpoc_run *r, const dpo_view *v, int type)
{
    dpo_view from = *v, to;
    if (!v->data || v->dtype == type) return v->data;
    to = dpoc_flat(dpoc_carve(r, (size_t)dpoc_count(v)*dpoc_size(type)), type, dpoc_count(v));
    dpoc_each(r, DPO_NONE, &from, NULL, 0, 0, &to, 0, NULL);
    return to.data;
}

/* x [..] -> y = act(x);   dx = dy act'(x), made again from x, which is what the tape kept. */
static void dpoc_op_act(dpoc_run *r)
{
    const dpo_args *a = r->a;
    if (!a->backward) dpoc_each(r, a->p.act.act, &a->in[0], NULL, 0, 0, &a->out, 0, NULL);
    else if (a->din[0].data)
        dpoc_each(r, DPOC_BACK + a->p.act.act, &a->in[0], &a->dout, 0, 0, &a->din[0], dpoc_adds(a, 0), NULL);
}

/* y = scale x + shift;   dx = scale dy. */
static void dpoc_op_affine(dpoc_run *r)
{
    const dpo_args *a = r->a;
    if (!a->backward) dpoc_each(r, DPOC_AFFINE, &a->in[0], NULL, a->p.affine.scale, a->p.affine.shift, &a->out, 0,
                                NULL);
    else if (a->din[0].data)
        dpoc_each(r, DPOC_AFFINE, &a->dout, NULL, a->p.affine.scale, 0, &a->din[0], dpoc_adds(a, 0), NULL);
}

/* y = min(max(x, low), high);   dx = dy where low <= x <= high, both ends with it. */
static void dpoc_op_clamp(dpoc_run *r)
{
    const dpo_args *a = r->a;
    float low = a->p.clamp.low, high = a->p.clamp.high;
    if (!a->backward) dpoc_each(r, DPOC_CLAMP, &a->in[0], NULL, low, high, &a->out, 0, NULL);
    else if (a->din[0].data)
        dpoc_each(r, DPOC_CLAMP_BACK, &a->in[0], &a->dout, low, high, &a->din[0], dpoc_adds(a, 0), NULL);
}

static const void *dpoc_varying(dpoc_run *r);

/* y <- y + rate (x - y) */
static void dpoc_op_lerp(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_each(r, DPOC_LERP, &a->in[0], &a->out, a->p.lerp.rate, 0, &a->out, 0, (const float *)dpoc_varying(r));
}

/* x [..] -> y [..] of another type.  I32 is only copied as it is. */
static void dpoc_op_copy(dpoc_run *r)
{
    const dpo_args *a = r->a;
    if (a->backward) {
        if (a->din[0].data) dpoc_each(r, DPO_NONE, &a->dout, NULL, 0, 0, &a->din[0], dpoc_adds(a, 0), NULL);
    } else if (a->in[0].dtype == a->out.dtype) {
        if (!r->counting)
            r->status = dpoc_check(r->d, cudaMemcpyAsync(a->out.data, a->in[0].data,
                                                         (size_t)dpoc_count(&a->out)*dpoc_size(a->out.dtype),
                                                         cudaMemcpyDeviceToDevice, r->d->stream), "cudaMemcpyAsync");
    } else if (a->in[0].panel != a->out.panel || a->out.dtype == DPO_I32 || a->in[0].dtype == DPO_I32) {
        r->status = dpoc_fail(r->d, DPO_UNSUPPORTED, "copy", "no copy between these layouts or types");
    } else dpoc_each(r, DPO_NONE, &a->in[0], NULL, 0, 0, &a->out, 0, NULL);
}

/* ------------------------------------------------------------------------------------------ GEGLU

   x [R,2D] = (a,b) -> y [R,D] = a gelu(b);   da = dy gelu(b),   db = dy a gelu'(b) */
typedef struct dpoc_geglu {
    int64_t R, D;                         /* rows of x and y, width of y */
    const void *x;                        /* [R,2D] */
    void   *y;                            /* [R,D] */
    int     xtype, ytype, add, quads;
    const float *dy;                      /* [R,D]; dx [R,2D] */
    float  *dx;
} dpoc_geglu;

/* A thread four numbers; neighbours in a row lie side by side in both halves. */
static __global__ void dpoc_geglu_kernel(dpoc_geglu g)
{
    int wide = g.quads ? 4 : 1;
    for (int64_t u = dpoc_unit(); u*wide < g.R*g.D; u += dpoc_units()) {
        int64_t i = u*wide, row = dpoc_div(i, g.D), at = row*2*g.D + (i - row*g.D);
        float   a[4], b[4], y[4];
        dpoc_take(g.x, g.xtype, at, g.quads, a);
        dpoc_take(g.x, g.xtype, at + g.D, g.quads, b);
        DPOC_EACH(k, g.quads) y[k] = a[k]*b[k]*dpoc_normal(b[k]);
        dpoc_give(g.y, g.ytype, i, g.quads, y);
    }
}
/* da = dy gelu(b), db = dy a gelu'(b); P(b) is computed once for both. */
static __global__ void dpoc_geglu_back_kernel(dpoc_geglu g)
{
    int wide = g.quads ? 4 : 1;
    for (int64_t u = dpoc_unit(); u*wide < g.R*g.D; u += dpoc_units()) {
        int64_t i = u*wide, row = dpoc_div(i, g.D), at = row*2*g.D + (i - row*g.D);
        float   a[4], b[4], dy[4], da[4] = { 0, 0, 0, 0 }, db[4] = { 0, 0, 0, 0 };
        dpoc_take(g.x, g.xtype, at, g.quads, a);
        dpoc_take(g.x, g.xtype, at + g.D, g.quads, b);
        dpoc_take(g.dy, DPO_F32, i, g.quads, dy);
        if (g.add) dpoc_take(g.dx, DPO_F32, at, g.quads, da);
        if (g.add) dpoc_take(g.dx, DPO_F32, at + g.D, g.quads, db);
        DPOC_EACH(k, g.quads) {
            float p = dpoc_normal(b[k]);
            da[k] += dy[k]*b[k]*p;
            db[k] += dy[k]*a[k]*(p + b[k]*dpoc_density(b[k]));
        }
        dpoc_give(g.dx, DPO_F32, at, g.quads, da);
        dpoc_give(g.dx, DPO_F32, at + g.D, g.quads, db);
    }
}

/* Both halves of a row start on a quad where D is a multiple of 4, as it is in every network here. */
static void dpoc_op_geglu(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_geglu g;
    memset(&g, 0, sizeof g);
    g.D = dpoc_channels(&a->in[0])/2;
    g.R = dpoc_count(&a->in[0])/(2*g.D);
    g.x = a->in[0].data;  g.xtype = a->in[0].dtype;
    g.y = a->out.data;    g.ytype = a->out.dtype;
    g.dy = (const float *)a->dout.data;  g.dx = (float *)a->din[0].data;  g.add = dpoc_adds(a, 0);
    g.quads = g.D % 4 == 0 && dpoc_quads(g.x, g.xtype) && dpoc_quads(g.y, g.ytype) && dpoc_quads(g.dy, DPO_F32) &&
        dpoc_quads(g.dx, DPO_F32);
    if (!a->backward) DPOC_LAUNCH(r, dpoc_geglu_kernel, dpoc_grid(g.R*g.D/(g.quads ? 4 : 1)), DPOC_THREADS, (g));
    else if (g.dx)    DPOC_LAUNCH(r, dpoc_geglu_back_kernel, dpoc_grid(g.R*g.D/(g.quads ? 4 : 1)), DPOC_THREADS, (g));
}

/* ------------------------------------------------------------------------------------------ functions of two

   y, a, b of rank 4; an operand's step along an axis that it repeats is 0. */
typedef struct dpoc_binary {
    int     fn, which, add, type[2], ytype;  /* which: the operand that gets its gradient */
    int64_t d[4], step[2][4], n, again;   /* backward: n numbers of the operand, `again` places of y for each */
    const void *x[2];                     /* the operands; backward of add and sub has none */
    void   *y;
    const float *dy;
    float  *dx;
} dpoc_binary;

/* a fn b */
static __device__ __forceinline__ float dpoc_binary_one(int fn, float a, float b)
{
    return fn == DPO_ADD ? a + b : fn == DPO_SUB ? a - b : fn == DPO_MUL ? a*b : a/b;
}

/* A thread a number of y; its place along the four axes gives the places in both operands. */
static __global__ void dpoc_binary_kernel(dpoc_binary g)
{
    for (int64_t u = dpoc_unit(); u < g.n; u += dpoc_units()) {
        int64_t left = u, at[2] = { 0, 0 };
        for (int i = 3; i >= 0; i--) {    /* innermost axis first */
            int64_t q = dpoc_div(left, g.d[i]), rest = left - q*g.d[i];
            at[0] += rest*g.step[0][i];
            at[1] += rest*g.step[1][i];
            left = q;
        }
        dpoc_put(g.y, g.ytype, u, dpoc_binary_one(g.fn, dpoc_get(g.x[0], g.type[0], at[0]),
                                                  dpoc_get(g.x[1], g.type[1], at[1])));
    }
}

/* dy times dy/d(operand): add, sub: dy, -dy;  mul: dy times the other;  div: dy/b, -dy a/b^2. */
static __device__ __forceinline__ float dpoc_binary_slope(const dpoc_binary &g, float a, float b, float dy)
{
    if (g.fn == DPO_ADD) return dy;
    if (g.fn == DPO_SUB) return g.which ? -dy : dy;
    if (g.fn == DPO_MUL) return dy*(g.which ? a : b);
    return g.which ? -dy*a/(b*b) : dy/b;
}

/* Number k of the operand and repetition `rep` of it: where in y, and where the two operands lie. */
static __device__ float dpoc_binary_term(const dpoc_binary &g, int64_t k, int64_t rep)
{
    int64_t o = 0, scale = 1, at[2] = { 0, 0 };
    for (int i = 3; i >= 0; i--) {
        int64_t *from = g.step[g.which][i] ? &k : &rep, q = dpoc_div(*from, g.d[i]), rest = *from - q*g.d[i];
        *from = q;
        o += rest*scale;
        scale *= g.d[i];
        at[0] += rest*g.step[0][i];
        at[1] += rest*g.step[1][i];
    }
    float a = g.x[0] ? dpoc_get(g.x[0], g.type[0], at[0]) : 0, b = g.x[1] ? dpoc_get(g.x[1], g.type[1], at[1]) : 0;
    return dpoc_binary_slope(g, a, b, g.dy[o]);
}

/* Few repetitions: a thread each number of the operand. */
static __global__ void dpoc_binary_back_kernel(dpoc_binary g)
{
    for (int64_t k = dpoc_unit(); k < g.n; k += dpoc_units()) {
        double sum = 0;
        for (int64_t rep = 0; rep < g.again; rep++) sum += dpoc_binary_term(g, k, rep);
        g.dx[k] = (float)(g.add ? g.dx[k] + sum : sum);
    }
}
/* Many: a block each. */
static __global__ void dpoc_binary_sum_kernel(dpoc_binary g)
{
    for (int64_t k = blockIdx.x; k < g.n; k += gridDim.x) {
        double sum = 0;
        for (int64_t rep = threadIdx.x; rep < g.again; rep += DPOC_THREADS) sum += dpoc_binary_term(g, k, rep);
        sum = dpoc_block_sum(sum);
        if (threadIdx.x == 0) g.dx[k] = (float)(g.add ? g.dx[k] + sum : sum);
    }
}

/* Backward runs once for each operand that wants its gradient: n numbers, each the sum over `again` places of y. */
static void dpoc_op_binary(dpoc_run *r)
{
    const dpo_args *a = r->a;
    const dpo_view *y = a->backward ? &a->dout : &a->out;
    dpoc_binary g;
    memset(&g, 0, sizeof g);
    g.fn = a->p.binary.fn;  g.y = a->out.data;  g.ytype = a->out.dtype;  g.n = dpoc_count(y);
    g.dy = (const float *)a->dout.data;
    for (int w = 0; w < 2; w++) {
        int64_t step = 1;
        g.x[w] = a->in[w].data;  g.type[w] = a->in[w].dtype;
        for (int i = 3; i >= 0; i--) {
            g.d[i] = y->shape[i];
            g.step[w][i] = a->in[w].shape[i] == 1 ? 0 : step;
            step *= a->in[w].shape[i];
        }
    }
    if (!a->backward) { DPOC_LAUNCH(r, dpoc_binary_kernel, dpoc_grid(g.n), DPOC_THREADS, (g));  return; }
    for (int w = 0; w < 2; w++) {
        if (!a->din[w].data) continue;
        g.which = w;  g.dx = (float *)a->din[w].data;  g.add = dpoc_adds(a, w);
        g.n = g.again = 1;
        for (int i = 0; i < 4; i++) *(g.step[w][i] ? &g.n : &g.again) *= g.d[i];
        /* 256 places and more are worth a block's sum; a bias over all pixels is such a case */
        if (g.again < 256) DPOC_LAUNCH(r, dpoc_binary_back_kernel, dpoc_grid(g.n), DPOC_THREADS, (g));
        else DPOC_LAUNCH(r, dpoc_binary_sum_kernel, dim3((unsigned)dpoc_least(g.n, 1 << 20)), DPOC_THREADS, (g));
    }
}

/* ------------------------------------------------------------------------------------------ moving values

   R rows of n units from places `from_step` apart to places `to_step` apart.  A unit is 16 bytes where all of these
   allow it, else one number; what is added to is F32. */
typedef struct dpoc_move {
    int64_t R, n, from_step, to_step;     /* in units */
    const void *from;
    void *to;
    int size, add;                        /* bytes of a unit */
} dpoc_move;

/* Neighbouring threads move neighbouring units, so that both sides are whole lines of memory. */
static __global__ void dpoc_move_kernel(dpoc_move g)
{
    for (int64_t u = dpoc_unit(); u < g.R*g.n; u += dpoc_units()) {
        int64_t row = dpoc_div(u, g.n), i = u - row*g.n, at = row*g.from_step + i, to = row*g.to_step + i;
        if (g.add)             ((float *)g.to)[to] += ((const float *)g.from)[at];
        else if (g.size == 16) ((uint4 *)g.to)[to] = ((const uint4 *)g.from)[at];
        else if (g.size == 4)  ((uint32_t *)g.to)[to] = ((const uint32_t *)g.from)[at];
        else                   ((uint16_t *)g.to)[to] = ((const uint16_t *)g.from)[at];
    }
}

/* Steps and n in numbers of `size` bytes. */
static void dpoc_rows(dpoc_run *r, int64_t R, int64_t n, const void *from, int64_t from_step, void *to, int64_t to_step,
                      size_t size,
                      int add)
{
    dpoc_move g;
    int64_t wide = (int64_t)(16/size);
    memset(&g, 0, sizeof g);
    g.R = R;  g.n = n;  g.from = from;  g.to = to;  g.from_step = from_step;  g.to_step = to_step;
    g.size = (int)size;  g.add = add;
    if (!add && n % wide == 0 && from_step % wide == 0 && to_step % wide == 0 &&
        ((uintptr_t)from | (uintptr_t)to) % 16 == 0) {
        g.n /= wide;  g.from_step /= wide;  g.to_step /= wide;  g.size = 16;
    }
    DPOC_LAUNCH(r, dpoc_move_kernel, dpoc_grid(g.R*g.n), DPOC_THREADS, (g));
}

/* a [A,n,B], b [A,m,B] -> y [A,n+m,B], and dy apart again. */
static void dpoc_op_concat(dpoc_run *r)
{
    const dpo_args *a = r->a;
    const dpo_view *y = a->backward ? &a->dout : &a->out;
    int64_t A = y->shape[0], all = y->shape[1]*y->shape[2], at = 0;
    for (int i = 0; i < 2; i++) {
        int64_t n = a->in[i].shape[1]*a->in[i].shape[2];
        size_t  size = a->backward ? 4 : dpoc_size(a->out.dtype);
        if (!a->backward) dpoc_rows(r, A, n, a->in[i].data, n, (char *)a->out.data + (size_t)at*size, all, size, 0);
        else if (a->din[i].data)
            dpoc_rows(r, A, n, (const char *)a->dout.data + (size_t)at*size, all, a->din[i].data, n, size,
                      dpoc_adds(a, i));
        at += n;
    }
}

/* x [A,n,B] -> y [A,count,B]; dx is 0 outside of the slice. */
static void dpoc_op_slice(dpoc_run *r)
{
    const dpo_args *a = r->a;
    const dpo_view *y = a->backward ? &a->dout : &a->out;
    int64_t A = y->shape[0], B = y->shape[2], n = a->in[0].shape[1]*B, m = y->shape[1]*B, at = a->p.slice.from*B;
    size_t  size = a->backward ? 4 : dpoc_size(a->out.dtype);
    if (!a->backward) {
        dpoc_rows(r, A, m, (const char *)a->in[0].data + (size_t)at*size, n, a->out.data, m, size, 0);
        return;
    }
    if (!a->din[0].data) return;
    if (!dpoc_adds(a, 0) && !r->counting)
        r->status = dpoc_check(r->d, cudaMemsetAsync(a->din[0].data, 0, (size_t)(A*n)*size, r->d->stream),
                               "cudaMemsetAsync");
    dpoc_rows(r, A, m, a->dout.data, m, (char *)a->din[0].data + (size_t)at*size, n, size, dpoc_adds(a, 0));
}

/* ------------------------------------------------------------------------------------------ pictures, tables

   y[n,i,j] = x[n, i H/H', j W/W']; dx sums over the pixels that read it: rows ceil(h H'/H) up to the next h's first. */
typedef struct dpoc_up {
    int64_t N, H, W, C, Y, X;             /* C in units of `size` bytes */
    const void *x;                        /* [N,H,W,C] */
    void *y;                              /* [N,Y,X,C] */
    const float *dy;                      /* as y, and dx as x */
    float *dx;
    int size, add;
} dpoc_up;

/* A thread a unit of y: 16 bytes of a pixel's channels where they divide, else one number. */
static __global__ void dpoc_up_kernel(dpoc_up g)
{
    for (int64_t u = dpoc_unit(); u < g.N*g.Y*g.X*g.C; u += dpoc_units()) {
        int64_t p = dpoc_div(u, g.C), c = u - p*g.C, q = dpoc_div(p, g.X), j = p - q*g.X, n = dpoc_div(q, g.Y),
            i = q - n*g.Y;
        int64_t at = ((n*g.H + dpoc_div(i*g.H, g.Y))*g.W + dpoc_div(j*g.W, g.X))*g.C + c;
        if (g.size == 16)     ((uint4 *)g.y)[u] = ((const uint4 *)g.x)[at];
        else if (g.size == 4) ((uint32_t *)g.y)[u] = ((const uint32_t *)g.x)[at];
        else                  ((uint16_t *)g.y)[u] = ((const uint16_t *)g.x)[at];
    }
}
/* A thread a number of dx, which it alone writes: the few pixels of y that read it are summed in their order. */
static __global__ void dpoc_up_back_kernel(dpoc_up g)
{
    for (int64_t u = dpoc_unit(); u < g.N*g.H*g.W*g.C; u += dpoc_units()) {
        int64_t p = dpoc_div(u, g.C), c = u - p*g.C, q = dpoc_div(p, g.W), w = p - q*g.W, n = dpoc_div(q, g.H),
            h = q - n*g.H;
        int64_t i0 = (h*g.Y + g.H - 1)/g.H, i1 = ((h + 1)*g.Y + g.H - 1)/g.H;
        int64_t j0 = (w*g.X + g.W - 1)/g.W, j1 = ((w + 1)*g.X + g.W - 1)/g.W;
        float   sum = g.add ? g.dx[u] : 0;            /* by two: four pixels at most */
        for (int64_t i = i0; i < i1; i++)
            for (int64_t j = j0; j < j1; j++) sum += g.dy[((n*g.Y + i)*g.X + j)*g.C + c];
        g.dx[u] = sum;
    }
}

/* x [N,H,W,C] -> y [N,Y,X,C].  Forward moves bits, whatever they mean; backward adds floats. */
static void dpoc_op_upsample(dpoc_run *r)
{
    const dpo_args *a = r->a;
    const dpo_view *x = &a->in[0], *y = a->backward ? &a->dout : &a->out;
    dpoc_up g;
    memset(&g, 0, sizeof g);
    g.N = x->shape[0];  g.H = x->shape[1];  g.W = x->shape[2];  g.C = x->shape[3];  g.Y = y->shape[1];
    g.X = y->shape[2];
    g.x = x->data;  g.y = a->out.data;  g.dy = (const float *)a->dout.data;  g.dx = (float *)a->din[0].data;
    g.size = (int)dpoc_size(x->dtype);  g.add = dpoc_adds(a, 0);
    if (a->backward) {
        if (g.dx) DPOC_LAUNCH(r, dpoc_up_back_kernel, dpoc_grid(g.N*g.H*g.W*g.C), DPOC_THREADS, (g));
        return;
    }
    if (g.C*g.size % 16 == 0 && ((uintptr_t)g.x | (uintptr_t)g.y) % 16 == 0) { g.C = g.C*g.size/16;  g.size = 16; }
    DPOC_LAUNCH(r, dpoc_up_kernel, dpoc_grid(g.N*g.Y*g.X*g.C), DPOC_THREADS, (g));
}

/* table [V,D], ids [R] -> y [R,D]; an id outside of the table reads zeros. */
typedef struct dpoc_embed {
    int64_t V, D, R;                      /* rows and width of the table, rows of y */
    const void *table;                    /* [V,D] */
    const int32_t *ids;                   /* [R] */
    void *y;
    int type, ytype;
    const float *dy;                      /* [R,D]; dx [V,D] */
    float *dx;
} dpoc_embed;

/* A thread a number of y; the rows of a table are read as they are asked for, widened or narrowed on the way. */
static __global__ void dpoc_embed_kernel(dpoc_embed g)
{
    for (int64_t u = dpoc_unit(); u < g.R*g.D; u += dpoc_units()) {
        int64_t row = dpoc_div(u, g.D), id = g.ids[row];
        dpoc_put(g.y, g.ytype, u, id < 0 || id >= g.V ? 0 : dpoc_get(g.table, g.type, id*g.D + (u - row*g.D)));
    }
}
/* A thread owns a column and walks the rows in order: two ids of one value never meet. */
static __global__ void dpoc_embed_back_kernel(dpoc_embed g)
{
    for (int64_t c = dpoc_unit(); c < g.D; c += dpoc_units())
        for (int64_t row = 0; row < g.R; row++) {
            int64_t id = g.ids[row];
            if (id >= 0 && id < g.V) g.dx[id*g.D + c] += g.dy[row*g.D + c];
        }
}

/* dtable is cleared first unless it is added to: rows that no id names get 0. */
static void dpoc_op_embed(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_embed g;
    memset(&g, 0, sizeof g);
    g.V = a->in[0].shape[0];  g.D = a->in[0].shape[1];  g.R = dpoc_count(&a->in[1]);
    g.table = a->in[0].data;  g.type = a->in[0].dtype;  g.ids = (const int32_t *)a->in[1].data;
    g.y = a->out.data;  g.ytype = a->out.dtype;  g.dy = (const float *)a->dout.data;  g.dx = (float *)a->din[0].data;
    if (!a->backward) { DPOC_LAUNCH(r, dpoc_embed_kernel, dpoc_grid(g.R*g.D), DPOC_THREADS, (g));  return; }
    if (!g.dx) return;
    if (!dpoc_adds(a, 0) && !r->counting)
        r->status = dpoc_check(r->d, cudaMemsetAsync(g.dx, 0, (size_t)(g.V*g.D)*4, r->d->stream), "cudaMemsetAsync");
    DPOC_LAUNCH(r, dpoc_embed_back_kernel, dpoc_grid(g.D), DPOC_THREADS, (g));
}

/* ------------------------------------------------------------------------------------------ numbers from nothing

   t [N] -> y [N,dim] = (cos(t f_i), sin(t f_i)), f_i = exp(-ln(10000) i/(dim/2)). */
typedef struct dpoc_wave {
    int64_t N, dim;                       /* samples, width of y */
    const void *t;                        /* [N] */
    int type, ytype;
    void *y;                              /* [N,dim] */
} dpoc_wave;

/* In floats, as the reference computes it: at t = 999 the rounding of the phase is what shows. */
static __global__ void dpoc_wave_kernel(dpoc_wave g)
{
    for (int64_t u = dpoc_unit(); u < g.N*g.dim; u += dpoc_units()) {
        int64_t n = u/g.dim, i = u - n*g.dim, half = g.dim/2;
        float   phase = dpoc_get(g.t, g.type, n)*expf(-9.210340371976184f*(float)(i % half)/(float)half);
        dpoc_put(g.y, g.ytype, u, i >= 2*half ? 0 : i < half ? cosf(phase) : sinf(phase));
    }
}
/* t [N] -> y [N,dim]; a few thousand numbers, whatever the network. */
static void dpoc_op_timestep(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_wave g;
    memset(&g, 0, sizeof g);
    g.N = a->out.shape[0];  g.dim = dpoc_channels(&a->out);
    g.t = a->in[0].data;  g.type = a->in[0].dtype;  g.y = a->out.data;  g.ytype = a->out.dtype;
    DPOC_LAUNCH(r, dpoc_wave_kernel, dpoc_grid(g.N*g.dim), DPOC_THREADS, (g));
}

/* y[n] = a[k] x[n] + b[k] z[n], k = index[n], held inside of the table;   dx = a[k] dy,   dz = b[k] dy */
typedef struct dpoc_mix {
    int64_t N, P, K;                      /* samples, numbers of one, length of the tables */
    const void *x, *z;                    /* [N,P] */
    const float *a, *b, *dy;              /* [K], [K], [N,P] */
    const int32_t *index;                 /* [N] */
    void *y;                              /* [N,P]; NULL in backward */
    float *dx, *dz;                       /* [N,P]; NULL where they are not wanted */
    int xtype, ztype, ytype, addx, addz;
} dpoc_mix;

/* Forward and backward in one: what is not wanted is NULL.  The tables are read here, so that no step needs a number
   from the host. */
static __global__ void dpoc_mix_kernel(dpoc_mix g)
{
    for (int64_t u = dpoc_unit(); u < g.N*g.P; u += dpoc_units()) {
        int64_t k = g.index[dpoc_div(u, g.P)];
        k = k < 0 ? 0 : k >= g.K ? g.K - 1 : k;
        if (g.y)  dpoc_put(g.y, g.ytype, u, g.a[k]*dpoc_get(g.x, g.xtype, u) + g.b[k]*dpoc_get(g.z, g.ztype, u));
        if (g.dx) g.dx[u] = (g.addx ? g.dx[u] : 0) + g.a[k]*g.dy[u];
        if (g.dz) g.dz[u] = (g.addz ? g.dz[u] : 0) + g.b[k]*g.dy[u];
    }
}
/* The tables are F32 already in all that the library does; dpoc_as then costs nothing. */
static void dpoc_op_mix(dpoc_run *r)
{
    const dpo_args *a = r->a;
    const dpo_view *y = a->backward ? &a->dout : &a->out;
    dpoc_mix g;
    memset(&g, 0, sizeof g);
    g.N = y->shape[0];  g.P = dpoc_count(y)/g.N;  g.K = dpoc_count(&a->in[2]);
    g.x = a->in[0].data;  g.xtype = a->in[0].dtype;  g.z = a->in[1].data;  g.ztype = a->in[1].dtype;
    g.a = (const float *)dpoc_as(r, &a->in[2], DPO_F32);  g.b = (const float *)dpoc_as(r, &a->in[3], DPO_F32);
    g.index = (const int32_t *)a->in[4].data;  g.ytype = a->out.dtype;
    g.dy = (const float *)a->dout.data;  g.addx = dpoc_adds(a, 0);  g.addz = dpoc_adds(a, 1);
    if (!a->backward) g.y = a->out.data;
    else { g.dx = (float *)a->din[0].data;  g.dz = (float *)a->din[1].data; }
    DPOC_LAUNCH(r, dpoc_mix_kernel, dpoc_grid(g.N*g.P), DPOC_THREADS, (g));
}

/* Philox 4x32-10 and Box-Muller as in >>impl random of diffdpo.h: element e of a sample is number e%4 of quad e/4. */
typedef struct dpoc_draw { uint32_t seed[2], purpose, step; } dpoc_draw;
typedef struct dpoc_randn {
    int64_t N, P;                         /* samples, numbers of one */
    const int32_t *key;                   /* [N] */
    void *y;
    int ytype;
    dpoc_draw draw;                       /* the call's own numbers, or */
    const dpoc_draw *vary;                /* those in the mailbox */
} dpoc_randn;

/* Ten rounds of (c0,c1,c2,c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)); no state, hence the
   same numbers as on the CPU for any grid. */
static __device__ void dpoc_philox(uint32_t k0, uint32_t k1, const uint32_t counter[4], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u*c0, b = (uint64_t)0xCD9E8D57u*c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;  c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;  c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;  k1 += 0xBB67AE85u;
    }
    out[0] = c0;  out[1] = c1;  out[2] = c2;  out[3] = c3;
}

/* A thread a quad of one sample. */
static __global__ void dpoc_randn_kernel(dpoc_randn g)
{
    int64_t quads = (g.P + 3)/4;
    dpoc_draw d = g.vary ? *g.vary : g.draw;
    for (int64_t u = dpoc_unit(); u < g.N*quads; u += dpoc_units()) {
        int64_t  n = dpoc_div(u, quads), q = u - n*quads;
        uint32_t counter[4] = { (uint32_t)q, (uint32_t)g.key[n], d.step, d.purpose }, x[4];
        float    z[4];
        dpoc_philox(d.seed[0], d.seed[1], counter, x);
        for (int i = 0; i < 4; i += 2) {
            float u0 = ((float)x[i] + 0.5f)*2.3283064e-10f, u1 = ((float)x[i + 1] + 0.5f)*2.3283064e-10f;
            float radius = sqrtf(-2*logf(u0)), angle = 6.2831853f*u1;
            z[i] = radius*cosf(angle);  z[i + 1] = radius*sinf(angle);
        }
        for (int64_t k = 0; k < 4 && 4*q + k < g.P; k++) dpoc_put(g.y, g.ytype, n*g.P + 4*q + k, z[k]);
    }
}
/* seed, purpose and step come with the call, or while a step is replayed from its mailbox. */
static void dpoc_op_randn(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_randn g;
    memset(&g, 0, sizeof g);
    g.N = a->out.shape[0];  g.P = dpoc_count(&a->out)/g.N;  g.key = (const int32_t *)a->in[0].data;
    g.y = a->out.data;  g.ytype = a->out.dtype;
    g.draw.seed[0] = (uint32_t)a->p.random.seed;  g.draw.seed[1] = (uint32_t)(a->p.random.seed >> 32);
    g.draw.purpose = a->p.random.purpose;  g.draw.step = a->p.random.step;
    g.vary = (const dpoc_draw *)dpoc_varying(r);
    DPOC_LAUNCH(r, dpoc_randn_kernel, dpoc_grid(g.N*((g.P + 3)/4)), DPOC_THREADS, (g));
}

/* ==========================================================================================================
   >>sums                                                                       sums, errors, norms of gradients
   ==========================================================================================================

   Rows of n numbers are cut into pieces of DPOC_PIECE, a block each, whatever else there is; a piece's sum is a double,
   and a row's pieces are added in order. */
enum { DPOC_PIECE = 16384 };
enum { DPOC_PLAIN, DPOC_SQUARE, DPOC_DIFFERENCE };         /* a, a^2, (a - b)^2 */

typedef struct dpoc_sum {
    int64_t A, n, B, pieces;              /* x [A,n,B]; pieces of a row where B is 1 */
    const void *a, *b;                    /* b: what is subtracted */
    int     atype, btype, kind, ytype;    /* kind: DPOC_PLAIN ... */
    double *part, scale;                  /* [A,pieces] */
    void   *y;                            /* [A,B] */
} dpoc_sum;

/* A block a piece: 64 numbers a thread, 256 threads side by side, then the warps' sums. */
static __global__ void dpoc_sum_pieces_kernel(dpoc_sum g)
{
    for (int64_t u = blockIdx.x; u < g.A*g.pieces; u += gridDim.x) {
        int64_t row = dpoc_div(u, g.pieces), first = (u - row*g.pieces)*DPOC_PIECE, at = row*g.n;
        int64_t end = first + DPOC_PIECE < g.n ? first + DPOC_PIECE : g.n;
        double  sum = 0;
        for (int64_t i = first + threadIdx.x; i < end; i += DPOC_THREADS) {
            float x = dpoc_get(g.a, g.atype, at + i);
            if (g.kind == DPOC_DIFFERENCE) x -= dpoc_get(g.b, g.btype, at + i);
            sum += g.kind == DPOC_PLAIN ? x : (double)x*x;
        }
        sum = dpoc_block_sum(sum);
        if (threadIdx.x == 0) g.part[u] = sum;
    }
}
/* A thread a row: there are few pieces to a row. */
static __global__ void dpoc_sum_rows_kernel(dpoc_sum g)
{
    for (int64_t row = dpoc_unit(); row < g.A; row += dpoc_units()) {
        double sum = 0;
        for (int64_t k = 0; k < g.pieces; k++) sum += g.part[row*g.pieces + k];
        dpoc_put(g.y, g.ytype, row, (float)(g.scale*sum));
    }
}
/* B > 1: a thread a column, neighbours side by side. */
static __global__ void dpoc_sum_columns_kernel(dpoc_sum g)
{
    for (int64_t u = dpoc_unit(); u < g.A*g.B; u += dpoc_units()) {
        int64_t a = dpoc_div(u, g.B), b = u - a*g.B;
        double  sum = 0;
        for (int64_t i = 0; i < g.n; i++) sum += dpoc_get(g.a, g.atype, (a*g.n + i)*g.B + b);
        dpoc_put(g.y, g.ytype, u, (float)(g.scale*sum));
    }
}

/* y[row] = scale * sum of a row's numbers, or of their squares, or of the squares of their differences. */
static void dpoc_sum_rows(dpoc_run *r, dpoc_sum g)
{
    g.pieces = dpoc_pieces(g.n, DPOC_PIECE);
    g.part = (double *)dpoc_carve(r, (size_t)(g.A*g.pieces)*sizeof(double));
    DPOC_LAUNCH(r, dpoc_sum_pieces_kernel, dim3((unsigned)dpoc_least(g.A*g.pieces, 1 << 20)), DPOC_THREADS, (g));
    DPOC_LAUNCH(r, dpoc_sum_rows_kernel, dpoc_grid(g.A), DPOC_THREADS, (g));
}

/* dx[a,i,b] = scale dy[a,b] */
typedef struct dpoc_spread {
    int64_t A, n, B;                      /* dx [A,n,B], dy [A,B] */
    float scale;
    const float *dy;
    float *dx;
    int add;
} dpoc_spread;
/* A thread a number of dx. */
static __global__ void dpoc_spread_kernel(dpoc_spread g)
{
    for (int64_t u = dpoc_unit(); u < g.A*g.n*g.B; u += dpoc_units()) {
        int64_t q = dpoc_div(u, g.B), a = dpoc_div(q, g.n);
        g.dx[u] = (g.add ? g.dx[u] : 0) + g.scale*g.dy[a*g.B + (u - q*g.B)];
    }
}

/* x [A,n,B] -> y [A,1,B] */
static void dpoc_op_sum(dpoc_run *r)
{
    const dpo_args *a = r->a;
    const int64_t  *s = a->in[0].shape;
    dpoc_sum    g;
    dpoc_spread b;
    memset(&g, 0, sizeof g);
    memset(&b, 0, sizeof b);
    g.A = b.A = s[0];  g.n = b.n = s[1];  g.B = b.B = s[2];
    if (a->backward) {
        b.dy = (const float *)a->dout.data;  b.dx = (float *)a->din[0].data;
        b.scale = a->p.sum.scale;  b.add = dpoc_adds(a, 0);
        if (b.dx) DPOC_LAUNCH(r, dpoc_spread_kernel, dpoc_grid(b.A*b.n*b.B), DPOC_THREADS, (b));
        return;
    }
    g.a = a->in[0].data;  g.atype = a->in[0].dtype;  g.y = a->out.data;  g.ytype = a->out.dtype;
    g.scale = a->p.sum.scale;
    if (g.B == 1) dpoc_sum_rows(r, g);
    else DPOC_LAUNCH(r, dpoc_sum_columns_kernel, dpoc_grid(g.A*g.B), DPOC_THREADS, (g));
}

/* dpred = 2/P dloss[n] (pred - target) = -dtarget */
typedef struct dpoc_mse {
    int64_t N, P;                         /* samples, numbers of one */
    const void *a, *b;                    /* prediction and target [N,P] */
    int atype, btype, add[2];
    const float *dy;                      /* [N] */
    float *d[2];                          /* their gradients; NULL: not wanted */
} dpoc_mse;
/* The difference is taken before it is scaled: 2/P pred - 2/P target would cancel where they agree. */
static __global__ void dpoc_mse_back_kernel(dpoc_mse g)
{
    for (int64_t u = dpoc_unit(); u < g.N*g.P; u += dpoc_units()) {
        float scale = (float)(2*(double)g.dy[dpoc_div(u, g.P)]/(double)g.P);
        float f = scale*(dpoc_get(g.a, g.atype, u) - dpoc_get(g.b, g.btype, u));
        if (g.d[0]) g.d[0][u] = (g.add[0] ? g.d[0][u] : 0) + f;
        if (g.d[1]) g.d[1][u] = (g.add[1] ? g.d[1][u] : 0) - f;
    }
}

/* loss[n] = 1/P sum (pred - target)^2 */
static void dpoc_op_mse(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_sum g;
    dpoc_mse b;
    memset(&g, 0, sizeof g);
    memset(&b, 0, sizeof b);
    g.A = b.N = a->in[0].shape[0];  g.n = b.P = dpoc_count(&a->in[0])/g.A;
    g.a = b.a = a->in[0].data;  g.b = b.b = a->in[1].data;
    g.atype = b.atype = a->in[0].dtype;  g.btype = b.btype = a->in[1].dtype;
    if (!a->backward) {
        g.kind = DPOC_DIFFERENCE;  g.scale = 1/(double)g.n;  g.y = a->out.data;  g.ytype = a->out.dtype;
        dpoc_sum_rows(r, g);
        return;
    }
    b.dy = (const float *)a->dout.data;
    for (int i = 0; i < 2; i++) { b.d[i] = (float *)a->din[i].data;  b.add[i] = dpoc_adds(a, i); }
    DPOC_LAUNCH(r, dpoc_mse_back_kernel, dpoc_grid(b.N*b.P), DPOC_THREADS, (b));
}

/* ------------------------------------------------------------------------------------------ columns

   Sums over the rows of [N,P,C], channel by channel: what norms and biases need.  A block takes 32 channels of
   DPOC_ROWS rows, its 8 warps every eighth row each: 32 neighbours make one load, and 8 rows in flight hide its
   latency.  Floats are added 16 times before they go to a double, so that the error does not grow with P. */
enum { DPOC_ROWS = 128, DPOC_COLUMNS = 32, DPOC_WARPS = DPOC_THREADS/32 };
enum { DPOC_COL_STATS, DPOC_COL_NORM, DPOC_COL_PLAIN };

typedef struct dpoc_columns {
    int64_t N, P, C, chunks;              /* chunks = ceil(P/DPOC_ROWS) */
    int     kind, xtype, silu, by_row;    /* by_row: mean and rs belong to rows, not to channels: layer norm */
    const void  *x;                       /* COL_PLAIN: not read */
    const float *dy, *table;              /* table: see dpoc_norm */
    const float *stat;                    /* by_row: [N*P,2] */
    double *part;                         /* [N,chunks,2,C] */
} dpoc_columns;

/* What group norm knows of each channel c of a sample, z = (x - mean) scale + beta before the activation; the last two
   for backward: dx = scale dz - k1 - (x - mean) k2. */
enum { DPOC_MEAN, DPOC_SCALE, DPOC_BETA, DPOC_RS, DPOC_K1, DPOC_K2, DPOC_TABLE };

/* Two numbers of an element: (d, d^2) with d = x - x of the chunk's first row, (dz, dz h), or (dy, 0). */
static __device__ __forceinline__ void dpoc_column_terms(const dpoc_columns &g, int64_t n, int64_t row, int64_t c,
                                                         float first, float t[2])
{
    int64_t at = (n*g.P + row)*g.C + c;
    float   d, dz;
    if (g.kind == DPOC_COL_PLAIN) { t[0] = g.dy[at];  t[1] = 0;  return; }
    d = dpoc_get(g.x, g.xtype, at) - first;
    if (g.kind == DPOC_COL_STATS) { t[0] = d;  t[1] = d*d;  return; }
    dz = g.dy[at];
    if (g.by_row) {
        const float *s = g.stat + (n*g.P + row)*2;
        t[0] = dz;
        t[1] = dz*((d - s[0])*s[1]);
        return;
    }
    const float *table = g.table + n*DPOC_TABLE*g.C + c;
    d -= table[DPOC_MEAN*g.C];
    if (g.silu) dz *= dpoc_act_slope(DPO_SILU, d*table[DPOC_SCALE*g.C] + table[DPOC_BETA*g.C]);
    t[0] = dz;
    t[1] = dz*(d*table[DPOC_RS*g.C]);
}

/* grid: channels, chunks of all samples. */
static __global__ void dpoc_columns_kernel(dpoc_columns g)
{
    __shared__ double shared[DPOC_WARPS][DPOC_COLUMNS][2];
    int     lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x/32;
    int64_t c = (int64_t)blockIdx.x*DPOC_COLUMNS + lane;
    for (int64_t u = blockIdx.y; u < g.N*g.chunks; u += gridDim.y) {
        int64_t n = u/g.chunks, begin = (u - n*g.chunks)*DPOC_ROWS, end = dpoc_min(begin + DPOC_ROWS, g.P);
        double  sum[2] = { 0, 0 };
        if (c < g.C) {                    /* the last strip may be narrower than a warp */
            float first = 0, part[2] = { 0, 0 }, t[2];
            if (g.kind == DPOC_COL_STATS) first = dpoc_get(g.x, g.xtype, (n*g.P + begin)*g.C + c);
            for (int64_t row = begin + warp; row < end; row += DPOC_WARPS) {    /* 16 rows at most */
                dpoc_column_terms(g, n, row, c, first, t);
                part[0] += t[0];  part[1] += t[1];
            }
            sum[0] = part[0];  sum[1] = part[1];
        }
        __syncthreads();                  /* the last round's sums were read */
        shared[warp][lane][0] = sum[0];
        shared[warp][lane][1] = sum[1];
        __syncthreads();
        if (warp == 0 && c < g.C) {
            double *to = g.part + u*2*g.C + c, m = (double)(end - begin);
            sum[0] = sum[1] = 0;
            for (int w = 0; w < DPOC_WARPS; w++) { sum[0] += shared[w][lane][0];  sum[1] += shared[w][lane][1]; }
            if (g.kind == DPOC_COL_STATS) {           /* sum of x, and of squares about the chunk's own mean */
                double first = dpoc_get(g.x, g.xtype, (n*g.P + begin)*g.C + c);
                sum[1] -= sum[0]*sum[0]/m;
                sum[0] += m*first;
            }
            to[0] = sum[0];
            to[g.C] = sum[1];
        }
    }
}

/* y[k,c] = sum over `count` rows of part [.., 2, C], k of them one after the other; y NULL: nobody wants it. */
typedef struct dpoc_fold {
    int64_t K, C, count;                  /* y [K,C], rows of part for each k */
    const double *part;
    float *y;
    int add;
} dpoc_fold;
/* A thread a channel: neighbours read side by side, chunk after chunk. */
static __global__ void dpoc_fold_kernel(dpoc_fold g)
{
    for (int64_t u = dpoc_unit(); u < g.K*g.C; u += dpoc_units()) {
        int64_t k = u/g.C, c = u - k*g.C;
        double  sum = 0;
        for (int64_t i = 0; i < g.count; i++) sum += g.part[(k*g.count + i)*2*g.C + c];
        g.y[u] = (float)(g.add ? g.y[u] + sum : sum);
    }
}

/* The y axis of a grid ends at 65535: beyond that a block takes several chunks. */
static void dpoc_columns_run(dpoc_run *r, dpoc_columns *g)
{
    dpoc_columns k;
    g->chunks = dpoc_pieces(g->P, DPOC_ROWS);
    g->part = (double *)dpoc_carve(r, (size_t)(g->N*g->chunks*2*g->C)*sizeof(double));
    k = *g;
    DPOC_LAUNCH(r, dpoc_columns_kernel, dim3((unsigned)dpoc_pieces(g->C, DPOC_COLUMNS),
                                             (unsigned)dpoc_least(g->N*g->chunks, 65535)),
                DPOC_THREADS, (k));
}

/* Nothing at all where nobody wants the result. */
static void dpoc_fold_run(dpoc_run *r, const double *part, int64_t K, int64_t C, int64_t count, void *y, int add)
{
    dpoc_fold g;
    memset(&g, 0, sizeof g);
    g.K = K;  g.C = C;  g.count = count;  g.part = part;  g.y = (float *)y;  g.add = add;
    if (y) DPOC_LAUNCH(r, dpoc_fold_kernel, dpoc_grid(K*C), DPOC_THREADS, (g));
}

/* ==========================================================================================================
   >>norms                                                                               group norm, layer norm
   ==========================================================================================================

   x [N,P,C] in G groups of C/G channels.  Three readings: sums of the channels (>>sums), folded into mean and rs of the
   groups, and y = act((x - mean) scale + beta).  Backward alike: sums of dz and dz h, and
     dx = rs (gamma dz - <gamma dz> - h <gamma dz h>) = scale dz - k1 - (x - mean) k2,   <.> the mean over the group. */
typedef struct dpoc_norm {
    int64_t N, P, C, G, chunks;           /* samples, pixels, channels, groups; chunks of pixels */
    int     xtype, ytype, silu, add, gtype, btype, quads;
    float   eps;
    const void  *x, *gamma, *beta;        /* x [N,P,C]; NULL gamma, beta: 1 and 0 */
    const float *dy;                      /* as x */
    void   *y;                            /* as x */
    float  *dx, *stat, *table;            /* table [N,DPOC_TABLE,C] */
    const double *part;                   /* [N,chunks,2,C] */
} dpoc_norm;

/* Three readings of x where two would do: a group's channels of all pixels do not fit into shared memory at the sizes
   that matter (64 x 64 x 10 numbers), and the second and third come out of the second-level cache at those that do. */

/* A block a group of a sample.  Joined as Chan, Golub and LeVeque do: M2 = sum M2_k + n_k (mean_k - mean)^2. */
static __global__ void dpoc_norm_fold_kernel(dpoc_norm g)
{
    int64_t n = blockIdx.x/g.G, group = blockIdx.x - n*g.G, size = g.C/g.G, terms = g.chunks*size;
    double  M = (double)(size*g.P), mean = 0, square = 0, rs;
    /* a term is one chunk of one channel: its sum, and the squares about its own mean */
    for (int64_t i = threadIdx.x; i < terms; i += DPOC_THREADS)
        mean += g.part[(n*g.chunks + i/size)*2*g.C + group*size + i % size];
    mean = dpoc_block_sum(mean)/M;
    for (int64_t i = threadIdx.x; i < terms; i += DPOC_THREADS) {
        const double *sum = g.part + (n*g.chunks + i/size)*2*g.C + group*size + i % size;
        int64_t left = g.P - i/size*DPOC_ROWS;
        double  count = (double)dpoc_min(left, DPOC_ROWS), d = sum[0]/count - mean;
        square += sum[g.C] + count*d*d;
    }
    square = dpoc_block_sum(square);
    rs = 1/sqrt((square > 0 || square != square ? square : 0)/M + (double)g.eps);
    if (threadIdx.x == 0 && g.stat) {     /* all that backward needs of the group */
        g.stat[blockIdx.x*2] = (float)mean;
        g.stat[blockIdx.x*2 + 1] = (float)rs;
    }
    for (int64_t c = group*size + threadIdx.x; c < (group + 1)*size; c += DPOC_THREADS) {
        float *t = g.table + n*DPOC_TABLE*g.C + c;
        t[DPOC_MEAN*g.C]  = (float)mean;
        t[DPOC_SCALE*g.C] = (g.gamma ? dpoc_get(g.gamma, g.gtype, c) : 1)*(float)rs;
        t[DPOC_BETA*g.C]  = g.beta ? dpoc_get(g.beta, g.btype, c) : 0;
    }
}

/* The table of backward from forward's statistics. */
static __global__ void dpoc_norm_table_kernel(dpoc_norm g)
{
    for (int64_t u = dpoc_unit(); u < g.N*g.C; u += dpoc_units()) {
        int64_t n = u/g.C, c = u - n*g.C, group = n*g.G + c/(g.C/g.G);
        float  *t = g.table + n*DPOC_TABLE*g.C + c, rs = g.stat[group*2 + 1];
        t[DPOC_MEAN*g.C]  = g.stat[group*2];
        t[DPOC_SCALE*g.C] = (g.gamma ? dpoc_get(g.gamma, g.gtype, c) : 1)*rs;
        t[DPOC_BETA*g.C]  = g.beta ? dpoc_get(g.beta, g.btype, c) : 0;
        t[DPOC_RS*g.C]    = rs;
    }
}

/* k1 = rs <gamma dz>, k2 = rs^2 <gamma dz h> of a group. */
static __global__ void dpoc_norm_fold_back_kernel(dpoc_norm g)
{
    int64_t n = blockIdx.x/g.G, group = blockIdx.x - n*g.G, size = g.C/g.G, terms = g.chunks*size;
    double  M = (double)(size*g.P), e = 0, eh = 0, rs = g.stat[blockIdx.x*2 + 1];
    for (int64_t i = threadIdx.x; i < terms; i += DPOC_THREADS) {
        int64_t c = group*size + i % size;
        const double *sum = g.part + (n*g.chunks + i/size)*2*g.C + c;
        double gamma = g.gamma ? dpoc_get(g.gamma, g.gtype, c) : 1;
        e += gamma*sum[0];
        eh += gamma*sum[g.C];
    }
    e = dpoc_block_sum(e)/M;
    eh = dpoc_block_sum(eh)/M;
    for (int64_t c = group*size + threadIdx.x; c < (group + 1)*size; c += DPOC_THREADS) {
        float *t = g.table + n*DPOC_TABLE*g.C + c;
        t[DPOC_K1*g.C] = (float)(rs*e);
        t[DPOC_K2*g.C] = (float)(rs*rs*eh);
    }
}

/* The last reading, a thread four channels of a pixel. */
static __global__ void dpoc_norm_apply_kernel(dpoc_norm g)
{
    int wide = g.quads ? 4 : 1;
    for (int64_t u = dpoc_unit(); u*wide < g.N*g.P*g.C; u += dpoc_units()) {
        int64_t i = u*wide, q = dpoc_div(i, g.C), n = dpoc_div(q, g.P);
        const float *t = g.table + n*DPOC_TABLE*g.C + (i - q*g.C);
        float   x[4], dy[4] = { 0, 0, 0, 0 }, y[4] = { 0, 0, 0, 0 };
        dpoc_take(g.x, g.xtype, i, g.quads, x);
        if (g.dx) dpoc_take(g.dy, DPO_F32, i, g.quads, dy);
        if (g.dx && g.add) dpoc_take(g.dx, DPO_F32, i, g.quads, y);
        DPOC_EACH(k, g.quads) {
            float d = x[k] - t[DPOC_MEAN*g.C + k], scale = t[DPOC_SCALE*g.C + k], z = d*scale + t[DPOC_BETA*g.C + k];
            if (!g.dx) { y[k] = g.silu ? z*dpoc_sigmoid(z) : z;  continue; }
            if (g.silu) dy[k] *= dpoc_act_slope(DPO_SILU, z);
            y[k] += scale*dy[k] - t[DPOC_K1*g.C + k] - d*t[DPOC_K2*g.C + k];
        }
        if (g.dx) dpoc_give(g.dx, DPO_F32, i, g.quads, y);
        else      dpoc_give(g.y, g.ytype, i, g.quads, y);
    }
}

/* What group norm and layer norm have in common: where everything lies, and in which type. */
static dpoc_norm dpoc_norm_of(const dpo_args *a)
{
    dpoc_norm g;
    memset(&g, 0, sizeof g);
    g.x = a->in[0].data;  g.xtype = a->in[0].dtype;  g.y = a->out.data;  g.ytype = a->out.dtype;
    g.gamma = a->in[1].data;  g.gtype = a->in[1].dtype;  g.beta = a->in[2].data;  g.btype = a->in[2].dtype;
    g.dy = (const float *)a->dout.data;  g.dx = (float *)a->din[0].data;  g.stat = (float *)a->stat.data;
    g.silu = a->p.norm.act == DPO_SILU;  g.eps = a->p.norm.eps;  g.add = dpoc_adds(a, 0);  g.G = a->p.norm.groups;
    g.C = dpoc_channels(&a->in[0]);
    g.quads = g.C % 4 == 0 && dpoc_quads(g.x, g.xtype) && dpoc_quads(g.y, g.ytype) && dpoc_quads(g.dy, DPO_F32) &&
        dpoc_quads(g.dx, DPO_F32);
    return g;
}

/* x [N,P,C] -> y, stat [N,G,2].  Three launches forward; backward five at most: table, sums, fold, dx, and the
   parameters' gradients from the same sums. */
static void dpoc_op_group_norm(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_norm    g = dpoc_norm_of(a);
    dpoc_columns k;
    memset(&k, 0, sizeof k);
    if (g.G < 1 || g.C % g.G || (a->p.norm.act != DPO_NONE && !g.silu)) {
        r->status = dpoc_fail(r->d, DPO_UNSUPPORTED, "group_norm",
                              "groups must divide the channels, and the activation be none or silu");
        return;
    }
    g.N = a->in[0].shape[0];  g.P = dpoc_count(&a->in[0])/(g.N*g.C);
    g.table = (float *)dpoc_carve(r, (size_t)(g.N*DPOC_TABLE*g.C)*sizeof(float));
    k.N = g.N;  k.P = g.P;  k.C = g.C;  k.x = g.x;  k.xtype = g.xtype;  k.dy = g.dy;  k.table = g.table;
    k.silu = g.silu;
    k.kind = a->backward ? DPOC_COL_NORM : DPOC_COL_STATS;
    if (a->backward) DPOC_LAUNCH(r, dpoc_norm_table_kernel, dpoc_grid(g.N*g.C), DPOC_THREADS, (g));
    dpoc_columns_run(r, &k);
    g.part = k.part;  g.chunks = k.chunks;
    if (!a->backward) DPOC_LAUNCH(r, dpoc_norm_fold_kernel, dim3((unsigned)(g.N*g.G)), DPOC_THREADS, (g));
    else {
        if (g.dx) DPOC_LAUNCH(r, dpoc_norm_fold_back_kernel, dim3((unsigned)(g.N*g.G)), DPOC_THREADS, (g));
        dpoc_fold_run(r, k.part + g.C, 1, g.C, g.N*g.chunks, a->din[1].data, dpoc_adds(a, 1));
        dpoc_fold_run(r, k.part, 1, g.C, g.N*g.chunks, a->din[2].data, dpoc_adds(a, 2));
    }
    if (!a->backward || g.dx) DPOC_LAUNCH(r, dpoc_norm_apply_kernel, dpoc_grid(g.N*g.P*g.C/(g.quads ? 4 : 1)),
                                          DPOC_THREADS, (g));
}

/* gamma of channel c, 1 where there is none. */
static __device__ __forceinline__ float dpoc_gamma(const dpoc_norm &g, int64_t c)
{
    return g.gamma ? dpoc_get(g.gamma, g.gtype, c) : 1;
}

/* Layer norm: a warp a row of x [P,C], which it reads three times, the second and third time out of the cache; rows of
   a transformer have 320 to 2048 numbers, 10 to 64 a thread. */
static __global__ void dpoc_layer_norm_kernel(dpoc_norm g)
{
    int     lane = (int)threadIdx.x % 32, wide = g.quads ? 4 : 1;
    int64_t warps = dpoc_units()/32;
    for (int64_t row = dpoc_unit()/32; row < g.P; row += warps) {
        int64_t at = row*g.C;
        double  mean = 0, square = 0;     /* of doubles: rows of 2048 numbers with a large mean */
        float   m, rs, x[4], y[4];
        for (int64_t c = lane*wide; c < g.C; c += 32*wide) {
            dpoc_take(g.x, g.xtype, at + c, g.quads, x);
            DPOC_EACH(k, g.quads) mean += x[k];
        }
        m = (float)(dpoc_warp_sum(mean)/(double)g.C);
        for (int64_t c = lane*wide; c < g.C; c += 32*wide) {
            dpoc_take(g.x, g.xtype, at + c, g.quads, x);
            DPOC_EACH(k, g.quads) square += (double)(x[k] - m)*(x[k] - m);
        }
        rs = (float)(1/sqrt(dpoc_warp_sum(square)/(double)g.C + (double)g.eps));
        for (int64_t c = lane*wide; c < g.C; c += 32*wide) {
            dpoc_take(g.x, g.xtype, at + c, g.quads, x);
            DPOC_EACH(k, g.quads) y[k] = (x[k] - m)*rs*dpoc_gamma(g, c + k)
                + (g.beta ? dpoc_get(g.beta, g.btype, c + k) : 0);
            dpoc_give(g.y, g.ytype, at + c, g.quads, y);
        }
        if (lane == 0 && g.stat) { g.stat[row*2] = m;  g.stat[row*2 + 1] = rs; }
    }
}

/* dx = rs (gamma dy - <gamma dy> - h <gamma dy h>), <.> the mean over the row. */
static __global__ void dpoc_layer_norm_back_kernel(dpoc_norm g)
{
    int     lane = (int)threadIdx.x % 32, wide = g.quads ? 4 : 1;
    int64_t warps = dpoc_units()/32;
    for (int64_t row = dpoc_unit()/32; row < g.P; row += warps) {
        int64_t at = row*g.C;
        float   m = g.stat[row*2], rs = g.stat[row*2 + 1], e, eh, x[4], dy[4];
        double  sum = 0, dot = 0;
        for (int64_t c = lane*wide; c < g.C; c += 32*wide) {
            dpoc_take(g.x, g.xtype, at + c, g.quads, x);
            dpoc_take(g.dy, DPO_F32, at + c, g.quads, dy);
            DPOC_EACH(k, g.quads) {
                float d = dy[k]*dpoc_gamma(g, c + k);
                sum += d;
                dot += (double)d*((x[k] - m)*rs);
            }
        }
        e = (float)(dpoc_warp_sum(sum)/(double)g.C);
        eh = (float)(dpoc_warp_sum(dot)/(double)g.C);
        for (int64_t c = lane*wide; c < g.C; c += 32*wide) {
            float dx[4] = { 0, 0, 0, 0 };
            dpoc_take(g.x, g.xtype, at + c, g.quads, x);
            dpoc_take(g.dy, DPO_F32, at + c, g.quads, dy);
            if (g.add) dpoc_take(g.dx, DPO_F32, at + c, g.quads, dx);
            DPOC_EACH(k, g.quads) dx[k] += rs*(dy[k]*dpoc_gamma(g, c + k) - e - (x[k] - m)*rs*eh);
            dpoc_give(g.dx, DPO_F32, at + c, g.quads, dx);
        }
    }
}

/* x [P,C] -> y, stat [P,2].  dgamma and dbeta are sums over rows: as dbias is, with h in front. */
static void dpoc_op_layer_norm(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_norm    g = dpoc_norm_of(a);
    dpoc_columns k;
    g.N = 1;  g.P = dpoc_count(&a->in[0])/g.C;
    /* the parameters' sums read x and dy a second time: frozen norms, as beside adapters, do without */
    if (!a->backward) { DPOC_LAUNCH(r, dpoc_layer_norm_kernel, dpoc_grid(g.P*32), DPOC_THREADS, (g));  return; }
    if (g.dx) DPOC_LAUNCH(r, dpoc_layer_norm_back_kernel, dpoc_grid(g.P*32), DPOC_THREADS, (g));
    if (!a->din[1].data && !a->din[2].data) return;
    memset(&k, 0, sizeof k);
    k.N = 1;  k.P = g.P;  k.C = g.C;  k.x = g.x;  k.xtype = g.xtype;  k.dy = g.dy;  k.stat = g.stat;
    k.by_row = 1;  k.kind = DPOC_COL_NORM;
    dpoc_columns_run(r, &k);
    dpoc_fold_run(r, k.part + g.C, 1, g.C, k.chunks, a->din[1].data, dpoc_adds(a, 1));
    dpoc_fold_run(r, k.part, 1, g.C, k.chunks, a->din[2].data, dpoc_adds(a, 2));
}

/* ==========================================================================================================
   >>products                                                                             cuBLASLt, finishing
   ==========================================================================================================

     y[m][o] = act( sum_k x[m,k] w[o][k] + bias[o] + vec[n][o] + residual[m][o]
                    + scale strength[n] sum_q u[m][q] up[o][q] ),     u[m][q] = sum_k x[m,k] down[q][k]

   m = (n,y,x) a pixel of the output, k = (ky,kx,i) a value under the kernel.  Weights lie as [O][K], K innermost (panel
   1). 1x1 kernels are products of matrices and go to cuBLASLt, others to >>convolution.  Factors are of one type: BF16
   if either is, or if the option DPO_CUDA_PRODUCTS says so; what is of another type is converted into scratch. */

/* Which results differ from the CPU's, and by how much: products of F32 by the order of their sums.  Factors of BF16
   are exact in F32, so that products of stored BF16 differ by the order of sums alone; what is F32 in memory and
   rounded for a product (gradients, an adapter's inner numbers, probabilities of attention) differs by 2^-9 of its
   size.  cuBLASLt may choose another kernel for another batch: here, unlike on the CPU, a sample's last bits can depend
   on the batch. */

/* C [m,n] = alpha op(A) op(B) + beta D + bias, rows outermost; ta: A lies as [k,m], tb: B as [n,k]. */
typedef struct dpoc_gemm {
    int64_t m, n, k;                      /* rows and columns of C; what is summed over */
    int     ta, tb, type, ctype;          /* of A and B; of C and D */
    const void *A, *B, *D, *bias;         /* D NULL: C itself; bias [n] of C's type, or NULL */
    void   *C;
    float   alpha, beta;
    int     tf32;                         /* F32 factors may be rounded to TF32 */
} dpoc_gemm;

/* The only way to a matrix product.  A status; `why` gets the name of the call that failed. */
static int dpoc_blas_open(dpoc *d);
static void dpoc_blas_close(dpoc *d);
static int dpoc_blas(dpoc *d, const dpoc_gemm *g);

#ifdef DIFFDPO_CUDA_STAND_IN

static int  dpoc_blas_open(dpoc *d)  { d->blas = d;  return DPO_OK; }
static void dpoc_blas_close(dpoc *d) { d->blas = NULL; }

/* Three plain loops. */
static void dpoc_blas_loops(const dpoc_gemm &g)
{
    for (int64_t i = 0; i < g.m; i++)
        for (int64_t j = 0; j < g.n; j++) {
            double sum = 0;
            for (int64_t k = 0; k < g.k; k++)
                sum += (double)dpoc_get(g.A, g.type, g.ta ? k*g.m + i : i*g.k + k)*
                       dpoc_get(g.B, g.type, g.tb ? j*g.k + k : k*g.n + j);
            sum *= g.alpha;
            if (g.beta != 0) sum += (double)g.beta*dpoc_get(g.D ? g.D : g.C, g.ctype, i*g.n + j);
            if (g.bias) sum += dpoc_get(g.bias, g.ctype, j);
            dpoc_put(g.C, g.ctype, i*g.n + j, (float)sum);
        }
}
static int dpoc_blas(dpoc *d, const dpoc_gemm *gemm)
{
    dpoc_gemm g = *gemm;
    if (stand_in_state.no_products) return DPO_UNSUPPORTED;
    if (stand_in_denies(&stand_in_state.deny_product)) return dpoc_fail(d, DPO_DEVICE, "cublasLtMatmul", "denied");
    stand_in_do([=] { dpoc_blas_loops(g); });
    return DPO_OK;
}

#else

/* What cuBLASLt chose for a shape: its heuristics take longer than many products. */
typedef struct dpoc_plan {
    dpoc_gemm key;                        /* with alignments in place of pointers */
    cublasLtMatmulAlgo_t algo;
    int used;
} dpoc_plan;
enum { DPOC_PLANS = 1024 };
typedef struct dpoc_plans { dpoc_plan at[DPOC_PLANS]; } dpoc_plans;

/* cuBLASLt's own words for its statuses. */
static int dpoc_blas_check(dpoc *d, cublasStatus_t s, const char *call)
{
    int status = s == CUBLAS_STATUS_NOT_SUPPORTED ? DPO_UNSUPPORTED : DPO_DEVICE;
    return s == CUBLAS_STATUS_SUCCESS ? (int)DPO_OK : dpoc_fail(d, status, call, cublasLtGetStatusString(s));
}

static int dpoc_blas_open(dpoc *d)
{
    cublasLtHandle_t h;
    int status = dpoc_blas_check(d, cublasLtCreate(&h), "cublasLtCreate");
    if (status != DPO_OK) return status;
    d->blas = (void *)h;
    d->plans = (dpoc_plans *)calloc(1, sizeof *d->plans);
    return d->plans ? DPO_OK : dpoc_fail(d, DPO_OUT_OF_MEMORY, "dpo_cuda_open", "no memory on the host");
}

static void dpoc_blas_close(dpoc *d)
{
    if (d->blas) (void)cublasLtDestroy((cublasLtHandle_t)d->blas);
    free(d->plans);
    d->blas = NULL;
    d->plans = NULL;
}

/* CUDA's names of our types. */
static cudaDataType_t dpoc_blas_type(int type)
{
    return type == DPO_BF16 ? CUDA_R_16BF : type == DPO_F16 ? CUDA_R_16F : CUDA_R_32F;
}

/* The descriptions of one product.  cuBLASLt thinks in columns: row-major C = A B is column-major C' = B' A', so that B
   comes first and what lies as [n,k] is `transposed`. */
typedef struct dpoc_blas_call {
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulPreference_t pref;
} dpoc_blas_call;

/* In the reverse order of their making; what was not made is NULL. */
static void dpoc_blas_drop(dpoc_blas_call *k)
{
    if (k->pref) (void)cublasLtMatmulPreferenceDestroy(k->pref);
    if (k->c)    (void)cublasLtMatrixLayoutDestroy(k->c);
    if (k->b)    (void)cublasLtMatrixLayoutDestroy(k->b);
    if (k->a)    (void)cublasLtMatrixLayoutDestroy(k->a);
    if (k->op)   (void)cublasLtMatmulDescDestroy(k->op);
}

/* Columns lie side by side: the leading dimension is the number of rows. */
static cublasStatus_t dpoc_blas_layout(cublasLtMatrixLayout_t *l, int type, int64_t rows, int64_t cols)
{
    return cublasLtMatrixLayoutCreate(l, dpoc_blas_type(type), (uint64_t)rows, (uint64_t)cols, rows);
}

/* Everything that decides which kernel is chosen.  TF32 only on request: F32 is F32 otherwise. */
static cublasStatus_t dpoc_blas_describe(const dpoc_gemm *g, dpoc_blas_call *k)
{
    cublasComputeType_t compute = g->type == DPO_F32 && g->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    cublasOperation_t   first = g->tb ? CUBLAS_OP_T : CUBLAS_OP_N, second = g->ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t  epilogue = CUBLASLT_EPILOGUE_BIAS;
    cublasStatus_t      s = cublasLtMatmulDescCreate(&k->op, compute, CUDA_R_32F);
    if (!s) s = cublasLtMatmulDescSetAttribute(k->op, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first);
    if (!s) s = cublasLtMatmulDescSetAttribute(k->op, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second);
    if (!s && g->bias) s = cublasLtMatmulDescSetAttribute(k->op, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                                          sizeof epilogue);
    if (!s && g->bias) s = cublasLtMatmulDescSetAttribute(k->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g->bias,
                                                          sizeof g->bias);
    if (!s) s = dpoc_blas_layout(&k->a, g->type, g->tb ? g->k : g->n, g->tb ? g->n : g->k);
    if (!s) s = dpoc_blas_layout(&k->b, g->type, g->ta ? g->m : g->k, g->ta ? g->k : g->m);
    if (!s) s = dpoc_blas_layout(&k->c, g->ctype, g->n, g->m);
    return s;
}

/* Whether a pointer stands on 16 bytes decides what may be chosen. */
static uint32_t dpoc_blas_line(const void *p) { return (uintptr_t)p % 16 == 0 ? 16 : (uintptr_t)p % 4 == 0 ? 4 : 2; }

/* The first of what the heuristics offer within the scratch that there is. */
static cublasStatus_t dpoc_blas_choose(dpoc *d, const dpoc_gemm *g, dpoc_blas_call *k, cublasLtMatmulAlgo_t *algo)
{
    cublasLtMatmulHeuristicResult_t found;
    size_t         most = DPOC_SCRATCH_BYTES;
    uint32_t       sums = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;          /* parts of a sum are F32, never y's type */
    uint32_t       la = dpoc_blas_line(g->B), lb = dpoc_blas_line(g->A), ld = dpoc_blas_line(g->C),
        lc = dpoc_blas_line(g->D ? g->D : g->C);
    int            n = 0;
    cublasStatus_t s = cublasLtMatmulPreferenceCreate(&k->pref);
    if (!s) s = cublasLtMatmulPreferenceSetAttribute(k->pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most,
                                                     sizeof most);
    if (!s) s = cublasLtMatmulPreferenceSetAttribute(k->pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &sums,
                                                     sizeof sums);
    if (!s) s = cublasLtMatmulPreferenceSetAttribute(k->pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &la,
                                                     sizeof la);
    if (!s) s = cublasLtMatmulPreferenceSetAttribute(k->pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &lb,
                                                     sizeof lb);
    if (!s) s = cublasLtMatmulPreferenceSetAttribute(k->pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &lc,
                                                     sizeof lc);
    if (!s) s = cublasLtMatmulPreferenceSetAttribute(k->pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &ld,
                                                     sizeof ld);
    if (!s) s = cublasLtMatmulAlgoGetHeuristic((cublasLtHandle_t)d->blas, k->op, k->a, k->b, k->c, k->c, k->pref, 1,
                                               &found, &n);
    if (!s && n < 1) s = CUBLAS_STATUS_NOT_SUPPORTED;
    if (!s) *algo = found.algo;
    return s;
}

/* Two products that differ in their pointers alone have one plan; of a pointer its alignment counts, and whether it is
   there. */
static dpoc_plan *dpoc_blas_plan(dpoc *d, const dpoc_gemm *g)
{
    dpoc_gemm key;
    uint64_t  h = 1469598103934665603u;
    memset(&key, 0, sizeof key);          /* bytes are compared, and what lies between fields counts */
    key.m = g->m;  key.n = g->n;  key.k = g->k;  key.ta = g->ta;  key.tb = g->tb;  key.type = g->type;
    key.ctype = g->ctype;  key.beta = g->beta;  key.tf32 = g->tf32;
    /* FNV-1a over the key, then the next free place */
    key.A = (const void *)(uintptr_t)dpoc_blas_line(g->A);
    key.B = (const void *)(uintptr_t)dpoc_blas_line(g->B);
    key.C = (void *)(uintptr_t)dpoc_blas_line(g->C);
    key.D = (const void *)(uintptr_t)dpoc_blas_line(g->D ? g->D : g->C);
    key.bias = g->bias ? (const void *)(uintptr_t)1 : NULL;
    for (size_t i = 0; i < sizeof key; i++) h = (h ^ ((const unsigned char *)&key)[i])*1099511628211u;
    for (int i = 0; i < DPOC_PLANS; i++) {
        dpoc_plan *p = &d->plans->at[(h + (uint64_t)i) % DPOC_PLANS];
        if (p->used && !memcmp(&p->key, &key, sizeof key)) return p;
        if (!p->used) { p->key = key;  return p; }
    }
    return NULL;                          /* full: asked anew each time */
}

static int dpoc_blas(dpoc *d, const dpoc_gemm *g)
{
    dpoc_blas_call       k;
    dpoc_plan           *plan = dpoc_blas_plan(d, g);
    cublasLtMatmulAlgo_t algo;
    cublasStatus_t       s;
    memset(&k, 0, sizeof k);
    s = dpoc_blas_describe(g, &k);        /* a few microseconds of the host, none where a step is replayed */
    if (!s && plan && plan->used) algo = plan->algo;
    else if (!s) s = dpoc_blas_choose(d, g, &k, &algo);
    if (!s && plan && !plan->used) { plan->algo = algo;  plan->used = 1; }
    if (!s) s = cublasLtMatmul((cublasLtHandle_t)d->blas, k.op, &g->alpha, g->B, k.a, g->A, k.b, &g->beta,
                               g->D ? g->D : g->C, k.c, g->C, k.c, &algo, d->scratch, DPOC_SCRATCH_BYTES, d->stream);
    dpoc_blas_drop(&k);
    return dpoc_blas_check(d, s, "cublasLtMatmul");
}
#endif

/* For shapes that cuBLASLt has no kernel for (rows of an odd number of 16-bit numbers may be such): 16 x 16 numbers a
   block, one a thread, from slices of 16.  Correct and slow. */
enum { DPOC_SQUARE_SIDE = 16 };

static __global__ void dpoc_gemm_kernel(dpoc_gemm g)
{
    __shared__ float as[DPOC_SQUARE_SIDE][DPOC_SQUARE_SIDE + 1], bs[DPOC_SQUARE_SIDE][DPOC_SQUARE_SIDE + 1];
    int     ti = (int)threadIdx.x/DPOC_SQUARE_SIDE, tj = (int)threadIdx.x % DPOC_SQUARE_SIDE;
    int64_t i = (int64_t)blockIdx.x*DPOC_SQUARE_SIDE + ti, j = (int64_t)blockIdx.y*DPOC_SQUARE_SIDE + tj,
        at = i*g.n + j;
    float   sum = 0;
    for (int64_t k = 0; k < g.k; k += DPOC_SQUARE_SIDE) {
        as[ti][tj] = i < g.m && k + tj < g.k ? dpoc_get(g.A, g.type, g.ta ? (k + tj)*g.m + i : i*g.k + k + tj) : 0;
        bs[ti][tj] = j < g.n && k + ti < g.k ? dpoc_get(g.B, g.type, g.tb ? j*g.k + k + ti : (k + ti)*g.n + j) : 0;
        __syncthreads();
        for (int e = 0; e < DPOC_SQUARE_SIDE; e++) sum += as[ti][e]*bs[e][tj];
        __syncthreads();
    }
    if (i >= g.m || j >= g.n) return;
    sum *= g.alpha;
    if (g.beta != 0) sum += g.beta*dpoc_get(g.D ? g.D : g.C, g.ctype, at);
    if (g.bias)      sum += dpoc_get(g.bias, g.ctype, j);
    dpoc_put(g.C, g.ctype, at, sum);
}

/* m, n, k as above; counted calls do nothing. */
static void dpoc_product(dpoc_run *r, dpoc_gemm g)
{
    dim3 grid((unsigned)dpoc_pieces(g.m, DPOC_SQUARE_SIDE), (unsigned)dpoc_least(dpoc_pieces(g.n, DPOC_SQUARE_SIDE),
            65535));
    if (r->counting || r->status != DPO_OK) return;
    g.tf32 = r->d->options[DPO_CUDA_TF32] != 0;
    r->status = dpoc_blas(r->d, &g);
    if (r->status != DPO_UNSUPPORTED || g.n > (int64_t)65535*DPOC_SQUARE_SIDE) return;
    r->status = DPO_OK;
    DPOC_LAUNCH(r, dpoc_gemm_kernel, grid, DPOC_THREADS, (g));
}

/* ------------------------------------------------------------------------------------------ what follows a product */

/* y [M,O] = act(y + bias[o] + vec[n][o] + residual[m][o]); what is NULL is left out. */
typedef struct dpoc_finish {
    int64_t M, O, P;                      /* P pixels a sample */
    void   *y;
    const void *bias, *vec, *residual;    /* [O], [N,O], [M,O] */
    int     ytype, btype, vtype, rtype, act;
} dpoc_finish;

/* One number of y from the sum of its product; n: the pixel's sample, if there is a vec. */
static __device__ __forceinline__ float dpoc_finish_at(const dpoc_finish &g, int64_t m, int64_t n, int64_t o, float sum)
{
    if (g.bias)     sum += dpoc_get(g.bias, g.btype, o);
    if (g.vec)      sum += dpoc_get(g.vec, g.vtype, n*g.O + o);
    if (g.residual) sum += dpoc_get(g.residual, g.rtype, m*g.O + o);
    return dpoc_act(g.act, sum);
}
static __device__ __forceinline__ float dpoc_finish_one(const dpoc_finish &g, int64_t m, int64_t o, float sum)
{
    return dpoc_finish_at(g, m, g.vec ? dpoc_div(m, g.P) : 0, o, sum);
}
/* Four channels a thread. */
static __global__ void dpoc_finish_kernel(dpoc_finish g, int quads)
{
    int wide = quads ? 4 : 1;
    for (int64_t u = dpoc_unit(); u*wide < g.M*g.O; u += dpoc_units()) {
        int64_t i = u*wide, m = dpoc_div(i, g.O), o = i - m*g.O;
        float   y[4];
        dpoc_take(g.y, g.ytype, i, quads, y);
        DPOC_EACH(k, quads) y[k] = dpoc_finish_one(g, m, o + k, y[k]);
        dpoc_give(g.y, g.ytype, i, quads, y);
    }
}
/* No launch where nothing is to be done. */
static void dpoc_finish_run(dpoc_run *r, dpoc_finish g)
{
    if (!g.bias && !g.vec && !g.residual && g.act == DPO_NONE) return;
    int quads = g.O % 4 == 0 && dpoc_quads(g.y, g.ytype);
    DPOC_LAUNCH(r, dpoc_finish_kernel, dpoc_grid(g.M*g.O/(quads ? 4 : 1)), DPOC_THREADS, (g, quads));
}

/* to[m][q] = scale strength[n] from[m][q]: an adapter's inner numbers, with the strength of their sample. */
typedef struct dpoc_strength {
    int64_t M, n, P;                      /* rows, the rank, pixels a sample */
    float scale;
    const void *strength;                 /* [N]; NULL: 1 */
    int stype, type;
    const float *from;                    /* [M,n] */
    void *to;                             /* [M,n], which may be narrow */
} dpoc_strength;
/* M*n numbers, n the rank: little beside the product that follows. */
static __global__ void dpoc_strength_kernel(dpoc_strength g)
{
    for (int64_t u = dpoc_unit(); u < g.M*g.n; u += dpoc_units()) {
        float s = g.strength ? g.scale*dpoc_get(g.strength, g.stype, dpoc_div(dpoc_div(u, g.n), g.P)) : g.scale;
        dpoc_put(g.to, g.type, u, s*g.from[u]);
    }
}

/* ==========================================================================================================
   >>convolution                                                  implicit products, plain and on tensor cores
   ==========================================================================================================

   y, dx and dw of a convolution are products whose factors are never written down; a tile's numbers are fetched from
   where they lie.  Five arrangements serve all three:
     X    [m][k]  x under place k = (tap,i) of output pixel m            DY   [m][o]  dy
     DYT  [p][k]  dy that reaches input pixel p by k = (tap,o)           W    [o][k]  w
                                                                         WT   [k][i]  w, k = (tap,o)
     y [m][o] = X W^T     dx [p][i] = DYT WT     dw [o][k] = DY^T X */
enum { DPOC_Y, DPOC_DX, DPOC_DW };
enum { DPOC_FROM_X, DPOC_FROM_DYT, DPOC_FROM_DY, DPOC_FROM_W, DPOC_FROM_WT };

typedef struct dpoc_tiles {
    int     mode, type, add, splits;      /* DPOC_Y ...; of both factors; out is added to; parts of depth */
    int     wide[2], pairs;               /* can 16 bytes of a factor be loaded, two numbers of the result stored */
    int     H, W, I, Y, X, O, kh, kw, stride, top, left;  /* of the convolution */
    int64_t rows, cols, depth, span;      /* of the product; span: depth of a part, a multiple of DPOC_DEPTH */
    const void *a, *b;                    /* the two arrays that factors are fetched from */
    float  *out, *part;                   /* DX, DW: [rows][cols]; splits > 1: [splits][rows][cols] */
    dpoc_finish f;                        /* Y: where it goes */
} dpoc_tiles;

/* The place of a number in its array, or -1 for a zero: outside of the picture.  Numbers whose `minor` follow one
   another inside one tap's channels lie side by side. */
static __device__ __forceinline__ int64_t dpoc_place(const dpoc_tiles &g, int from, int64_t major, int64_t minor)
{
    uint32_t j = (uint32_t)minor, m = (uint32_t)major, tap, c, n;
    int y, x;
    switch (from) {
    case DPOC_FROM_X:
        tap = j/(uint32_t)g.I;  c = j - tap*(uint32_t)g.I;
        n = m/(uint32_t)(g.Y*g.X);  m -= n*(uint32_t)(g.Y*g.X);
        y = (int)(m/(uint32_t)g.X)*g.stride + (int)(tap/(uint32_t)g.kw) - g.top;
        x = (int)(m%(uint32_t)g.X)*g.stride + (int)(tap%(uint32_t)g.kw) - g.left;
        if (y < 0 || y >= g.H || x < 0 || x >= g.W) return -1;
        return (((int64_t)n*g.H + y)*g.W + x)*g.I + c;
    case DPOC_FROM_DYT:
        tap = j/(uint32_t)g.O;  c = j - tap*(uint32_t)g.O;
        n = m/(uint32_t)(g.H*g.W);  m -= n*(uint32_t)(g.H*g.W);
        y = (int)(m/(uint32_t)g.W) + g.top - (int)(tap/(uint32_t)g.kw);
        x = (int)(m%(uint32_t)g.W) + g.left - (int)(tap%(uint32_t)g.kw);
        if (y < 0 || x < 0 || y % g.stride || x % g.stride) return -1;
        y /= g.stride;  x /= g.stride;
        if (y >= g.Y || x >= g.X) return -1;
        return (((int64_t)n*g.Y + y)*g.X + x)*g.O + c;
    case DPOC_FROM_DY: return major*g.O + minor;
    case DPOC_FROM_W:  return major*g.kh*g.kw*g.I + minor;
    default:                              /* WT */
        tap = m/(uint32_t)g.O;  c = m - tap*(uint32_t)g.O;
        return ((int64_t)c*g.kh*g.kw + tap)*g.I + minor;
    }
}

/* Where the factors of a mode come from, and whether depth is their major axis. */
static __host__ __device__ __forceinline__ int dpoc_from(int mode, int second)
{
    if (mode == DPOC_Y)  return second ? DPOC_FROM_W  : DPOC_FROM_X;
    if (mode == DPOC_DX) return second ? DPOC_FROM_WT : DPOC_FROM_DYT;
    return second ? DPOC_FROM_X : DPOC_FROM_DY;
}
/* 0: depth is a factor's minor axis, numbers follow one another along it. */
static __host__ __device__ __forceinline__ int dpoc_deep(int mode, int second)
{
    return mode == DPOC_DW || (mode == DPOC_DX && second);
}

/* Number (line, k) of a factor, line being a row of the first or a column of the second; 0 outside. */
static __device__ __forceinline__ float dpoc_factor(const dpoc_tiles &g, int second, int64_t line, int64_t k,
                                                    int64_t lines, int64_t end)
{
    int     deep = dpoc_deep(g.mode, second), from = dpoc_from(g.mode, second);
    int64_t at = line >= lines || k >= end ? -1 : dpoc_place(g, from, deep ? k : line, deep ? line : k);
    return at < 0 ? 0 : dpoc_get(second ? g.b : g.a, g.type, at);
}

/* One number of the result to where it belongs. */
static __device__ __forceinline__ void dpoc_store(const dpoc_tiles &g, int64_t split, int64_t row, int64_t col,
                                                  float sum)
{
    int64_t at = row*g.cols + col;
    if (row >= g.rows || col >= g.cols) return;
    if (g.splits > 1)          g.part[split*g.rows*g.cols + at] = sum;
    else if (g.mode == DPOC_Y) dpoc_put(g.f.y, g.f.ytype, at, dpoc_finish_one(g.f, row, col, sum));
    else                       g.out[at] = g.add ? g.out[at] + sum : sum;
}

/* What one number costs decides the shapes below.  A tile of h x w numbers fetches h + w for every h*w it multiplies:
   at 64 x 64 that is 32 multiplications a number fetched, at 128 x 64 some 43.  Larger tiles fetch less, but small
   pictures, 8 x 8 at the bottom of a UNet, would then leave processors without a tile; cutting the depth makes up for
   some of that. Places are computed again for every number or eight of them: some twenty whole-number operations beside
   64 to 1024 multiplications. */

/* Plain: a block computes 64 x 64 numbers, 4 x 4 a thread, from slices of 16 of the depth: 8 KB of shared memory, and
   each number fetched is used 64 times. */
enum { DPOC_SIDE = 64, DPOC_SLICE = 16, DPOC_DEPTH = 32 };  /* parts of a depth are whole DPOC_DEPTHs */

/* Sums run through the depth in one order, a part of it a block. */
static __global__ void __launch_bounds__(DPOC_THREADS) dpoc_conv_kernel(dpoc_tiles g)
{
    __shared__ float as[DPOC_SLICE][DPOC_SIDE + 4], bs[DPOC_SLICE][DPOC_SIDE + 4];
    int     t = (int)threadIdx.x, ti = t/16, tj = t % 16;
    int64_t row = (int64_t)blockIdx.x*DPOC_SIDE, col = (int64_t)blockIdx.y*DPOC_SIDE;
    int64_t k0 = blockIdx.z*g.span, end = k0 + g.span < g.depth ? k0 + g.span : g.depth;
    float   sum[4][4] = { { 0 } };
    for (; k0 < end; k0 += DPOC_SLICE) {
        /* slices lie with the depth outermost, padded by 4 against conflicts of the turned stores */
        for (int e = 0; e < 4; e++) {     /* neighbours fetch what lies side by side */
            int u = t + e*DPOC_THREADS, deep[2] = { dpoc_deep(g.mode, 0), dpoc_deep(g.mode, 1) };
            int ka = deep[0] ? u/DPOC_SIDE : u % DPOC_SLICE, ia = deep[0] ? u % DPOC_SIDE : u/DPOC_SLICE;
            int kb = deep[1] ? u/DPOC_SIDE : u % DPOC_SLICE, ib = deep[1] ? u % DPOC_SIDE : u/DPOC_SLICE;
            as[ka][ia] = dpoc_factor(g, 0, row + ia, k0 + ka, g.rows, end);
            bs[kb][ib] = dpoc_factor(g, 1, col + ib, k0 + kb, g.cols, end);
        }
        __syncthreads();
        /* rows 4 ti .. + 3, columns tj, tj + 16, ...: a warp reads two rows' and sixteen columns' numbers a step */
        for (int k = 0; k < DPOC_SLICE; k++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) sum[i][j] += as[k][ti*4 + i]*bs[k][tj + 16*j];
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) dpoc_store(g, blockIdx.z, row + ti*4 + i, col + tj + 16*j, sum[i][j]);
}

/* The parts of a depth that was cut, added in order. */
static __global__ void dpoc_parts_kernel(dpoc_tiles g)
{
    int64_t n = g.rows*g.cols;
    for (int64_t u = dpoc_unit(); u < n; u += dpoc_units()) {
        float sum = 0;
        for (int s = 0; s < g.splits; s++) sum += g.part[s*n + u];
        if (g.mode == DPOC_Y) dpoc_put(g.f.y, g.f.ytype, u, dpoc_finish_one(g.f, dpoc_div(u, g.cols),
                u - dpoc_div(u, g.cols)*g.cols, sum));
        else g.out[u] = g.add ? g.out[u] + sum : sum;
    }
}

/* ------------------------------------------------------------------------------------------ tensor cores

   mma.sync m16n8: d [16][8] += a [16][k] b [k][8], shared out over a warp, sums in F32; k is 16 for factors of 16 bits
   and 8 for TF32.  With g = lane/4 and t = lane%4 (PTX manual, warp-level matrix fragments), in units of a register:
     a[0..3] are (g, t), (g+8, t), (g, t+4), (g+8, t+4)     b[0..1] are (t, g), (t+4, g)
     d[0..3] are (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)
   where register t holds the numbers 2t, 2t+1 of 16 bits, or number t of TF32.  ldmatrix fetches four pieces of eight
   rows of 16 bytes each in just this order, whichever of the two they are. */
template<int type> static __device__ __forceinline__ void dpoc_mma(float d[4], const uint32_t a[4], const uint32_t b[2])
{
#ifdef DIFFDPO_CUDA_STAND_IN
    if (type == DPO_F32) stand_in_mma_tf32(d, a, b);
    else stand_in_mma(d, a, b, type == DPO_BF16 ? dpoc_of_bf16 : dpoc_of_f16);
#else
    if (type == DPO_BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else if (type == DPO_F16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/* Two numbers as one pair, the first in the low half. */
template<int type> static __device__ __forceinline__ uint32_t dpoc_pair(float x, float y)
{
    if (type == DPO_BF16) return dpoc_to_bf16(x) | (uint32_t)dpoc_to_bf16(y) << 16;
    return dpoc_to_f16(x) | (uint32_t)dpoc_to_f16(y) << 16;
}

/* Shared memory of a kernel on tensor cores, in units of 16 bytes; at most the 48 KB that need no request.  One block
   of it in the stand-in, since its templates cannot share. */
enum { DPOC_POOL = 3072 };
#ifdef DIFFDPO_CUDA_STAND_IN
__shared__ uint4 dpoc_pool_all[DPOC_POOL];
template<int units> static uint4 *dpoc_pool(void)
{
    static_assert(units <= DPOC_POOL, "48 KB");
    return dpoc_pool_all;
}
/* What these compute stands beside their other selves below. */
static void dpoc_fetch16(uint4 *to, const void *from, int really) { stand_in_fetch16(to, from, really); }
static void dpoc_fetch_commit(void)                               { stand_in_fetch_commit(); }
template<int late> static void dpoc_fetch_wait(void)              { stand_in_fetch_wait(late); }
static void dpoc_load4(uint32_t f[4], const uint4 *at, int turned) { stand_in_ldmatrix(f, at, turned); }
static uint32_t dpoc_to_tf32(uint32_t x)                          { return stand_in_to_tf32(x); }
#else
template<int units> static __device__ __forceinline__ uint4 *dpoc_pool(void)
{
    static_assert(units <= DPOC_POOL, "48 KB");
    __shared__ uint4 pool[units];
    return pool;
}
/* 16 bytes from memory to shared memory past the registers, or zeros; `from` is an address even where nothing is read.
   Fetches between two commits are one group, and come to stand when all but the `late` newest groups are there. */
static __device__ __forceinline__ void dpoc_fetch16(uint4 *to, const void *from, int really)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(really ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void dpoc_fetch_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template<int late> static __device__ __forceinline__ void dpoc_fetch_wait(void)
{
    asm volatile("cp.async.wait_group %0;" :: "n"(late) : "memory");
}
/* Four pieces of 8 rows of 16 bytes; lane l gives the address of row l%8 of piece l/8.  Turned: (2t, g), (2t+1, g) in
   place of (g, 2t), (g, 2t+1). */
static __device__ __forceinline__ void dpoc_load4(uint32_t f[4], const uint4 *at, int turned)
{
    uint32_t p = (uint32_t)__cvta_generic_to_shared(at);
    if (turned) asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(p) : "memory");
    else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                      : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(p) : "memory");
}
/* To nearest; the instruction alone would cut off. */
static __device__ __forceinline__ uint32_t dpoc_to_tf32(uint32_t x)
{
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
    return y;
}
#endif

/* wgmma and tcgen05, which reach further on sm_90 and sm_100, would each want a kernel of their own that nobody could
   test without the device; mma.sync runs on all of them, and the stand-in knows what it computes. */

/* A block of 8 warps computes 128 x `wide` numbers, 128 or 64 of them, from slices of the depth of 64 bytes: 32 numbers
   of 16 bits or 16 of 32.  Slices are fetched by cp.async, three or four in turn, 48 KB in all: two are under way when
   one is multiplied, and one barrier a slice is enough, since what is overwritten was read before it.  A warp has
   64 x 32 numbers (32 x 32 where `wide` is 64): 6 loads of four pieces feed 16 products of 16x8.  At most 128 registers
   a thread, hence two blocks a processor.

   A slice lies as its factor does in memory, in units of 16 bytes, so that each is fetched as one:
     depth along a row     [lines][4 units]           unit u of a line at u ^ (line/2)%4
     depth down the rows   [depth][lines/E units]     unit u of a row  at u ^ row%8, or for TF32 u ^ (row%4)*2
   With these places the eight rows of a piece, and eight neighbours that are stored, lie in different banks. */
enum { DPOC_HIGH = 128 };

template<int E> static __device__ __forceinline__ int dpoc_unit_along(int line, int u)
{
    return line*4 + (u ^ line/2%4);
}
template<int E, int lines> static __device__ __forceinline__ int dpoc_unit_down(int row, int u)
{
    return row*(lines/E) + (u ^ (E == 8 ? row%8 : row%4*2));
}

/* Where a number of a factor lies depends on a pixel and a place under the kernel, which divisions would find: twenty
   instructions each, several for every 16 bytes, more than the products take.  So each thread divides once, at its
   first unit, and counts from there, as a clock does; what stays with it is kept as one offset.

   A number in three digits: pixels as (sample, y, x), a place under the kernel as (ky, kx, channel), rows of WT as
   (0, tap, o), all else in `lo`. */
typedef struct dpoc_digits { int hi, mid, lo; } dpoc_digits;

/* How many values a digit of a depth has, the lowest one or the middle one; 0: it has no end. */
static __device__ __forceinline__ int dpoc_radix(const dpoc_tiles &g, int from, int deep, int lowest)
{
    if (from == DPOC_FROM_W || from == DPOC_FROM_DY) return 0;
    if (from == DPOC_FROM_X) return deep ? lowest ? g.X : g.Y : lowest ? g.I : g.kw;
    return lowest ? g.O : from == DPOC_FROM_DYT ? g.kw : 0;
}
static __device__ __forceinline__ dpoc_digits dpoc_split(int v, int mid, int lo)
{
    dpoc_digits d = { 0, 0, v };
    if (lo)  { d.mid = v/lo;  d.lo = v - d.mid*lo; }
    if (mid) { d.hi = d.mid/mid;  d.mid -= d.hi*mid; }
    return d;
}
/* d += step, both in digits: a carry at most each, for a digit of a step is below its radix. */
static __device__ __forceinline__ void dpoc_walk(dpoc_digits *d, const dpoc_digits &step, int mid, int lo)
{
    d->lo += step.lo;
    if (!lo) return;
    d->mid += step.mid;
    if (d->lo >= lo) { d->lo -= lo;  d->mid++; }
    if (!mid) return;
    d->hi += step.hi;
    if (d->mid >= mid) { d->mid -= mid;  d->hi++; }
}

/* What a thread fetches of one factor: one or two units of each slice.  Where depth runs along a line both have the
   same depth, else both have the same line: the first of `depth`, or of the others, then stands for both. */
typedef struct dpoc_feed {
    dpoc_digits depth[2], step;           /* step: a slice's depth */
    int64_t base[2];                      /* the part of the offset that stays */
    int     y[2], x[2];                   /* X, DYT: the part of the place in the picture that stays */
    int     first[2], k;                  /* the first number: its line and its depth; of the second unit k, too, */
                                          /* or dpoc_feed_apart further on */
    int     lines, end, till[2];          /* both end before these; till: end, or 0 for a line that is not there */
} dpoc_feed;

/* Lines of pixels that are not there stand outside of every picture instead, which saves their `till`. */
enum { DPOC_NOWHERE = -(1 << 30) };
static __device__ __forceinline__ int dpoc_by_pixel(int from, int deep)
{
    return from == DPOC_FROM_DYT || (from == DPOC_FROM_X && !deep);
}

/* The parts of a line that stay.  X as rows: the pixel's corner of the kernel; X as columns: tap and channel. */
static __device__ __forceinline__ void dpoc_feed_line(const dpoc_tiles &g, int from, int deep, dpoc_feed *f, int e)
{
    int line = f->first[e];
    dpoc_digits d;
    if (from == DPOC_FROM_X && !deep) {
        d = dpoc_split(line, g.Y, g.X);
        f->y[e] = d.mid*g.stride - g.top;
        f->x[e] = d.lo*g.stride - g.left;
        f->base[e] = (((int64_t)d.hi*g.H + f->y[e])*g.W + f->x[e])*g.I;
    } else if (from == DPOC_FROM_X) {
        d = dpoc_split(line, g.kw, g.I);
        f->y[e] = d.hi - g.top;
        f->x[e] = d.mid - g.left;
        f->base[e] = d.lo;
    } else if (from == DPOC_FROM_DYT) {   /* with a stride the place in dy is found for each tap */
        d = dpoc_split(line, g.H, g.W);
        f->y[e] = d.mid + g.top;
        f->x[e] = d.lo + g.left;
        f->base[e] = g.stride > 1 ? (int64_t)d.hi*g.Y : (((int64_t)d.hi*g.Y + f->y[e])*g.X + f->x[e])*g.O;
    } else f->base[e] = from == DPOC_FROM_W ? (int64_t)line*g.kh*g.kw*g.I : 0;
    if (dpoc_by_pixel(from, deep) && line >= f->lines) f->y[e] = DPOC_NOWHERE;
}

/* How far apart in depth a thread's two units lie where depth runs down the rows. */
template<int E, int lines> static __device__ __forceinline__ int dpoc_feed_apart(void) { return DPOC_THREADS*E/lines; }

/* Threads are dealt out so that neighbours fetch neighbours: four units of a line where depth runs along it, else all
   units of a row.  Lines behind the last one are dealt out too, and fetch zeros: every thread makes the same turns. */
template<int mode, int second, int E, int lines>
static __device__ __forceinline__ void dpoc_feed_open(const dpoc_tiles &g, dpoc_feed *f, int line, int k0, int end)
{
    int deep = dpoc_deep(mode, second), from = dpoc_from(mode, second);
    int mid = dpoc_radix(g, from, deep, 0), lo = dpoc_radix(g, from, deep, 1);
    f->lines = (int)(second ? g.cols : g.rows);
    f->end = end;
    f->step = dpoc_split(4*E, mid, lo);
    f->k = k0 + (deep ? (int)threadIdx.x/(lines/E) : (int)threadIdx.x % 4*E);
    DPOC_UNROLL
    for (int e = 0; e < lines/64; e++) {
        int v = (int)threadIdx.x + e*DPOC_THREADS;
        f->first[e] = line + (deep ? v % (lines/E)*E : v/4);
        f->till[e] = f->first[e] < f->lines ? f->end : 0;
        f->depth[e] = dpoc_split(f->k + (deep ? e*dpoc_feed_apart<E, lines>() : 0), mid, lo);
        dpoc_feed_line(g, from, deep, f, e);
    }
}

/* As dpoc_place: the offset of unit e, of line l and depth d; nonsense where 0 comes back, for a zero. */
static __device__ __forceinline__ int dpoc_spot(const dpoc_tiles &g, int from, int deep, const dpoc_feed *f, int l,
                                                const dpoc_digits &d, int64_t *at)
{
    int y, x;
    if (from == DPOC_FROM_X && !deep) {
        y = f->y[l] + d.hi;
        x = f->x[l] + d.mid;
        *at = f->base[l] + ((d.hi*g.W + d.mid)*g.I + d.lo);
        return (unsigned)y < (unsigned)g.H && (unsigned)x < (unsigned)g.W;
    }
    if (from == DPOC_FROM_X) {
        y = d.mid*g.stride + f->y[l];
        x = d.lo*g.stride + f->x[l];
        *at = (((int64_t)d.hi*g.H + y)*g.W + x)*g.I + f->base[l];
        return (unsigned)y < (unsigned)g.H && (unsigned)x < (unsigned)g.W;
    }
    if (from == DPOC_FROM_DYT) {
        y = f->y[l] - d.hi;
        x = f->x[l] - d.mid;
        *at = f->base[l] + (d.lo - (d.hi*g.X + d.mid)*g.O);
        if (g.stride > 1) {
            int v = y/g.stride, u = x/g.stride, on = y >= 0 && x >= 0 && v*g.stride == y && u*g.stride == x;
            *at = ((f->base[l] + v)*g.X + u)*g.O + d.lo;
            return on && v < g.Y && u < g.X;
        }
        return (unsigned)y < (unsigned)g.Y && (unsigned)x < (unsigned)g.X;
    }
    if (from == DPOC_FROM_W) *at = f->base[l] + d.lo;
    else *at = f->first[l] + (from == DPOC_FROM_DY ? (int64_t)d.lo*g.O : ((int64_t)d.lo*g.kh*g.kw + d.mid)*g.I);
    return 1;
}

/* A unit whose numbers do not lie side by side on 16 bytes: channels not in eights, as at both ends of a UNet.  One
   after the other, with divisions and all: such layers are small, and the kernel's code stays so. */
template<int type, int mode, int second>
static __device__ __forceinline__ uint4 dpoc_feed_slow(const dpoc_tiles &g, int line, int k, int lines, int end)
{
    enum { E = type == DPO_F32 ? 4 : 8, bits = 128/E, deep = mode == DPOC_DW || (mode == DPOC_DX && second) };
    const void *p = second ? g.b : g.a;
    uint64_t    low = 0, high = 0;        /* shifted into place: an array would lie in memory */
    DPOC_ROLLED
    for (int e = 0; e < E; e++) {
        int      l = deep ? line + e : line, kk = deep ? k : k + e;
        int64_t  at = l < lines && kk < end ? dpoc_place(g, dpoc_from(mode, second), deep ? kk : l, deep ? l : kk) : -1;
        uint64_t x = at < 0 ? 0 : type == DPO_F32 ? ((const uint32_t *)p)[at] : ((const uint16_t *)p)[at];
        if (e < E/2) low |= x << e*bits;
        else         high |= x << (e - E/2)*bits;
    }
    uint4 v = { (uint32_t)low, (uint32_t)(low >> 32), (uint32_t)high, (uint32_t)(high >> 32) };
    return v;
}

/* The thread's units of the next slice, to where it lies; every call goes one slice on. */
template<int type, int mode, int second, int lines, int wide>
static __device__ __forceinline__ void dpoc_feed_next(const dpoc_tiles &g, dpoc_feed *f, uint4 *to)
{
    enum { E = type == DPO_F32 ? 4 : 8, deep = mode == DPOC_DW || (mode == DPOC_DX && second) };
    int         from = dpoc_from(mode, second), mid = dpoc_radix(g, from, deep, 0), lo = dpoc_radix(g, from, deep, 1);
    const char *p = (const char *)(second ? g.b : g.a);
    DPOC_UNROLL
    for (int e = 0; e < lines/64; e++) {
        int    v = (int)threadIdx.x + e*DPOC_THREADS, l = deep ? 0 : e, d = deep ? e : 0;
        int    k = f->k + d*dpoc_feed_apart<E, lines>();
        uint4 *u = to + (deep ? dpoc_unit_down<E, lines>(v/(lines/E), v % (lines/E)) : dpoc_unit_along<E>(v/4, v % 4));
        if (wide > 64 || g.wide[second]) {            /* what is slow is not even in the code of the widest kernels */
            int64_t at;
            int     on = dpoc_spot(g, from, deep, f, l, f->depth[d], &at);
            dpoc_fetch16(u, p + at*(16/E), on && k < (dpoc_by_pixel(from, deep) ? f->end : f->till[l]));
        } else *u = dpoc_feed_slow<type, mode, second>(g, f->first[l], k, f->lines, f->end);
    }
    f->k += 4*E;
    DPOC_UNROLL
    for (int d = 0; d < (deep ? lines/64 : 1); d++) dpoc_walk(&f->depth[d], f->step, mid, lo);
}

/* One register of a factor whose depth runs down the rows, for TF32: ldmatrix turns numbers of 16 bits only. */
template<int lines> static __device__ __forceinline__ uint32_t dpoc_tf32_down(const uint4 *s, int row, int line)
{
    return dpoc_to_tf32(((const uint32_t *)(s + dpoc_unit_down<4, lines>(row, line/4)))[line%4]);
}

/* a: 16 lines from `line` on, half `half` of the slice's depth. */
template<int type, int down, int lines>
static __device__ __forceinline__ void dpoc_first_of(uint32_t a[4], const uint4 *s, int line, int half)
{
    enum { E = type == DPO_F32 ? 4 : 8 };
    int lane = (int)threadIdx.x % 32, g = lane/4, t = lane % 4;
    if (!down) dpoc_load4(a, s + dpoc_unit_along<E>(line + lane%16, 2*half + lane/16), 0);
    else if (type != DPO_F32)
        dpoc_load4(a, s + dpoc_unit_down<E, lines>(16*half + lane%8 + lane/16*8, line/8 + lane/8%2), 1);
    DPOC_UNROLL
    for (int e = 0; e < 4 && type == DPO_F32; e++)
        a[e] = down ? dpoc_tf32_down<lines>(s, 8*half + t + e/2*4, line + g + e%2*8) : dpoc_to_tf32(a[e]);
}
/* b: two blocks of 8 lines from `line` on, two registers each. */
template<int type, int down, int lines>
static __device__ __forceinline__ void dpoc_second_of(uint32_t b[4], const uint4 *s, int line, int half)
{
    enum { E = type == DPO_F32 ? 4 : 8 };
    int lane = (int)threadIdx.x % 32, g = lane/4, t = lane % 4;
    if (!down) dpoc_load4(b, s + dpoc_unit_along<E>(line + lane%8 + lane/16*8, 2*half + lane/8%2), 0);
    else if (type != DPO_F32) dpoc_load4(b, s + dpoc_unit_down<E, lines>(16*half + lane%16, line/8 + lane/16), 1);
    DPOC_UNROLL
    for (int e = 0; e < 4 && type == DPO_F32; e++)
        b[e] = down ? dpoc_tf32_down<lines>(s, 8*half + t + e%2*4, line + g + e/2*8) : dpoc_to_tf32(b[e]);
}

/* A warp's numbers of one slice: M blocks of 16 rows, four of 8 columns.  First factors are loaded block by block: 64
   sums leave room for some of them, and ptxas loads as far ahead as there is. */
template<int type, int mode, int wide, int M>
static __device__ __forceinline__ void dpoc_slice(const uint4 *a, const uint4 *b, int high, int across,
                                                  float sum[M][4][4])
{
    DPOC_UNROLL
    for (int half = 0; half < 2; half++) {
        uint32_t fa[4], fb[2][4];
        DPOC_UNROLL
        for (int j = 0; j < 2; j++) dpoc_second_of<type, mode != DPOC_Y, wide>(fb[j], b, across + 16*j, half);
        DPOC_UNROLL
        for (int i = 0; i < M; i++) {
            dpoc_first_of<type, mode == DPOC_DW, DPOC_HIGH>(fa, a, high + 16*i, half);
            DPOC_UNROLL
            for (int j = 0; j < 4; j++) dpoc_mma<type>(sum[i][j], fa, &fb[j/2][j%2*2]);
        }
    }
}

/* Two neighbours of a row of the result, finished and stored, as one where rows have an even number of them. */
template<int mode>
static __device__ __forceinline__ void dpoc_store2(const dpoc_tiles &g, int64_t split, int64_t row, int64_t col,
                                                   float2 sum)
{
    int64_t at = row*g.cols + col;
    float   x[2] = { sum.x, sum.y };
    int     two = col + 1 < g.cols, type = DPO_F32, add = 0;
    void   *to = g.part + split*g.rows*g.cols;
    if (row >= g.rows || col >= g.cols) return;
    if (g.splits == 1 && mode == DPOC_Y) {
        int64_t n = g.f.vec ? dpoc_div(row, g.f.P) : 0;
        x[0] = dpoc_finish_at(g.f, row, n, col, x[0]);
        if (two) x[1] = dpoc_finish_at(g.f, row, n, col + 1, x[1]);
        to = g.f.y;
        type = g.f.ytype;
    } else if (g.splits == 1) {
        to = g.out;
        add = g.add;
    }
    if (add) { x[0] += ((const float *)to)[at];  if (two) x[1] += ((const float *)to)[at + 1]; }
    if (!g.pairs) {
        dpoc_put(to, type, at, x[0]);
        if (two) dpoc_put(to, type, at + 1, x[1]);
    } else if (type == DPO_F32) {
        float2 v = { x[0], x[1] };
        ((float2 *)to)[at/2] = v;
    } else ((uint32_t *)to)[at/2] = type == DPO_BF16 ? dpoc_pair<DPO_BF16>(x[0], x[1]) : dpoc_pair<DPO_F16>(x[0], x[1]);
}

/* A warp's numbers to where they belong, 16 rows at a time by way of shared memory: a row of 32 is then stored by 16
   neighbouring lanes, and what follows a product stands in the code once for 16 rows, not for every register.
   own: the warp's 16 rows, 40 floats apart, so that the lanes of a half write to different banks. */
enum { DPOC_OWN = 40 };
template<int mode, int M>
static __device__ __forceinline__ void dpoc_store_warp(const dpoc_tiles &g, float *own, int row, int col,
                                                       const float sum[M][4][4])
{
    int lane = (int)threadIdx.x % 32;
    DPOC_UNROLL
    for (int i = 0; i < M; i++) {
        DPOC_UNROLL
        for (int e = 0; e < 8; e++) {
            float2 v = { sum[i][e/2][e%2*2], sum[i][e/2][e%2*2 + 1] };
            *(float2 *)(own + (lane/4 + e%2*8)*DPOC_OWN + e/2*8 + lane%4*2) = v;
        }
        __syncwarp();
        DPOC_ROLLED
        for (int k = lane/16; k < 16; k += 2)
            dpoc_store2<mode>(g, blockIdx.z, row + 16*i + k, col + lane%16*2,
                              *(const float2 *)(own + k*DPOC_OWN + lane%16*2));
        __syncwarp();                     /* the next rows come to the same place */
    }
}

/* Fetching runs `stages` - 1 slices ahead of multiplying.  A stage may be written by cp.async or, where units are put
   together from single numbers, by plain stores: both come after the barrier behind its last reading, and before the
   one in front of its next. */
template<int type, int mode, int wide> static __device__ __forceinline__ void dpoc_conv_tensor(const dpoc_tiles &g)
{
    enum { E = type == DPO_F32 ? 4 : 8, stages = wide == 128 ? 3 : 4, units = (DPOC_HIGH + wide)*4, M = wide/32 };
    uint4  *pool = dpoc_pool<stages*units>();
    int     warp = (int)threadIdx.x/32;
    int     high = wide == 128 ? warp/4*64 : warp/2*32, across = wide == 128 ? warp%4*32 : warp%2*32;
    int     row = (int)blockIdx.x*DPOC_HIGH, col = (int)blockIdx.y*wide;         /* below 2^31, as rows and depth are */
    int     k0 = (int)(blockIdx.z*g.span), end = (int)dpoc_min(k0 + g.span, g.depth);
    int     slices = (end - k0 + 4*E - 1)/(4*E);
    float   sum[M][4][4];
    dpoc_feed a, b;
    DPOC_UNROLL
    for (int i = 0; i < M; i++) for (int j = 0; j < 4; j++) for (int e = 0; e < 4; e++) sum[i][j][e] = 0;
    dpoc_feed_open<mode, 0, E, DPOC_HIGH>(g, &a, row, k0, end);
    dpoc_feed_open<mode, 1, E, wide>(g, &b, col, k0, end);
    for (int next = 0, s = 1 - stages; s < slices; s++) {
        if (s >= 0) {                     /* the first rounds only fetch */
            dpoc_fetch_wait<stages - 2>();
            __syncthreads();              /* all threads' parts of slice s are there, and slice s - 1 was read */
        }
        if (s + stages - 1 < slices) {
            dpoc_feed_next<type, mode, 0, DPOC_HIGH, wide>(g, &a, pool + next*units);
            dpoc_feed_next<type, mode, 1, wide, wide>(g, &b, pool + next*units + DPOC_HIGH*4);
        }
        dpoc_fetch_commit();              /* empty ones too, so that waiting can count */
        next = next + 1 == stages ? 0 : next + 1;
        if (s >= 0)
            dpoc_slice<type, mode, wide, M>(pool + next*units, pool + next*units + DPOC_HIGH*4, high, across, sum);
    }
    __syncthreads();                      /* the last slice was read by all */
    dpoc_store_warp<mode, M>(g, (float *)pool + warp*16*DPOC_OWN, row + high, col + across, sum);
}

/* One kernel for each use, so that everything that a mode decides is decided by the compiler. */
template<int type, int mode, int wide>
static __global__ void __launch_bounds__(DPOC_THREADS, 2) dpoc_conv_tensor_kernel(dpoc_tiles g)
{
    dpoc_conv_tensor<type, mode, wide>(g);
}

/* F32 without rounding: the same slices, multiplied by ordinary instructions.  A block computes 128 x 64 numbers, a
   thread 8 x 4 of them: 12 loads of 16 bytes feed 128 multiplications.  Along the depth a thread's lines stand 16
   apart, across it four side by side: either way eight neighbouring threads load from different banks, or the same
   place. */
template<int down> static __device__ __forceinline__ int dpoc_float_line(int t, int e)
{
    return down ? t*4 + e%4 + e/4*64 : t + 16*e;
}
/* Four steps of the depth, from k on, for four of a thread's lines, from its number `first` on: x[line][step].
   Every load is of 16 bytes: four steps of a line, or four lines of a step. */
template<int down, int lines>
static __device__ __forceinline__ void dpoc_float_load(const uint4 *s, int t, int first, int k, float x[4][4])
{
    DPOC_UNROLL
    for (int e = 0; e < 4; e++) {
        int    line = dpoc_float_line<down>(t, down ? first : first + e);
        int    unit = down ? dpoc_unit_down<4, lines>(k + e, line/4) : dpoc_unit_along<4>(line, k/4);
        float4 p = *(const float4 *)(s + unit);
        float  v[4] = { p.x, p.y, p.z, p.w };
        DPOC_UNROLL
        for (int c = 0; c < 4; c++) *(down ? &x[c][e] : &x[e][c]) = v[c];
    }
}

template<int mode> static __global__ void __launch_bounds__(DPOC_THREADS) dpoc_conv_float_kernel(dpoc_tiles g)
{
    enum { wide = DPOC_SIDE, stages = 4, units = (DPOC_HIGH + wide)*4, da = mode == DPOC_DW, db = mode != DPOC_Y };
    uint4  *pool = dpoc_pool<stages*units>();
    int     ti = (int)threadIdx.x/16, tj = (int)threadIdx.x % 16;
    int     row = (int)blockIdx.x*DPOC_HIGH, col = (int)blockIdx.y*wide;
    int     k0 = (int)(blockIdx.z*g.span), end = (int)dpoc_min(k0 + g.span, g.depth);
    int     slices = (end - k0 + DPOC_SLICE - 1)/DPOC_SLICE;
    float   sum[8][4];
    dpoc_feed a, b;
    for (int i = 0; i < 8; i++) for (int j = 0; j < 4; j++) sum[i][j] = 0;
    dpoc_feed_open<mode, 0, 4, DPOC_HIGH>(g, &a, row, k0, end);
    dpoc_feed_open<mode, 1, 4, wide>(g, &b, col, k0, end);
    for (int next = 0, s = 1 - stages; s < slices; s++) {  /* as above */
        const uint4 *now;
        if (s >= 0) { dpoc_fetch_wait<stages - 2>();  __syncthreads(); }
        if (s + stages - 1 < slices) {
            dpoc_feed_next<DPO_F32, mode, 0, DPOC_HIGH, wide>(g, &a, pool + next*units);
            dpoc_feed_next<DPO_F32, mode, 1, wide, wide>(g, &b, pool + next*units + DPOC_HIGH*4);
        }
        dpoc_fetch_commit();
        next = next + 1 == stages ? 0 : next + 1;
        now = pool + next*units;
        DPOC_ROLLED
        for (int k = 0; k < DPOC_SLICE && s >= 0; k += 4) {
            float x[4][4], y[4][4];
            dpoc_float_load<db, wide>(now + DPOC_HIGH*4, tj, 0, k, y);
            DPOC_UNROLL
            for (int h = 0; h < 8; h += 4) {          /* 80 registers of numbers, where all eight lines would take 96 */
                dpoc_float_load<da, DPOC_HIGH>(now, ti, h, k, x);
                DPOC_UNROLL
                for (int e = 0; e < 64; e++) sum[h + e/4%4][e%4] += x[e/4%4][e/16]*y[e%4][e/16];
            }
        }
    }
    __syncthreads();
    float *all = (float *)pool;           /* [128][64], then stored pair by pair as above */
    DPOC_UNROLL
    for (int e = 0; e < 32; e++) all[dpoc_float_line<da>(ti, e/4)*wide + dpoc_float_line<db>(tj, e%4)] = sum[e/4][e%4];
    __syncthreads();
    DPOC_ROLLED
    for (int u = (int)threadIdx.x; u < DPOC_HIGH*wide/2; u += DPOC_THREADS)
        dpoc_store2<mode>(g, blockIdx.z, (int64_t)row + u/(wide/2), col + u%(wide/2)*2, *(float2 *)(all + 2*u));
}

/* ------------------------------------------------------------------------------------------ cuDNN, where it was asked
   for

   With -DDIFFDPO_CUDNN forward and dx of convolutions in BF16 and F16 go to cuDNN, if it can take them: channels in
   eights, the same padding on all sides.  dW stays here, for cuDNN would round it.  The only way to cuDNN is dpoc_dnn.
   */
typedef struct dpoc_dnn_call {
    int     back, type;                   /* back: from dy to dx */
    int     N, H, W, I, Y, X, O, kh, kw, stride, top, left;
    const void *from, *w;
    void   *to;
} dpoc_dnn_call;

#ifndef DIFFDPO_CUDNN
static void dpoc_dnn_close(dpoc *d) { d->dnn = NULL; }
static int  dpoc_dnn(dpoc *d, const dpoc_dnn_call *c)
{
    (void)c;
    return dpoc_fail(d, DPO_UNSUPPORTED, "cuDNN", "not built in");
}
enum { DPOC_HAS_DNN = 0 };
#elif defined(DIFFDPO_CUDA_STAND_IN)
enum { DPOC_HAS_DNN = 1 };
static void dpoc_dnn_close(dpoc *d) { d->dnn = NULL; }

/* Plain loops over the result. */
static void dpoc_dnn_loops(const dpoc_dnn_call &c)
{
    int H = c.back ? c.H : c.Y, W = c.back ? c.W : c.X, C = c.back ? c.I : c.O, K = c.back ? c.O : c.I;
    for (int64_t u = 0; u < (int64_t)c.N*H*W*C; u++) {
        int    ch = (int)(u % C), x = (int)(u/C % W), y = (int)(u/C/W % H), n = (int)(u/C/W/H);
        double sum = 0;
        for (int tap = 0; tap < c.kh*c.kw; tap++) {
            int ky = tap/c.kw, kx = tap % c.kw;
            int h = c.back ? y + c.top - ky : y*c.stride + ky - c.top, v = c.back ? x + c.left - kx
                : x*c.stride + kx - c.left;
            if (c.back && (h < 0 || v < 0 || h % c.stride || v % c.stride)) continue;
            if (c.back) { h /= c.stride;  v /= c.stride; }
            if (h < 0 || v < 0 || h >= (c.back ? c.Y : c.H) || v >= (c.back ? c.X : c.W)) continue;
            for (int k = 0; k < K; k++)
                sum += (double)dpoc_get(c.from, c.type, (((int64_t)n*(c.back ? c.Y : c.H) + h)*(c.back ? c.X : c.W)
                                                         + v)*K + k)*
                       dpoc_get(c.w, c.type, ((int64_t)(c.back ? k : ch)*c.kh*c.kw + tap)*c.I + (c.back ? ch : k));
        }
        dpoc_put(c.to, c.type, u, (float)sum);
    }
}
static int dpoc_dnn(dpoc *d, const dpoc_dnn_call *call)
{
    dpoc_dnn_call c = *call;
    (void)d;
    stand_in_do([=] { dpoc_dnn_loops(c); });
    return DPO_OK;
}
#else
enum { DPOC_HAS_DNN = 1 };

static void dpoc_dnn_close(dpoc *d)
{
    if (d->dnn) (void)cudnnDestroy((cudnnHandle_t)d->dnn);
    d->dnn = NULL;
}

/* The descriptions of a convolution; tensors and filters are NHWC, as ours are. */
typedef struct dpoc_dnn_parts {
    cudnnTensorDescriptor_t x, y;
    cudnnFilterDescriptor_t w;
    cudnnConvolutionDescriptor_t k;
} dpoc_dnn_parts;

/* Padding is one number an axis here, which dpoc_tiles_dnn has checked; sums in F32. */
static cudnnStatus_t dpoc_dnn_describe(const dpoc_dnn_call *c, dpoc_dnn_parts *p)
{
    cudnnDataType_t t = c->type == DPO_BF16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_HALF;
    cudnnStatus_t   s = cudnnCreateTensorDescriptor(&p->x);
    if (!s) s = cudnnCreateTensorDescriptor(&p->y);
    if (!s) s = cudnnCreateFilterDescriptor(&p->w);
    if (!s) s = cudnnCreateConvolutionDescriptor(&p->k);
    if (!s) s = cudnnSetTensor4dDescriptor(p->x, CUDNN_TENSOR_NHWC, t, c->N, c->I, c->H, c->W);
    if (!s) s = cudnnSetTensor4dDescriptor(p->y, CUDNN_TENSOR_NHWC, t, c->N, c->O, c->Y, c->X);
    if (!s) s = cudnnSetFilter4dDescriptor(p->w, t, CUDNN_TENSOR_NHWC, c->O, c->I, c->kh, c->kw);
    if (!s) s = cudnnSetConvolution2dDescriptor(p->k, c->top, c->left, c->stride, c->stride, 1, 1,
                                                CUDNN_CROSS_CORRELATION, CUDNN_DATA_FLOAT);
    if (!s) s = cudnnSetConvolutionMathType(p->k, CUDNN_TENSOR_OP_MATH);
    return s;
}

/* What was not made is NULL. */
static void dpoc_dnn_drop(dpoc_dnn_parts *p)
{
    if (p->k) (void)cudnnDestroyConvolutionDescriptor(p->k);
    if (p->w) (void)cudnnDestroyFilterDescriptor(p->w);
    if (p->y) (void)cudnnDestroyTensorDescriptor(p->y);
    if (p->x) (void)cudnnDestroyTensorDescriptor(p->x);
}

/* The algorithms that are implicit products: they need little scratch and give the same bits every time. */
static int dpoc_dnn(dpoc *d, const dpoc_dnn_call *c)
{
    dpoc_dnn_parts p;
    cudnnHandle_t  h = (cudnnHandle_t)d->dnn;
    float          one = 1, none = 0;
    size_t         bytes = 0;
    cudnnStatus_t  s = CUDNN_STATUS_SUCCESS;
    memset(&p, 0, sizeof p);
    if (!h && !(s = cudnnCreate(&h))) { d->dnn = (void *)h;  s = cudnnSetStream(h, d->stream); }
    if (!s) s = dpoc_dnn_describe(c, &p);
    if (!s && !c->back) s = cudnnGetConvolutionForwardWorkspaceSize(h, p.x, p.w, p.k, p.y,
                                                                    CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM,
                                                                            &bytes);
    if (!s && c->back) s = cudnnGetConvolutionBackwardDataWorkspaceSize(h, p.w, p.y, p.k, p.x,
            CUDNN_CONVOLUTION_BWD_DATA_ALGO_1, &bytes);
    if (!s && bytes > DPOC_SCRATCH_BYTES) s = CUDNN_STATUS_NOT_SUPPORTED;
    if (!s && !c->back)
        s = cudnnConvolutionForward(h, &one, p.x, c->from, p.w, c->w, p.k,
                                    CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM, d->scratch, bytes,
                                    &none, p.y, c->to);
    if (!s && c->back)
        s = cudnnConvolutionBackwardData(h, &one, p.w, c->w, p.y, c->from, p.k, CUDNN_CONVOLUTION_BWD_DATA_ALGO_1,
                                         d->scratch, bytes, &none, p.x, c->to);
    dpoc_dnn_drop(&p);
    return s ? dpoc_fail(d, DPO_DEVICE, "cuDNN convolution", cudnnGetErrorString(s)) : (int)DPO_OK;
}
#endif

/* The same product of tiles by cuDNN: y without what follows it, or dx into scratch of 16 bits.  1 if it was done. */
static int dpoc_tiles_dnn(dpoc_run *r, const dpoc_tiles *g)
{
    dpoc_dnn_call c;
    dpo_view      from, to;
    int64_t       pixels = g->mode == DPOC_Y ? (int64_t)g->Y*g->X : (int64_t)g->H*g->W;
    int           wide = g->I % 8 == 0 && g->O % 8 == 0, N = (int)(g->rows/pixels);
    if (!DPOC_HAS_DNN || g->type == DPO_F32 || g->mode == DPOC_DW || !wide || r->d->options[DPO_CUDA_PLAIN]) return 0;
    if ((g->H + 2*g->top - g->kh)/g->stride + 1 != g->Y || (g->W + 2*g->left - g->kw)/g->stride + 1 != g->X) return 0;
    if (g->mode == DPOC_Y && g->f.ytype != g->type) return 0;
    memset(&c, 0, sizeof c);
    c.back = g->mode == DPOC_DX;  c.type = g->type;  c.N = N;
    c.H = g->H;  c.W = g->W;  c.I = g->I;  c.Y = g->Y;  c.X = g->X;  c.O = g->O;
    c.kh = g->kh;  c.kw = g->kw;  c.stride = g->stride;  c.top = g->top;  c.left = g->left;
    c.from = g->a;  c.w = g->b;
    c.to = c.back ? dpoc_carve(r, (size_t)(g->rows*g->cols)*dpoc_size(g->type)) : g->f.y;
    if (!r->counting && r->status == DPO_OK) r->status = dpoc_dnn(r->d, &c);
    if (!c.back) { dpoc_finish_run(r, g->f);  return 1; }
    from = dpoc_flat(c.to, g->type, g->rows*g->cols);
    to = dpoc_flat(g->out, DPO_F32, g->rows*g->cols);
    dpoc_each(r, DPO_NONE, &from, NULL, 0, 0, &to, g->add, NULL);
    return 1;
}

/* The sizes and operands of one call, the same for forward and backward. */
typedef struct dpoc_conv {
    int64_t N, H, W, I, Y, X, O, r;       /* x [N,H,W,I] -> y [N,Y,X,O]; r: rank of the adapter, 0 without one */
    int64_t kh, kw, K, M, P;              /* K = kh*kw*I, M = N*Y*X, P = Y*X */
    int     flat, type;                   /* flat: a product of matrices; type of the factors */
} dpoc_conv;

/* F16's range is too narrow for gradients, which are F32: backward of F16 works in F32. */
static dpoc_conv dpoc_conv_of(const dpoc_run *r)
{
    const dpo_args *a = r->a;
    const dpo_view *x = &a->in[0], *w = &a->in[1], *y = a->backward ? &a->dout : &a->out;
    dpoc_conv g;
    memset(&g, 0, sizeof g);
    g.N = x->shape[0];  g.H = x->shape[1];  g.W = x->shape[2];  g.I = x->shape[3];
    g.Y = y->shape[1];  g.X = y->shape[2];  g.O = w->shape[0];
    g.kh = w->rank == 4 ? w->shape[1] : 1;
    g.kw = w->rank == 4 ? w->shape[2] : 1;
    g.r = a->in[5].data && a->in[6].data ? a->in[5].shape[0] : 0;
    g.K = g.kh*g.kw*g.I;  g.P = g.Y*g.X;  g.M = g.N*g.P;
    g.flat = g.kh == 1 && g.kw == 1 && a->p.conv.stride == 1 && !a->p.conv.pad_top && !a->p.conv.pad_left &&
             g.Y == g.H && g.X == g.W;
    g.type = x->dtype == DPO_BF16 || w->dtype == DPO_BF16 ? DPO_BF16 : x->dtype == DPO_F16 &&
        w->dtype == DPO_F16 ? DPO_F16 : DPO_F32;
    if (g.type == DPO_F32 && r->d->options[DPO_CUDA_PRODUCTS] == DPO_BF16) g.type = DPO_BF16;
    if (g.type == DPO_F16 && a->backward) g.type = DPO_F32;
    return g;
}

/* The tiles of one product of convolution: mode, the two factors; `lines` rows of the result a sample. */
static dpoc_tiles dpoc_tiles_of(const dpoc_conv *g, const dpo_args *a, int mode, int64_t O, const void *first,
                                const void *second)
{
    dpoc_tiles t;
    memset(&t, 0, sizeof t);
    t.mode = mode;  t.type = g->type;  t.splits = 1;
    t.H = (int)g->H;  t.W = (int)g->W;  t.I = (int)g->I;  t.Y = (int)g->Y;  t.X = (int)g->X;  t.O = (int)O;
    t.kh = (int)g->kh;  t.kw = (int)g->kw;
    t.stride = a->p.conv.stride;  t.top = a->p.conv.pad_top;  t.left = a->p.conv.pad_left;
    t.a = first;  t.b = second;
    t.rows  = mode == DPOC_Y ? g->M : mode == DPOC_DX ? g->N*g->H*g->W : O;
    t.cols  = mode == DPOC_Y ? O : mode == DPOC_DX ? g->I : g->K;
    t.depth = mode == DPOC_Y ? g->K : mode == DPOC_DX ? g->kh*g->kw*O : g->M;
    return t;
}

/* Can 16 bytes of a factor be loaded at once?  They must not cross from one tap's channels into the next's: I or O is a
   multiple of 8, or for F32 of 4. */
static int dpoc_wide(const dpoc_tiles *g, int second)
{
    int from = dpoc_from(g->mode, second);
    int channels = from == DPOC_FROM_X || from == DPOC_FROM_W || from == DPOC_FROM_WT ? g->I : g->O;
    return channels % (g->type == DPO_F32 ? 4 : 8) == 0 && (uintptr_t)(second ? g->b : g->a) % 16 == 0;
}

/* Can two neighbours of a row of the result be stored as one? */
static int dpoc_paired(const dpoc_tiles *g)
{
    uintptr_t to = g->splits > 1 ? (uintptr_t)g->part : g->mode == DPOC_Y ? (uintptr_t)g->f.y : (uintptr_t)g->out;
    return g->cols % 2 == 0 && to % 8 == 0;
}

/* The kernel of a type and a width, for each mode; F16 has no backward here, since gradients would leave its range. */
template<int type, int wide> static void dpoc_tiles_launch(dpoc_run *r, dpoc_tiles g, dim3 grid)
{
    enum { back = type == DPO_F16 ? DPO_BF16 : type };
    if (g.mode == DPOC_Y)
        DPOC_LAUNCH(r, (dpoc_conv_tensor_kernel<type, DPOC_Y, wide>), grid, DPOC_THREADS, (g));
    else if (g.mode == DPOC_DX)
        DPOC_LAUNCH(r, (dpoc_conv_tensor_kernel<back, DPOC_DX, wide>), grid, DPOC_THREADS, (g));
    else
        DPOC_LAUNCH(r, (dpoc_conv_tensor_kernel<back, DPOC_DW, wide>), grid, DPOC_THREADS, (g));
}
/* 128 columns a block, or 64 where that leaves less of the last one empty: 320 channels are five times 64.
   64 always for TF32, whose factors need more registers on the way, and where a factor cannot be loaded 16 bytes at a
   time: what that takes would stand in the way of all others. */
static void dpoc_tiles_tensor(dpoc_run *r, dpoc_tiles g, dim3 grid, int wide)
{
    if (g.type == DPO_F32)                     dpoc_tiles_launch<DPO_F32, 64>(r, g, grid);
    else if (g.type == DPO_BF16 && wide > 64)  dpoc_tiles_launch<DPO_BF16, 128>(r, g, grid);
    else if (g.type == DPO_BF16)               dpoc_tiles_launch<DPO_BF16, 64>(r, g, grid);
    else if (wide > 64)                        dpoc_tiles_launch<DPO_F16, 128>(r, g, grid);
    else                                       dpoc_tiles_launch<DPO_F16, 64>(r, g, grid);
}

/* Few tiles of a great depth would leave most processors idle: the depth is cut so that there are about 256 blocks,
   which is two a processor on the largest devices, and added afterwards in order.  Not cut by this device's processors:
   all devices give the same bits.  But by all rows, whatever samples they belong to: parts counted a sample would cost
   a large batch hundreds of megabytes, and cuBLASLt's products depend on the batch anyway.
   F32 goes to tensor cores as TF32, and only where DPO_CUDA_TF32 asks for it. */
static void dpoc_tiles_run(dpoc_run *r, dpoc_tiles g)
{
    const int *options = r->d->options;
    int     plain = r->d->major < 8 || options[DPO_CUDA_PLAIN];
    int     tensor = !plain && (g.type != DPO_F32 || options[DPO_CUDA_TF32]);
    int     wide = tensor && g.type != DPO_F32 && dpoc_wide(&g, 0) && dpoc_wide(&g, 1) && (g.cols + 127) % 128 >= 64
        ? 128 : (int)DPOC_SIDE;           /* unaligned factors give more tiles, hence no more parts than were counted */
    int64_t high = plain ? (int)DPOC_SIDE : (int)DPOC_HIGH, most = dpoc_pieces(g.depth, 512);
    int64_t tiles = dpoc_pieces(g.rows, high)*dpoc_pieces(g.cols, wide);
    int64_t splits = dpoc_least(dpoc_least(256/tiles < 1 ? 1 : 256/tiles, most), 64), limit = INT32_MAX - 256;
    if (g.rows > limit || g.cols > limit || g.depth > limit || dpoc_pieces(g.cols, DPOC_SIDE) > 65535) {
        r->status = dpoc_fail(r->d, DPO_UNSUPPORTED, "convolution", "more than 2^31 pixels");
        return;
    }
    if (dpoc_tiles_dnn(r, &g)) return;    /* only in builds with cuDNN */
    g.span = dpoc_pieces(dpoc_pieces(g.depth, splits), DPOC_DEPTH)*DPOC_DEPTH;
    g.splits = (int)dpoc_pieces(g.depth, g.span);
    if (g.splits > 1) g.part = (float *)dpoc_carve(r, (size_t)(g.splits*g.rows*g.cols)*sizeof(float));
    dim3 grid((unsigned)dpoc_pieces(g.rows, high), (unsigned)dpoc_pieces(g.cols, wide), (unsigned)g.splits);
    for (int w = 0; w < 2; w++) g.wide[w] = dpoc_wide(&g, w);
    g.pairs = dpoc_paired(&g);
    if (plain)                    DPOC_LAUNCH(r, dpoc_conv_kernel, grid, DPOC_THREADS, (g));
    else if (tensor)              dpoc_tiles_tensor(r, g, grid, wide);
    else if (g.mode == DPOC_Y)    DPOC_LAUNCH(r, (dpoc_conv_float_kernel<DPOC_Y>), grid, DPOC_THREADS, (g));
    else if (g.mode == DPOC_DX)   DPOC_LAUNCH(r, (dpoc_conv_float_kernel<DPOC_DX>), grid, DPOC_THREADS, (g));
    else                          DPOC_LAUNCH(r, (dpoc_conv_float_kernel<DPOC_DW>), grid, DPOC_THREADS, (g));
    if (g.splits > 1) DPOC_LAUNCH(r, dpoc_parts_kernel, dpoc_grid(g.rows*g.cols), DPOC_THREADS, (g));
}

/* y [M,O] = x W^T with nothing else, or with all of f: as a product of matrices, or as tiles. */
static void dpoc_conv_product(dpoc_run *r, const dpoc_conv *g, const void *x, const void *w, int64_t O, dpoc_finish f)
{
    dpoc_gemm  k;
    dpoc_tiles t;
    int        fits = !f.vec && f.act == DPO_NONE && (!f.bias || f.btype == f.ytype) &&
        (!f.residual || f.rtype == f.ytype);
    if (!g->flat) {
        t = dpoc_tiles_of(g, r->a, DPOC_Y, O, x, w);
        t.f = f;
        dpoc_tiles_run(r, t);
        return;
    }
    memset(&k, 0, sizeof k);
    k.m = g->M;  k.n = O;  k.k = g->I;  k.tb = 1;  k.A = x;  k.B = w;  k.type = g->type;
    k.C = f.y;  k.ctype = f.ytype;  k.alpha = 1;
    if (fits) {                           /* cuBLASLt adds the bias and the residual as it stores */
        k.bias = f.bias;
        if (f.residual) { k.D = f.residual;  k.beta = 1; }
    }
    dpoc_product(r, k);
    if (!fits) dpoc_finish_run(r, f);     /* a time embedding, an activation, a bias of another type: one pass more */
}

/* to [M,r] = scale strength[n] from [M,r], in the type of the factors. */
static const void *dpoc_strengthen(dpoc_run *r, const dpoc_conv *g, const float *from)
{
    const dpo_args *a = r->a;
    dpoc_strength s;
    memset(&s, 0, sizeof s);
    s.M = g->M;  s.n = g->r;  s.P = g->P;  s.scale = a->p.conv.scale;
    s.strength = a->in[7].data;  s.stype = a->in[7].dtype;  s.from = from;  s.type = g->type;
    s.to = dpoc_carve(r, (size_t)(g->M*g->r)*dpoc_size(g->type));
    DPOC_LAUNCH(r, dpoc_strength_kernel, dpoc_grid(g->M*g->r), DPOC_THREADS, (s));
    return s.to;
}

/* y += (scale strength u) up^T;   u goes to stat where backward will want it, else to scratch. */
static void dpoc_conv_adapter(dpoc_run *r, const dpoc_conv *g, const void *x)
{
    const dpo_args *a = r->a;
    dpoc_finish f;
    dpoc_gemm   k;
    memset(&f, 0, sizeof f);
    memset(&k, 0, sizeof k);
    f.M = g->M;  f.O = g->r;  f.P = g->P;  f.ytype = DPO_F32;
    f.y = a->stat.data ? a->stat.data : dpoc_carve(r, (size_t)(g->M*g->r)*sizeof(float));
    dpoc_conv_product(r, g, x, dpoc_as(r, &a->in[5], g->type), g->r, f);
    k.m = g->M;  k.n = g->O;  k.k = g->r;  k.tb = 1;  k.type = g->type;  k.ctype = a->out.dtype;
    k.A = dpoc_strengthen(r, g, (const float *)f.y);
    k.B = dpoc_as(r, &a->in[6], g->type);
    k.C = a->out.data;  k.alpha = k.beta = 1;
    dpoc_product(r, k);
}

/* Everything goes with the product, and an adapter's is added to what was stored: where that is zero, y is to the bit
   what it is without, so that a policy begins as its reference.  With an activation, which must see the whole sum, the
   product is stored bare, and what follows comes last. */
static void dpoc_conv_forward(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_conv   g = dpoc_conv_of(r);
    const void *x = dpoc_as(r, &a->in[0], g.type), *w = dpoc_as(r, &a->in[1], g.type);
    dpoc_finish f, bare;
    memset(&f, 0, sizeof f);
    f.M = g.M;  f.O = g.O;  f.P = g.P;  f.y = a->out.data;  f.ytype = a->out.dtype;
    bare = f;
    f.bias = a->in[2].data;      f.btype = a->in[2].dtype;
    f.vec = a->in[3].data;       f.vtype = a->in[3].dtype;
    f.residual = a->in[4].data;  f.rtype = a->in[4].dtype;
    f.act = a->p.conv.act;
    dpoc_conv_product(r, &g, x, w, g.O, g.r && f.act != DPO_NONE ? bare : f);
    if (g.r) dpoc_conv_adapter(r, &g, x);
    if (g.r && f.act != DPO_NONE) dpoc_finish_run(r, f);
}

/* din = or += product; as matrices where it is one: C [m,n], A, B as dpoc_gemm takes them. */
static void dpoc_conv_gradient(dpoc_run *r, const dpoc_conv *g, int mode, int64_t O, const void *first,
                               const void *second, void *to, int add)
{
    dpoc_gemm  k;
    dpoc_tiles t = dpoc_tiles_of(g, r->a, mode, O, first, second);
    t.out = (float *)to;  t.add = add;
    if (!g->flat) { dpoc_tiles_run(r, t);  return; }
    memset(&k, 0, sizeof k);
    k.m = t.rows;  k.n = t.cols;  k.k = t.depth;  k.ta = mode == DPOC_DW;
    k.A = first;  k.B = second;  k.C = to;  k.type = g->type;  k.ctype = DPO_F32;  k.alpha = 1;
    k.beta = add ? 1.0f : 0.0f;
    dpoc_product(r, k);
}

/* du = scale strength dy up, [M,r], in the type of the factors. */
static const void *dpoc_conv_du(dpoc_run *r, const dpoc_conv *g, const void *dy)
{
    dpoc_gemm k;
    memset(&k, 0, sizeof k);
    k.m = g->M;  k.n = g->r;  k.k = g->O;  k.A = dy;  k.B = dpoc_as(r, &r->a->in[6], g->type);
    k.type = g->type;  k.ctype = DPO_F32;  k.alpha = 1;
    k.C = dpoc_carve(r, (size_t)(g->M*g->r)*sizeof(float));
    dpoc_product(r, k);
    return dpoc_strengthen(r, g, (const float *)k.C);
}

/* dvec [N,O] and dbias [O]: sums of dy's columns. */
static void dpoc_conv_sums(dpoc_run *r, const dpoc_conv *g)
{
    const dpo_args *a = r->a;
    dpoc_columns k;
    if (!a->din[2].data && !a->din[3].data) return;
    memset(&k, 0, sizeof k);
    k.N = g->N;  k.P = g->P;  k.C = g->O;  k.kind = DPOC_COL_PLAIN;  k.dy = (const float *)a->dout.data;
    dpoc_columns_run(r, &k);
    dpoc_fold_run(r, k.part, 1, g->O, g->N*k.chunks, a->din[2].data, dpoc_adds(a, 2));
    dpoc_fold_run(r, k.part, g->N, g->O, k.chunks, a->din[3].data, dpoc_adds(a, 3));
}

/* dx = dy W + du down,  dW = dy^T x,  ddown = du^T x,  dup = dy^T (scale strength u).  The residual's gradient is dy
   itself, which the tape hands on. */
static void dpoc_conv_backward(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_conv   g = dpoc_conv_of(r);
    const void *dy = NULL, *x = NULL, *du = NULL;
    int         wanted = a->din[0].data || a->din[1].data || a->din[5].data || a->din[6].data;
    if (wanted) dy = dpoc_as(r, &a->dout, g.type);         /* gradients are F32 between ops, factors in products */
    if (a->din[1].data || a->din[5].data) x = dpoc_as(r, &a->in[0], g.type);
    if (g.r && (a->din[0].data || a->din[5].data)) du = dpoc_conv_du(r, &g, dy);
    if (a->din[0].data) {
        dpoc_conv_gradient(r, &g, DPOC_DX, g.O, dy, dpoc_as(r, &a->in[1], g.type), a->din[0].data, dpoc_adds(a, 0));
        if (g.r) dpoc_conv_gradient(r, &g, DPOC_DX, g.r, du, dpoc_as(r, &a->in[5], g.type), a->din[0].data, 1);
    }
    if (a->din[1].data) dpoc_conv_gradient(r, &g, DPOC_DW, g.O, dy, x, a->din[1].data, dpoc_adds(a, 1));
    if (a->din[5].data) dpoc_conv_gradient(r, &g, DPOC_DW, g.r, du, x, a->din[5].data, dpoc_adds(a, 5));
    if (a->din[6].data) {
        dpoc_gemm k;
        memset(&k, 0, sizeof k);
        k.m = g.O;  k.n = g.r;  k.k = g.M;  k.ta = 1;  k.A = dy;
        k.B = dpoc_strengthen(r, &g, (const float *)a->stat.data);
        k.C = a->din[6].data;  k.type = g.type;  k.ctype = DPO_F32;  k.alpha = 1;
        k.beta = dpoc_adds(a, 6) ? 1.0f : 0.0f;
        dpoc_product(r, k);
    }
    dpoc_conv_sums(r, &g);
}

/* x [N,H,W,I], w [O,kh,kw,I] -> y [N,Y,X,O]; linear layers are pictures of one column. */
static void dpoc_op_conv(dpoc_run *r)
{
    if (r->a->backward) dpoc_conv_backward(r);
    else dpoc_conv_forward(r);
}

/* ==========================================================================================================
   >>attention                                                                    plain and on tensor cores
   ==========================================================================================================

     s[i][j] = scale q[i].k[j]     p[i][j] = exp(s[i][j] - lse[i])     lse[i] = log sum_j exp(s[i][j])
     o[i] = sum_j p[i][j] v[j]     in every one of N*heads slices of d = D/heads channels; causal: j <= i
     delta[i] = do[i].o[i]         ds[i][j] = p[i][j] (do[i].v[j] - delta[i])
     dq[i] = scale sum_j ds[i][j] k[j]     dk[j] = scale sum_i ds[i][j] q[i]     dv[j] = sum_i p[i][j] do[i]

   Scores live in a tile of 32 x 32 and are made again in backward: nothing of size T x S is ever stored. */
typedef struct dpoc_attention {
    int64_t N, T, S, D, heads, d, strip, strips;           /* strip: channels of the result that a block owns */
    int     causal, type, otype, add[3];  /* type: of q, k, v; otype: of y and o */
    float   scale;
    const void  *q, *k, *v, *o;           /* [N,T,D], [N,S,D] twice, [N,T,D] */
    const float *dout;                    /* [N,T,D] */
    void   *y;
    float  *lse, *delta, *dq, *dk, *dv;   /* lse, delta [N,heads,T] */
} dpoc_attention;

enum { DPOC_TILE = 32, DPOC_STRIP = 256 };                 /* a thread holds 32 of 32 x 256 sums */

/* One row of a head as the plain kernels read it: rows D apart. */
static __device__ __forceinline__ int64_t dpoc_head(const dpoc_attention &g, int64_t slice, int64_t length)
{
    return slice/g.heads*length*g.D + slice%g.heads*g.d;
}

/* How many keys the queries before `end` see. */
static __device__ __forceinline__ int64_t dpoc_keys(const dpoc_attention &g, int64_t end)
{
    return g.causal ? dpoc_min(g.S, end) : g.S;
}

/* s[e] = row i of A . row j of B over d channels, i = thread/8, j = thread%8 + 8 e: a tile of 32 x 32 out of slices of
   32 channels.  Rows beyond their number count as zeros. */
static __device__ void dpoc_dots(const dpoc_attention &g, const void *A, int atype, int64_t a, int64_t rows,
                                 const void *B, int btype,
                                 int64_t b, int64_t cols, float s[4])
{
    __shared__ float as[DPOC_TILE][DPOC_TILE + 1], bs[DPOC_TILE][DPOC_TILE + 1];
    int t = (int)threadIdx.x, i = t/8, j = t % 8, lane = t % 32, warp = t/32;
    for (int e = 0; e < 4; e++) s[e] = 0;
    for (int64_t c = 0; c < g.d; c += DPOC_TILE) {
        __syncthreads();                  /* the last slice was read */
        for (int e = 0; e < 4; e++) {
            int row = warp + 8*e, in = c + lane < g.d;
            as[row][lane] = in && row < rows ? dpoc_get(A, atype, a + row*g.D + c + lane) : 0;
            bs[row][lane] = in && row < cols ? dpoc_get(B, btype, b + row*g.D + c + lane) : 0;
        }
        __syncthreads();
        for (int k = 0; k < DPOC_TILE; k++)
            for (int e = 0; e < 4; e++) s[e] += as[i][k]*bs[j + 8*e][k];
    }
}

/* sum[e] += sum_j p[i][j] B[j][column], column = thread%8 + 8 e of the strip from `first` on; B's rows from b on. */
static __device__ void dpoc_blend(const dpoc_attention &g, float (*p)[DPOC_TILE + 1], const void *B, int type,
                                  int64_t b, int64_t rows,
                                  int64_t first, float sum[DPOC_STRIP/8])
{
    __shared__ float bs[DPOC_TILE][DPOC_TILE + 1];
    int t = (int)threadIdx.x, i = t/8, j = t % 8, lane = t % 32, warp = t/32;
    DPOC_UNROLL
    for (int u = 0; u < DPOC_STRIP/DPOC_TILE; u++) {       /* unrolled: sums stay in registers */
        int64_t c = first + u*DPOC_TILE;
        if (u*DPOC_TILE >= g.strip || c >= g.d) continue;
        __syncthreads();
        for (int e = 0; e < 4; e++) {
            int row = warp + 8*e;
            bs[row][lane] = row < rows && c + lane < g.d ? dpoc_get(B, type, b + row*g.D + c + lane) : 0;
        }
        __syncthreads();
        for (int k = 0; k < DPOC_TILE; k++)
            for (int e = 0; e < 4; e++) sum[4*u + e] += p[i][k]*bs[k][j + 8*e];
    }
}

/* What a thread summed, times `factor`, to row i of y, which starts at `at`. */
static __device__ void dpoc_spill(const dpoc_attention &g, const float sum[DPOC_STRIP/8], float factor, int64_t first,
                                  void *y, int type,
                                  int64_t at, int add)
{
    DPOC_UNROLL
    for (int e = 0; e < DPOC_STRIP/8; e++) {
        int64_t c = first + (int)threadIdx.x % 8 + 8*e;
        if (8*e >= g.strip || c >= g.d) continue;
        dpoc_put(y, type, at + c, factor*sum[e] + (add ? dpoc_get(y, type, at + c) : 0));
    }
}

/* Which strip, tile of rows and slice a block has; blocks of one slice follow one another, so that its keys stay in
   cache. */
static __device__ __forceinline__ int64_t dpoc_tile_of(const dpoc_attention &g, int64_t length, int64_t *row,
                                                       int64_t *first)
{
    int64_t tiles = (length + DPOC_TILE - 1)/DPOC_TILE, u = blockIdx.x/tiles;
    *row = (blockIdx.x - u*tiles)*DPOC_TILE;
    *first = (int64_t)blockIdx.y*g.strip;
    return u;
}

/* The plain kernels are the oracle of those below, and serve F32, which parity is checked in, and heads that are too
   wide for registers.  Tiles of 32 x 32 are what eight warps share evenly: a thread has four scores of one row, eight
   threads a row, so that its maximum takes three shuffles; rows of shared memory are 33 numbers apart, so that neither
   walking along nor down them meets a bank twice. */

/* 32 queries a block, keys 32 at a time, with a running maximum: eight threads share a row. */
static __global__ void __launch_bounds__(DPOC_THREADS) dpoc_attention_kernel(dpoc_attention g)
{
    __shared__ float p[DPOC_TILE][DPOC_TILE + 1];
    int64_t row, first, u = dpoc_tile_of(g, g.T, &row, &first), q = dpoc_head(g, u, g.T) + row*g.D,
        k = dpoc_head(g, u, g.S);
    int64_t i = row + (int)threadIdx.x/8, keys = dpoc_keys(g, row + DPOC_TILE);
    float   sum[DPOC_STRIP/8], most = -FLT_MAX, total = 0, s[4];
    for (int e = 0; e < DPOC_STRIP/8; e++) sum[e] = 0;
    for (int64_t j0 = 0; j0 < keys; j0 += DPOC_TILE) {
        float high = most, shrink, part = 0;          /* of the row's scores so far, and of this tile's */
        dpoc_dots(g, g.q, g.type, q, g.T - row, g.k, g.type, k + j0*g.D, g.S - j0, s);
        for (int e = 0; e < 4; e++) {
            int64_t j = j0 + (int)threadIdx.x % 8 + 8*e;
            s[e] = j < g.S && (!g.causal || j <= i) ? s[e]*g.scale : -FLT_MAX;
            if (s[e] > high || s[e] != s[e]) high = s[e];
        }
        for (int m = 1; m < 8; m <<= 1) { float other = __shfl_xor_sync(~0u, high, m);
            high = other > high || other != other ? other : high; }
        shrink = expf(most - high);       /* what was summed stands for exp(s - most) */
        for (int e = 0; e < 4; e++) {
            s[e] = s[e] == -FLT_MAX ? 0 : expf(s[e] - high);
            part += s[e];
            p[threadIdx.x/8][threadIdx.x % 8 + 8*e] = s[e];
        }
        for (int m = 1; m < 8; m <<= 1) part += __shfl_xor_sync(~0u, part, m);
        total = total*shrink + part;
        most = high;
        DPOC_UNROLL
        for (int e = 0; e < DPOC_STRIP/8; e++) sum[e] *= shrink;
        dpoc_blend(g, p, g.v, g.type, k + j0*g.D, g.S - j0, first, sum);
        __syncthreads();                  /* p is written anew */
    }
    if (i >= g.T) return;                 /* rows behind the last one only helped to load */
    dpoc_spill(g, sum, 1/total, first, g.y, g.otype, dpoc_head(g, u, g.T) + i*g.D, 0);
    if (g.lse && threadIdx.x % 8 == 0 && blockIdx.y == 0) g.lse[u*g.T + i] = most + logf(total);
}

/* delta [N,heads,T]: a warp a row. */
static __global__ void dpoc_delta_kernel(dpoc_attention g)
{
    int     lane = (int)threadIdx.x % 32;
    int64_t warps = dpoc_units()/32;
    for (int64_t w = dpoc_unit()/32; w < g.N*g.heads*g.T; w += warps) {
        int64_t u = w/g.T, at = dpoc_head(g, u, g.T) + (w - u*g.T)*g.D;
        double  sum = 0;
        for (int64_t c = lane; c < g.d; c += 32) sum += (double)g.dout[at + c]*dpoc_get(g.o, g.otype, at + c);
        sum = dpoc_warp_sum(sum);
        if (lane == 0) g.delta[w] = (float)sum;
    }
}

/* p and ds of query i and key j, from their dots. */
static __device__ __forceinline__ void dpoc_slopes(const dpoc_attention &g, int64_t u, int64_t i, int64_t j,
                                                   float score, float dot, float *p, float *ds)
{
    *p = i < g.T && j < g.S && (!g.causal || j <= i) ? expf(score*g.scale - g.lse[u*g.T + i]) : 0;
    *ds = *p == 0 ? 0 : *p*(dot - g.delta[u*g.T + i]);
}

/* 32 queries a block against all keys that they see. */
static __global__ void __launch_bounds__(DPOC_THREADS) dpoc_dq_kernel(dpoc_attention g)
{
    __shared__ float ds[DPOC_TILE][DPOC_TILE + 1];
    int64_t row, first, u = dpoc_tile_of(g, g.T, &row, &first), q = dpoc_head(g, u, g.T) + row*g.D,
        k = dpoc_head(g, u, g.S);
    int64_t i = row + (int)threadIdx.x/8, keys = dpoc_keys(g, row + DPOC_TILE);
    float   sum[DPOC_STRIP/8], s[4], dp[4], p;
    for (int e = 0; e < DPOC_STRIP/8; e++) sum[e] = 0;
    for (int64_t j0 = 0; j0 < keys; j0 += DPOC_TILE) {
        dpoc_dots(g, g.q, g.type, q, g.T - row, g.k, g.type, k + j0*g.D, g.S - j0, s);
        dpoc_dots(g, g.dout, DPO_F32, q, g.T - row, g.v, g.type, k + j0*g.D, g.S - j0, dp);
        for (int e = 0; e < 4; e++) {
            int j = (int)threadIdx.x % 8 + 8*e;
            dpoc_slopes(g, u, i, j0 + j, s[e], dp[e], &p, &ds[threadIdx.x/8][j]);
        }
        dpoc_blend(g, ds, g.k, g.type, k + j0*g.D, g.S - j0, first, sum);
        __syncthreads();
    }
    if (i < g.T) dpoc_spill(g, sum, g.scale, first, g.dq, DPO_F32, dpoc_head(g, u, g.T) + i*g.D, g.add[0]);
}

/* 32 keys a block against all queries that see them: no two blocks add to one row. */
static __global__ void __launch_bounds__(DPOC_THREADS) dpoc_dkv_kernel(dpoc_attention g)
{
    __shared__ float ps[DPOC_TILE][DPOC_TILE + 1], ds[DPOC_TILE][DPOC_TILE + 1];
    int64_t row, first, u = dpoc_tile_of(g, g.S, &row, &first), q = dpoc_head(g, u, g.T),
        k = dpoc_head(g, u, g.S) + row*g.D;
    int64_t j = row + (int)threadIdx.x/8;
    float   dk[DPOC_STRIP/8], dv[DPOC_STRIP/8], s[4], dp[4];
    for (int e = 0; e < DPOC_STRIP/8; e++) dk[e] = dv[e] = 0;
    for (int64_t i0 = g.causal ? row : 0; i0 < g.T; i0 += DPOC_TILE) {
        dpoc_dots(g, g.k, g.type, k, g.S - row, g.q, g.type, q + i0*g.D, g.T - i0, s);
        dpoc_dots(g, g.v, g.type, k, g.S - row, g.dout, DPO_F32, q + i0*g.D, g.T - i0, dp);
        for (int e = 0; e < 4; e++) {
            int i = (int)threadIdx.x % 8 + 8*e;
            dpoc_slopes(g, u, i0 + i, j, s[e], dp[e], &ps[threadIdx.x/8][i], &ds[threadIdx.x/8][i]);
        }
        if (g.dk) dpoc_blend(g, ds, g.q, g.type, q + i0*g.D, g.T - i0, first, dk);
        if (g.dv) dpoc_blend(g, ps, g.dout, DPO_F32, q + i0*g.D, g.T - i0, first, dv);
        __syncthreads();
    }
    if (j >= g.S) return;                 /* as above */
    if (g.dk) dpoc_spill(g, dk, g.scale, first, g.dk, DPO_F32, dpoc_head(g, u, g.S) + j*g.D, g.add[1]);
    if (g.dv) dpoc_spill(g, dv, 1, first, g.dv, DPO_F32, dpoc_head(g, u, g.S) + j*g.D, g.add[2]);
}

/* ------------------------------------------------------------------------------------------ on tensor cores

   The same with factors of 16 bits.  A warp owns 16 rows (queries, or in dk and dv keys) and walks the other axis R
   rows at a time, 32 or 64: its scores are tiles of 16 x 8, which after the exponential are, register for register, the
   first factor of the next product; they never leave the registers.  Four warps share what they walk over, in shared
   memory: two stages of it, one under way while the other is used, as it lies in memory; ldmatrix turns it for sums
   over rows.  A row is 2*chunks + 1 units of 16 bytes, an odd number, so that eight rows lie in different banks.
   chunks: channels of a head in sixteens, a constant, so that everything stays in registers. */
enum { DPOC_QUERIES = 64, DPOC_FOUR_WARPS = 128 };

#define DPOC_LOG2E 1.44269504f

/* Rows of a slice, 16 of which a warp owns: the pairs that lane (g,t) holds of the first factor. */
template<int chunks>
static __device__ __forceinline__ void dpoc_own_rows(const uint16_t *x, int64_t at, int64_t left,
                                                     const dpoc_attention &g, uint32_t f[chunks][4])
{
    int row = (int)threadIdx.x % 32/4, t = (int)threadIdx.x % 4;
    DPOC_UNROLL
    for (int c = 0; c < chunks; c++) {
        DPOC_UNROLL
        for (int e = 0; e < 4; e++) {
            int i = row + e % 2*8, k = 16*c + 2*t + e/2*8;
            f[c][e] = i < left && k < g.d ? *(const uint32_t *)(x + at + i*g.D + k) : 0;
        }
    }
}

/* Rows of 40 to 160 channels are 5 to 20 units of 16 bytes; neighbours fetch neighbours.
   R rows of a slice on their way into shared memory; zeros behind the last row and channel.  Sixteen bytes a thread:
   heads are eights of channels here. */
template<int chunks, int R>
static __device__ __forceinline__ void dpoc_share_rows(const uint16_t *x, int64_t at, int64_t left,
                                                       const dpoc_attention &g, uint4 *to)
{
    for (int v = (int)threadIdx.x; v < R*2*chunks; v += DPOC_FOUR_WARPS) {
        int i = v/(2*chunks), u = v % (2*chunks), in = i < left && 8*u < g.d;
        dpoc_fetch16(to + i*(2*chunks + 1) + u, in ? x + at + i*g.D + 8*u : x, in);
    }
}

/* Keys and values from j0 on for one round, if there are any, as a group of fetches: keys first. */
template<int chunks, int R>
static __device__ __forceinline__ void dpoc_share_keys(const dpoc_attention &g, int64_t k, int64_t j0, int64_t keys,
                                                       uint4 *to)
{
    if (j0 < keys) {
        dpoc_share_rows<chunks, R>((const uint16_t *)g.k, k + j0*g.D, g.S - j0, g, to);
        dpoc_share_rows<chunks, R>((const uint16_t *)g.v, k + j0*g.D, g.S - j0, g, to + R*(2*chunks + 1));
    }
    dpoc_fetch_commit();
}

/* s [16][R] = own rows times R shared rows, or where `more` += that.  One load of four pieces is the second factor of
   two products: 16 rows by 16 channels. */
template<int type, int chunks, int R>
static __device__ __forceinline__ void dpoc_scores(const uint32_t f[chunks][4], const uint4 *b, float s[R/8][4],
                                                   int more = 0)
{
    int lane = (int)threadIdx.x % 32;
    b += (lane%8 + lane/16*8)*(2*chunks + 1) + lane/8%2;
    DPOC_UNROLL
    for (int j = 0; j < R/16; j++) {
        DPOC_UNROLL
        for (int e = 0; e < 8; e++) if (!more) s[2*j + e/4][e%4] = 0;
        DPOC_UNROLL
        for (int c = 0; c < chunks; c++) {
            uint32_t fb[4];
            dpoc_load4(fb, b + 16*j*(2*chunks + 1) + 2*c, 0);
            dpoc_mma<type>(s[2*j], f[c], fb);
            dpoc_mma<type>(s[2*j + 1], f[c], fb + 2);
        }
    }
}

/* sum [16][16*chunks] += p [16][R] times R shared rows, which are turned as they are loaded.  p is rounded to 16 bits
   here: at most 1, and summed in F32. */
template<int type, int chunks, int R>
static __device__ __forceinline__ void dpoc_gather_rows(const float p[R/8][4], const uint4 *b, float sum[2*chunks][4])
{
    int lane = (int)threadIdx.x % 32;
    b += lane%16*(2*chunks + 1) + lane/16;
    DPOC_UNROLL
    for (int k = 0; k < R/16; k++) {
        uint32_t fa[4] = { dpoc_pair<type>(p[2*k][0], p[2*k][1]), dpoc_pair<type>(p[2*k][2], p[2*k][3]),
                           dpoc_pair<type>(p[2*k + 1][0], p[2*k + 1][1]),
                           dpoc_pair<type>(p[2*k + 1][2], p[2*k + 1][3]) };
        DPOC_UNROLL
        for (int n = 0; n < chunks; n++) {
            uint32_t fb[4];
            dpoc_load4(fb, b + 16*k*(2*chunks + 1) + 2*n, 1);
            dpoc_mma<type>(sum[2*n], fa, fb);
            dpoc_mma<type>(sum[2*n + 1], fa, fb + 2);
        }
    }
}

/* A warp's sums, times a factor a row, to rows of y; neighbours as one store where they may be. */
template<int chunks>
static __device__ __forceinline__ void dpoc_spill_rows(const float sum[2*chunks][4], const float factor[2],
                                                       const dpoc_attention &g, void *y, int type, int64_t at,
                                                       int64_t left, int add)
{
    int row = (int)threadIdx.x % 32/4, t = (int)threadIdx.x % 4;
    DPOC_UNROLL
    for (int n = 0; n < 2*chunks; n++) {
        DPOC_UNROLL
        for (int h = 0; h < 2; h++) {
            int     i = row + 8*h, c = 8*n + 2*t;     /* both of a pair are there: d is a multiple of 8 */
            int64_t to = at + i*g.D + c;
            float   x[2] = { factor[h]*sum[n][2*h], factor[h]*sum[n][2*h + 1] };
            if (i >= left || c >= g.d) continue;
            if (type == DPO_F32) {
                float2 *p = (float2 *)((float *)y + to), v = { x[0], x[1] };
                if (add) { float2 old = *p;  v.x += old.x;  v.y += old.y; }
                *p = v;
            } else *(uint32_t *)((uint16_t *)y + to) = type == DPO_BF16 ? dpoc_pair<DPO_BF16>(x[0], x[1])
                : dpoc_pair<DPO_F16>(x[0], x[1]);
        }
    }
}

/* Slice and first row of a block of 64 rows. */
static __device__ __forceinline__ int64_t dpoc_block_rows(int64_t length, int64_t *row)
{
    int64_t tiles = (length + DPOC_QUERIES - 1)/DPOC_QUERIES, u = blockIdx.x/tiles;
    *row = (blockIdx.x - u*tiles)*DPOC_QUERIES;
    return u;
}

/* The running maximum `most` and sum `total` of a row meet R new scores, which become exp(s - most) in s; `shrink` is
   what older sums are worth now.  In units of log 2, for exp2 is one instruction.  i: the first row's query. */
template<int R>
static __device__ __forceinline__ void dpoc_soften(const dpoc_attention &g, float s[R/8][4], int64_t i, int64_t j0,
                                                   float most[2], float total[2], float shrink[2])
{
    float high[2] = { most[0], most[1] }, part[2] = { 0, 0 };
    DPOC_UNROLL
    for (int e = 0; e < R/2; e++) {
        int64_t j = j0 + e/4*8 + (int)threadIdx.x % 4*2 + e % 2;
        s[e/4][e % 4] = j < g.S && (!g.causal || j <= i + e % 4/2*8) ? s[e/4][e % 4]*(g.scale*DPOC_LOG2E) : -FLT_MAX;
        high[e % 4/2] = fmaxf(high[e % 4/2], s[e/4][e % 4]);
    }
    DPOC_UNROLL
    for (int h = 0; h < 2; h++) {         /* four lanes share a row */
        high[h] = fmaxf(high[h], __shfl_xor_sync(~0u, high[h], 1));
        high[h] = fmaxf(high[h], __shfl_xor_sync(~0u, high[h], 2));
    }
    DPOC_UNROLL
    for (int e = 0; e < R/2; e++) {
        float x = s[e/4][e % 4];
        x = x == -FLT_MAX ? 0 : exp2f(x - high[e % 4/2]);
        s[e/4][e % 4] = x;
        part[e % 4/2] += x;
    }
    DPOC_UNROLL
    for (int h = 0; h < 2; h++) {
        shrink[h] = exp2f(most[h] - high[h]);
        total[h] = total[h]*shrink[h] + part[h];
        most[h] = high[h];
    }
}

/* What is left when all keys were seen: lse, once for all strips, and in place of total what sums are multiplied by. */
static __device__ __forceinline__ void dpoc_soften_end(const dpoc_attention &g, int64_t u, int64_t own,
                                                       const float most[2], float total[2])
{
    int lane = (int)threadIdx.x % 32;
    DPOC_UNROLL
    for (int h = 0; h < 2; h++) {
        int64_t i = own + lane/4 + 8*h;
        total[h] += __shfl_xor_sync(~0u, total[h], 1);
        total[h] += __shfl_xor_sync(~0u, total[h], 2);
        if (g.lse && lane % 4 == 0 && blockIdx.y == 0 && i < g.T)
            g.lse[u*g.T + i] = (most[h] + log2f(total[h]))/DPOC_LOG2E;
        total[h] = 1/total[h];
    }
}

/* Forward, 64 queries a block.  Their own numbers are loaded once and stay in registers; keys and values go by. */
template<int type, int chunks, int R>
static __global__ void __launch_bounds__(DPOC_FOUR_WARPS) dpoc_attention_tensor_kernel(dpoc_attention g)
{
    enum { units = R*(2*chunks + 1) };
    uint4   *pool = dpoc_pool<4*units>();             /* keys and values, twice */
    int64_t  row, u = dpoc_block_rows(g.T, &row), k = dpoc_head(g, u, g.S), keys = dpoc_keys(g, row + DPOC_QUERIES);
    int64_t  own = row + (int)threadIdx.x/32*16, q = dpoc_head(g, u, g.T) + own*g.D;
    int      lane = (int)threadIdx.x % 32, turn = 0;
    float    sum[2*chunks][4], most[2] = { -FLT_MAX, -FLT_MAX }, total[2] = { 0, 0 }, shrink[2], s[R/8][4];
    uint32_t f[chunks][4];
    DPOC_UNROLL
    for (int n = 0; n < 2*chunks; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
    dpoc_own_rows<chunks>((const uint16_t *)g.q, q, g.T - own, g, f);
    for (int64_t j0 = -R; j0 < keys; j0 += R, turn ^= 1) {
        uint4 *now = pool + turn*2*units, *next = pool + (turn ^ 1)*2*units;
        dpoc_share_keys<chunks, R>(g, k, j0 + R, keys, next);
        if (j0 < 0) continue;             /* the first round only fetches */
        dpoc_fetch_wait<1>();
        __syncthreads();
        dpoc_scores<type, chunks, R>(f, now, s);
        dpoc_soften<R>(g, s, own + lane/4, j0, most, total, shrink);
        DPOC_UNROLL
        for (int n = 0; n < 2*chunks; n++) {          /* what was summed stands for exp(s - most) */
            DPOC_UNROLL
            for (int e = 0; e < 4; e++) sum[n][e] *= shrink[e/2];
        }
        dpoc_gather_rows<type, chunks, R>(s, now + units, sum);
        __syncthreads();                  /* the keys after the next come to the same place */
    }
    dpoc_soften_end(g, u, own, most, total);
    dpoc_spill_rows<chunks>(sum, total, g, g.y, g.otype, q, g.T - own, 0);
}

/* Forward of wide heads, the 512 channels of a VAE: 64 queries and a strip of 128 channels of the result a block.
   Queries do not fit into registers, nor all channels of anything into 48 KB: both they and the keys go by in slices
   of 64 channels, whose products add up to the scores, two slices in turn; the strip's values come with the second
   slice of a round, when those of the round before were read.  Each strip makes the scores anew: of 512 channels 2.5
   times the products that are needed, all on tensor cores, in place of one time on none. */
enum { DPOC_SLICE_CHUNKS = 4, DPOC_STRIP_CHUNKS = 8, DPOC_WIDEST = 160 };
template<int type> static __global__ void __launch_bounds__(DPOC_FOUR_WARPS)
dpoc_attention_split_kernel(dpoc_attention g)
{
    enum { chunks = DPOC_SLICE_CHUNKS, strip = DPOC_STRIP_CHUNKS, R = 32, wide = 16*chunks, line = 2*chunks + 1,
           units = (DPOC_QUERIES + R)*line };
    uint4   *pool = dpoc_pool<2*units + R*(2*strip + 1)>(), *values = pool + 2*units;
    int64_t  row, u = dpoc_block_rows(g.T, &row), k = dpoc_head(g, u, g.S), q = dpoc_head(g, u, g.T) + row*g.D;
    int64_t  own = row + (int)threadIdx.x/32*16, first = (int64_t)blockIdx.y*16*strip;
    int      lane = (int)threadIdx.x % 32, slices = (int)((g.d + wide - 1)/wide);
    int64_t  steps = (dpoc_keys(g, row + DPOC_QUERIES) + R - 1)/R*slices;
    float    sum[2*strip][4], most[2] = { -FLT_MAX, -FLT_MAX }, total[2] = { 0, 0 }, shrink[2], s[R/8][4];
    dpoc_attention part = g, own_strip = g;           /* d: the channels that are left from a slice or strip on */
    own_strip.d = g.d - first;
    DPOC_UNROLL
    for (int n = 0; n < 2*strip; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
    for (int64_t step = -1, j0 = 0; step < steps; step++) {
        uint32_t f[chunks][4];
        int64_t  to = step + 1, j = to/slices*R, c = to%slices;
        uint4   *now = pool + (step & 1)*units, *next = pool + (to & 1)*units;
        if (to < steps) {
            part.d = g.d - c*wide;
            dpoc_share_rows<chunks, DPOC_QUERIES>((const uint16_t *)g.q, q + c*wide, g.T - row, part, next);
            dpoc_share_rows<chunks, R>((const uint16_t *)g.k, k + j*g.D + c*wide, g.S - j, part,
                                       next + DPOC_QUERIES*line);
            if (c == 1)
                dpoc_share_rows<strip, R>((const uint16_t *)g.v, k + j*g.D + first, g.S - j, own_strip, values);
        }
        dpoc_fetch_commit();
        if (step < 0) continue;
        dpoc_fetch_wait<1>();
        __syncthreads();
        DPOC_UNROLL
        for (int e = 0; e < chunks; e++)
            dpoc_load4(f[e], now + ((int)threadIdx.x/32*16 + lane%16)*line + 2*e + lane/16, 0);
        dpoc_scores<type, chunks, R>(f, now + DPOC_QUERIES*line, s, step%slices != 0);
        if (step%slices == slices - 1) {
            dpoc_soften<R>(g, s, own + lane/4, j0, most, total, shrink);
            DPOC_UNROLL
            for (int n = 0; n < 8*strip; n++) sum[n/4][n%4] *= shrink[n%4/2];
            dpoc_gather_rows<type, strip, R>(s, values, sum);
            j0 += R;
        }
        __syncthreads();                  /* the slice after the next comes to the same place */
    }
    dpoc_soften_end(g, u, own, most, total);
    dpoc_spill_rows<strip>(sum, total, own_strip, g.y, g.otype, dpoc_head(g, u, g.T) + own*g.D + first, g.T - own, 0);
}

/* p and ds of a warp's tile of scores, in place of s and dp; lse and delta of the query that each number belongs to. */
static __device__ __forceinline__ void dpoc_tile_slopes(const dpoc_attention &g, float *s, float *dp, int seen,
                                                        float lse, float delta)
{
    float p = seen ? exp2f((*s*g.scale - lse)*DPOC_LOG2E) : 0;
    *s = p;
    *dp = seen ? p*(*dp - delta) : 0;
}

/* dq, 64 queries a block.  dout is `o` here: rounded like the other factors.  Scores and do.v are made from the same
   keys and values as in forward; ds then meets the keys a second time, turned. */
template<int chunks>
static __global__ void __launch_bounds__(DPOC_FOUR_WARPS) dpoc_dq_tensor_kernel(dpoc_attention g)
{
    enum { R = chunks > 8 ? 16 : 32, units = R*(2*chunks + 1), type = DPO_BF16 };      /* what registers there are */
    uint4   *pool = dpoc_pool<4*units>();
    int64_t  row, u = dpoc_block_rows(g.T, &row), k = dpoc_head(g, u, g.S), keys = dpoc_keys(g, row + DPOC_QUERIES);
    int64_t  own = row + (int)threadIdx.x/32*16, q = dpoc_head(g, u, g.T) + own*g.D;
    int      lane = (int)threadIdx.x % 32, turn = 0;
    float    sum[2*chunks][4], s[R/8][4], dp[R/8][4], lse[2] = { 0, 0 }, delta[2] = { 0, 0 };
    float    factor[2] = { g.scale, g.scale };
    uint32_t f[chunks][4], d[chunks][4];
    DPOC_UNROLL
    for (int n = 0; n < 2*chunks; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
    dpoc_own_rows<chunks>((const uint16_t *)g.q, q, g.T - own, g, f);
    dpoc_own_rows<chunks>((const uint16_t *)g.o, q, g.T - own, g, d);
    DPOC_UNROLL
    for (int h = 0; h < 2; h++) {
        int64_t i = own + lane/4 + 8*h;
        if (i < g.T) { lse[h] = g.lse[u*g.T + i];  delta[h] = g.delta[u*g.T + i]; }
    }
    for (int64_t j0 = -R; j0 < keys; j0 += R, turn ^= 1) {
        uint4 *now = pool + turn*2*units, *next = pool + (turn ^ 1)*2*units;
        dpoc_share_keys<chunks, R>(g, k, j0 + R, keys, next);
        if (j0 < 0) continue;
        dpoc_fetch_wait<1>();
        __syncthreads();
        dpoc_scores<type, chunks, R>(f, now, s);
        dpoc_scores<type, chunks, R>(d, now + units, dp);
        DPOC_UNROLL
        for (int e = 0; e < R/2; e++) {
            int64_t j = j0 + e/4*8 + lane % 4*2 + e % 2, i = own + lane/4 + e % 4/2*8;
            dpoc_tile_slopes(g, &s[e/4][e % 4], &dp[e/4][e % 4], i < g.T && j < g.S && (!g.causal || j <= i),
                             lse[e % 4/2], delta[e % 4/2]);
        }
        dpoc_gather_rows<type, chunks, R>(dp, now, sum);       /* dq += ds k */
        __syncthreads();
    }
    dpoc_spill_rows<chunks>(sum, factor, g, g.dq, DPO_F32, q, g.T - own, g.add[0]);
}

/* What a round of dk and dv walks over: R queries and rows of dout, with their lse and delta. */
template<int chunks, int R>
static __device__ __forceinline__ void dpoc_share_queries(const dpoc_attention &g, int64_t u, int64_t q, int64_t i0,
                                                          uint4 *to, float *lse)
{
    dpoc_share_rows<chunks, R>((const uint16_t *)g.q, q + i0*g.D, g.T - i0, g, to);
    dpoc_share_rows<chunks, R>((const uint16_t *)g.o, q + i0*g.D, g.T - i0, g, to + R*(2*chunks + 1));
    if (threadIdx.x < R) {
        int in = i0 + (int)threadIdx.x < g.T;
        lse[threadIdx.x] = in ? g.lse[u*g.T + i0 + threadIdx.x] : 0;
        lse[R + threadIdx.x] = in ? g.delta[u*g.T + i0 + threadIdx.x] : 0;
    }
}

/* dk and dv, 64 keys a block against all queries that see them; parts: 1 dk, 2 dv, 3 both.  Scores are those of forward
   with rows and columns exchanged, so that p and ds come out as the first factor that these sums want. */
template<int chunks, int parts>
static __global__ void __launch_bounds__(DPOC_FOUR_WARPS) dpoc_dkv_tensor_kernel(dpoc_attention g)
{
    enum { R = 32, units = R*(2*chunks + 1), type = DPO_BF16 };
    uint4   *pool = dpoc_pool<4*units + R>();         /* queries and dout, lse and delta, twice */
    float   *stat = (float *)(pool + 4*units);
    int64_t  row, u = dpoc_block_rows(g.S, &row), q = dpoc_head(g, u, g.T);
    int64_t  own = row + (int)threadIdx.x/32*16, k = dpoc_head(g, u, g.S) + own*g.D, begin = g.causal ? row : 0;
    int      lane = (int)threadIdx.x % 32, turn = 0;
    float    dk[2*chunks][4], dv[2*chunks][4], s[R/8][4], dp[R/8][4];
    float    factor[2] = { g.scale, g.scale }, one[2] = { 1, 1 };
    uint32_t fk[chunks][4], fv[chunks][4];
    DPOC_UNROLL
    for (int n = 0; n < 2*chunks; n++) { DPOC_UNROLL for (int e = 0; e < 4; e++) dk[n][e] = dv[n][e] = 0; }
    dpoc_own_rows<chunks>((const uint16_t *)g.k, k, g.S - own, g, fk);
    if (parts & 1) dpoc_own_rows<chunks>((const uint16_t *)g.v, k, g.S - own, g, fv);
    /* queries before the first key of a block see none of its keys where attention is causal */
    for (int64_t i0 = begin - R; i0 < g.T; i0 += R, turn ^= 1) {
        uint4 *now = pool + turn*2*units, *next = pool + (turn ^ 1)*2*units;
        if (i0 + R < g.T) dpoc_share_queries<chunks, R>(g, u, q, i0 + R, next, stat + (turn ^ 1)*2*R);
        dpoc_fetch_commit();
        if (i0 < begin) continue;
        dpoc_fetch_wait<1>();
        __syncthreads();
        dpoc_scores<type, chunks, R>(fk, now, s);
        if (parts & 1) dpoc_scores<type, chunks, R>(fv, now + units, dp);
        DPOC_UNROLL
        for (int e = 0; e < R/2; e++) {
            int     col = e/4*8 + lane % 4*2 + e % 2;
            int64_t i = i0 + col, j = own + lane/4 + e % 4/2*8;
            float   none = 0;
            dpoc_tile_slopes(g, &s[e/4][e % 4], parts & 1 ? &dp[e/4][e % 4] : &none,
                             i < g.T && j < g.S && (!g.causal || j <= i), stat[turn*2*R + col],
                             stat[turn*2*R + R + col]);
        }
        if (parts & 1) dpoc_gather_rows<type, chunks, R>(dp, now, dk);           /* dk += ds^T q */
        if (parts & 2) dpoc_gather_rows<type, chunks, R>(s, now + units, dv);    /* dv += p^T do */
        __syncthreads();
    }
    if ((parts & 1) && g.dk) dpoc_spill_rows<chunks>(dk, factor, g, g.dk, DPO_F32, k, g.S - own, g.add[1]);
    if ((parts & 2) && g.dv) dpoc_spill_rows<chunks>(dv, one, g, g.dv, DPO_F32, k, g.S - own, g.add[2]);
}

/* One width of heads.  64 keys a round where two stages of them fit into 48 KB. */
template<int type, int chunks> static void dpoc_attention_wide(dpoc_run *r, dpoc_attention g)
{
    unsigned slices = (unsigned)(g.N*g.heads);
    dim3     queries((unsigned)dpoc_pieces(g.T, DPOC_QUERIES)*slices);
    enum { R = chunks <= 5 ? 64 : 32 };   /* fewer, longer rounds: their barriers and rescaling cost */
    DPOC_LAUNCH(r, (dpoc_attention_tensor_kernel<type, chunks, R>), queries, DPOC_FOUR_WARPS, (g));
}
/* Heads that are wider than that. */
template<int type> static void dpoc_attention_split(dpoc_run *r, dpoc_attention g)
{
    dim3 strips((unsigned)(dpoc_pieces(g.T, DPOC_QUERIES)*g.N*g.heads),
                (unsigned)dpoc_pieces(g.d, 16*DPOC_STRIP_CHUNKS));
    DPOC_LAUNCH(r, dpoc_attention_split_kernel<type>, strips, DPOC_FOUR_WARPS, (g));
}
/* Three kernels at most, none of which adds to what another wrote.
   dk and dv share their scores, and dq makes them again: 7 products instead of 5, but no block adds to another's rows.
   Heads of more than 80 channels have no room for the sums of both in registers: dk and dv are launches of their own,
   8 products; such heads stand where pictures are small. */
template<int chunks> static void dpoc_attention_back(dpoc_run *r, dpoc_attention g)
{
    enum { both = chunks <= 5 };
    unsigned slices = (unsigned)(g.N*g.heads);
    dim3     queries((unsigned)dpoc_pieces(g.T, DPOC_QUERIES)*slices),
        keys((unsigned)dpoc_pieces(g.S, DPOC_QUERIES)*slices);
    if (g.dq) DPOC_LAUNCH(r, (dpoc_dq_tensor_kernel<chunks>), queries, DPOC_FOUR_WARPS, (g));
    if (both ? g.dk || g.dv : g.dk != NULL)
        DPOC_LAUNCH(r, (dpoc_dkv_tensor_kernel<chunks, (both ? 3 : 1)>), keys, DPOC_FOUR_WARPS, (g));
    if (!both && g.dv) DPOC_LAUNCH(r, (dpoc_dkv_tensor_kernel<chunks, (both ? 3 : 2)>), keys, DPOC_FOUR_WARPS, (g));
}
/* The narrowest width that holds a head; 40 channels as 48 waste a sixth. */
template<int type> static void dpoc_attention_forward(dpoc_run *r, const dpoc_attention *g)
{
    if (g->d <= 48)       dpoc_attention_wide<type, 3>(r, *g);
    else if (g->d <= 64)  dpoc_attention_wide<type, 4>(r, *g);
    else if (g->d <= 80)  dpoc_attention_wide<type, 5>(r, *g);
    else if (g->d <= 128) dpoc_attention_wide<type, 8>(r, *g);
    else if (g->d <= DPOC_WIDEST) dpoc_attention_wide<type, 10>(r, *g);
    else dpoc_attention_split<type>(r, *g);
}

/* Heads of Stable Diffusion: 40, 80, 160 channels (1.x), 64 (2.x, XL, CLIP), 512 (VAE).  Tensor cores take them if the
   numbers have 16 bits.  Decided by shape and options, never by what was there before. */
static int dpoc_attention_fits(const dpoc_run *r, const dpoc_attention *g)
{
    return r->d->major >= 8 && !r->d->options[DPO_CUDA_PLAIN] && g->d % 8 == 0;
}

/* 1 if it was done here.  Gradients need the range of BF16: backward of F16 is plain, and so is that of wide heads,
   which only a reward through a VAE wants. */
static int dpoc_attention_tensor(dpoc_run *r, const dpoc_attention *attention)
{
    const dpo_args *a = r->a;
    dpoc_attention  g = *attention;
    int             lines = ((uintptr_t)g.q | (uintptr_t)g.k | (uintptr_t)g.v | (uintptr_t)g.y | (uintptr_t)g.dq |
                             (uintptr_t)g.dk | (uintptr_t)g.dv) % 16 == 0;
    if (g.type == DPO_F32 || !lines || !dpoc_attention_fits(r, &g)) return 0;
    if (a->backward && (g.type != DPO_BF16 || g.d > DPOC_WIDEST)) return 0;
    if (!a->backward) {
        if (g.type == DPO_BF16) dpoc_attention_forward<DPO_BF16>(r, &g);
        else                    dpoc_attention_forward<DPO_F16>(r, &g);
        return 1;
    }
    g.o = dpoc_as(r, &a->dout, DPO_BF16); /* o itself is in delta already */
    if (g.d <= 48)       dpoc_attention_back<3>(r, g);
    else if (g.d <= 64)  dpoc_attention_back<4>(r, g);
    else if (g.d <= 80)  dpoc_attention_back<5>(r, g);
    else if (g.d <= 128) dpoc_attention_back<8>(r, g);
    else                 dpoc_attention_back<10>(r, g);
    return 1;
}

/* Slice h of sample n starts at n*T*D + h*d (S for keys), its rows are D apart: heads are never moved into place. */
static dpoc_attention dpoc_attention_of(const dpo_args *a)
{
    dpoc_attention g;
    memset(&g, 0, sizeof g);
    g.N = a->in[0].shape[0];  g.T = a->in[0].shape[1];  g.D = a->in[0].shape[2];  g.S = a->in[1].shape[1];
    g.heads = a->p.attention.heads;  g.d = g.D/g.heads;  g.causal = a->p.attention.causal;
    g.scale = a->p.attention.scale;
    g.strip = dpoc_least(g.d, DPOC_STRIP);  g.strips = dpoc_pieces(g.d, g.strip);
    g.otype = a->out.dtype;  g.o = a->out.data;  g.y = a->out.data;
    g.dout = (const float *)a->dout.data;  g.lse = (float *)a->stat.data;
    g.dq = (float *)a->din[0].data;  g.dk = (float *)a->din[1].data;  g.dv = (float *)a->din[2].data;
    for (int i = 0; i < 3; i++) g.add[i] = dpoc_adds(a, i);
    return g;
}

/* One type for q, k and v: that of q, or BF16 where factors that are F32 may be rounded; what has another is converted.
   */
static void dpoc_op_attention(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_attention  g = dpoc_attention_of(a);
    unsigned slices = (unsigned)(g.N*g.heads), strips = (unsigned)g.strips;
    g.type = a->in[0].dtype;
    if (g.type == DPO_F32 && r->d->options[DPO_CUDA_PRODUCTS] == DPO_BF16 && dpoc_attention_fits(r, &g)) g.type =
        DPO_BF16;
    g.q = dpoc_as(r, &a->in[0], g.type);  g.k = dpoc_as(r, &a->in[1], g.type);  g.v = dpoc_as(r, &a->in[2], g.type);
    /* delta is all that backward keeps of o; it is one number a query and head, and lives as long as the call */
    if (a->backward) g.delta = (float *)dpoc_carve(r, (size_t)(g.N*g.heads*g.T)*sizeof(float));
    dim3 queries((unsigned)dpoc_pieces(g.T, DPOC_TILE)*slices, strips),
        keys((unsigned)dpoc_pieces(g.S, DPOC_TILE)*slices, strips);
    if (a->backward) DPOC_LAUNCH(r, dpoc_delta_kernel, dpoc_grid(g.N*g.heads*g.T*32), DPOC_THREADS, (g));
    if (dpoc_attention_tensor(r, &g)) return;
    if (!a->backward) DPOC_LAUNCH(r, dpoc_attention_kernel, queries, DPOC_THREADS, (g));
    if (a->backward && g.dq) DPOC_LAUNCH(r, dpoc_dq_kernel, queries, DPOC_THREADS, (g));
    if (a->backward && (g.dk || g.dv)) DPOC_LAUNCH(r, dpoc_dkv_kernel, keys, DPOC_THREADS, (g));
}

/* ==========================================================================================================
   >>optimizer                                                             loss, clipping, AdamW, Adafactor
   ========================================================================================================== */

/* loss [1] = 1/B sum_b weight_b loss_b(inside_b), inside_b = beta/2 ((R_w - L_w) - (R_l - L_l)); stat [2,B]: inside,
   and d loss / d L_w = -beta/2 weight/B slope.  B is small: one block. */
typedef struct dpoc_preference {
    int64_t B;                            /* pairs */
    int kind, add, type[3], ytype;
    float beta, smoothing;
    const void *L, *R, *weight;           /* [2B] errors of policy and reference; [B] or NULL */
    const float *dy;                      /* [1] */
    void *y;
    float *stat, *d;                      /* [2,B], which may be NULL; [2B] */
} dpoc_preference;

/* loss(inside) and its slope: hinge max(0, 1 - inside), IPO (inside - 1/2)^2, else the sigmoid's with smoothing s. */
static __device__ double dpoc_preference_one(const dpoc_preference &g, float inside, double *slope)
{
    double s = g.smoothing, d;
    if (g.kind == DPO_PREF_HINGE) { *slope = inside < 1 ? -1 : 0;  return inside < 1 ? 1 - inside : 0; }
    if (g.kind == DPO_PREF_IPO)   { d = inside - 0.5;  *slope = 2*d;  return d*d; }
    *slope = s*dpoc_sigmoid(inside) - (1 - s)*dpoc_sigmoid(-inside);
    return -(1 - s)*dpoc_log_sigmoid(inside) - s*dpoc_log_sigmoid(-inside);
}
/* Differences of the same pair first, in double: errors near 0.1 that differ by 1e-5 would lose their digits. */
static __global__ void dpoc_preference_kernel(dpoc_preference g)
{
    double loss = 0, slope;
    for (int64_t b = threadIdx.x; b < g.B; b += DPOC_THREADS) {
        double w = dpoc_get(g.R, g.type[1], b) - (double)dpoc_get(g.L, g.type[0], b);
        double l = dpoc_get(g.R, g.type[1], g.B + b) - (double)dpoc_get(g.L, g.type[0], g.B + b);
        double share = (g.weight ? dpoc_get(g.weight, g.type[2], b) : 1)/(double)g.B;
        float  inside = (float)(0.5*g.beta*(w - l));
        loss += share*dpoc_preference_one(g, inside, &slope);
        if (g.stat) { g.stat[b] = inside;  g.stat[g.B + b] = (float)(-0.5*g.beta*share*slope); }
    }
    loss = dpoc_block_sum(loss);
    if (threadIdx.x == 0) dpoc_put(g.y, g.ytype, 0, (float)loss);
}
/* dL_w = dloss stat[1], dL_l = -dL_w; the reference gets no gradient. */
static __global__ void dpoc_preference_back_kernel(dpoc_preference g)
{
    for (int64_t b = threadIdx.x; b < g.B; b += DPOC_THREADS) {
        float d = g.dy[0]*g.stat[g.B + b];
        g.d[b]       = (g.add ? g.d[b] : 0) + d;
        g.d[g.B + b] = (g.add ? g.d[g.B + b] : 0) - d;
    }
}
/* policy, reference [2B], winners first. */
static void dpoc_op_preference(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_preference g;
    memset(&g, 0, sizeof g);
    g.B = a->in[0].shape[0]/2;  g.kind = a->p.preference.kind;  g.beta = a->p.preference.beta;
    g.smoothing = a->p.preference.smoothing;
    g.L = a->in[0].data;  g.R = a->in[1].data;  g.weight = a->in[2].data;
    for (int i = 0; i < 3; i++) g.type[i] = a->in[i].dtype;
    g.y = a->out.data;  g.ytype = a->out.dtype;  g.stat = (float *)a->stat.data;
    g.dy = (const float *)a->dout.data;  g.d = (float *)a->din[0].data;  g.add = dpoc_adds(a, 0);
    /* a loss that diffdpo.h has learned since */
    if (g.kind < DPO_PREF_SIGMOID || g.kind > DPO_PREF_IPO) {
        r->status = dpoc_fail(r->d, DPO_UNSUPPORTED, "preference", "no such loss");
        return;
    }
    if (!a->backward) DPOC_LAUNCH(r, dpoc_preference_kernel, 1, DPOC_THREADS, (g));
    else if (g.d)     DPOC_LAUNCH(r, dpoc_preference_back_kernel, 1, DPOC_THREADS, (g));
}

/* MaPO: loss [1] = 1/B sum_b weight_b (L_w - lambda log sigmoid(1000 (phi(L_w) - phi(L_l)))), in double for the 1000 */
typedef struct dpoc_mapo {
    int64_t B;                            /* pairs */
    int add, type[2], ytype;
    double lambda;
    const void *L, *weight;               /* [2B], winners first; [B] or NULL */
    const float *dy;                      /* [1] */
    void *y;
    float *stat, *d;                      /* [2B] dloss/dL, which may be NULL; [2B] */
} dpoc_mapo;

/* phi = u/(exp(u) - 1), u = L/2, and its slope by L: as in >>impl ops of diffdpo.h. */
static __device__ double dpoc_mapo_phi(double L, double *slope)
{
    double u = 0.5*L, e = expm1(u);
    if (fabs(u) < 1e-8) { *slope = -0.25;  return 1 - 0.5*u; }
    if (e > 1e300)      { *slope = 0;      return 0; }
    *slope = 0.5*(1 - u*(e + 1)/e)/e;
    return u/e;
}
/* stat keeps the slopes, so that backward is a product. */
static __global__ void dpoc_mapo_kernel(dpoc_mapo g)
{
    double loss = 0, dw, dl;
    for (int64_t b = threadIdx.x; b < g.B; b += DPOC_THREADS) {
        double w = dpoc_get(g.L, g.type[0], b), l = dpoc_get(g.L, g.type[0], g.B + b);
        double share = (g.weight ? dpoc_get(g.weight, g.type[1], b) : 1)/(double)g.B;
        double z = 1000*(dpoc_mapo_phi(w, &dw) - dpoc_mapo_phi(l, &dl)), e = exp(-fabs(z));
        double slope = 1000*g.lambda*(z < 0 ? 1 : e)/(1 + e);             /* 1000 lambda sigmoid(-z) */
        loss += share*(w - g.lambda*((z < 0 ? z : 0) - log1p(e)));
        if (g.stat) { g.stat[b] = (float)(share*(1 - slope*dw));  g.stat[g.B + b] = (float)(share*slope*dl); }
    }
    loss = dpoc_block_sum(loss);
    if (threadIdx.x == 0) dpoc_put(g.y, g.ytype, 0, (float)loss);
}
/* The same share for every number: forward has done the work. */
static __global__ void dpoc_mapo_back_kernel(dpoc_mapo g)
{
    for (int64_t i = threadIdx.x; i < 2*g.B; i += DPOC_THREADS) g.d[i] = (g.add ? g.d[i] : 0) + g.dy[0]*g.stat[i];
}
/* One block, as for pairs of the other losses. */
static void dpoc_op_mapo(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_mapo g;
    memset(&g, 0, sizeof g);
    g.B = a->in[0].shape[0]/2;  g.lambda = a->p.mapo.lambda;
    g.L = a->in[0].data;  g.weight = a->in[1].data;  g.type[0] = a->in[0].dtype;  g.type[1] = a->in[1].dtype;
    g.y = a->out.data;  g.ytype = a->out.dtype;  g.stat = (float *)a->stat.data;
    g.dy = (const float *)a->dout.data;  g.d = (float *)a->din[0].data;  g.add = dpoc_adds(a, 0);
    if (!a->backward) DPOC_LAUNCH(r, dpoc_mapo_kernel, 1, DPOC_THREADS, (g));
    else if (g.d)     DPOC_LAUNCH(r, dpoc_mapo_back_kernel, 1, DPOC_THREADS, (g));
}

/* record.factor = min(1, max_norm/(norm + 1e-6)), 0 and one more skip for a norm that is not a number. */
typedef struct dpoc_clip {
    int64_t n;                            /* gradients */
    const void *sums;                     /* [n]: the sum of squares of each */
    int type;
    float most;                           /* the norm that is allowed; 0: any */
    float *record;                        /* the step record */
} dpoc_clip;
/* A sum of squares beyond the range of float is infinite, and skips the step as well. */
static __global__ void dpoc_clip_kernel(dpoc_clip g)
{
    double sum = 0, norm, factor = 1;
    for (int64_t i = threadIdx.x; i < g.n; i += DPOC_THREADS) sum += dpoc_get(g.sums, g.type, i);
    sum = dpoc_block_sum(sum);
    norm = sqrt(sum);
    if (threadIdx.x) return;
    if (g.most > 0 && norm + 1e-6 > g.most) factor = g.most/(norm + 1e-6);
    if (!(sum <= DBL_MAX)) { factor = 0;  g.record[DPO_REC_SKIPPED] += 1; }
    g.record[DPO_REC_FACTOR] = (float)factor;
    g.record[DPO_REC_NORM] = (float)norm;
}
/* sums [P] -> the step record, which the optimizer's kernels read: nothing goes to the host. */
static void dpoc_op_clip(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_clip g;
    memset(&g, 0, sizeof g);
    g.n = dpoc_count(&a->in[0]);  g.sums = a->in[0].data;  g.type = a->in[0].dtype;  g.most = a->p.clip.max_norm;
    g.record = (float *)a->out.data;
    DPOC_LAUNCH(r, dpoc_clip_kernel, 1, DPOC_THREADS, (g));
}

/* ------------------------------------------------------------------------------------------ many tensors a launch

   The optimizers and the squares of gradients come as one call a tensor, hundreds in a row.  They are gathered, up to
   DPOC_BATCH, and run as one launch (Adafactor: as six) when another call, a copy or the end of the step comes: see
   dpoc_flush.  A tensor has a number of blocks that its shape and the pass decide, and a block finds its tensor in a
   list of their sums: 40 comparisons beside the 16384 numbers of a piece. */
enum { DPOC_PIECES, DPOC_ROW_PASS, DPOC_COLUMN_PASS };
enum { DPOC_WHOLE, DPOC_MATRIX, DPOC_KERNEL };

/* Passed by value: 40 tensors are 3.4 KB of the 4 KB that a kernel's arguments may have, and what is passed by value a
   graph keeps without further ado. */
typedef struct dpoc_many {
    int     count, first[DPOC_BATCH + 1]; /* tensors; the first block of each, and how many there are */
    float   beta1, beta2, eps, decay, clip;           /* as in dpo_params */
    const float *record;                  /* the step record, but for SUM_SQUARES */
    double *part, *total;                 /* [all pieces]; of Adafactor [count][2]: mean of row, sum of u^2 */
    dpoc_one one[DPOC_BATCH];
} dpoc_many;
static_assert(sizeof(dpoc_many) <= 4096, "what a kernel's arguments may have");

/* Which tensor a block belongs to, and which of its blocks it is. */
static __device__ __forceinline__ int dpoc_find(const dpoc_many &g, int *block)
{
    int at = 0;
    while (at + 1 < g.count && (int)blockIdx.x >= g.first[at + 1]) at++;
    *block = (int)blockIdx.x - g.first[at];
    return at;
}
/* First number of a piece, and where it ends.  Pieces have one size whatever else there is, so that sums over them are
   the same bits in any company. */
static __device__ __forceinline__ int64_t dpoc_piece(const dpoc_one &one, int block, int64_t *end)
{
    *end = dpoc_min(((int64_t)block + 1)*DPOC_PIECE, one.n);
    return (int64_t)block*DPOC_PIECE;
}

/* m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  w <- decay w - rate m / (root sqrt(v) + eps).  arXiv 1711.05101. */
static __global__ void dpoc_adamw_kernel(dpoc_many g)
{
    int     block, at = dpoc_find(g, &block);
    int64_t end, first = dpoc_piece(g.one[at], block, &end);
    float   factor = g.record[DPO_REC_FACTOR], lr = g.record[DPO_REC_LR];
    float   decay = (float)(1 - (double)lr*g.decay), rate = lr/g.record[DPO_REC_BIAS1],
        root = (float)(1/sqrt((double)g.record[DPO_REC_BIAS2]));
    /* the factors that all numbers share are formed in double, once a thread */
    if (factor == 0) return;              /* a skipped step leaves all as it is */
    /* by reference: what a kernel was passed lies in constant memory, and a copy of it would not */
    const dpoc_one &one = g.one[at];
    int quads = one.n % 4 == 0 && one.aligned, wide = quads ? 4 : 1;
    for (int64_t i = first + (int64_t)threadIdx.x*wide; i < end; i += DPOC_THREADS*wide) {
        float d[4], m[4], v[4], w[4];
        dpoc_take(one.g, DPO_F32, i, quads, d);
        dpoc_take(one.m, DPO_F32, i, quads, m);
        dpoc_take(one.v, DPO_F32, i, quads, v);
        dpoc_take(one.w, DPO_F32, i, quads, w);
        DPOC_EACH(k, quads) {
            d[k] *= factor;
            m[k] = g.beta1*m[k] + (1 - g.beta1)*d[k];
            v[k] = g.beta2*v[k] + (1 - g.beta2)*d[k]*d[k];
            w[k] = decay*w[k] - rate*m[k]/(root*sqrtf(v[k]) + g.eps);
        }
        dpoc_give(one.m, DPO_F32, i, quads, m);
        dpoc_give(one.v, DPO_F32, i, quads, v);
        dpoc_give(one.w, DPO_F32, i, quads, w);
    }
}

/* AdamW with moments of 8 bits, see >>impl optim of diffdpo.h: a code is one of 256 levels times the largest of its
   block of 256 numbers, which a block of threads takes at a time, one each. */
enum { DPOC_LEVELS = 256 };

/* Level k of a moment with a sign (129 of them, from 0 on) or without (256). */
static __device__ float dpoc_level(int k, int sign)
{
    double decade = 1e-6;
    int    n = 1;
    if (k == 0) return 0;
    for (int i = 0; i < 7; i++, decade *= 10) {
        int parts = 1 << (sign ? i : i + 1);
        if (k < n + parts) return (float)(decade*(0.1 + 0.9*(k - n + 0.5)/parts));
        n += parts;
    }
    return 1;
}
/* The nearest of `count` ascending levels; the lower one in the middle. */
static __device__ int dpoc_level_near(const float *level, int count, float a)
{
    int low = 0, high = count - 1;
    while (low < high) {
        int k = (low + high + 1)/2;
        if (a > 0.5f*(level[k - 1] + level[k])) low = k; else high = k - 1;
    }
    return low;
}
/* The largest of a block of DPOC_THREADS, through part [DPOC_THREADS]. */
static __device__ float dpoc_block_most(float *part, float x)
{
    __syncthreads();
    part[threadIdx.x] = x;
    for (unsigned k = DPOC_THREADS/2; k; k /= 2) {
        __syncthreads();
        if (threadIdx.x < k && part[threadIdx.x + k] > part[threadIdx.x]) part[threadIdx.x] = part[threadIdx.x + k];
    }
    __syncthreads();
    return part[0];
}
/* The levels are made anew in shared memory by each block, one a thread; it then walks the 64 blocks of its piece. */
static __global__ void dpoc_adamw8_kernel(dpoc_many g)
{
    __shared__ float lm[DPOC_LEVELS], lv[DPOC_LEVELS], part[DPOC_THREADS];
    int     block, at = dpoc_find(g, &block);
    int64_t end, first = dpoc_piece(g.one[at], block, &end);
    float   factor = g.record[DPO_REC_FACTOR], lr = g.record[DPO_REC_LR], rate = lr/g.record[DPO_REC_BIAS1];
    float   keep = (float)(1 - (double)lr*g.decay), root = (float)(1/sqrt((double)g.record[DPO_REC_BIAS2]));
    const dpoc_one &one = g.one[at];
    unsigned char  *mc = (unsigned char *)one.m, *vc = (unsigned char *)one.v;
    if (factor == 0) return;              /* a skipped step leaves all as it is */
    lm[threadIdx.x] = dpoc_level(threadIdx.x < 129 ? (int)threadIdx.x : 128, 1);
    lv[threadIdx.x] = dpoc_level((int)threadIdx.x, 0);
    __syncthreads();
    for (; first < end; first += DPOC_THREADS) {
        int64_t i = first + threadIdx.x, u = first/DPOC_THREADS;
        float   m = 0, v = 0, top, a;
        if (i < end) {
            int   c = mc[i];
            float d = factor*one.g[i];
            m = one.ms[u]*(c >= 127 ? lm[c - 127] : -lm[127 - c]);
            m = g.beta1*m + (1 - g.beta1)*d;
            v = g.beta2*one.vs[u]*lv[vc[i]] + (1 - g.beta2)*d*d;
            one.w[i] = keep*one.w[i] - rate*m/(root*sqrtf(v) + g.eps);
        }
        top = dpoc_block_most(part, fabsf(m));
        a = top > 0 ? fabsf(m)/top : 0;
        if (i < end) {
            int k = dpoc_level_near(lm, 129, a);
            mc[i] = (unsigned char)(m >= 0 ? 127 + k : 127 - (k < 127 ? k : 127));
        }
        if (threadIdx.x == 0) one.ms[u] = top;
        top = dpoc_block_most(part, v);
        a = top > 0 ? v/top : 0;
        if (i < end) {                    /* what is not 0 keeps the lowest level, or a step would have no bounds */
            int k = dpoc_level_near(lv, DPOC_LEVELS, a);
            vc[i] = (unsigned char)(k || v == 0 ? k : 1);
        }
        if (threadIdx.x == 0) one.vs[u] = top;
    }
}

/* A block a piece, as in >>sums. */
static __global__ void dpoc_squares_kernel(dpoc_many g)
{
    int     block, at = dpoc_find(g, &block);
    int64_t end, first = dpoc_piece(g.one[at], block, &end);
    double  sum = 0;
    for (int64_t i = first + threadIdx.x; i < end; i += DPOC_THREADS) sum += (double)g.one[at].g[i]*g.one[at].g[i];
    sum = dpoc_block_sum(sum);
    if (threadIdx.x == 0) g.part[blockIdx.x] = sum;
}
/* The sum of a tensor's pieces, for all threads of a block. */
static __device__ double dpoc_pieces_sum(const dpoc_many &g, int at)
{
    double sum = 0;
    for (int k = g.first[at] + (int)threadIdx.x; k < g.first[at + 1]; k += DPOC_THREADS) sum += g.part[k];
    return dpoc_block_sum(sum);
}
/* A block a tensor. */
static __global__ void dpoc_squares_fold_kernel(dpoc_many g)
{
    double sum = dpoc_pieces_sum(g, (int)blockIdx.x);
    if (threadIdx.x == 0) g.one[blockIdx.x].w[0] = (float)sum;
}

/* ------------------------------------------------------------------------------------------ Adafactor

   arXiv 1804.04235, algorithm 4 with a given step size; the formula stands in >>impl optim of diffdpo.h.  m is row,
   v col:
     whole    col as the weight: every square for itself
     matrix   row [O] means over i, col [I] means over o
     kernel   row [O,kh,1,I] means over x, col [O,1,kw,I] means over y
   Six passes: rows; columns; the mean of row; the pieces' sums of u^2; their sum; the step.  Every one of them looks at
   the record first, so that a skipped step changes nothing. */

/* y <- (1 - share) y + share (mean + eps) */
static __device__ __forceinline__ void dpoc_adafactor_blend(const dpoc_many &g, float *y, double mean)
{
    float share = g.record[DPO_REC_BIAS2];
    *y = (1 - share)* *y + share*((float)mean + g.eps);
}
/* The square of a clipped gradient. */
static __device__ __forceinline__ double dpoc_adafactor_square(const dpoc_many &g, const dpoc_one &one, int64_t at)
{
    double d = (double)g.record[DPO_REC_FACTOR]*one.g[at];
    return d*d;
}
/* A factor of a 3x3 kernel, a thread each: three squares make one, and neighbours lie side by side in all of them.
    row: (o*kh + y)*I + i, over x;  col: (o*kw + x)*I + i, over y. */
static __device__ void dpoc_adafactor_kernel_factor(const dpoc_many &g, const dpoc_one &one, int64_t u, int column)
{
    int64_t q = dpoc_div(u, one.I), i = u - q*one.I, per = column ? one.kw : one.kh;
    int64_t o = dpoc_div(q, per), rest = q - o*per;
    int64_t at = o*one.kh*one.kw*one.I + (column ? rest*one.I : rest*one.kw*one.I) + i;
    int64_t step = column ? (int64_t)one.kw*one.I : one.I;
    int     along = column ? one.kh : one.kw;
    double  sum = 0;
    if (o >= one.O) return;
    for (int k = 0; k < along; k++) sum += dpoc_adafactor_square(g, one, at + k*step);
    dpoc_adafactor_blend(g, (column ? one.v : one.m) + u, sum/along);
}
/* Rows.  A warp a row of a matrix, whose numbers lie side by side; the last block of a tensor may have idle warps. */
static __global__ void dpoc_adafactor_rows_kernel(dpoc_many g)
{
    int     block, at = dpoc_find(g, &block), lane = (int)threadIdx.x % 32;
    const dpoc_one &one = g.one[at];
    int64_t o = (int64_t)block*DPOC_WARPS + (int)threadIdx.x/32;
    double  sum = 0;
    if (g.record[DPO_REC_FACTOR] == 0) return;
    if (one.kind == DPOC_KERNEL) dpoc_adafactor_kernel_factor(g, one, (int64_t)block*DPOC_THREADS + threadIdx.x, 0);
    if (one.kind != DPOC_MATRIX || o >= one.O) return;
    for (int64_t i = lane; i < one.I; i += 32) sum += dpoc_adafactor_square(g, one, o*one.I + i);
    sum = dpoc_warp_sum(sum);
    if (lane == 0) dpoc_adafactor_blend(g, one.m + o, sum/one.I);
}
/* Columns.  32 of a matrix a block, whose warps take every eighth row and are added in their order: a thread a column
   would walk thousands of rows alone. */
static __global__ void dpoc_adafactor_columns_kernel(dpoc_many g)
{
    __shared__ double part[DPOC_WARPS][DPOC_COLUMNS];
    int     block, at = dpoc_find(g, &block), lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x/32;
    const dpoc_one &one = g.one[at];
    int64_t end, first = dpoc_piece(one, block, &end), i = (int64_t)block*DPOC_COLUMNS + lane;
    double  sum = 0;
    if (g.record[DPO_REC_FACTOR] == 0) return;
    if (one.kind == DPOC_KERNEL) dpoc_adafactor_kernel_factor(g, one, (int64_t)block*DPOC_THREADS + threadIdx.x, 1);
    if (one.kind == DPOC_WHOLE)
        for (first += threadIdx.x; first < end; first += DPOC_THREADS)
            dpoc_adafactor_blend(g, one.v + first, dpoc_adafactor_square(g, one, first));
    if (one.kind != DPOC_MATRIX) return;
    for (int64_t o = warp; o < one.O && i < one.I; o += DPOC_WARPS) sum += dpoc_adafactor_square(g, one, o*one.I + i);
    part[warp][lane] = sum;
    __syncthreads();
    if (warp || i >= one.I) return;
    for (int k = 1; k < DPOC_WARPS; k++) sum += part[k][lane];
    dpoc_adafactor_blend(g, one.v + i, sum/one.O);
}
/* total[at][0] = mean of row, a block a tensor. */
static __global__ void dpoc_adafactor_mean_kernel(dpoc_many g)
{
    const dpoc_one &one = g.one[blockIdx.x];
    double sum = 0;
    if (one.kind != DPOC_MATRIX) return;
    for (int o = (int)threadIdx.x; o < one.O; o += DPOC_THREADS) sum += one.m[o];
    sum = dpoc_block_sum(sum);
    if (threadIdx.x == 0) g.total[2*blockIdx.x] = sum/one.O;
}
/* u of number `at`: the gradient over the root of what the factors say of its square. */
static __device__ float dpoc_adafactor_u(const dpoc_many &g, const dpoc_one &one, float row_mean, int64_t at)
{
    float   d = g.record[DPO_REC_FACTOR]*one.g[at], mean = 0;
    if (one.kind == DPOC_WHOLE)  return 1/sqrtf(one.v[at])*d;
    int64_t q = dpoc_div(at, one.I), i = at - q*one.I;
    if (one.kind == DPOC_MATRIX) return 1/sqrtf(one.m[q]/row_mean)/sqrtf(one.v[i])*d;
    int64_t p = dpoc_div(q, one.kw), x = q - p*one.kw, o = dpoc_div(p, one.kh), y = p - o*one.kh;
    for (int k = 0; k < one.kh; k++) mean += one.m[(o*one.kh + k)*one.I + i];
    mean /= (float)one.kh;
    return 1/sqrtf(one.m[(o*one.kh + y)*one.I + i]/mean)/sqrtf(one.v[(o*one.kw + x)*one.I + i])*d;
}
/* part[piece] = sum of u^2, with the factors of this step. */
static __global__ void dpoc_adafactor_norm_kernel(dpoc_many g)
{
    int     block, at = dpoc_find(g, &block);
    int64_t end, first = dpoc_piece(g.one[at], block, &end);
    float   mean = (float)g.total[2*at];
    double  sum = 0;
    if (g.record[DPO_REC_FACTOR] == 0) return;
    for (int64_t i = first + threadIdx.x; i < end; i += DPOC_THREADS) {
        float u = dpoc_adafactor_u(g, g.one[at], mean, i);
        sum += (double)u*u;
    }
    sum = dpoc_block_sum(sum);
    if (threadIdx.x == 0) g.part[blockIdx.x] = sum;
}
/* total[at][1] = the sum of all pieces. */
static __global__ void dpoc_adafactor_total_kernel(dpoc_many g)
{
    double sum;
    if (g.record[DPO_REC_FACTOR] == 0) return;
    sum = dpoc_pieces_sum(g, (int)blockIdx.x);
    if (threadIdx.x == 0) g.total[2*blockIdx.x + 1] = sum;
}
/* w <- keep w - rate u, rate = lr / max(1, rms(u)/clip) */
static __global__ void dpoc_adafactor_step_kernel(dpoc_many g)
{
    int     block, at = dpoc_find(g, &block);
    int64_t end, first = dpoc_piece(g.one[at], block, &end);
    double  lr = g.record[DPO_REC_LR], rms = sqrt(g.total[2*at + 1]/(double)g.one[at].n)/g.clip;
    float   keep = (float)(1 - lr*g.decay), rate = (float)(lr/(rms > 1 ? rms : 1)), mean = (float)g.total[2*at];
    if (g.record[DPO_REC_FACTOR] == 0 || rate == 0) return;
    for (int64_t i = first + threadIdx.x; i < end; i += DPOC_THREADS)
        g.one[at].w[i] = keep*g.one[at].w[i] - rate*dpoc_adafactor_u(g, g.one[at], mean, i);
}

/* ------------------------------------------------------------------------------------------ gathering */

enum { DPOC_PARTS = 1 << 18 };            /* pieces of one launch: 2^32 numbers */

/* A launch may read gradients long after the call that handed them over; nothing can have changed them, since whatever
   could comes through this backend and runs what waits first. */

/* Blocks that a tensor has in a pass, see the kernels. */
static int64_t dpoc_one_blocks(const dpoc_one *o, int pass)
{
    if (pass == DPOC_PIECES || (pass == DPOC_COLUMN_PASS && o->kind == DPOC_WHOLE))
        return dpoc_pieces(o->n, DPOC_PIECE);
    if (o->kind == DPOC_KERNEL)
        return dpoc_pieces((int64_t)o->O*(pass == DPOC_ROW_PASS ? o->kh : o->kw)*o->I, DPOC_THREADS);
    if (o->kind == DPOC_WHOLE) return 0;
    return pass == DPOC_ROW_PASS ? dpoc_pieces(o->O, DPOC_WARPS) : dpoc_pieces(o->I, DPOC_COLUMNS);
}
/* The list of blocks for a pass; their number. */
static unsigned dpoc_many_blocks(dpoc_many *g, int pass)
{
    int64_t all = 0;
    for (int i = 0; i < g->count; i++) { g->first[i] = (int)all;  all += dpoc_one_blocks(&g->one[i], pass); }
    g->first[g->count] = (int)all;
    return (unsigned)all;
}

/* Six launches, whatever the number of tensors.  Rows and columns could be one, but for the blocks that they want. */
static void dpoc_adafactor_run(dpoc_run *r, dpoc_many *many)
{
    unsigned  blocks = dpoc_many_blocks(many, DPOC_ROW_PASS), count = (unsigned)many->count;
    dpoc_many g = *many;
    if (blocks) DPOC_LAUNCH(r, dpoc_adafactor_rows_kernel, dim3(blocks), DPOC_THREADS, (g));
    blocks = dpoc_many_blocks(&g, DPOC_COLUMN_PASS);
    DPOC_LAUNCH(r, dpoc_adafactor_columns_kernel, dim3(blocks), DPOC_THREADS, (g));
    DPOC_LAUNCH(r, dpoc_adafactor_mean_kernel, dim3(count), DPOC_THREADS, (g));
    blocks = dpoc_many_blocks(&g, DPOC_PIECES);
    DPOC_LAUNCH(r, dpoc_adafactor_norm_kernel, dim3(blocks), DPOC_THREADS, (g));
    DPOC_LAUNCH(r, dpoc_adafactor_total_kernel, dim3(count), DPOC_THREADS, (g));
    DPOC_LAUNCH(r, dpoc_adafactor_step_kernel, dim3(blocks), DPOC_THREADS, (g));
}

/* Runs what was gathered in one list. */
static int dpoc_flush_one(dpoc *d, dpoc_pending *p)
{
    dpoc_run      r;
    dpoc_many     g;
    const char   *op = d->op;
    if (!p->count) return DPO_OK;
    memset(&r, 0, sizeof r);
    memset(&g, 0, sizeof g);
    r.d = d;
    d->op = dpoc_names[p->op];
    memcpy(g.one, p->one, sizeof g.one);
    g.count = p->count;  g.record = p->record;  g.part = d->sums;  g.total = d->sums + DPOC_PARTS;
    p->count = 0;                         /* whatever happens now, it is not tried twice */
    unsigned pieces = dpoc_many_blocks(&g, DPOC_PIECES), count = (unsigned)g.count;
    if (p->op == DPO_OP_ADAFACTOR) {
        g.eps = p->p.adafactor.eps;  g.clip = p->p.adafactor.clip;  g.decay = p->p.adafactor.weight_decay;
        dpoc_adafactor_run(&r, &g);
    } else if (p->op == DPO_OP_SUM_SQUARES) {
        DPOC_LAUNCH(&r, dpoc_squares_kernel, dim3(pieces), DPOC_THREADS, (g));
        DPOC_LAUNCH(&r, dpoc_squares_fold_kernel, dim3(count), DPOC_THREADS, (g));
    } else {
        g.beta1 = p->p.adamw.beta1;  g.beta2 = p->p.adamw.beta2;  g.eps = p->p.adamw.eps;
        g.decay = p->p.adamw.weight_decay;
        if (p->op == DPO_OP_ADAMW) DPOC_LAUNCH(&r, dpoc_adamw_kernel, dim3(pieces), DPOC_THREADS, (g));
        else                       DPOC_LAUNCH(&r, dpoc_adamw8_kernel, dim3(pieces), DPOC_THREADS, (g));
    }
    d->op = op;
    return r.status;
}
/* Runs what was gathered.  Small tensors have moments in floats beside codes of 8 bits, and take turns with them. */
static int dpoc_flush(dpoc *d)
{
    int status = dpoc_flush_one(d, &d->pending[0]), second = dpoc_flush_one(d, &d->pending[1]);
    return status == DPO_OK ? second : status;
}

/* May this call be gathered with those that wait? */
static int dpoc_gathers(const dpoc_pending *p, const dpo_args *a)
{
    int64_t pieces = dpoc_pieces(dpoc_count(&a->out), DPOC_PIECE);
    if (a->op == DPO_OP_SUM_SQUARES) pieces = dpoc_pieces(dpoc_count(&a->in[0]), DPOC_PIECE);
    if (a->op != p->op || p->count == DPOC_BATCH) return 0;
    if (a->op != DPO_OP_SUM_SQUARES && p->record != (const float *)a->in[3].data) return 0;
    if (a->op == DPO_OP_ADAFACTOR) { if (memcmp(&p->p.adafactor, &a->p.adafactor, sizeof a->p.adafactor)) return 0; }
    else if (a->op != DPO_OP_SUM_SQUARES && memcmp(&p->p.adamw, &a->p.adamw, sizeof a->p.adamw)) return 0;
    for (int i = 0; i < p->count; i++) pieces += dpoc_pieces(p->one[i].n, DPOC_PIECE);
    return pieces <= DPOC_PARTS;
}

/* What Adafactor wants to know of a weight's shape, which the shapes of its factors tell: none, [O], or [O,kh,1,I]. */
static void dpoc_one_shape(dpoc_one *one, const dpo_args *a)
{
    const dpo_view *w = &a->out;
    one->kind = !one->m ? DPOC_WHOLE : a->in[1].rank == 1 ? DPOC_MATRIX : DPOC_KERNEL;
    one->O = (int)(w->rank > 1 ? w->shape[0] : 1);
    one->kh = one->kind == DPOC_KERNEL ? (int)w->shape[1] : 1;
    one->kw = one->kind == DPOC_KERNEL ? (int)w->shape[2] : 1;
    one->I = (int)(one->n/((int64_t)one->O*one->kh*one->kw));
}

/* One more tensor for the launch to come. */
static void dpoc_op_gather(dpoc_run *r)
{
    const dpo_args *a = r->a;
    dpoc_pending   *p = &r->d->pending[a->op == DPO_OP_ADAMW8];
    dpoc_one       *one;
    int64_t         n = dpoc_count(a->op == DPO_OP_SUM_SQUARES ? &a->in[0] : &a->out);
    int             codes = a->op == DPO_OP_ADAMW8;
    if (r->counting) return;
    if (a->in[0].dtype != DPO_F32 || a->out.dtype != DPO_F32 || n >= INT32_MAX ||
        (!codes && ((a->in[1].data && a->in[1].dtype != DPO_F32) || (a->in[2].data && a->in[2].dtype != DPO_F32)))) {
        r->status = dpoc_fail(r->d, DPO_UNSUPPORTED, "optimizer", "weights, gradients and moments must be F32");
        return;
    }
    if (p->count && !dpoc_gathers(p, a)) r->status = dpoc_flush_one(r->d, p);
    one = &p->one[p->count++];
    memset(one, 0, sizeof *one);
    p->op = a->op;  p->p = a->p;  p->record = (const float *)a->in[3].data;
    one->g = (const float *)a->in[0].data;  one->n = n;
    one->m = (float *)a->in[1].data;  one->v = (float *)a->in[2].data;  one->w = (float *)a->out.data;
    if (codes) { one->ms = (float *)a->in[4].data;  one->vs = (float *)a->in[5].data; }
    if (a->op == DPO_OP_ADAFACTOR) dpoc_one_shape(one, a);
    one->aligned = ((uintptr_t)one->g | (uintptr_t)one->m | (uintptr_t)one->v | (uintptr_t)one->w) % 16 == 0;
}

/* ==========================================================================================================
   >>steps                                                                       recording, capture, replay
   ==========================================================================================================

   A training step makes thousands of calls, and the next step makes the same ones with the same addresses, since the
   context cuts its memory in the same way.  Between step(begin) and step(end) calls are noted.  A step that was run
   once is a recording.  In the next one a call that equals the recording's is not run but put off; at the end, if all
   were equal, the recording is captured as a CUDA graph, once, and launched: one launch for the whole step.  Where a
   call differs, those put off are run and the step goes on as if there were no recordings.  So nothing above knows of
   graphs, and nothing can go wrong but speed.

   What differs from step to step without being another call: what the host uploads, the counter of random numbers, the
   rate of an average.  These numbers go to the step's mailbox: page-locked memory, copied to the device in front of the
   graph, whose kernels read it by pointer.  Two mailboxes take turns, so that the host never waits. */
enum { DPOC_CALL_RUN, DPOC_CALL_UP, DPOC_CALL_ON, DPOC_CALL_ZERO };

typedef struct dpoc_call {
    int         what;                     /* DPOC_CALL_RUN ... */
    dpo_args    a;                        /* RUN; the numbers that vary are zeros here */
    void       *to;                       /* UP, ON, ZERO */
    const void *from;                     /* ON */
    size_t      bytes, mail, mailed;      /* mail: place of its `mailed` bytes in the mailbox */
} dpoc_call;

typedef struct dpoc_list { dpoc_call *at; int64_t count, room; size_t mail; } dpoc_list;

typedef struct dpoc_known {
    dpoc_list calls;                      /* in their order */
    cudaGraphExec_t graph;                /* NULL: not captured yet */
    int alive, matches;                   /* it is one; this step has been alike so far */
    int64_t used;                         /* when it was last replayed, by `clock` */
} dpoc_known;

struct dpoc_recording {
    int         active, broken, deferring;     /* inside of a step; it cannot be a recording; calls are put off */
    dpoc_list   now;
    dpoc_known  known[DPOC_RECORDINGS];
    char       *host[2], *device;         /* mailboxes, of `room` bytes */
    size_t      room;
    cudaEvent_t sent[2];
    int         turn;
    int64_t     clock;
    const void *vary;                     /* while capturing: where the call's own numbers lie on the device */
};

/* NULL: the numbers of the call itself count. */
static const void *dpoc_varying(dpoc_run *r) { return r->counting ? NULL : r->d->steps->vary; }

/* What a step costs the host once it is replayed: the walk of the tape, a comparison of some thousand bytes a call, and
   one launch.  What it costs the device: nothing between kernels but what the graph itself takes.  Four recordings are
   kept, for steps that come in a few kinds: a sampler's state changes places from step to step, captions are encoded or
   not. */

/* The ops that have numbers which vary, and those numbers, in the form in which kernels read them; returns the bytes.
   */
static size_t dpoc_mail_of(const dpo_args *a, char mail[16])
{
    dpoc_draw d;
    if (a->op == DPO_OP_LERP) { memcpy(mail, &a->p.lerp.rate, 4);  return 4; }
    if (a->op != DPO_OP_RANDN) return 0;
    d.seed[0] = (uint32_t)a->p.random.seed;  d.seed[1] = (uint32_t)(a->p.random.seed >> 32);
    d.purpose = a->p.random.purpose;  d.step = a->p.random.step;
    memcpy(mail, &d, sizeof d);
    return sizeof d;
}

/* The numbers back into the call, for when it is run after all. */
static void dpoc_mail_set(dpo_args *a, const char *mail)
{
    dpoc_draw d;
    if (a->op == DPO_OP_LERP) { memcpy(&a->p.lerp.rate, mail, 4);  return; }
    if (a->op != DPO_OP_RANDN) return;
    memcpy(&d, mail, sizeof d);
    a->p.random.seed = (uint64_t)d.seed[1] << 32 | d.seed[0];
    a->p.random.purpose = d.purpose;  a->p.random.step = d.step;
}

/* Bytes decide: a view that differs in a field which nobody reads costs a replay, not a result. */
static int dpoc_same(const dpoc_call *x, const dpoc_call *y)
{
    if (x->what != y->what || x->to != y->to || x->from != y->from || x->bytes != y->bytes || x->mail != y->mail ||
        x->mailed != y->mailed) return 0;
    return x->what != DPOC_CALL_RUN || !memcmp(&x->a, &y->a, sizeof x->a);
}

static int dpoc_execute(dpoc *d, const dpo_args *a);

/* A noted call, run now: its mail from the host's box, or while a graph is captured from the device's. */
static int dpoc_call_run(dpoc *d, const dpoc_call *c, int capturing)
{
    dpoc_recording *s = d->steps;
    const char     *mail = (capturing ? s->device : s->host[s->turn]) + c->mail;
    dpo_args        a;
    int             status;
    if (c->what == DPOC_CALL_RUN) {
        a = c->a;
        if (c->mailed && !capturing) dpoc_mail_set(&a, mail);
        s->vary = c->mailed && capturing ? mail : NULL;
        status = dpoc_execute(d, &a);
        s->vary = NULL;
        return status;
    }
    if (c->what == DPOC_CALL_ON)   return dpoc_copy_now(d, c->to, c->from, c->bytes, DPO_COPY_ON);
    if (c->what == DPOC_CALL_ZERO) return dpoc_zero_now(d, c->to, c->bytes);
    if ((status = dpoc_flush(d)) != DPO_OK) return status;
    return dpoc_check(d, cudaMemcpyAsync(c->to, mail, c->bytes, capturing ? cudaMemcpyDeviceToDevice
                                         : cudaMemcpyHostToDevice, d->stream),
                      "cudaMemcpyAsync");
}

/* All calls of a list up to `count`, at once. */
static int dpoc_list_run(dpoc *d, const dpoc_list *l, int64_t count, int capturing)
{
    int status = DPO_OK;
    for (int64_t i = 0; i < count && status == DPO_OK; i++) status = dpoc_call_run(d, &l->at[i], capturing);
    if (status == DPO_OK) status = dpoc_flush(d);
    return status;
}

/* Calls are put off no longer: those that were are run. */
static int dpoc_step_abandon(dpoc *d, int64_t count)
{
    dpoc_recording *s = d->steps;
    int status;
    if (!s->deferring) return DPO_OK;
    s->deferring = 0;
    status = dpoc_list_run(d, &s->now, count, 0);
    if (status == DPO_OK) status = dpoc_check(d, cudaEventRecord(s->sent[s->turn], d->stream), "cudaEventRecord");
    return status;
}

/* Something happens that no graph can hold: memory comes or goes, or the host wants to see a result. */
static int dpoc_step_stop(dpoc *d)
{
    int status = DPO_OK;
    if (d->steps && d->steps->active) {
        status = dpoc_step_abandon(d, d->steps->now.count);
        d->steps->broken = 1;
    }
    return status == DPO_OK ? dpoc_flush(d) : status;
}

/* Room for one more call; without memory on the host the step is just no recording. */
static dpoc_call *dpoc_list_add(dpoc_list *l)
{
    if (l->count == l->room) {
        int64_t    room = l->room ? 2*l->room : 256;
        dpoc_call *at = (dpoc_call *)realloc(l->at, (size_t)room*sizeof *at);
        if (!at) return NULL;
        l->at = at;
        l->room = room;
    }
    memset(&l->at[l->count], 0, sizeof *l->at);
    return &l->at[l->count++];
}

/* Does the newest call stand in a recording at its place? */
static int dpoc_step_matches(dpoc_recording *s)
{
    int64_t i = s->now.count - 1;
    int     any = 0;
    for (int k = 0; k < DPOC_RECORDINGS; k++) {
        dpoc_known *r = &s->known[k];
        r->matches = r->matches && i < r->calls.count && dpoc_same(&s->now.at[i], &r->calls.at[i]);
        any |= r->matches;
    }
    return any;
}

/* A call inside of a step, with the bytes that it takes from the host.  c: what, a, to, from, bytes. */
static int dpoc_note(dpoc *d, const dpoc_call *c, const void *mail, size_t mailed)
{
    dpoc_recording *s = d->steps;
    dpoc_call      *n = s->broken ? NULL : dpoc_list_add(&s->now);
    int             status;
    if (n) {
        *n = *c;
        n->mail = s->now.mail;
        n->mailed = mailed;
        s->now.mail += (mailed + 15) & ~(size_t)15;
        if (n->what == DPOC_CALL_RUN && mailed) memset(&n->a.p, 0, sizeof n->a.p);
        if (s->deferring && dpoc_step_matches(s)) {        /* put off; its numbers go to the mailbox now */
            if (mailed) memcpy(s->host[s->turn] + n->mail, mail, mailed);
            return DPO_OK;
        }
    }
    status = dpoc_step_abandon(d, s->now.count - (n != NULL));         /* all before this one */
    if (!n) s->broken = 1;
    if (status != DPO_OK) return status;
    if (c->what == DPOC_CALL_RUN)  return dpoc_execute(d, &c->a);
    if (c->what == DPOC_CALL_ZERO) return dpoc_zero_now(d, c->to, c->bytes);
    return dpoc_copy_now(d, c->to, c->what == DPOC_CALL_UP ? mail : c->from, c->bytes, c->what == DPOC_CALL_UP
                         ? DPO_COPY_UP : DPO_COPY_ON);
}

/* Its place can be taken by another one. */
static void dpoc_known_free(dpoc_known *k)
{
    if (k->graph) (void)cudaGraphExecDestroy(k->graph);
    free(k->calls.at);
    memset(k, 0, sizeof *k);
}

/* Mailboxes of at least `bytes`; what lay in them was sent. */
static int dpoc_mailboxes(dpoc *d, size_t bytes)
{
    dpoc_recording *s = d->steps;
    int status;
    if (bytes <= s->room) return DPO_OK;
    bytes = bytes + bytes/2 + 4096;
    if ((status = dpoc_check(d, cudaStreamSynchronize(d->stream), "cudaStreamSynchronize")) != DPO_OK) return status;
    for (int k = 0; k < DPOC_RECORDINGS; k++) dpoc_known_free(&s->known[k]);         /* graphs hold the old address */
    for (int i = 0; i < 2; i++) { (void)cudaFreeHost(s->host[i]);  s->host[i] = NULL; }
    (void)cudaFree(s->device);
    s->device = NULL;
    s->room = 0;
    for (int i = 0; i < 2 && status == DPO_OK; i++) status = dpoc_check(d, cudaMallocHost((void **)&s->host[i], bytes),
            "cudaMallocHost");
    if (status == DPO_OK) status = dpoc_check(d, cudaMalloc((void **)&s->device, bytes), "cudaMalloc");
    if (status == DPO_OK) s->room = bytes;
    return status;
}

/* The step that just ran becomes a recording, in place of the one that was used least lately. */
static void dpoc_step_keep(dpoc *d)
{
    dpoc_recording *s = d->steps;
    dpoc_known     *oldest = &s->known[0];
    if (dpoc_mailboxes(d, s->now.mail) != DPO_OK) { (void)cudaGetLastError();  d->options[DPO_CUDA_GRAPHS] = 0;  return;
        }
    for (int k = 1; k < DPOC_RECORDINGS; k++) if (s->known[k].used < oldest->used) oldest = &s->known[k];
    dpoc_known_free(oldest);
    oldest->calls = s->now;
    oldest->alive = 1;
    oldest->used = ++s->clock;
    memset(&s->now, 0, sizeof s->now);
}

/* The recording as a graph.  A failure is no error: it stays without one, and graphs are left alone from then on. */
static int dpoc_step_capture(dpoc *d, dpoc_known *k)
{
    cudaGraph_t graph = NULL;
    int         status = dpoc_check(d, cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal),
                                    "cudaStreamBeginCapture");
    if (status == DPO_OK) {
        int ended;
        status = dpoc_list_run(d, &k->calls, k->calls.count, 1);
        for (int i = 0; i < DPOC_WAITING; i++) d->pending[i].count = 0;           /* of a run that failed half-way */
        ended = dpoc_check(d, cudaStreamEndCapture(d->stream, &graph), "cudaStreamEndCapture");
        if (status == DPO_OK) status = ended;
    }
    if (status == DPO_OK) status = dpoc_check(d, cudaGraphInstantiate(&k->graph, graph, 0), "cudaGraphInstantiate");
    if (graph) (void)cudaGraphDestroy(graph);
    if (status == DPO_OK) return 1;
    (void)cudaGetLastError();
    k->graph = NULL;
    d->options[DPO_CUDA_GRAPHS] = 0;
    return 0;
}

/* Everything that was put off, as one graph; 0 if there is none. */
static int dpoc_step_replay(dpoc *d, int *status)
{
    dpoc_recording *s = d->steps;
    for (int i = 0; i < DPOC_RECORDINGS; i++) {
        dpoc_known *k = &s->known[i];
        if (!k->matches || k->calls.count != s->now.count || (!k->graph && !dpoc_step_capture(d, k))) continue;
        k->used = ++s->clock;
        *status = DPO_OK;
        if (k->calls.mail)
            *status = dpoc_check(d, cudaMemcpyAsync(s->device, s->host[s->turn], k->calls.mail, cudaMemcpyHostToDevice,
                                                    d->stream), "cudaMemcpyAsync");
        if (*status == DPO_OK) *status = dpoc_check(d, cudaEventRecord(s->sent[s->turn], d->stream), "cudaEventRecord");
        if (*status == DPO_OK) *status = dpoc_check(d, cudaGraphLaunch(k->graph, d->stream),
                                                    "cudaGraphLaunch of a whole step");
        return 1;
    }
    return 0;
}

/* All recordings may still be the one; the mailbox of two steps ago is read by now. */
static int dpoc_step_begin(dpoc *d)
{
    dpoc_recording *s = d->steps;
    int status = dpoc_step_stop(d);       /* a step that never ended */
    if (status != DPO_OK) return status;
    s->active = d->options[DPO_CUDA_GRAPHS] && !d->options[DPO_CUDA_SYNC];
    s->broken = s->deferring = 0;
    s->now.count = 0;
    s->now.mail = 0;
    if (!s->active) return DPO_OK;
    s->turn ^= 1;
    for (int k = 0; k < DPOC_RECORDINGS; k++) {
        s->known[k].matches = s->known[k].alive;
        s->deferring |= s->known[k].alive;
    }
    return dpoc_check(d, cudaEventSynchronize(s->sent[s->turn]), "cudaEventSynchronize");
}

/* A step that was not put off becomes a recording, so that the second one like it is a graph already. */
static int dpoc_step_end(dpoc *d)
{
    dpoc_recording *s = d->steps;
    int status = DPO_OK;
    if (!s->active) return dpoc_flush(d);
    s->active = 0;
    if (s->deferring && dpoc_step_replay(d, &status)) { s->deferring = 0;  return status; }
    status = dpoc_step_abandon(d, s->now.count);
    if (status == DPO_OK) status = dpoc_flush(d);
    if (status == DPO_OK && !s->broken && s->now.count && d->options[DPO_CUDA_GRAPHS]) dpoc_step_keep(d);
    return status;
}

/* Mailboxes come with the first recording, whose size they have. */
static int dpoc_steps_open(dpoc *d)
{
    int status = DPO_OK;
    d->steps = (dpoc_recording *)calloc(1, sizeof *d->steps);
    if (!d->steps) return dpoc_fail(d, DPO_OUT_OF_MEMORY, "dpo_cuda_open", "no memory on the host");
    for (int i = 0; i < 2 && status == DPO_OK; i++)
        status = dpoc_check(d, cudaEventCreateWithFlags(&d->steps->sent[i], cudaEventDisableTiming),
                            "cudaEventCreateWithFlags");
    return status;
}

/* Graphs first: they hold the mailbox's address. */
static void dpoc_steps_close(dpoc *d)
{
    dpoc_recording *s = d->steps;
    if (!s) return;
    for (int k = 0; k < DPOC_RECORDINGS; k++) dpoc_known_free(&s->known[k]);
    for (int i = 0; i < 2; i++) {
        if (s->host[i]) (void)cudaFreeHost(s->host[i]);
        if (s->sent[i]) (void)cudaEventDestroy(s->sent[i]);
    }
    if (s->device) (void)cudaFree(s->device);
    free(s->now.at);
    free(s);
    d->steps = NULL;
}

/* ==========================================================================================================
   >>open                                                                          table of ops, dpo_backend
   ========================================================================================================== */

/* What has no kernel, or no backward. */
static void dpoc_op_none(dpoc_run *r) { r->status = dpoc_fail(r->d, DPO_UNSUPPORTED, "run", "no such kernel"); }

typedef struct dpoc_op { void (*run)(dpoc_run *r); int backward; } dpoc_op;

static const dpoc_op dpoc_ops[] = {        /* in the order of DPO_OPS; the last stands for what is none */
    { dpoc_op_conv,       1 },
    { dpoc_op_group_norm, 1 },
    { dpoc_op_layer_norm, 1 },
    { dpoc_op_attention,  1 },
    { dpoc_op_geglu,      1 },
    { dpoc_op_act,        1 },
    { dpoc_op_binary,     1 },
    { dpoc_op_affine,     1 },
    { dpoc_op_clamp,      1 },
    { dpoc_op_sum,        1 },
    { dpoc_op_concat,     1 },
    { dpoc_op_slice,      1 },
    { dpoc_op_copy,       1 },
    { dpoc_op_upsample,   1 },
    { dpoc_op_embed,      1 },
    { dpoc_op_timestep,   0 },
    { dpoc_op_mix,        1 },
    { dpoc_op_randn,      0 },
    { dpoc_op_mse,        1 },
    { dpoc_op_preference, 1 },
    { dpoc_op_mapo,       1 },
    { dpoc_op_gather,     0 },
    { dpoc_op_clip,       0 },
    { dpoc_op_gather,     0 },
    { dpoc_op_gather,     0 },
    { dpoc_op_gather,     0 },
    { dpoc_op_lerp,       0 },
    { dpoc_op_none,       0 }
};
static_assert(sizeof dpoc_ops == (DPO_OP_COUNT + 1)*sizeof *dpoc_ops, "a row for each op of DPO_OPS");

/* Calls from outside may hold any number. */
static const dpoc_op *dpoc_op_of(const dpo_args *a)
{
    return a->op < 0 || a->op >= DPO_OP_COUNT || (a->backward && !dpoc_ops[a->op].backward) ? &dpoc_ops[DPO_OP_COUNT]
        : &dpoc_ops[a->op];
}

/* The op's own function decides in both passes by shapes, types and NULLs alone, so that it hands out the same scratch.
   */

/* Counted by running the op without running anything. */
static size_t dpoc_workspace(void *self, const dpo_args *a)
{
    dpoc_run r;
    memset(&r, 0, sizeof r);
    r.d = (dpoc *)self;
    r.a = a;
    r.counting = 1;
    dpoc_op_of(a)->run(&r);
    return r.at;
}

/* Runs a call at once.  Optimizers and squares are gathered; anything else runs what was gathered first. */
static int dpoc_execute(dpoc *d, const dpo_args *a)
{
    dpoc_run r;
    int      gathered = dpoc_op_of(a)->run == dpoc_op_gather;
    memset(&r, 0, sizeof r);
    r.d = d;
    r.a = a;
    r.status = gathered ? (int)DPO_OK : dpoc_flush(d);
    d->op = a->op >= 0 && a->op < DPO_OP_COUNT ? dpoc_names[a->op] : "an unknown op";
    if (r.status == DPO_OK) dpoc_op_of(a)->run(&r);
    d->op = NULL;
    return r.status;
}

/* Every call from outside: the device of this thread is the backend's, and the last failure is forgotten. */
static int dpoc_enter(dpoc *d)
{
    if (!d->open) return DPO_DEVICE;
    d->text[0] = 0;
    d->op = NULL;
    return dpoc_check(d, cudaSetDevice(d->device), "cudaSetDevice");
}

/* The one way in for ops: outside of steps at once, inside noted. */
static int dpoc_backend_run(void *self, const dpo_args *a)
{
    dpoc     *d = (dpoc *)self;
    dpoc_call c;
    char      mail[16];
    int       status = dpoc_enter(d);
    if (status != DPO_OK) return status;
    /* a call that is put off equals one that was checked */
    if (!d->steps->deferring && a->work_size < dpoc_workspace(self, a)) return dpoc_fail(d, DPO_BAD_ARGUMENT, "run",
            "too little scratch");
    if (!d->steps->active) return dpoc_execute(d, a);
    memset(&c, 0, sizeof c);
    c.a = *a;
    return dpoc_note(d, &c, mail, dpoc_mail_of(a, mail));
}

/* Down is the only copy that waits, and ends a recording: the host wants to see something now. */
static int dpoc_backend_copy(void *self, void *to, const void *from, size_t bytes, int direction)
{
    dpoc     *d = (dpoc *)self;
    dpoc_call c;
    int       status = dpoc_enter(d);
    if (status == DPO_OK && direction == DPO_COPY_DOWN) status = dpoc_step_stop(d);
    if (status != DPO_OK) return status;
    if (!d->steps->active || direction == DPO_COPY_DOWN) return dpoc_copy_now(d, to, from, bytes, direction);
    memset(&c, 0, sizeof c);
    c.what = direction == DPO_COPY_UP ? DPOC_CALL_UP : DPOC_CALL_ON;
    c.to = to;
    c.bytes = bytes;
    if (direction == DPO_COPY_ON) c.from = from;
    return dpoc_note(d, &c, from, direction == DPO_COPY_UP ? bytes : 0);
}

/* As a call of a step like any other. */
static int dpoc_backend_zero(void *self, void *data, size_t bytes)
{
    dpoc     *d = (dpoc *)self;
    dpoc_call c;
    int       status = dpoc_enter(d);
    if (status != DPO_OK) return status;
    if (!d->steps->active) return dpoc_zero_now(d, data, bytes);
    memset(&c, 0, sizeof c);
    c.what = DPOC_CALL_ZERO;
    c.to = data;
    c.bytes = bytes;
    return dpoc_note(d, &c, NULL, 0);
}

/* The context says where a step begins and ends, for devices that want to know. */
static int dpoc_backend_step(void *self, int begin)
{
    dpoc *d = (dpoc *)self;
    int   status = dpoc_enter(d);
    if (status != DPO_OK) return status;
    return begin ? dpoc_step_begin(d) : dpoc_step_end(d);
}

/* Whatever was put off or gathered is run first. */
static int dpoc_backend_sync(void *self)
{
    dpoc *d = (dpoc *)self;
    int   status = dpoc_enter(d);
    if (status == DPO_OK) status = dpoc_step_stop(d);
    return status == DPO_OK ? dpoc_check(d, cudaStreamSynchronize(d->stream), "cudaStreamSynchronize") : status;
}

/* A copy down that nobody waits for, behind all calls so far; a step's end has put these on the stream as one graph. */
static void *dpoc_send(void *self, const void *from, size_t bytes)
{
    dpoc     *d = (dpoc *)self;
    int       status = dpoc_enter(d);
    dpoc_box *b;
    if (status == DPO_OK) status = dpoc_step_stop(d);
    if (status != DPO_OK || !(b = dpoc_box_for(d, bytes))) return NULL;
    status = dpoc_check(d, cudaMemcpyAsync(b->p, from, bytes, cudaMemcpyDeviceToHost, d->stream), "cudaMemcpyAsync");
    if (status == DPO_OK) status = dpoc_check(d, cudaEventRecord(b->came, d->stream), "cudaEventRecord");
    if (status != DPO_OK) return NULL;
    b->used = 1;
    return b;
}

/* Waits for that copy alone: calls behind it go on.  A box that nobody reads can be sent again without waiting, for
   copies keep their order. */
static int dpoc_take(void *self, void *sent, void *to, size_t bytes)
{
    dpoc     *d = (dpoc *)self;
    dpoc_box *b = (dpoc_box *)sent;
    int       status = to ? dpoc_enter(d) : (int)DPO_OK;
    if (to && status == DPO_OK) status = dpoc_check(d, cudaEventSynchronize(b->came), "cudaEventSynchronize");
    if (to && status == DPO_OK) memcpy(to, b->p, bytes);
    b->used = 0;
    return status;
}

/* Call, reason, op. */
static const char *dpoc_explain(void *self) { return ((dpoc *)self)->text[0] ? ((dpoc *)self)->text : NULL; }

/* Also of a backend that never opened. */
static void dpoc_close(void *self)
{
    dpoc *d = (dpoc *)self;
    if (d->stream) (void)cudaSetDevice(d->device);
    if (d->stream) (void)cudaStreamSynchronize(d->stream); /* nothing may be in use that is freed now */
    dpoc_steps_close(d);
    dpoc_blas_close(d);
    dpoc_dnn_close(d);
    for (int i = 0; i < DPOC_STAGES; i++) {
        if (d->stage[i])  (void)cudaFreeHost(d->stage[i]);
        if (d->staged[i]) (void)cudaEventDestroy(d->staged[i]);
    }
    for (dpoc_box *b = d->boxes, *next; b; b = next) {
        next = b->next;
        if (b->p)    (void)cudaFreeHost(b->p);
        if (b->came) (void)cudaEventDestroy(b->came);
        free(b);
    }
    if (d->scratch) (void)cudaFree(d->scratch);
    if (d->sums)    (void)cudaFree(d->sums);
    if (d->stream)  (void)cudaStreamDestroy(d->stream);
    free(d);
}

/* In the order in which a user can do something about what is wrong: driver, device, its age. */

/* Which device, how much memory, what it can do. */
static int dpoc_open_device(dpoc *d)
{
    cudaDeviceProp p;
    int count = 0, status = dpoc_check(d, cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    if (status == DPO_OK) status = dpoc_check(d, cudaSetDevice(d->device), "cudaSetDevice");
    if (status == DPO_OK) status = dpoc_check(d, cudaGetDeviceProperties(&p, d->device), "cudaGetDeviceProperties");
    if (status == DPO_OK) status = dpoc_check(d, cudaDeviceGetAttribute(&d->major, cudaDevAttrComputeCapabilityMajor,
            d->device), "cudaDeviceGetAttribute");
    if (status == DPO_OK) status = dpoc_check(d, cudaDeviceGetAttribute(&d->minor, cudaDevAttrComputeCapabilityMinor,
            d->device), "cudaDeviceGetAttribute");
    if (status == DPO_OK) status = dpoc_check(d, cudaDeviceGetAttribute(&d->processors, cudaDevAttrMultiProcessorCount,
            d->device), "cudaDeviceGetAttribute");
    if (status != DPO_OK) return status;
    snprintf(d->about, sizeof d->about, "%.200s, %.1f GiB, compute capability %d.%d", p.name,
             (double)p.totalGlobalMem/(1 << 30), d->major, d->minor);
    /* mma of BF16 and rounding in one instruction begin there */
    if (d->major < 8) return dpoc_fail(d, DPO_UNSUPPORTED, d->about, "compute capability 8.0 or newer is needed");
    return DPO_OK;
}

/* What every call needs: stream, stages, scratch. */
static int dpoc_open_rest(dpoc *d)
{
    size_t sums = (DPOC_PARTS + 2*DPOC_BATCH)*sizeof(double);
    int    status = dpoc_check(d, cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking),
                            "cudaStreamCreateWithFlags");
    for (int i = 0; i < DPOC_STAGES && status == DPO_OK; i++) {
        status = dpoc_check(d, cudaMallocHost((void **)&d->stage[i], DPOC_STAGE_BYTES), "cudaMallocHost");
        if (status == DPO_OK) status = dpoc_check(d, cudaEventCreateWithFlags(&d->staged[i], cudaEventDisableTiming),
                                                  "cudaEventCreateWithFlags");
    }
    if (status == DPO_OK) status = dpoc_check(d, cudaMalloc(&d->scratch, DPOC_SCRATCH_BYTES), "cudaMalloc");
    if (status == DPO_OK) status = dpoc_check(d, cudaMalloc((void **)&d->sums, sums), "cudaMalloc");
    if (status == DPO_OK) status = dpoc_blas_open(d);
    if (status == DPO_OK) status = dpoc_steps_open(d);
    return status;
}

/* panel 1: weights lie as [O][K], and are told apart from other tensors all the same. */
static void dpoc_fill(dpoc *d)
{
    dpo_backend *b = &d->backend;
    b->size = (uint32_t)sizeof *b;     b->version = DIFFDPO_VERSION;
    b->name = "cuda";                  b->self = d;                    b->panel = 1;
    b->alloc = dpoc_alloc;             b->release = dpoc_release;
    b->copy = dpoc_backend_copy;       b->zero = dpoc_backend_zero;
    b->workspace = dpoc_workspace;     b->run = dpoc_backend_run;
    b->sync = dpoc_backend_sync;       b->step = dpoc_backend_step;
    b->send = dpoc_send;               b->take = dpoc_take;
    b->explain = dpoc_explain;         b->close = dpoc_close;
}

/* NULL only without memory on the host.  A backend without a device answers every call with a failure and its reason,
   which dpo_open finds. */
dpo_backend *dpo_cuda_open(int device, uint32_t version)
{
    dpoc *d = (dpoc *)calloc(1, sizeof *d);
    int   status;
    if (!d) return NULL;
    dpoc_fill(d);
    d->device = device;
    d->options[DPO_CUDA_GRAPHS] = 1;      /* all others are 0 */
    status = version == DIFFDPO_VERSION ? dpoc_open_device(d)
        : dpoc_fail(d, DPO_BAD_ARGUMENT, "dpo_cuda_open", "diffdpo.h is of another version");
    if (status == DPO_OK) status = dpoc_open_rest(d);
    d->open = status == DPO_OK;
    if (!d->open) (void)cudaGetLastError();
    return &d->backend;
}

const char *dpo_cuda_about(const dpo_backend *b)
{
    const dpoc *d = b ? (const dpoc *)b->self : NULL;
    return !d || b->run != dpoc_backend_run ? "no CUDA backend" : d->open ? d->about : d->text;
}

int dpo_cuda_set(dpo_backend *b, int option, int value)
{
    if (!b || b->run != dpoc_backend_run || option < 0 || option >= DPO_CUDA_OPTIONS) return 0;
    ((dpoc *)b->self)->options[option] = value;
    return 1;
}

/* ------------------------------------------------------------------------------------------ many GPUs

   The sum, or the greatest, of numbers over all GPUs of a communicator, in place; NCCL's stream is ours, so that it
   follows the kernels before it and nobody waits.  The only way to NCCL is dpoc_nccl. */
#ifndef DIFFDPO_NCCL
static int dpoc_nccl(dpoc *d, void *comm, void *data, size_t count, int type, int greatest)
{
    (void)comm; (void)data; (void)count; (void)type; (void)greatest;
    return dpoc_fail(d, DPO_UNSUPPORTED, "NCCL", "not built in: compile with -DDIFFDPO_NCCL");
}
#elif defined(DIFFDPO_CUDA_STAND_IN)
/* `comm` points to how many GPUs there are, which all hold the same numbers. */
static int dpoc_nccl(dpoc *d, void *comm, void *data, size_t count, int type, int greatest)
{
    int n = *(int *)comm;
    (void)d;
    stand_in_do([=] { for (size_t i = 0; i < count && !greatest;
    i++) dpoc_put(data, type, (int64_t)i, (float)n*dpoc_get(data, type, (int64_t)i)); });
    return DPO_OK;
}
#else
static int dpoc_nccl(dpoc *d, void *comm, void *data, size_t count, int type, int greatest)
{
    ncclDataType_t t = type == DPO_BF16 ? ncclBfloat16 : type == DPO_F16 ? ncclHalf : ncclFloat;
    ncclResult_t   s = ncclAllReduce(data, data, count, t, greatest ? ncclMax : ncclSum, (ncclComm_t)comm, d->stream);
    return s == ncclSuccess ? (int)DPO_OK : dpoc_fail(d, DPO_DEVICE, "ncclAllReduce", ncclGetErrorString(s));
}
#endif

int dpo_cuda_reduce(dpo_backend *b, void *comm, void *data, size_t count, int dtype, int greatest)
{
    dpoc *d = b && b->run == dpoc_backend_run ? (dpoc *)b->self : NULL;
    int   status = d ? dpoc_enter(d) : (int)DPO_BAD_ARGUMENT;
    if (status == DPO_OK) status = dpoc_step_stop(d);      /* what was put off comes first */
    return status == DPO_OK ? dpoc_nccl(d, comm, data, count, dtype, greatest) : status;
}
