/* The two quantizers in one pass over memory each, as `native.py` calls them.

   Levels equal those of `levels.py`: the same operations in the same precision, each
   rounded by itself (compile with -ffp-contract=off). Codes are clamped before they are
   rounded, which is the same where bounds are whole. Comparisons let NaN pass.

   Sums run over pieces of fixed length and then over pieces, so that they depend neither
   on the number of threads nor on how a tensor is cut among them. Without OpenMP one
   thread does all. */

#if defined(_OPENMP) && defined(__clang__)
#error "a second LLVM runtime of OpenMP beside that of torch would end the process"
#endif

#include <math.h>
#include <stdint.h>

#define PIECE 4096
#define LN2 0.69314718055994530942

static int64_t pieces_of(int64_t length) { return (length + PIECE - 1) / PIECE; }

static int64_t shorter(int64_t one, int64_t other) { return one < other ? one : other; }

static inline float code_of(float value, float step, float lower, float top)
{
    float code = (value - lower) / step;
    code = code < 0.0f ? 0.0f : code;
    code = code > top ? top : code;
    return nearbyintf(code);
}

static inline float snapped(float offset, float unit)
{
    return unit > 0.0f ? nearbyintf(offset / unit) * unit : offset;
}

/* Lowest level and largest code of grids of weights, as `WeightQuantizer` has them; a
   lowest level is a multiple of `part` steps, or free where that is 0. */
void gdnsq_weight_grid(const float *low, const float *high, const float *step,
                       int64_t count, float part, float tolerance, float *lower,
                       float *top)
{
    for (int64_t i = 0; i < count; i++) {
        const float capacity = log2f((high[i] - low[i]) / step[i] + 1.0f);
        const float whole = ceilf(capacity - tolerance);
        lower[i] = snapped(low[i], step[i] * part);
        top[i] = exp2f(whole < 1.0f ? 1.0f : whole) - 1.0f;
    }
}

/* Step, range and lowest level of an activation, as `ActivationQuantizer` has them: an
   odd multiple of half a step is moved by a sixty-fourth of one. A null `lower` is 0,
   and `bound` is not written then. */
void gdnsq_activation_grid(const float *log2_step, const float *log2_range,
                           const float *lower, float part, float *step, float *range,
                           float *bound)
{
    const float s = exp2f(*log2_step);
    *step = s;
    *range = exp2f(*log2_range);
    if (!lower)
        return;
    const float unit = s * part, b = snapped(*lower, unit);
    const int is_odd = part == 0.5f && fmodf(nearbyintf(b / unit), 2.0f) != 0.0f;
    *bound = is_odd ? b + s / 64.0f : b;
}

/* y = step * k + lower of values that share a grid. */
static inline void write_levels(const float *restrict value, float *restrict levels,
                                int64_t count, float step, float lower, float top)
{
    const float s = isnan(top) ? top : step; /* diverged: no level is right */
    for (int64_t i = 0; i < count; i++)
        levels[i] = code_of(value[i], s, lower, top) * s + lower;
}

/* Levels of rows of one grid each. */
void gdnsq_weight_levels(const float *restrict value, float *restrict levels,
                         int64_t rows, int64_t length, const float *step,
                         const float *lower, const float *top, int threads)
{
    const int64_t pieces = pieces_of(length);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < rows * pieces; piece++) {
        const int64_t row = piece / pieces, first = piece % pieces * PIECE;
        const int64_t at = row * length + first;
        write_levels(value + at, levels + at, shorter(PIECE, length - first), step[row],
                     lower[row], top[row]);
    }
}

/* Levels of one clamped grid: its step, range and, where it is signed, lowest level.
   Rows of values lie `stride` apart, those of levels behind each other. */
void gdnsq_activation_levels(const float *restrict value, float *restrict levels,
                             int64_t rows, int64_t length, int64_t stride,
                             const float *grid, int is_signed, int threads)
{
    const float step = grid[0], top = nearbyintf(grid[1] / step - 1.0f);
    const float lower = is_signed ? grid[2] : 0.0f;
    const int64_t pieces = pieces_of(length);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < rows * pieces; piece++) {
        const int64_t row = piece / pieces, first = piece % pieces * PIECE;
        write_levels(value + row * stride + first, levels + row * length + first,
                     shorter(PIECE, length - first), step, lower, top);
    }
}

/* Gradients of one clamped grid by the estimator lsq. `sums` has room for three numbers
   a piece of a row; the others get the gradients of log2 of step and range, and of the
   lower bound. */
void gdnsq_activation_gradients(const float *restrict value,
                                const float *restrict gradient,
                                float *restrict grad_value, int64_t rows,
                                int64_t length, int64_t stride, const float *grid,
                                int is_signed, double *sums, float *by_step,
                                float *by_range, float *by_lower, int threads)
{
    const float range = grid[1], s = grid[0] + (range - range); /* NaN where it is */
    const float b = is_signed ? grid[2] : 0.0f, low = is_signed ? b : -INFINITY;
    const float high = is_signed ? b + range - s : range - s;
    const float top = nearbyintf(range / s - 1.0f);
    const int64_t pieces = pieces_of(length);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < rows * pieces; piece++) {
        const int64_t row = piece / pieces, first = piece % pieces * PIECE;
        const int64_t count = shorter(PIECE, length - first);
        const float *restrict x = value + row * stride + first;
        const float *restrict g = gradient + row * length + first;
        float *restrict to = grad_value + row * length + first;
        float noise = 0.0f, above = 0.0f, outside = 0.0f;
#pragma omp simd reduction(+ : noise, above, outside)
        for (int64_t i = 0; i < count; i++) {
            const int over = x[i] > high, out = over | (x[i] < low);
            const float level = code_of(x[i], s, b, top) * s + b;
            to[i] = out ? 0.0f : g[i];
            noise += out ? 0.0f : (level - x[i]) * g[i];
            above += over ? g[i] : 0.0f;
            outside += out ? g[i] : 0.0f;
        }
        sums[3 * piece] = noise;
        sums[3 * piece + 1] = above;
        sums[3 * piece + 2] = outside;
    }
    double noise = 0.0, above = 0.0, outside = 0.0;
    for (int64_t piece = 0; piece < rows * pieces; piece++) {
        noise += sums[3 * piece];
        above += sums[3 * piece + 1];
        outside += sums[3 * piece + 2];
    }
    *by_step = (float)((noise - above * s) * LN2);
    *by_range = (float)(above * range * LN2);
    if (by_lower)
        *by_lower = (float)outside;
}

/* Gradients of log2 of the steps of rows by the estimator lsq, from the sums of rounding
   error times the gradient that arrives. `sums` has room for one number a piece. */
void gdnsq_weight_gradients(const float *restrict value, const float *restrict gradient,
                            int64_t rows, int64_t length, const float *step,
                            const float *lower, const float *top, double *sums,
                            float *found, int threads)
{
    const int64_t pieces = pieces_of(length);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < rows * pieces; piece++) {
        const int64_t row = piece / pieces, first = piece % pieces * PIECE;
        const int64_t count = shorter(PIECE, length - first);
        const float *restrict w = value + row * length + first;
        const float *restrict g = gradient + row * length + first;
        const float s = step[row], b = lower[row], high = top[row];
        float noise = 0.0f;
#pragma omp simd reduction(+ : noise)
        for (int64_t i = 0; i < count; i++)
            noise += (code_of(w[i], s, b, high) * s + b - w[i]) * g[i];
        sums[piece] = noise;
    }
    for (int64_t row = 0; row < rows; row++) {
        double sum = 0.0;
        for (int64_t piece = 0; piece < pieces; piece++)
            sum += sums[row * pieces + piece];
        found[row] = (float)(sum * LN2);
    }
}

/* Least and largest value of each of `parts` equal parts of each row, and of the rows;
   NaN where there is one. */
void gdnsq_extremes(const float *restrict value, int64_t rows, int64_t parts,
                    int64_t length, float *part_lows, float *part_highs, float *lows,
                    float *highs, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < rows * parts; part++) {
        const float *restrict from = value + part * length;
        float low = INFINITY, high = -INFINITY;
        int unordered = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : unordered)
        for (int64_t i = 0; i < length; i++) {
            low = from[i] < low ? from[i] : low;
            high = from[i] > high ? from[i] : high;
            unordered |= from[i] != from[i];
        }
        part_lows[part] = unordered ? NAN : low;
        part_highs[part] = unordered ? NAN : high;
    }
    for (int64_t row = 0; row < rows; row++) {
        float low = INFINITY, high = -INFINITY;
        int unordered = 0;
        for (int64_t part = row * parts; part < (row + 1) * parts; part++) {
            low = part_lows[part] < low ? part_lows[part] : low;
            high = part_highs[part] > high ? part_highs[part] : high;
            unordered |= isnan(part_lows[part]) != 0;
        }
        lows[row] = unordered ? NAN : low;
        highs[row] = unordered ? NAN : high;
    }
}
