// The body of forward_plain.cpp, forward_avx2.cpp and forward_avx512.cpp: one text, which the compiler
// turns into vectors for the instruction set that each file's flags name.
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
void convolve_as(const lfm2_layer &layer, const float *bcx, int64_t d, int64_t taps, int64_t first,
                 int64_t last, const T *state, T *next, float *y) {
    const float *b = bcx, *c = bcx + d, *u = bcx + 2 * d;
    const float *bias = layer.in_bias;
    for (int64_t i = first; i < last; ++i) {
        float gated = (b[i] + (bias ? bias[i] : 0.0f)) * (u[i] + (bias ? bias[2 * d + i] : 0.0f));
        if (taps > 1) {
            write(next, (taps - 2) * d + i, gated);
            gated = read(next, (taps - 2) * d + i);
        }
        float sum = gated * layer.taps[(taps - 1) * d + i];
        for (int64_t j = 0; j + 1 < taps; ++j) {
            const float past = read(state, j * d + i);
            sum += past * layer.taps[j * d + i];
            if (j) write(next, (j - 1) * d + i, past);
        }
        if (layer.conv_bias) sum += layer.conv_bias[i];
        y[i] = sum * (c[i] + (bias ? bias[d + i] : 0.0f));
    }
}

void convolve(const lfm2_layer &layer, const float *bcx, int64_t d, int64_t taps, int64_t first,
              int64_t last, const void *state, void *next, bool bf16, float *y) {
    if (bf16)
        convolve_as(layer, bcx, d, taps, first, last, static_cast<const uint16_t *>(state),
                    static_cast<uint16_t *>(next), y);
    else
        convolve_as(layer, bcx, d, taps, first, last, static_cast<const float *>(state),
                    static_cast<float *>(next), y);
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
        Floats total[E / kWide];
        for (int i = 0; i < E / kWide; ++i) total[i] = load(out + kWide * i) * shrink;
        for (int64_t t = 0; t < count; ++t, values += E)
            for (int i = 0; i < E / kWide; ++i) total[i] += scores[t] * load(values + kWide * i);
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

void keep(const float *from, int64_t n, void *to, int64_t at, bool bf16) {
    for (int64_t i = 0; i < n; ++i)
        if (bf16)
            static_cast<uint16_t *>(to)[at + i] = to_bf16(from[i]);
        else
            static_cast<float *>(to)[at + i] = from[i];
}

constexpr lfm2_forward_path kPath = {norm, swiglu, convolve, attend, keep};

}  // namespace
