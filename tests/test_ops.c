/* test_ops.c - every op of the table: forward against the formula in double precision, backward against central
   differences of that formula, odd sizes, on each instruction set; and the tape: reuse, segments, scopes.

   build   cc -O2 tests/test_ops.c -o build/test_ops -lm -lpthread     (with -DDIFFDPO_CUDA and diffdpo_cuda.cu: on CUDA, too)
   run     build/test_ops [seed]                                                                                    */
#define DIFFDPO_IMPLEMENTATION
#include "../diffdpo.h"
#include "dpo_test.h"

enum { MOST = 4096 };                     /* elements of the largest tensor here */

/* One case.  Inputs: rank, then shape; rank 0: left out.  kind: 0 normal numbers, 'w' weights of a product,
   'p' positive numbers, 'i' ids, 'b' a table of coefficients, 't' timesteps. */
typedef struct problem {
    const char *name;
    int         op;
    int64_t     in[8][5];
    const char *kind;                     /* a letter an input */
    int         a, b, d;                  /* what the op's own parameters are, case by case */
    dpo_tensor *(*run)(dpo_ctx *c, const struct problem *q, dpo_tensor **x);
    void        (*ref)(const struct problem *q, double *const *x, double *y);
} problem;

/* The context's error, or nothing. */
static const char *why(dpo_ctx *c) { return dpo_error(c) ? dpo_error(c) : "no error"; }

static int64_t count_of(const int64_t *s)
{
    int64_t n = s[0] > 0;
    for (int i = 1; i <= s[0]; i++) n *= s[i];
    return n;
}

static int64_t last_of(const int64_t *s) { return s[s[0]]; }

/* ---- the formulas, in double ------------------------------------------------------------------------------------ */

static double act_of(int act, double x)
{
    switch (act) {
    case DPO_SILU:        return x / (1 + exp(-x));
    case DPO_GELU:        return 0.5 * x * (1 + erf(x / sqrt(2.0)));
    case DPO_QUICK_GELU:  return x / (1 + exp(-1.702 * x));
    case DPO_SIGMOID:     return 1 / (1 + exp(-x));
    case DPO_TANH:        return tanh(x);
    case DPO_EXP:         return exp(x);
    case DPO_LOG:         return log(x);
    case DPO_SQRT:        return sqrt(x);
    case DPO_SQUARE:      return x * x;
    case DPO_ABS:         return fabs(x);
    case DPO_RELU:        return x > 0 ? x : 0;
    case DPO_LOG_SIGMOID: return -log1p(exp(-x));
    default:              return x;
    }
}

/* Pixel (i,j) of channel o of picture n, without bias and extras: w [O,kh,kw,I], stride a, padding b before and after. */
static double pixel_of(const problem *q, const double *x, const double *w, int64_t n, int64_t i, int64_t j, int64_t o)
{
    const int64_t *s = q->in[0], *k = q->in[1];
    double sum = 0;
    for (int64_t u = 0; u < k[2]; u++)
        for (int64_t v = 0; v < k[3]; v++) {
            int64_t row = i * q->a + u - q->b, col = j * q->a + v - q->b;
            if (row < 0 || col < 0 || row >= s[2] || col >= s[3]) continue;
            for (int64_t e = 0; e < k[4]; e++)
                sum += x[((n * s[2] + row) * s[3] + col) * s[4] + e] * w[((o * k[2] + u) * k[3] + v) * k[4] + e];
        }
    return sum;
}

static void ref_conv(const problem *q, double *const *x, double *y)
{
    const int64_t *s = q->in[0], *k = q->in[1];
    int64_t H = (s[2] + 2 * q->b - k[2]) / q->a + 1, W = (s[3] + 2 * q->b - k[3]) / q->a + 1, O = k[1], r = q->in[5][0] ? q->in[5][1] : 0;
    for (int64_t n = 0; n < s[1]; n++)
        for (int64_t p = 0; p < H * W; p++)
            for (int64_t o = 0; o < O; o++) {
                double sum = pixel_of(q, x[0], x[1], n, p / W, p % W, o);
                int64_t at = (n * H * W + p) * O + o;
                if (x[2]) sum += x[2][o];
                if (x[3]) sum += x[3][n * O + o];
                if (x[4]) sum += x[4][at];
                for (int64_t e = 0; e < r; e++)
                    sum += 0.5 * (x[7] ? x[7][n] : 1) * x[6][o * r + e] * pixel_of(q, x[0], x[5], n, p / W, p % W, e);
                y[at] = act_of(q->d, sum);
            }
}

static void ref_group_norm(const problem *q, double *const *x, double *y)
{
    int64_t N = q->in[0][1], C = last_of(q->in[0]), P = count_of(q->in[0]) / (N * C), m = C / q->a;
    for (int64_t b = 0; b < N * q->a; b++) {
        double mean = 0, var = 0;
        for (int pass = 0; pass < 3; pass++)
            for (int64_t i = 0; i < P * m; i++) {
                int64_t c = b % q->a * m + i % m, at = (b / q->a * P + i / m) * C + c;
                if (pass == 0) mean += x[0][at] / (double)(P * m);
                if (pass == 1) var += (x[0][at] - mean) * (x[0][at] - mean) / (double)(P * m);
                if (pass == 2) y[at] = act_of(q->b, (x[0][at] - mean) / sqrt(var + 1e-3) * x[1][c] + x[2][c]);
            }
    }
}

static void ref_layer_norm(const problem *q, double *const *x, double *y)
{
    int64_t C = last_of(q->in[0]);
    for (int64_t r = 0; r < count_of(q->in[0]) / C; r++) {
        double mean = 0, var = 0;
        for (int64_t c = 0; c < C; c++) mean += x[0][r * C + c] / (double)C;
        for (int64_t c = 0; c < C; c++) var += (x[0][r * C + c] - mean) * (x[0][r * C + c] - mean) / (double)C;
        for (int64_t c = 0; c < C; c++) y[r * C + c] = (x[0][r * C + c] - mean) / sqrt(var + 1e-3) * x[1][c] + x[2][c];
    }
}

static void ref_attention(const problem *q, double *const *x, double *y)
{
    int64_t N = q->in[0][1], T = q->in[0][2], D = q->in[0][3], S = q->in[1][2], d = D / q->a;
    double  p[MOST];
    for (int64_t i = 0; i < N * T * q->a; i++) {
        int64_t n = i / (T * q->a), t = i / q->a % T, h = i % q->a, last = q->b ? t + 1 : S;
        double  sum = 0;
        for (int64_t s = 0; s < last; s++) {
            double dot = 0;
            for (int64_t e = 0; e < d; e++) dot += x[0][(n * T + t) * D + h * d + e] * x[1][(n * S + s) * D + h * d + e];
            sum += p[s] = exp(dot / sqrt((double)d));
        }
        for (int64_t e = 0; e < d; e++) {
            double o = 0;
            for (int64_t s = 0; s < last; s++) o += p[s] / sum * x[2][(n * S + s) * D + h * d + e];
            y[(n * T + t) * D + h * d + e] = o;
        }
    }
}

static void ref_geglu(const problem *q, double *const *x, double *y)
{
    int64_t D = last_of(q->in[0]) / 2;
    for (int64_t i = 0; i < count_of(q->in[0]) / 2; i++)
        y[i] = x[0][i / D * 2 * D + i % D] * act_of(DPO_GELU, x[0][i / D * 2 * D + D + i % D]);
}

static void ref_act(const problem *q, double *const *x, double *y)
{
    for (int64_t i = 0; i < count_of(q->in[0]); i++) y[i] = act_of(q->a, x[0][i]);
}

/* The index into an operand whose axes of size 1 repeat, for element i of the result. */
static int64_t spread_index(const int64_t *s, const int64_t *y, int64_t i)
{
    int64_t at = 0, step = 1;
    for (int k = 0; k < y[0]; k++) {
        int64_t n = y[y[0] - k], own = k < s[0] ? s[s[0] - k] : 1;
        if (own > 1) at += i % n * step;
        step *= own;
        i /= n;
    }
    return at;
}

static void ref_binary(const problem *q, double *const *x, double *y)
{
    int64_t shape[5];
    memcpy(shape, q->in[q->in[1][0] > q->in[0][0]], sizeof shape);
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < q->in[k][0]; i++) {
            int64_t n = q->in[k][q->in[k][0] - i];
            if (n > shape[shape[0] - i]) shape[shape[0] - i] = n;
        }
    for (int64_t i = 0; i < count_of(shape); i++) {
        double a = x[0][spread_index(q->in[0], shape, i)], b = x[1][spread_index(q->in[1], shape, i)];
        y[i] = q->a == DPO_ADD ? a + b : q->a == DPO_SUB ? a - b : q->a == DPO_MUL ? a * b : a / b;
    }
}

static void ref_affine(const problem *q, double *const *x, double *y)
{
    for (int64_t i = 0; i < count_of(q->in[0]); i++) y[i] = -1.5 * x[0][i] + 0.25;
}

static void ref_clamp(const problem *q, double *const *x, double *y)
{
    for (int64_t i = 0; i < count_of(q->in[0]); i++) y[i] = x[0][i] < -0.5 ? -0.5 : x[0][i] > 0.75 ? 0.75 : x[0][i];
}

static void around(const int64_t *s, int axis, int64_t *A, int64_t *B)
{
    *A = *B = 1;
    for (int i = 0; i < s[0]; i++) { if (i < axis) *A *= s[i + 1]; if (i > axis) *B *= s[i + 1]; }
}

/* a: axis, or -1; b: mean instead of sum. */
static void ref_sum(const problem *q, double *const *x, double *y)
{
    int64_t A = 1, B = 1, n;
    if (q->a >= 0) around(q->in[0], q->a, &A, &B);
    n = count_of(q->in[0]) / (A * B);
    for (int64_t i = 0; i < A * B; i++) {
        y[i] = 0;
        for (int64_t k = 0; k < n; k++) y[i] += x[0][(i / B * n + k) * B + i % B] / (q->b ? (double)n : 1);
    }
}

static void ref_concat(const problem *q, double *const *x, double *y)
{
    int64_t A, B, n = q->in[0][q->a + 1], m = q->in[1][q->a + 1];
    around(q->in[0], q->a, &A, &B);
    for (int64_t i = 0; i < A; i++)
        for (int64_t k = 0; k < (n + m) * B; k++)
            y[i * (n + m) * B + k] = k < n * B ? x[0][i * n * B + k] : x[1][i * m * B + k - n * B];
}

/* a: axis, b: from, d: count. */
static void ref_slice(const problem *q, double *const *x, double *y)
{
    int64_t A, B, n = q->in[0][q->a + 1];
    around(q->in[0], q->a, &A, &B);
    for (int64_t i = 0; i < A * q->d * B; i++) y[i] = x[0][(i / (q->d * B) * n + q->b) * B + i % (q->d * B)];
}

static void ref_copy(const problem *q, double *const *x, double *y)
{
    for (int64_t i = 0; i < count_of(q->in[0]); i++) y[i] = x[0][i];
}

static void ref_upsample(const problem *q, double *const *x, double *y)
{
    const int64_t *s = q->in[0];
    for (int64_t i = 0; i < s[1] * q->a * q->b * s[4]; i++) {
        int64_t c = i % s[4], col = i / s[4] % q->b, row = i / s[4] / q->b % q->a, n = i / s[4] / q->b / q->a;
        y[i] = x[0][((n * s[2] + row * s[2] / q->a) * s[3] + col * s[3] / q->b) * s[4] + c];
    }
}

static void ref_embed(const problem *q, double *const *x, double *y)
{
    int64_t D = q->in[0][2];
    for (int64_t i = 0; i < count_of(q->in[1]) * D; i++) y[i] = x[0][(int64_t)x[1][i / D] * D + i % D];
}

static void ref_timestep(const problem *q, double *const *x, double *y)
{
    int half = q->a / 2;
    for (int64_t i = 0; i < q->in[0][1] * q->a; i++) {
        double angle = x[0][i / q->a] * exp(-log(10000.0) * (double)(i % half) / half);
        y[i] = i % q->a < half ? cos(angle) : sin(angle);
    }
}

static void ref_mix(const problem *q, double *const *x, double *y)
{
    int64_t N = q->in[0][1], P = count_of(q->in[0]) / N;
    for (int64_t i = 0; i < N * P; i++) {
        int64_t k = (int64_t)x[4][i / P];
        y[i] = x[2][k] * x[0][i] + x[3][k] * x[1][i];
    }
}

static void ref_mse(const problem *q, double *const *x, double *y)
{
    int64_t N = q->in[0][1], P = count_of(q->in[0]) / N;
    for (int64_t n = 0; n < N; n++) y[n] = 0;
    for (int64_t i = 0; i < N * P; i++) y[i / P] += (x[0][i] - x[1][i]) * (x[0][i] - x[1][i]) / (double)P;
}

/* a: kind, b: smoothing in percent; beta is 3. */
static void ref_preference(const problem *q, double *const *x, double *y)
{
    int64_t B = q->in[0][1] / 2;
    double  s = q->b / 100.0;
    y[0] = 0;
    for (int64_t b = 0; b < B; b++) {
        double inside = -0.5 * 3 * ((x[0][b] - x[0][B + b]) - (x[1][b] - x[1][B + b]));
        double loss = q->a == DPO_PREF_SIGMOID ? (1 - s) * log1p(exp(-inside)) + s * log1p(exp(inside))
                    : q->a == DPO_PREF_HINGE ? (inside < 1 ? 1 - inside : 0) : (inside - 0.5) * (inside - 0.5);
        y[0] += (x[2] ? x[2][b] : 1) * loss / (double)B;
    }
}

/* d: lambda in thousandths. */
static void ref_mapo(const problem *q, double *const *x, double *y)
{
    int64_t B = q->in[0][1] / 2;
    y[0] = 0;
    for (int64_t b = 0; b < B; b++) {
        double u = 0.5 * x[0][b], v = 0.5 * x[0][B + b], z = 1000 * (u / expm1(u) - v / expm1(v));
        double ratio = z > 0 ? -log1p(exp(-z)) : z - log1p(exp(z));
        y[0] += (x[1] ? x[1][b] : 1) * (x[0][b] - q->d / 1000.0 * ratio) / (double)B;
    }
}

/* ---- the ops, as a host calls them ------------------------------------------------------------------------------- */

static dpo_tensor *run_conv(dpo_ctx *c, const problem *q, dpo_tensor **x)
{
    int       pad[4];
    dpo_extra e;
    memset(&e, 0, sizeof e);
    pad[0] = pad[1] = pad[2] = pad[3] = q->b;
    e.act = q->d; e.scale = 0.5f; e.vec = x[3]; e.residual = x[4]; e.down = x[5]; e.up = x[6]; e.strength = x[7];
    return dpo_conv2d(c, x[0], x[1], x[2], q->a, pad, &e);
}
static dpo_tensor *run_group_norm(dpo_ctx *c, const problem *q, dpo_tensor **x) { return dpo_group_norm(c, x[0], x[1], x[2], q->a, 1e-3f, q->b); }
static dpo_tensor *run_layer_norm(dpo_ctx *c, const problem *q, dpo_tensor **x) { (void)q; return dpo_layer_norm(c, x[0], x[1], x[2], 1e-3f); }
static dpo_tensor *run_attention(dpo_ctx *c, const problem *q, dpo_tensor **x)  { return dpo_attention(c, x[0], x[1], x[2], q->a, q->b); }
static dpo_tensor *run_geglu(dpo_ctx *c, const problem *q, dpo_tensor **x)      { (void)q; return dpo_geglu(c, x[0]); }
static dpo_tensor *run_act(dpo_ctx *c, const problem *q, dpo_tensor **x)        { return dpo_act(c, x[0], q->a); }
static dpo_tensor *run_binary(dpo_ctx *c, const problem *q, dpo_tensor **x)     { return dpo_binary(c, q->a, x[0], x[1]); }
static dpo_tensor *run_affine(dpo_ctx *c, const problem *q, dpo_tensor **x)     { (void)q; return dpo_affine(c, x[0], -1.5f, 0.25f); }
static dpo_tensor *run_clamp(dpo_ctx *c, const problem *q, dpo_tensor **x)      { (void)q; return dpo_clamp(c, x[0], -0.5f, 0.75f); }
static dpo_tensor *run_sum(dpo_ctx *c, const problem *q, dpo_tensor **x)        { return q->b ? dpo_mean(c, x[0], q->a) : dpo_sum(c, x[0], q->a); }
static dpo_tensor *run_concat(dpo_ctx *c, const problem *q, dpo_tensor **x)     { return dpo_concat(c, x[0], x[1], q->a); }
static dpo_tensor *run_slice(dpo_ctx *c, const problem *q, dpo_tensor **x)      { return dpo_slice(c, x[0], q->a, q->b, q->d); }
static dpo_tensor *run_copy(dpo_ctx *c, const problem *q, dpo_tensor **x)       { (void)q; return dpo_cast(c, dpo_cast(c, x[0], DPO_F32), DPO_F32); }
static dpo_tensor *run_upsample(dpo_ctx *c, const problem *q, dpo_tensor **x)   { return dpo_upsample(c, x[0], q->a, q->b); }
static dpo_tensor *run_embed(dpo_ctx *c, const problem *q, dpo_tensor **x)      { (void)q; return dpo_embed(c, x[0], x[1]); }
static dpo_tensor *run_timestep(dpo_ctx *c, const problem *q, dpo_tensor **x)   { return dpo_timestep_embedding(c, x[0], q->a); }
static dpo_tensor *run_mix(dpo_ctx *c, const problem *q, dpo_tensor **x)        { (void)q; return dpo_mix(c, x[0], x[1], x[2], x[3], x[4]); }
static dpo_tensor *run_mse(dpo_ctx *c, const problem *q, dpo_tensor **x)        { (void)q; return dpo_mse(c, x[0], x[1]); }
static dpo_tensor *run_preference(dpo_ctx *c, const problem *q, dpo_tensor **x)
{
    return dpo_preference_loss(c, x[0], x[1], x[2], q->a, 3, (float)q->b / 100, NULL);
}

static dpo_tensor *run_mapo(dpo_ctx *c, const problem *q, dpo_tensor **x)
{
    return dpo_mapo_loss(c, x[0], x[1], (float)q->d / 1000, NULL);
}

#define CONV ref_conv
static const problem problems[] = {
    { "conv 3x3",        DPO_OP_CONV, { {4,2,5,7,3}, {4,18,3,3,3}, {1,18} }, " w ", 1, 1, 0, run_conv, CONV },
    { "conv stride 2",   DPO_OP_CONV, { {4,1,7,5,17}, {4,5,3,3,17}, {1,5} }, " w ", 2, 1, 0, run_conv, CONV },
    { "conv 1x1 wide",   DPO_OP_CONV, { {4,3,4,3,33}, {4,50,1,1,33} }, " w", 1, 0, 0, run_conv, CONV },
    { "conv 2x3",        DPO_OP_CONV, { {4,1,6,4,2}, {4,7,2,3,2} }, " w", 1, 1, 0, run_conv, CONV },
    { "conv extras",     DPO_OP_CONV, { {4,2,4,4,6}, {4,20,3,3,6}, {1,20}, {2,2,20}, {4,2,4,4,20} }, " w   ", 1, 1, 0, run_conv, CONV },
    { "conv silu",       DPO_OP_CONV, { {4,2,4,5,8}, {4,16,1,1,8}, {1,16}, {2,2,16} }, " w  ", 1, 0, DPO_SILU, run_conv, CONV },
    { "conv adapter",    DPO_OP_CONV, { {4,3,4,5,9}, {4,19,1,1,9}, {1,19}, {0}, {0}, {4,4,1,1,9}, {4,19,1,1,4}, {1,3} }, " w   ww ", 1, 0, 0, run_conv, CONV },
    { "conv adapter 3x3",DPO_OP_CONV, { {4,1,4,5,3}, {4,5,3,3,3}, {0}, {0}, {0}, {4,2,3,3,3}, {4,5,1,1,2} }, " w   ww", 1, 1, 0, run_conv, CONV },
    { "group_norm",      DPO_OP_GROUP_NORM, { {4,2,3,5,12}, {1,12}, {1,12} }, "   ", 3, 0, 0, run_group_norm, ref_group_norm },
    { "group_norm silu", DPO_OP_GROUP_NORM, { {4,3,4,4,32}, {1,32}, {1,32} }, "   ", 16, DPO_SILU, 0, run_group_norm, ref_group_norm },
    { "group_norm one",  DPO_OP_GROUP_NORM, { {3,2,7,5}, {1,5}, {1,5} }, "   ", 1, DPO_SILU, 0, run_group_norm, ref_group_norm },
    { "layer_norm",      DPO_OP_LAYER_NORM, { {3,2,5,37}, {1,37}, {1,37} }, "   ", 0, 0, 0, run_layer_norm, ref_layer_norm },
    { "attention self",  DPO_OP_ATTENTION, { {3,2,9,12}, {3,2,9,12}, {3,2,9,12} }, "   ", 3, 0, 0, run_attention, ref_attention },
    { "attention cross", DPO_OP_ATTENTION, { {3,1,35,40}, {3,1,19,40}, {3,1,19,40} }, "   ", 1, 0, 0, run_attention, ref_attention },
    { "attention causal",DPO_OP_ATTENTION, { {3,2,17,16}, {3,2,17,16}, {3,2,17,16} }, "   ", 2, 1, 0, run_attention, ref_attention },
    { "attention one",   DPO_OP_ATTENTION, { {3,1,1,6}, {3,1,1,6}, {3,1,1,6} }, "   ", 2, 0, 0, run_attention, ref_attention },
    { "geglu",           DPO_OP_GEGLU, { {3,2,3,46} }, " ", 0, 0, 0, run_geglu, ref_geglu },
    { "silu",            DPO_OP_ACT, { {2,5,19} }, " ", DPO_SILU, 0, 0, run_act, ref_act },
    { "gelu",            DPO_OP_ACT, { {2,5,19} }, " ", DPO_GELU, 0, 0, run_act, ref_act },
    { "quick_gelu",      DPO_OP_ACT, { {2,5,19} }, " ", DPO_QUICK_GELU, 0, 0, run_act, ref_act },
    { "sigmoid",         DPO_OP_ACT, { {1,19} }, " ", DPO_SIGMOID, 0, 0, run_act, ref_act },
    { "tanh",            DPO_OP_ACT, { {1,19} }, " ", DPO_TANH, 0, 0, run_act, ref_act },
    { "exp",             DPO_OP_ACT, { {1,19} }, " ", DPO_EXP, 0, 0, run_act, ref_act },
    { "log",             DPO_OP_ACT, { {1,19} }, "p", DPO_LOG, 0, 0, run_act, ref_act },
    { "sqrt",            DPO_OP_ACT, { {1,19} }, "p", DPO_SQRT, 0, 0, run_act, ref_act },
    { "square",          DPO_OP_ACT, { {1,19} }, " ", DPO_SQUARE, 0, 0, run_act, ref_act },
    { "abs",             DPO_OP_ACT, { {1,19} }, "p", DPO_ABS, 0, 0, run_act, ref_act },
    { "relu",            DPO_OP_ACT, { {1,19} }, "p", DPO_RELU, 0, 0, run_act, ref_act },
    { "log_sigmoid",     DPO_OP_ACT, { {1,19} }, " ", DPO_LOG_SIGMOID, 0, 0, run_act, ref_act },
    { "add",             DPO_OP_BINARY, { {3,2,3,5}, {3,2,3,5} }, "  ", DPO_ADD, 0, 0, run_binary, ref_binary },
    { "sub rows",        DPO_OP_BINARY, { {3,2,3,5}, {2,3,1} }, "  ", DPO_SUB, 0, 0, run_binary, ref_binary },
    { "mul spread",      DPO_OP_BINARY, { {1,5}, {4,2,3,4,1} }, "  ", DPO_MUL, 0, 0, run_binary, ref_binary },
    { "div",             DPO_OP_BINARY, { {2,4,7}, {1,7} }, " p", DPO_DIV, 0, 0, run_binary, ref_binary },
    { "affine",          DPO_OP_AFFINE, { {3,2,3,21} }, " ", 0, 0, 0, run_affine, ref_affine },
    { "clamp",           DPO_OP_CLAMP, { {2,3,21} }, " ", 0, 0, 0, run_clamp, ref_clamp },
    { "sum axis",        DPO_OP_SUM, { {3,2,5,7} }, " ", 1, 0, 0, run_sum, ref_sum },
    { "mean last",       DPO_OP_SUM, { {3,2,5,7} }, " ", 2, 1, 0, run_sum, ref_sum },
    { "mean all",        DPO_OP_SUM, { {3,2,5,7} }, " ", -1, 1, 0, run_sum, ref_sum },
    { "concat last",     DPO_OP_CONCAT, { {4,2,3,2,5}, {4,2,3,2,19} }, "  ", 3, 0, 0, run_concat, ref_concat },
    { "concat first",    DPO_OP_CONCAT, { {2,3,5}, {2,1,5} }, "  ", 0, 0, 0, run_concat, ref_concat },
    { "slice",           DPO_OP_SLICE, { {3,4,7,3} }, " ", 1, 2, 4, run_slice, ref_slice },
    { "copy",            DPO_OP_COPY, { {2,3,9} }, " ", 0, 0, 0, run_copy, ref_copy },
    { "upsample 2",      DPO_OP_UPSAMPLE, { {4,2,3,4,5} }, " ", 6, 8, 0, run_upsample, ref_upsample },
    { "upsample odd",    DPO_OP_UPSAMPLE, { {4,1,4,3,17} }, " ", 7, 5, 0, run_upsample, ref_upsample },
    { "embed",           DPO_OP_EMBED, { {2,6,19}, {2,2,5} }, " i", 0, 0, 0, run_embed, ref_embed },
    { "timestep",        DPO_OP_TIMESTEP, { {1,3} }, "t", 34, 0, 0, run_timestep, ref_timestep },
    { "mix",             DPO_OP_MIX, { {4,3,2,3,5}, {4,3,2,3,5}, {1,6}, {1,6}, {1,3} }, "  bbi", 0, 0, 0, run_mix, ref_mix },
    { "mse",             DPO_OP_MSE, { {4,3,4,5,3}, {4,3,4,5,3} }, "  ", 0, 0, 0, run_mse, ref_mse },
    { "sigmoid loss",    DPO_OP_PREFERENCE, { {1,6}, {1,6}, {1,3} }, "  p", DPO_PREF_SIGMOID, 10, 0, run_preference, ref_preference },
    { "hinge loss",      DPO_OP_PREFERENCE, { {1,8}, {1,8} }, "  ", DPO_PREF_HINGE, 0, 0, run_preference, ref_preference },
    { "mapo loss",       DPO_OP_MAPO, { {1,6}, {1,3} }, "pp", 0, 0, 100, run_mapo, ref_mapo },
    { "mapo, no weight", DPO_OP_MAPO, { {1,8} }, "p", 0, 0, 1, run_mapo, ref_mapo },
    { "ipo loss",        DPO_OP_PREFERENCE, { {1,8}, {1,8} }, "  ", DPO_PREF_IPO, 0, 0, run_preference, ref_preference },
};

/* ---- one case: make inputs, run, compare -------------------------------------------------------------------------- */

typedef struct { double *x[8]; dpo_tensor *t[8]; } inputs;

static double value_of(char kind, uint64_t *rng)
{
    double z = test_normal(rng);
    if (kind == 'p') return 0.3 + fabs(z);
    if (kind == 'i') return (double)(test_random(rng) % 6);
    if (kind == 't') return (double)(test_random(rng) % 1000);
    return kind == 'w' ? 0.3 * z : z;
}

static int make_inputs(dpo_ctx *c, const problem *q, inputs *v, uint64_t *rng)
{
    memset(v, 0, sizeof *v);
    for (int i = 0; i < 8; i++) {
        const int64_t *s = q->in[i];
        int64_t n = count_of(s);
        char    kind = s[0] ? q->kind[i] : ' ';
        float   f[MOST];
        int32_t ids[MOST];
        if (!n) continue;
        v->x[i] = (double *)malloc((size_t)n * sizeof(double));
        for (int64_t e = 0; e < n; e++) {
            f[e] = (float)value_of(kind, rng);
            ids[e] = (int32_t)f[e];
            v->x[i][e] = f[e];
        }
        if (kind == 'w') { v->t[i] = dpo_weight_new(c, DPO_F32, (int)s[0], s + 1, "w"); dpo_write(v->t[i], f); }
        else v->t[i] = dpo_tensor_from(c, kind == 'i' ? DPO_I32 : DPO_F32, (int)s[0], s + 1, kind == 'i' ? (void *)ids : (void *)f);
        if (!v->t[i]) return 0;
    }
    return 1;
}

/* d sum(dy * y) / d x[i][e] by central differences of the formula. */
static double slope(const problem *q, inputs *v, int i, int64_t e, const float *dy, int64_t n)
{
    static double y[MOST];
    double at = v->x[i][e], h = 1e-5, sum[2];
    for (int k = 0; k < 2; k++) {
        v->x[i][e] = at + (k ? h : -h);
        q->ref(q, v->x, y);
        sum[k] = 0;
        for (int64_t j = 0; j < n; j++) sum[k] += dy[j] * y[j];
    }
    v->x[i][e] = at;
    return (sum[1] - sum[0]) / (2 * h);
}

/* The worst difference of a gradient, at up to 24 places, over its largest value. */
static double gradient_error(const problem *q, inputs *v, int i, const float *dy, int64_t n, uint64_t *rng)
{
    static float g[MOST];
    int64_t m = count_of(q->in[i]);
    double  worst = 0, most = 0.05;       /* a gradient that is 0 by its formula keeps the rounding of its terms */
    if (!v->t[i]->grad || !dpo_read(v->t[i]->grad, g)) return INFINITY;
    for (int64_t e = 0; e < m; e++) if (fabs(g[e]) > most) most = fabs(g[e]);
    for (int k = 0; k < 24 && k < m; k++) {
        int64_t e = m <= 24 ? k : (int64_t)(test_random(rng) % (uint64_t)m);
        double  d = fabs(slope(q, v, i, e, dy, n) - g[e]);
        if (!(d <= worst)) worst = d;
    }
    return worst / most;
}

static void check_problem(dpo_ctx *c, const problem *q, const char *isa, uint64_t *rng)
{
    static double ref[MOST];
    static float  y[MOST], dy[MOST];
    inputs        v;
    dpo_tensor   *out;
    double        worst = 0, most = 1e-3;
    unsigned      grads = (unsigned)dpoi_ops[q->op].grads;
    int64_t       n;
    if (!make_inputs(c, q, &v, rng)) { CHECK(0, "%s: %s", q->name, why(c)); return; }
    for (int i = 0; i < 8; i++) if (v.t[i]) v.t[i]->needs_grad = grads >> i & 1;
    out = q->run(c, q, v.t);
    n = dpo_count(out);
    CHECK(out && n <= MOST && dpo_read(out, y), "%s on %s: %s", q->name, isa, dpo_error(c) ? dpo_error(c) : "too large");
    if (!out) return;
    q->ref(q, v.x, ref);
    for (int64_t i = 0; i < n; i++) {
        double d = fabs(y[i] - ref[i]);
        if (!(d <= worst)) worst = d;
        if (fabs(ref[i]) > most) most = fabs(ref[i]);
        dy[i] = (float)test_normal(rng);
    }
    CHECK(worst <= (q->op == DPO_OP_TIMESTEP ? 1e-4 : 3e-6) * most,   /* a float angle of 1000 is known to 6e-5 */
          "%s on %s: forward is off by %g of %g", q->name, isa, worst, most);
    if (grads) {
        CHECK(dpo_backward_from(out, dpo_tensor_from(c, DPO_F32, out->rank, out->shape, dy)), "%s: %s", q->name, why(c));
        for (int i = 0; i < 8; i++) {
            double e = v.t[i] && (grads >> i & 1) ? gradient_error(q, &v, i, dy, n, rng) : 0;
            CHECK(e <= 2e-5, "%s on %s: gradient of input %d is off by %g", q->name, isa, i, e);
        }
    }
    for (int i = 0; i < 8; i++) { free(v.x[i]); if (v.t[i] && v.t[i]->persistent) dpo_param_free(v.t[i]); }
}

/* Every op that has a gradient stands in a case above. */
static void check_coverage(void)
{
    for (int op = 0; op < DPO_OP_COUNT; op++) {
        int found = !dpoi_ops[op].grads;
        for (size_t k = 0; k < sizeof problems / sizeof *problems; k++) found |= problems[k].op == op;
        CHECK(found, "no case tests the gradient of %s", dpoi_ops[op].name);
    }
}

/* ---- the tape ----------------------------------------------------------------------------------------------------- */

static dpo_tensor *square_plus(dpo_ctx *c, void *user, dpo_tensor **x)
{
    (void)user;
    return dpo_binary(c, DPO_ADD, dpo_last(dpo_binary(c, DPO_MUL, x[0], x[0])), dpo_last(x[1]));
}

/* Runs square_plus as a segment inside a segment. */
static dpo_tensor *nested(dpo_ctx *c, void *user, dpo_tensor **x)
{
    dpo_tensor *in[2];
    in[0] = dpo_checkpoint(c, square_plus, user, x, 2);
    in[1] = x[0];
    return dpo_checkpoint(c, square_plus, user, in, 2);
}

/* y = (x^2 + z)^2 + x: by ops, by a segment, by nested segments: the same gradients, and less memory kept. */
static void check_segments(dpo_ctx *c)
{
    static const float xs[3] = { 0.5f, -1, 2 }, zs[3] = { 1, 2, -0.5f };
    int64_t shape = 3;
    for (int way = 0; way < 2; way++) {
        int64_t     scope = dpo_scope(c);
        float       dx[3], dz[3];
        dpo_tensor *in[2], *y;
        in[0] = dpo_tensor_from(c, DPO_F32, 1, &shape, xs);
        in[1] = dpo_tensor_from(c, DPO_F32, 1, &shape, zs);
        in[0]->needs_grad = in[1]->needs_grad = 1;
        y = way ? dpo_checkpoint(c, nested, NULL, in, 2) : nested(c, NULL, in);
        CHECK(y && dpo_backward(dpo_sum(c, y, -1)), "segments: %s", why(c));
        CHECK(in[0]->grad && in[1]->grad && dpo_read(in[0]->grad, dx) && dpo_read(in[1]->grad, dz), "segments have no gradient");
        for (int i = 0; i < 3; i++) {
            float s = xs[i] * xs[i] + zs[i];
            CHECK_CLOSE(dx[i], 4 * s * xs[i] + 1, 1e-5);
            CHECK_CLOSE(dz[i], 2 * s, 1e-5);
        }
        CHECK(c->row_count == 0, "the tape is not empty after backward");
        dpo_scope_end(c, scope, NULL);
    }
}

/* A released tensor, one of another shape, one of another context: errors that name the op. */
/* A weight in panels is read by products alone, by its name in the error elsewhere. */
static void check_panels(dpo_ctx *c)
{
    int64_t     wide[2] = { 21, 5 }, one[2] = { 1, 5 }, up[2] = { 21, 1 };
    dpo_extra   e;
    dpo_tensor *w = dpo_weight_new(c, DPO_F32, 2, wide, "proj"), *x = dpo_tensor_new(c, DPO_F32, 2, one), *no[6];
    CHECK(w && dpo_linear(c, x, w, NULL, NULL), "a weight serves its product: %s", why(c));
    if (!w->panel) { dpo_param_free(w); return; }          /* this device keeps rows */
    for (int i = 0; i < 6; i++) {
        no[i] = i == 0 ? dpo_affine(c, w, 2, 0) : i == 1 ? dpo_act(c, w, DPO_SILU) : i == 2 ? dpo_binary(c, DPO_ADD, x, w) :
                i == 3 ? dpo_mean(c, w, -1) : i == 4 ? dpo_reshape(c, w, 2, wide) : dpo_cast(c, w, DPO_BF16);
        CHECK(!no[i] && dpo_status(c) == DPO_BAD_ARGUMENT && strstr(dpo_error(c), "proj"), "op %d takes panels: %s", i,
              why(c));
        dpo_clear_error(c);
    }
    memset(&e, 0, sizeof e);
    e.down = x;
    e.up = dpo_tensor_new(c, DPO_F32, 2, up);
    CHECK(!dpo_linear(c, x, w, NULL, &e) && dpo_status(c) == DPO_BAD_ARGUMENT, "an adapter in rows was read as panels");
    dpo_clear_error(c);
    w->needs_grad = 1;
    CHECK(!dpo_backward_from(w, dpo_tensor_new(c, DPO_F32, 2, wide)) && dpo_status(c) == DPO_BAD_SHAPE,
          "a gradient in rows was laid on panels");
    dpo_clear_error(c);
    dpo_param_free(w);
}

/* A gradient that backward made in an inner scope, of a tensor of an outer one: gone with that scope, and made again. */
static void check_scopes(dpo_ctx *c)
{
    int64_t     n = 3, scope = dpo_scope(c);
    float       value[3] = { 1, 2, 3 }, got[3];
    dpo_tensor *x = dpo_tensor_from(c, DPO_F32, 1, &n, value), *dy = dpo_tensor_from(c, DPO_F32, 1, &n, value);
    x->needs_grad = 1;
    for (int k = 0; k < 3; k++) {
        int64_t inner = dpo_scope(c);
        dpo_backward_from(dpo_affine(c, x, 2, 0), dy);
        CHECK(!dpo_error(c) && x->grad && dpo_read(x->grad, got) && got[2] == 6, "scope %d: gradient %g", k, x->grad ? got[2] : 0);
        dpo_scope_end(c, inner, NULL);
        CHECK(!x->grad, "a gradient outlived its scope");
    }
    dpo_scope_end(c, scope, NULL);
}

static void check_misuse(dpo_ctx *c)
{
    int64_t     a = 3, b = 4, scope = dpo_scope(c);
    dpo_tensor *x = dpo_tensor_new(c, DPO_F32, 1, &a), *y = dpo_tensor_new(c, DPO_F32, 1, &b);
    CHECK(!dpo_binary(c, DPO_ADD, x, y) && strstr(dpo_error(c), "[3]") && strstr(dpo_error(c), "[4]"), "shapes are not named");
    dpo_clear_error(c);
    dpo_act(c, dpo_last(x), DPO_SILU);
    CHECK(!dpo_act(c, x, DPO_SILU) && dpo_status(c) == DPO_BAD_ARGUMENT, "a released tensor was read");
    dpo_clear_error(c);
    CHECK(!dpo_act(c, NULL, DPO_SILU) && !dpo_error(c), "NULL in must be NULL out, without an error");
    check_panels(c);
    dpo_cancel(c);
    CHECK(!dpo_act(c, y, DPO_SILU) && dpo_status(c) == DPO_CANCELLED, "cancel did not stop");
    dpo_clear_error(c);
    dpo_scope_end(c, scope, NULL);
}

/* The same requests on cpu and dry; nothing new from the backend in the second round. */
static void check_memory(void)
{
    size_t peak[2], second[2];
    for (int k = 0; k < 2; k++) {
        dpo_desc     d;
        dpo_backend *cpu;
        dpo_ctx     *c;
        memset(&d, 0, sizeof d);
        cpu = dpo_cpu_open(&d);
        d.backend = k ? dpo_dry_open(cpu) : cpu;
        c = dpo_open(&d);
        for (int round = 0; round < 2; round++) {
            int64_t     shape[4] = { 2, 9, 8, 16 }, wshape[4] = { 48, 3, 3, 16 }, scope = dpo_scope(c);
            int         pad[4] = { 1, 1, 1, 1 };
            dpo_tensor *x = dpo_tensor_new(c, DPO_F32, 4, shape), *w = dpo_weight_new(c, DPO_F32, 4, wshape, "w");
            w->needs_grad = 1;
            dpo_backward(dpo_mean(c, dpo_last(dpo_act(c, dpo_last(dpo_conv2d(c, x, w, NULL, 1, pad, NULL)), DPO_SILU)), -1));
            CHECK(!dpo_error(c), "%s", why(c));
            dpo_scope_end(c, scope, NULL);
            dpo_param_free(w);
            if (!round) peak[k] = dpo_memory_peak(c, 0);
            second[k] = dpo_memory_peak(c, 0);
        }
        dpo_close(c);
        if (k) cpu->close(cpu->self);
    }
    CHECK(peak[0] == peak[1], "dry counts %llu bytes, cpu takes %llu", (unsigned long long)peak[1], (unsigned long long)peak[0]);
    CHECK(peak[0] == second[0], "a second step allocates");
}

/* y = geglu(x w^T + b + r) v^T.  `more` says what else reads the numbers between them, after (2) or before (3) what is
   on the way to y: the gradients of those that several ops read are summed in F32, whatever the first of them wrote. */
static dpo_tensor *gated(dpo_ctx *c, void *user, dpo_tensor **x)
{
    int         more = *(const int *)user;
    int64_t     same[3] = { 1, 600, 96 };
    dpo_extra   e;
    dpo_tensor *h, *g, *y, *before, *after;
    memset(&e, 0, sizeof e);
    e.residual = x[4];
    h = dpo_linear(c, x[0], x[1], x[2], &e);
    if (more == 1) h = dpo_reshape(c, h, 3, same);
    before = more == 3 ? dpo_mean(c, dpo_act(c, h, DPO_SILU), -1) : NULL;
    g = dpo_geglu(c, h);
    if (before) before = dpo_binary(c, DPO_ADD, before, dpo_mean(c, dpo_act(c, g, DPO_SILU), -1));
    y = dpo_mean(c, dpo_act(c, dpo_linear(c, g, x[3], NULL, NULL), DPO_SILU), -1);
    if (before) return dpo_binary(c, DPO_ADD, y, before);
    if (more < 2) return y;
    after = dpo_binary(c, DPO_ADD, dpo_mean(c, dpo_act(c, h, DPO_SILU), -1), dpo_mean(c, dpo_act(c, g, DPO_SILU), -1));
    return dpo_binary(c, DPO_ADD, y, after);
}

/* The gradients of x [600,64], w [96,64], b [96], v [40,48], r [600,96] one after the other; the caller frees them. */
static float *gated_gradients(int isa, int more, int segment, int64_t *count)
{
    dpo_desc    d;
    dpo_ctx    *c;
    dpo_tensor *x[5], *y;
    int64_t     shape[5][2] = { { 600, 64 }, { 96, 64 }, { 96, 1 }, { 40, 48 }, { 600, 96 } }, at = 0;
    float      *all = (float *)calloc(1 << 17, sizeof *all);
    uint64_t    rng = 7;
    memset(&d, 0, sizeof d);
    d.isa = isa;
    c = dpo_open(&d);
    for (int i = 0; i < 5; i++) {
        int64_t n = shape[i][0]*shape[i][1];
        for (int64_t e = 0; e < n; e++) all[e] = (float)test_normal(&rng);
        if (i % 2) x[i] = dpo_weight_new(c, DPO_BF16, 2, shape[i], "w");
        else if (i == 2) x[i] = dpo_param_new(c, DPO_BF16, 1, shape[i], "b");
        else x[i] = dpo_tensor_new(c, DPO_BF16, 2, shape[i]);
        dpo_write(x[i], all);
        x[i]->needs_grad = 1;
    }
    y = segment ? dpo_checkpoint(c, gated, &more, x, 5) : gated(c, &more, x);
    dpo_backward(y);
    CHECK(!dpo_error(c), "%s", why(c));
    for (int i = 0; i < 5 && !dpo_error(c); i++) {
        CHECK(x[i]->grad->dtype == DPO_F32, "gradient %d is not F32", i);
        dpo_read(x[i]->grad, all + at);
        at += dpo_count(x[i]);
    }
    dpo_close(c);
    *count = at;
    return all;
}

/* BF16 between a product and a GEGLU against a device that keeps all gradients in F32. */
static void check_halves(void)
{
    for (int more = 0; more < 4; more++)
        for (int segment = 0; segment < 2; segment++) {
            int64_t n, m;
            float  *a = gated_gradients(DPO_ISA_BEST, more, segment, &n), *b = gated_gradients(DPO_ISA_PLAIN, more, segment, &m);
            double  d = 0, all = 0;
            for (int64_t e = 0; e < n && n == m; e++) {
                d += ((double)a[e] - b[e])*((double)a[e] - b[e]);
                all += (double)b[e]*b[e];
            }
            CHECK(n == m && sqrt(d) <= 1e-2*sqrt(all), "gradients %d %d: relative difference %g", more, segment, sqrt(d/all));
            free(a);
            free(b);
        }
}

/* What an op made is a leaf of the next pass, once its row is gone: its gradient stays, and in F32. */
static void check_leaf(void)
{
    dpo_ctx    *c = dpo_open(NULL);
    int64_t     shape[2][2] = { { 70, 32 }, { 64, 32 } };
    dpo_tensor *x = dpo_tensor_new(c, DPO_BF16, 2, shape[0]), *w = dpo_weight_new(c, DPO_BF16, 2, shape[1], "w"), *h;
    w->needs_grad = 1;
    h = dpo_linear(c, x, w, NULL, NULL);
    for (int pass = 0; pass < 2; pass++) {
        dpo_backward(dpo_sum(c, dpo_cast(c, dpo_geglu(c, h), DPO_F32), -1));
        CHECK(!dpo_error(c) && (h->grad != NULL) == pass, "pass %d: %s", pass, dpo_error(c) ? dpo_error(c) : "gradient of a result");
    }
    CHECK(h->grad && h->grad->dtype == DPO_F32 && dpo_count(h->grad) == dpo_count(h), "a leaf's gradient is not F32");
    dpo_close(c);
}

/* All of it on one device. */
static void check_device(dpo_desc *d, const char *name, uint64_t *rng)
{
    dpo_ctx *c = dpo_open(d);
    for (size_t i = 0; i < sizeof problems / sizeof *problems; i++) {
        int64_t scope = dpo_scope(c);
        check_problem(c, &problems[i], name, rng);
        dpo_scope_end(c, scope, NULL);
        dpo_clear_error(c);
    }
    check_segments(c);
    check_scopes(c);
    check_misuse(c);
    dpo_close(c);
}

int main(int argc, char **argv)
{
    static const int         isas[3] = { DPO_ISA_PLAIN, DPO_ISA_AVX2, DPO_ISA_AVX512 };
    static const char *const names[3] = { "plain C", "AVX2", "AVX-512" };
    uint64_t rng = argc > 1 ? (uint64_t)atoll(argv[1]) : 1;
    check_coverage();
    for (int k = 0; k < 3; k++) {
        dpo_desc d;
        memset(&d, 0, sizeof d);
        d.isa = isas[k];
        if (!test_has_isa(isas[k])) { SKIP("ops on %s: this machine has none", names[k]); continue; }
        check_device(&d, names[k], &rng);
    }
#ifdef DIFFDPO_CUDA
    {
        dpo_desc d;
        memset(&d, 0, sizeof d);
        d.backend = dpo_cuda_open(0, DIFFDPO_VERSION);
        check_device(&d, "CUDA", &rng);
    }
#endif
    check_memory();
    check_halves();
    check_leaf();
    return test_report();
}
