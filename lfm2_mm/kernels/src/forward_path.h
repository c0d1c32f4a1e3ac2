// The body of forward_plain.cpp, forward_avx2.cpp, forward_avx512.cpp and forward_neon.cpp: one text,
// which the compiler turns into vectors for the instruction set that each file's flags name.
#include "forward.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// e^x within 2e-7 of its value; 0 far below, large and finite far above. Not a number stays so.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float whole = __builtin_rintf(x * 1.44269504f);
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    return y * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
}

inline float read(const float *from, int64_t i) { return from[i]; }
inline float read(const uint16_t *from, int64_t i) { return from_bf16(from[i]); }
inline void write(float *to, int64_t i, float value) { to[i] = value; }
inline void write(uint16_t *to, int64_t i, float value) { to[i] = to_bf16(value); }

void norm(const float *x, const float *weight, float eps, int64_t n, float *out) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
    const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

void swiglu(float *gate, const float *up, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

template <class T>
void convolve_as(const lfm2_layer &layer, float *b, const float *c, float *u, int64_t stride, int64_t d,
                 int64_t taps, int64_t first, int64_t last, const lfm2_sequence &sequence, int64_t slot,
                 int64_t slots) {
    const int64_t n = sequence.count, width = last - first, kept = taps - 1;
    const T *state = static_cast<const T *>(sequence.states[slot]) + first;
    const float *bias = layer.in_bias ? layer.in_bias + first : nullptr;
    for (int64_t i = 0; i < n; ++i) {  // what is convolved, as it is kept
        float *gated = b + i * stride;
        const float *input = u + i * stride;
        if (bias)
            for (int64_t j = 0; j < width; ++j) gated[j] = (gated[j] + bias[j]) * (input[j] + bias[2 * d + j]);
        else
            for (int64_t j = 0; j < width; ++j) gated[j] *= input[j];
        if constexpr (sizeof(T) == 2)
            for (int64_t j = 0; j < width; ++j) gated[j] = from_bf16(to_bf16(gated[j]));
    }
    for (int64_t i = 0; i < n; ++i) {
        float *y = u + i * stride;
        const float *gate = c + i * stride, *now = b + i * stride, *weights = layer.taps + first;
        for (int64_t j = 0; j < width; ++j) y[j] = now[j] * weights[kept * d + j];
        for (int64_t k = 0; k < kept; ++k) {
            const float *tap = weights + k * d;
            const int64_t row = i - kept + k;
            if (row >= 0) {
                const float *past = b + row * stride;
                for (int64_t j = 0; j < width; ++j) y[j] += past[j] * tap[j];
            } else {
                const T *past = state + (row + kept) * d;
                for (int64_t j = 0; j < width; ++j) y[j] += read(past, j) * tap[j];
            }
        }
        if (layer.conv_bias)
            for (int64_t j = 0; j < width; ++j) y[j] += layer.conv_bias[first + j];
        if (bias)
            for (int64_t j = 0; j < width; ++j) y[j] *= gate[j] + bias[d + j];
        else
            for (int64_t j = 0; j < width; ++j) y[j] *= gate[j];
    }
    for (int64_t end = 0; end < sequence.ends; ++end) {
        T *next = static_cast<T *>(sequence.next[end * slots + slot]) + first;
        for (int64_t k = 0; k < kept; ++k) {
            const int64_t row = sequence.places[end] - kept + k;
            for (int64_t j = 0; j < width; ++j)
                if (row >= 0)
                    write(next + k * d, j, b[row * stride + j]);
                else
                    next[k * d + j] = state[(row + kept) * d + j];
        }
    }
}

void convolve(const lfm2_layer &layer, float *b, const float *c, float *u, int64_t stride, int64_t d,
              int64_t taps, int64_t first, int64_t last, const lfm2_sequence &sequence, int64_t slot,
              int64_t slots, bool bf16) {
    if (bf16)
        convolve_as<uint16_t>(layer, b, c, u, stride, d, taps, first, last, sequence, slot, slots);
    else
        convolve_as<float>(layer, b, c, u, stride, d, taps, first, last, sequence, slot, slots);
}

float dot(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

constexpr int64_t kStep = 64;  // positions whose scores are known before any value is read
constexpr int kWide = 16;

// Vectors of the compiler, which cuts them to what the instruction set has.
typedef float Floats __attribute__((vector_size(4 * kWide)));
typedef uint32_t Words __attribute__((vector_size(4 * kWide)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWide)));
typedef float Quarter __attribute__((vector_size(kWide)));

inline Floats load(const float *from) {
    Floats value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

inline Floats load(const uint16_t *from) {
#if defined(__AVX512F__)  // GCC 12 widens in two halves what is one instruction
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
#endif
}

// Vectors of which many are summed at once.
#if defined(__aarch64__)  // GCC 12 keeps arrays of those that are wider than a register in memory
constexpr int kSums = 4;
typedef Quarter Sums;
typedef uint32_t QuarterWords __attribute__((vector_size(kWide)));
typedef uint16_t QuarterHalves __attribute__((vector_size(kWide / 2)));

inline Sums load_sums(const float *from) {
    Sums value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

inline Sums load_sums(const uint16_t *from) {
    QuarterHalves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    return (Sums)(__builtin_convertvector(halves, QuarterWords) << 16);
}
#else
constexpr int kSums = kWide;
typedef Floats Sums;

template <class T>
inline Sums load_sums(const T *from) {
    return load(from);
}
#endif

inline float sum_of(Floats value) {
    Quarter part[4];
    __builtin_memcpy(part, &value, sizeof value);
    const Quarter sum = (part[0] + part[1]) + (part[2] + part[3]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The scores of one query with `count` keys; E is the size of a head where it is known, else 0.
template <int E, class T>
inline void score(const float *q, int64_t e, const T *keys, int64_t count, float *scores) {
    if constexpr (E > 0) {
        Floats query[E / kWide];
        for (int i = 0; i < E / kWide; ++i) query[i] = load(q + kWide * i);
        for (int64_t t = 0; t < count; ++t, keys += E) {
            Floats sum = query[0] * load(keys);
            for (int i = 1; i < E / kWide; ++i) sum += query[i] * load(keys + kWide * i);
            scores[t] = sum_of(sum);
        }
    } else {
        for (int64_t t = 0; t < count; ++t, keys += e) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < e; ++i) sum += q[i] * read(keys, i);
            scores[t] = sum;
        }
    }
}

// out = shrink * out + the values weighed by their scores
template <int E, class T>
inline void weigh(const float *scores, int64_t e, const T *values, int64_t count, float shrink, float *out) {
    if constexpr (E > 0) {
        Sums total[E / kSums];
        for (int i = 0; i < E / kSums; ++i) total[i] = load_sums(out + kSums * i) * shrink;
        for (int64_t t = 0; t < count; ++t, values += E)
            for (int i = 0; i < E / kSums; ++i) total[i] += scores[t] * load_sums(values + kSums * i);
        __builtin_memcpy(out, total, sizeof total);
    } else {
        for (int64_t i = 0; i < e; ++i) out[i] *= shrink;
        for (int64_t t = 0; t < count; ++t, values += e)
#pragma omp simd
            for (int64_t i = 0; i < e; ++i) out[i] += scores[t] * read(values, i);
    }
}

// The softmax over all positions is put together from one of each step.
template <int E, class T>
void attend_as(const float *q, int64_t heads, int64_t e, const T *keys, const T *values, int64_t length,
               float *out) {
    for (int64_t h = 0; h < heads; ++h, q += e, out += e) {
        float most = -__builtin_inff(), total = 0.0f;
        for (int64_t i = 0; i < e; ++i) out[i] = 0.0f;
        for (int64_t start = 0; start < length; start += kStep) {
            const int64_t count = length - start < kStep ? length - start : kStep;
            float scores[kStep];
            score<E>(q, e, keys + start * e, count, scores);
            float top = most;
            for (int64_t t = count; t < kStep; ++t) scores[t] = scores[0];
#pragma omp simd reduction(max : top)
            for (int64_t t = 0; t < kStep; ++t) top = scores[t] > top ? scores[t] : top;
            for (int64_t t = count; t < kStep; ++t) scores[t] = top - 100.0f;
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (int64_t t = 0; t < kStep; ++t) {
                scores[t] = exponential(scores[t] - top);
                part += scores[t];
            }
            const float shrink = exponential(most - top);
            total = total * shrink + part;
            most = top;
            weigh<E>(scores, e, values + start * e, count, shrink, out);
        }
        for (int64_t i = 0; i < e; ++i) out[i] /= total;
    }
}

template <class T>
void attend_kept(const float *q, int64_t heads, int64_t e, const void *keys, const void *values,
                 int64_t length, float *out) {
    const T *k = static_cast<const T *>(keys), *v = static_cast<const T *>(values);
    switch (e) {
        case 32: return attend_as<32>(q, heads, e, k, v, length, out);
        case 64: return attend_as<64>(q, heads, e, k, v, length, out);
        case 128: return attend_as<128>(q, heads, e, k, v, length, out);
        default: return attend_as<0>(q, heads, e, k, v, length, out);
    }
}

void attend(const float *q, int64_t heads, int64_t e, const void *keys, const void *values,
            int64_t length, bool bf16, float *out) {
    if (bf16)
        attend_kept<uint16_t>(q, heads, e, keys, values, length, out);
    else
        attend_kept<float>(q, heads, e, keys, values, length, out);
}

// Many rows: 32 queries at a time lie side by side in vectors, so that nothing is summed across
// a vector; keys and values come one number at a time, and serve both.
constexpr int64_t kRows = 32, kKeys = 64;
#if defined(__AVX512F__)
constexpr int kTall = 4;
#else
constexpr int kTall = 2;
#endif

// c[a][32] (+)= sum over k of left[a * tall + k * deep] * right[k][32], for kTall numbers a.
inline void outer(const float *left, int64_t tall, int64_t deep, const float *right, int64_t steps,
                  bool add, float *c) {
    constexpr int kAcross = kRows / kSums;
    Sums sum[kTall][kAcross];
    for (int a = 0; a < kTall; ++a)
        for (int v = 0; v < kAcross; ++v) sum[a][v] = add ? load_sums(c + a * kRows + kSums * v) : Sums{};
    for (int64_t k = 0; k < steps; ++k, right += kRows, left += deep) {
        Sums row[kAcross];
        for (int v = 0; v < kAcross; ++v) row[v] = load_sums(right + kSums * v);
        for (int a = 0; a < kTall; ++a)
            for (int v = 0; v < kAcross; ++v) sum[a][v] += row[v] * left[a * tall];
    }
    __builtin_memcpy(c, sum, sizeof sum);
}

inline const float *widened(const void *from, int64_t count, bool bf16, float *room) {
    if (!bf16) return static_cast<const float *>(from);
    const uint16_t *halves = static_cast<const uint16_t *>(from);
    for (int64_t i = 0; i < count; ++i) room[i] = from_bf16(halves[i]);
    return room;
}

void attend_rows(const lfm2_view &view, char *room) {
    const int64_t e = view.e, total = view.past + view.n;
    float *at = reinterpret_cast<float *>(room);
    const auto take = [&](int64_t count) {
        float *piece = at;
        at += (count + 15) / 16 * 16;
        return piece;
    };
    const float *keys = widened(view.keys, total * e, view.bf16, take(total * e));
    const float *values = widened(view.values, total * e, view.bf16, take(total * e));
    float *const turned = take(kRows * e), *const sums = take(kRows * e), *const scores = take(kKeys * kRows);
    alignas(64) float most[kRows], whole[kRows];
    for (int64_t h = 0; h < view.heads; ++h)
        for (int64_t start = 0; start < view.n; start += kRows) {
            const int64_t real = view.n - start < kRows ? view.n - start : kRows;
            for (int64_t i = 0; i < e; ++i)
                for (int64_t r = 0; r < kRows; ++r)
                    turned[i * kRows + r] = r < real ? view.q[(start + r) * view.stride + h * e + i] : 0.0f;
            for (int64_t i = 0; i < e * kRows; ++i) sums[i] = 0.0f;
            for (int64_t r = 0; r < kRows; ++r) most[r] = -__builtin_inff(), whole[r] = 0.0f;
            const int64_t seen = view.past + start + 1;  // by the first of these rows
            const int64_t last = seen + real - 1;
            for (int64_t k = 0; k < last; k += kKeys) {
                const int64_t count = last - k < kKeys ? last - k : kKeys;
                int64_t t = 0;
                for (; t + kTall <= count; t += kTall)
                    outer(keys + (k + t) * e, e, 1, turned, e, false, scores + t * kRows);
                for (; t < count; ++t)
                    for (int64_t r = 0; r < kRows; ++r) {
                        float sum = 0.0f;
                        for (int64_t i = 0; i < e; ++i) sum += keys[(k + t) * e + i] * turned[i * kRows + r];
                        scores[t * kRows + r] = sum;
                    }
                for (t = seen - k > 0 ? seen - k : 0; t < count; ++t)  // a row sees itself, not beyond
                    for (int64_t r = 0; r < kRows && r < k + t - seen + 1; ++r)
                        scores[t * kRows + r] = -__builtin_inff();
                alignas(64) float top[kRows], shrink[kRows];
#pragma omp simd
                for (int64_t r = 0; r < kRows; ++r) top[r] = most[r];
                for (t = 0; t < count; ++t)
#pragma omp simd
                    for (int64_t r = 0; r < kRows; ++r)
                        top[r] = scores[t * kRows + r] > top[r] ? scores[t * kRows + r] : top[r];
#pragma omp simd
                for (int64_t r = 0; r < kRows; ++r) {
                    shrink[r] = exponential(most[r] - top[r]);
                    whole[r] *= shrink[r];
                    most[r] = top[r];
                }
                for (t = 0; t < count; ++t)
#pragma omp simd
                    for (int64_t r = 0; r < kRows; ++r) {
                        scores[t * kRows + r] = exponential(scores[t * kRows + r] - top[r]);
                        whole[r] += scores[t * kRows + r];
                    }
                for (int64_t i = 0; i < e; ++i)
#pragma omp simd
                    for (int64_t r = 0; r < kRows; ++r) sums[i * kRows + r] *= shrink[r];
                int64_t i = 0;
                for (; i + kTall <= e; i += kTall)
                    outer(values + k * e + i, 1, e, scores, count, true, sums + i * kRows);
                for (; i < e; ++i)
                    for (t = 0; t < count; ++t)
#pragma omp simd
                        for (int64_t r = 0; r < kRows; ++r)
                            sums[i * kRows + r] += values[(k + t) * e + i] * scores[t * kRows + r];
            }
            for (int64_t r = 0; r < real; ++r) {
                const float scale = 1.0f / whole[r];
                float *out = view.out + (start + r) * view.out_stride + h * e;
                for (int64_t i = 0; i < e; ++i) out[i] = sums[i * kRows + r] * scale;
            }
        }
}

void keep(const float *from, int64_t n, void *to, int64_t at, bool bf16) {
    for (int64_t i = 0; i < n; ++i)
        if (bf16)
            static_cast<uint16_t *>(to)[at + i] = to_bf16(from[i]);
        else
            static_cast<float *>(to)[at + i] = from[i];
}

constexpr lfm2_forward_path kPath = {norm, swiglu, convolve, attend, attend_rows, keep, dot};

}  // namespace
