/* Convolutions with 3x3 kernels and strides of 1 by minimal filtering, F(2x2, 3x3): Lavin and Gray,
 * "Fast Algorithms for Convolutional Neural Networks", 2016, section 4; on processors with AVX2.
 *
 * Four outputs, 2x2, are made of a tile of 4x4 of the images with 16 multiplications instead of 36:
 * what all tiles have in one of their 16 places is multiplied, as a matrix, with what all kernels
 * have there, and before and behind that there are sums of a few neighbours only. The sums of
 * products are shorter than those of the definition, and what they round away is less.
 *
 * `winograd.py` says which arrays a function is given. What is multiplied lies in 16 planes, one
 * for each place of a tile; of a plane, the second factor lies in panels of 16 columns,
 * [columns / 16, rows, 16], so that a product reads what follows in memory.
 */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE AVX2 static inline __attribute__((always_inline))

typedef __m256 lanes;
enum { LANES = 8, PANEL = 16, ROWS = 6, PLACES = 16 };

INLINE lanes load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store(float *to, lanes x) { _mm256_storeu_ps(to, x); }

/* -------------------------------------------------------------------------------------- threads */
/* OpenMP's own, of the library that oneDNN computes with: another would have threads of its own. */
static struct {
    void (*parallel)(void (*)(void *), void *, unsigned threads, unsigned flags);
    void (*barrier)(void);
    int (*me)(void);
    int (*threads)(void);
} openmp;

void use_openmp(void *parallel, void *barrier, void *me, void *threads) {
    openmp.parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    openmp.barrier = (void (*)(void))barrier;
    openmp.me = (int (*)(void))me;
    openmp.threads = (int (*)(void))threads;
}

/* This thread's share of so many. */
#define SHARE(i, count) \
    for (int64_t i = (count) * openmp.me() / openmp.threads(), \
                 end_##i = (count) * (openmp.me() + 1) / openmp.threads(); i < end_##i; i++)

/* -------------------------------------------------------------------------------- what is asked */
/* As `_Problem` of `winograd.py` has it. */
typedef struct {
    int64_t batch, height, width, channels; /* of the images */
    int64_t out_height, out_width, features; /* of the outputs */
    int64_t top, left; /* rows and columns of zeros before the images */
    int64_t threads;
    int64_t block; /* how many tiles are multiplied at once */
    int64_t bias, residual, relu; /* what is done with the outputs */
} problem;

typedef struct {
    const problem *of;
    void *const *arrays;
} task;

typedef struct {
    int64_t image, row, column; /* the first of its outputs */
} tile;

INLINE int64_t tiles(const problem *p) {
    return p->batch * ((p->out_height + 1) / 2) * ((p->out_width + 1) / 2);
}

INLINE tile tile_at(const problem *p, int64_t number) {
    int64_t rows = (p->out_height + 1) / 2, columns = (p->out_width + 1) / 2;
    return (tile){number / columns / rows, number / columns % rows * 2, number % columns * 2};
}

static const float zeros[1 << 14]; /* a pixel of padding */

/* The pixels of the images that a tile sees, row by row. */
INLINE void seen(const problem *p, tile at, const float *images, const float *pixels[PLACES]) {
    for (int64_t i = 0; i < 4; i++)
        for (int64_t j = 0; j < 4; j++) {
            int64_t row = at.row + i - p->top, column = at.column + j - p->left;
            int inside = row >= 0 && row < p->height && column >= 0 && column < p->width;
            int64_t pixel = (at.image * p->height + row) * p->width + column;
            pixels[i * 4 + j] = inside ? images + pixel * p->channels : zeros;
        }
}

/* ------------------------------------------------------------------------------------ products */
/* `rows` x 16 sums of `count` products: a[row * across + i * along] b[i, 16]. */
INLINE void product(int rows, const float *a, int64_t across, int64_t along, const float *b,
                    int64_t count, float *sums, int64_t stride, int add) {
    lanes left[ROWS], right[ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) left[r] = right[r] = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i++, b += PANEL) {
        lanes b_left = load(b), b_right = load(b + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            lanes factor = _mm256_broadcast_ss(a + r * across + i * along);
            left[r] = _mm256_fmadd_ps(factor, b_left, left[r]);
            right[r] = _mm256_fmadd_ps(factor, b_right, right[r]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++, sums += stride) {
        if (add) left[r] += load(sums), right[r] += load(sums + LANES);
        store(sums, left[r]);
        store(sums + LANES, right[r]);
    }
}

/* Of all rows, an even number: six at a time, as many as there are registers for. */
INLINE void products(int64_t rows, const float *a, int64_t across, int64_t along, const float *b,
                     int64_t count, float *sums, int64_t stride, int add) {
    for (; rows >= 6; rows -= 6, a += 6 * across, sums += 6 * stride)
        product(6, a, across, along, b, count, sums, stride, add);
    if (rows == 4) product(4, a, across, along, b, count, sums, stride, add);
    if (rows == 2) product(2, a, across, along, b, count, sums, stride, add);
}

/* -------------------------------------------------------------------------------------- kernels */
/* G of the paper, of one column: three elements become four. */
INLINE void widened(lanes a, lanes b, lanes c, lanes *to) {
    lanes half = _mm256_set1_ps(0.5f), even = (a + c) * half, odd = b * half;
    to[0] = a, to[1] = even + odd, to[2] = even - odd, to[3] = c;
}

INLINE void widened_kernel(lanes kernel[3][3], float *to, int64_t plane) {
    lanes columns[3][4];
    for (int j = 0; j < 3; j++) widened(kernel[0][j], kernel[1][j], kernel[2][j], columns[j]);
    for (int i = 0; i < 4; i++, to += 4 * plane) {
        lanes row[4];
        widened(columns[0][i], columns[1][i], columns[2][i], row);
        for (int j = 0; j < 4; j++) store(to + j * plane, row[j]);
    }
}

AVX2 static void kernel_part(void *argument) {
    const task *task = argument;
    int64_t channels = task->of->channels, features = task->of->features;
    const float *kernel = task->arrays[0];
    float *to = task->arrays[1];
    SHARE(panel, features / PANEL)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t lane = 0; lane < PANEL; lane += LANES) {
                lanes elements[3][3];
                for (int i = 0; i < 9; i++) {
                    const float *from = kernel + (i * channels + c) * features;
                    elements[i / 3][i % 3] = load(from + panel * PANEL + lane);
                }
                float *there = to + (panel * PLACES * channels + c) * PANEL + lane;
                widened_kernel(elements, there, channels * PANEL);
            }
}

INLINE void transpose(lanes x[LANES]) {
    lanes y[LANES];
    for (int i = 0; i < LANES; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
            x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xEE);
        }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
        y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
    }
    memcpy(x, y, sizeof(y));
}

/* For the gradient of the images, which is a convolution with the kernel turned around whose
 * channels are the features: the problem's channels are those of that convolution. */
AVX2 static void turned_kernel_part(void *argument) {
    const task *task = argument;
    int64_t channels = task->of->channels, features = task->of->features;
    const float *kernel = task->arrays[0];
    float *to = task->arrays[1];
    SHARE(group, features / LANES)
        for (int64_t c = 0; c < channels; c += LANES) {
            lanes turned[9][LANES];
            for (int i = 0; i < 9; i++) {
                const float *from = kernel + (i * features + group * LANES) * channels + c;
                for (int k = 0; k < LANES; k++) turned[8 - i][k] = load(from + k * channels);
                transpose(turned[8 - i]);
            }
            int64_t panel = group * LANES / PANEL, lane = group * LANES % PANEL;
            for (int k = 0; k < LANES; k++) {
                lanes elements[3][3];
                for (int i = 0; i < 9; i++) elements[i / 3][i % 3] = turned[i][k];
                float *there = to + (panel * PLACES * channels + c + k) * PANEL + lane;
                widened_kernel(elements, there, channels * PANEL);
            }
        }
}

/* --------------------------------------------------------------------------------- convolutions */
/* B of the paper, of one column of a tile. */
INLINE void differences(lanes a, lanes b, lanes c, lanes d, lanes *to) {
    to[0] = a - c, to[1] = b + c, to[2] = c - b, to[3] = b - d;
}

INLINE void differences_of_tile(const float *const pixels[PLACES], int64_t channels, float *to,
                                int64_t plane) {
    for (int64_t c = 0; c < channels; c += LANES) {
        lanes columns[4][4];
        for (int j = 0; j < 4; j++)
            differences(load(pixels[j] + c), load(pixels[4 + j] + c), load(pixels[8 + j] + c),
                        load(pixels[12 + j] + c), columns[j]);
        for (int i = 0; i < 4; i++) {
            lanes row[4];
            differences(columns[0][i], columns[1][i], columns[2][i], columns[3][i], row);
            for (int j = 0; j < 4; j++) store(to + (i * 4 + j) * plane + c, row[j]);
        }
    }
}

/* NaN stays what it is. */
INLINE lanes relu(lanes x) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ), x);
}

/* A of the paper: 2x2 outputs of what a tile has in its planes, of one panel of features. */
INLINE void outputs_of_tile(const problem *p, tile at, const float *sums, int64_t plane,
                            const float *bias, float *outputs) {
    int64_t pixel = (at.image * p->out_height + at.row) * p->out_width + at.column;
    for (int64_t lane = 0; lane < PANEL; lane += LANES) {
        lanes rows[2][4];
        for (int j = 0; j < 4; j++) {
            const float *column = sums + j * plane + lane;
            lanes first = load(column), second = load(column + 4 * plane);
            lanes third = load(column + 8 * plane), fourth = load(column + 12 * plane);
            rows[0][j] = first + second + third;
            rows[1][j] = second - third - fourth;
        }
        for (int i = 0; i < 2 && at.row + i < p->out_height; i++)
            for (int j = 0; j < 2 && at.column + j < p->out_width; j++) {
                lanes *row = rows[i];
                lanes y = j ? row[1] - row[2] - row[3] : row[0] + row[1] + row[2];
                float *to = outputs + (pixel + i * p->out_width + j) * p->features + lane;
                if (bias) y += load(bias + lane);
                if (p->residual) y += load(to);
                store(to, p->relu ? relu(y) : y);
            }
    }
}

AVX2 static void convolution_part(void *argument) {
    const task *task = argument;
    const problem *p = task->of;
    const float *images = task->arrays[0], *kernel = task->arrays[1];
    const float *bias = p->bias ? task->arrays[2] : 0;
    float *outputs = task->arrays[2 + p->bias], *work = task->arrays[3 + p->bias];
    int64_t channels = p->channels, features = p->features, count = tiles(p);
    float *planes = work + openmp.me() * PLACES * p->block * (channels + PANEL);
    float *sums = planes + PLACES * p->block * channels;
    SHARE(block, (count + p->block - 1) / p->block) {
        int64_t first = block * p->block, left = count - first;
        int64_t there = left < p->block ? left : p->block;
        for (int64_t i = 0; i < there; i++) {
            const float *pixels[PLACES];
            seen(p, tile_at(p, first + i), images, pixels);
            float *to = planes + i * channels;
            differences_of_tile(pixels, channels, to, p->block * channels);
        }
        for (int64_t k = 0; k < features; k += PANEL) {
            const float *panel = kernel + k * PLACES * channels;
            for (int64_t place = 0; place < PLACES; place++)
                products((there + 1) / 2 * 2, planes + place * p->block * channels, channels,
                         1, panel + place * channels * PANEL, channels,
                         sums + place * p->block * PANEL, PANEL, 0);
            for (int64_t i = 0; i < there; i++)
                outputs_of_tile(p, tile_at(p, first + i), sums + i * PANEL, p->block * PANEL,
                                bias ? bias + k : 0, outputs + k);
        }
    }
}

/* ------------------------------------------------------------------------- gradients of kernels */
/* The transpose of `outputs_of_tile`: gradients of 2x2 outputs become those of a tile's planes. */
INLINE void gradients_of_tile(const float *const pixels[4], int64_t features, float *to,
                              int64_t plane, int64_t panel) {
    for (int64_t k = 0; k < features; k += LANES) {
        lanes a = load(pixels[0] + k), b = load(pixels[1] + k);
        lanes c = load(pixels[2] + k), d = load(pixels[3] + k);
        lanes rows[4][2] = {{a, b}, {a + c, b + d}, {a - c, b - d}, {-c, -d}};
        float *there = to + k / PANEL * panel + k % PANEL;
        for (int i = 0; i < 4; i++, there += 4 * plane) {
            lanes left = rows[i][0], right = rows[i][1];
            store(there, left);
            store(there + plane, left + right);
            store(there + 2 * plane, left - right);
            store(there + 3 * plane, -right);
        }
    }
}

/* The transpose of `widened`. */
INLINE void narrowed(lanes a, lanes b, lanes c, lanes d, lanes *to) {
    lanes half = _mm256_set1_ps(0.5f), even = (b + c) * half, odd = (b - c) * half;
    to[0] = a + even, to[1] = odd, to[2] = even + d;
}

INLINE void narrowed_kernel(const float *from, int64_t plane, float *to) {
    lanes columns[4][3];
    for (int j = 0; j < 4; j++) {
        const float *column = from + j * plane;
        narrowed(load(column), load(column + 4 * plane), load(column + 8 * plane),
                 load(column + 12 * plane), columns[j]);
    }
    for (int i = 0; i < 3; i++) {
        lanes row[3];
        narrowed(columns[0][i], columns[1][i], columns[2][i], columns[3][i], row);
        for (int j = 0; j < 3; j++) store(to + (i * 3 + j) * plane, row[j]);
    }
}

AVX2 static void gradient_part(void *argument) {
    const task *task = argument;
    const problem *p = task->of;
    const float *images = task->arrays[0], *of_outputs = task->arrays[1];
    float *to = task->arrays[2], *work = task->arrays[3];
    int64_t channels = p->channels, features = p->features, count = tiles(p), at_once = p->block;
    int64_t panels = features / PANEL, plane = channels * features;
    float *planes = work, *gradients = planes + PLACES * at_once * channels;
    float *sums = gradients + PLACES * at_once * features;
    for (int64_t first = 0; first < count; first += at_once) {
        int64_t left = count - first, there = left < at_once ? left : at_once;
        SHARE(i, there) {
            const float *pixels[PLACES], *gradient[4];
            tile at = tile_at(p, first + i);
            seen(p, at, images, pixels);
            differences_of_tile(pixels, channels, planes + i * channels, at_once * channels);
            int64_t pixel = (at.image * p->out_height + at.row) * p->out_width + at.column;
            for (int64_t k = 0; k < 4; k++) {
                int inside = at.row + k / 2 < p->out_height && at.column + k % 2 < p->out_width;
                int64_t behind = k / 2 * p->out_width + k % 2;
                gradient[k] = inside ? of_outputs + (pixel + behind) * features : zeros;
            }
            gradients_of_tile(gradient, features, gradients + i * PANEL, at_once * features,
                              at_once * PANEL);
        }
        openmp.barrier();
        SHARE(part, PLACES * panels) {
            int64_t place = part / panels, panel = part % panels;
            products(channels, planes + place * at_once * channels, 1, channels,
                     gradients + (place * panels + panel) * at_once * PANEL, there,
                     sums + place * plane + panel * PANEL, features, first > 0);
        }
        openmp.barrier();
    }
    SHARE(c, channels)
        for (int64_t k = 0; k < features; k += LANES)
            narrowed_kernel(sums + c * features + k, plane, to + c * features + k);
}

/* ----------------------------------------------------------------------------- for `repeats.c` */
#define FUNCTION(name, part) \
    void name(const void *numbers, void *const *arrays) { \
        const problem *of = numbers; \
        openmp.parallel(part, &(task){of, arrays}, (unsigned)of->threads, 0); \
    }
FUNCTION(winograd_kernel, kernel_part)
FUNCTION(winograd_turned_kernel, turned_kernel_part)
FUNCTION(winograd_convolution, convolution_part)
FUNCTION(winograd_gradient, gradient_part)
