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

/* The lowest level of an activation, as `ActivationQuantizer` has it: an odd multiple of
   half a step is moved by a sixty-fourth of one. */
void gdnsq_activation_offset(const float *lower, const float *step, float part,
                             float *offset)
{
    const float unit = *step * part, bound = snapped(*lower, unit);
    const int is_odd = part == 0.5f && fmodf(nearbyintf(bound / unit), 2.0f) != 0.0f;
    *offset = is_odd ? bound + *step / 64.0f : bound;
}

/* Rows of one grid each: y = step * k + lower. A null `lower` is 0, a null `top`
   bounds nothing. */
void gdnsq_levels(const float *restrict value, float *restrict levels, int64_t rows,
                  int64_t length, const float *step, const float *lower,
                  const float *top, int threads)
{
    const int64_t pieces = pieces_of(length);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < rows * pieces; piece++) {
        const int64_t row = piece / pieces, first = piece % pieces * PIECE;
        const int64_t count = shorter(PIECE, length - first);
        const float *restrict from = value + row * length + first;
        float *restrict to = levels + row * length + first;
        const float high = top ? top[row] : INFINITY;
        const float s = isnan(high) ? high : step[row]; /* diverged: no level is right */
        if (lower) {
            const float b = lower[row];
            for (int64_t i = 0; i < count; i++)
                to[i] = code_of(from[i], s, b, high) * s + b;
        } else {
            for (int64_t i = 0; i < count; i++)
                to[i] = code_of(from[i], s, 0.0f, high) * s;
        }
    }
}

/* One clamped grid for all values. */
void gdnsq_activation_levels(const float *restrict value, float *restrict levels,
                             int64_t length, const float *step, const float *range,
                             const float *lower, int threads)
{
    const float top = nearbyintf(*range / *step - 1.0f);
    gdnsq_levels(value, levels, 1, length, step, lower, &top, threads);
}

/* Gradients of one clamped grid by the estimator lsq. `sums` has room for three numbers
   a piece; `found` gets the gradients of step, range and lower bound. */
void gdnsq_activation_gradients(const float *restrict value,
                                const float *restrict gradient,
                                float *restrict grad_value, int64_t length,
                                const float *step, const float *range,
                                const float *lower, double *sums, float *found,
                                int threads)
{
    const float s = *step + (*range - *range); /* NaN where the range is */
    const float b = lower ? *lower : 0.0f, low = lower ? b : -INFINITY;
    const float high = lower ? b + *range - s : *range - s;
    const float top = nearbyintf(*range / s - 1.0f);
    const int64_t pieces = pieces_of(length);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t first = piece * PIECE;
        const int64_t count = shorter(PIECE, length - first);
        const float *restrict x = value + first;
        const float *restrict g = gradient + first;
        float *restrict to = grad_value + first;
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
    for (int64_t piece = 0; piece < pieces; piece++) {
        noise += sums[3 * piece];
        above += sums[3 * piece + 1];
        outside += sums[3 * piece + 2];
    }
    found[0] = (float)(noise / s - above);
    found[1] = (float)above;
    found[2] = (float)outside;
}

/* Gradients of the steps of rows by the estimator lsq, the sums of rounding error in
   steps times the gradient that arrives. `sums` has room for one number a piece. */
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
        const float s = step[row], b = lower[row], high = top ? top[row] : INFINITY;
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
        found[row] = (float)(sum / step[row]);
    }
}

/* Least and largest value of each row; NaN where a row has one. */
void gdnsq_extremes(const float *restrict value, int64_t rows, int64_t length,
                    float *lows, float *highs, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *restrict from = value + row * length;
        float low = INFINITY, high = -INFINITY;
        int unordered = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : unordered)
        for (int64_t i = 0; i < length; i++) {
            low = from[i] < low ? from[i] : low;
            high = from[i] > high ? from[i] : high;
            unordered |= from[i] != from[i];
        }
        lows[row] = unordered ? NAN : low;
        highs[row] = unordered ? NAN : high;
    }
}
