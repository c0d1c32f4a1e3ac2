// The body of forward_plain.cpp, forward_avx2.cpp, forward_avx512.cpp and forward_neon.cpp: one text,
// which the compiler turns into vectors for the instruction set that each file's flags name.
#include "forward.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// e^x within 2e-7 of its value; 0 far below, large and finite far above. Not a number stays so.
inline float exponential(float x) {
    x = x < -88.0f ? -88.0f : x;  // 2^-127, whose bits are those of 0
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

// Vectors of the compiler, as wide as a register: GCC 12 keeps arrays of wider ones in memory.
#if defined(__AVX512F__)
constexpr int kWide = 16;
#elif defined(__AVX2__)
constexpr int kWide = 8;
#else
constexpr int kWide = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kWide)));

inline Floats load(const float *from) {
    Floats value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

inline float sum_of(Floats value) {
    for (int i = 1; i < kWide; ++i) value[0] += value[i];
    return value[0];
}

#if defined(__AVX512F__)
// The sums of 16 vectors, in their order.
inline Floats sums_of(const Floats *value) {
    __m512 four[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 a = (__m512)value[4 * i], b = (__m512)value[4 * i + 1];
        const __m512 c = (__m512)value[4 * i + 2], d = (__m512)value[4 * i + 3];
        const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        four[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
    }
    const auto halved = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return (Floats)halved(halved(four[0], four[1]), halved(four[2], four[3]));
}
#endif

// The scores of one query with `count` keys; E is the size of a head where it is known, else 0.
template <int E>
inline void score(const float *q, int64_t e, const float *keys, int64_t count, float *scores) {
    if constexpr (E > 0) {
        Floats query[E / kWide];
        for (int i = 0; i < E / kWide; ++i) query[i] = load(q + kWide * i);
        const auto products = [&](const float *key) {
            Floats sum = query[0] * load(key);
            for (int i = 1; i < E / kWide; ++i) sum += query[i] * load(key + kWide * i);
            return sum;
        };
        int64_t t = 0;
#if defined(__AVX512F__)
        for (; t + kWide <= count; t += kWide, keys += kWide * E) {
            Floats some[kWide];
            for (int i = 0; i < kWide; ++i) some[i] = products(keys + i * E);
            const Floats sums = sums_of(some);
            __builtin_memcpy(scores + t, &sums, sizeof sums);
        }
#endif
        for (; t < count; ++t, keys += E) scores[t] = sum_of(products(keys));
    } else {
        for (int64_t t = 0; t < count; ++t, keys += e) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < e; ++i) sum += q[i] * keys[i];
            scores[t] = sum;
        }
    }
}

// out = shrink * out + the values weighed by their scores
template <int E>
inline void weigh(const float *scores, int64_t e, const float *values, int64_t count, float shrink, float *out) {
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
            for (int64_t i = 0; i < e; ++i) out[i] += scores[t] * values[i];
    }
}

// `count` rows from `first` on as fp32, where they lie or in `room`; bytes not yet scaled.
inline const float *widened(const lfm2_kept &from, int64_t first, int64_t count, int64_t e, float *room) {
    const int64_t start = first * e, size = count * e;
    if (from.scales) {
        const int8_t *bytes = static_cast<const int8_t *>(from.rows) + start;
        int64_t done = 0;
#if defined(__AVX512F__)
        for (; done + kWide <= size; done += kWide) {
            const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes + done));
            _mm512_storeu_ps(room + done, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some)));
        }
#endif
        for (; done < size; ++done) room[done] = static_cast<float>(bytes[done]);
        return room;
    }
    if (!from.bf16) return static_cast<const float *>(from.rows) + start;
    const uint16_t *halves = static_cast<const uint16_t *>(from.rows) + start;
    for (int64_t i = 0; i < size; ++i) room[i] = from_bf16(halves[i]);
    return room;
}

// numbers[t] *= the scale of row first + t
inline void scale_by(const lfm2_kept &kept, int64_t first, int64_t count, float *numbers) {
    if (!kept.scales) return;
#pragma omp simd
    for (int64_t t = 0; t < count; ++t) numbers[t] *= kept.scales[first + t];
}

constexpr int64_t kHeads = 8;  // heads that take each step together, so that it is read and widened once

// The softmax over all positions is put together from one of each step.
template <int E>
void attend_as(const float *q, int64_t heads, int64_t e, const lfm2_kept &keys, const lfm2_kept &values,
               int64_t length, float *out, float *room) {
    float scores[kHeads][kStep], shrink[kHeads], most[kHeads], total[kHeads];
    for (int64_t h = 0; h < heads; ++h) most[h] = -__builtin_inff(), total[h] = 0.0f;
    for (int64_t i = 0; i < heads * e; ++i) out[i] = 0.0f;
    for (int64_t start = 0; start < length; start += kStep) {
        const int64_t count = length - start < kStep ? length - start : kStep;
        const float *rows = widened(keys, start, count, e, room);
        for (int64_t h = 0; h < heads; ++h) {
            float *const own = scores[h];
            score<E>(q + h * e, e, rows, count, own);
            scale_by(keys, start, count, own);
            float top = most[h];
            for (int64_t t = count; t < kStep; ++t) own[t] = own[0];
#pragma omp simd reduction(max : top)
            for (int64_t t = 0; t < kStep; ++t) top = own[t] > top ? own[t] : top;
            for (int64_t t = count; t < kStep; ++t) own[t] = top - 100.0f;
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (int64_t t = 0; t < kStep; ++t) {
                own[t] = exponential(own[t] - top);
                part += own[t];
            }
            scale_by(values, start, count, own);
            shrink[h] = exponential(most[h] - top);
            total[h] = total[h] * shrink[h] + part;
            most[h] = top;
        }
        rows = widened(values, start, count, e, room);
        for (int64_t h = 0; h < heads; ++h) weigh<E>(scores[h], e, rows, count, shrink[h], out + h * e);
    }
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < e; ++i) out[h * e + i] /= total[h];
}

void attend(const float *q, int64_t count, int64_t e, const lfm2_kept &keys, const lfm2_kept &values,
            int64_t length, float *out, char *room) {
    float *const widened_rows = reinterpret_cast<float *>(room);
    const auto attend_some =
        e == 32 ? attend_as<32> : e == 64 ? attend_as<64> : e == 128 ? attend_as<128> : attend_as<0>;
    for (int64_t h = 0; h < count; h += kHeads) {
        const int64_t heads = count - h < kHeads ? count - h : kHeads;
        attend_some(q + h * e, heads, e, keys, values, length, out + h * e, widened_rows);
    }
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
    constexpr int kAcross = kRows / kWide;
    Floats sum[kTall][kAcross];
    for (int a = 0; a < kTall; ++a)
        for (int v = 0; v < kAcross; ++v) sum[a][v] = add ? load(c + a * kRows + kWide * v) : Floats{};
    for (int64_t k = 0; k < steps; ++k, right += kRows, left += deep) {
        Floats row[kAcross];
        for (int v = 0; v < kAcross; ++v) row[v] = load(right + kWide * v);
        for (int a = 0; a < kTall; ++a)
            for (int v = 0; v < kAcross; ++v) sum[a][v] += row[v] * left[a * tall];
    }
    __builtin_memcpy(c, sum, sizeof sum);
}

void attend_rows(const lfm2_view &view, char *room) {
    const int64_t e = view.e;
    float *at = reinterpret_cast<float *>(room);
    const auto take = [&](int64_t count) {
        float *piece = at;
        at += (count + 15) / 16 * 16;
        return piece;
    };
    float *const widened_rows = take(kKeys * e);
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
                const float *const keys = widened(view.keys, k, count, e, widened_rows);
                int64_t t = 0;
                for (; t + kTall <= count; t += kTall)
                    outer(keys + t * e, e, 1, turned, e, false, scores + t * kRows);
                for (; t < count; ++t)
                    for (int64_t r = 0; r < kRows; ++r) {
                        float sum = 0.0f;
                        for (int64_t i = 0; i < e; ++i) sum += keys[t * e + i] * turned[i * kRows + r];
                        scores[t * kRows + r] = sum;
                    }
                if (view.keys.scales)
                    for (t = 0; t < count; ++t)
#pragma omp simd
                        for (int64_t r = 0; r < kRows; ++r) scores[t * kRows + r] *= view.keys.scales[k + t];
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
                for (t = 0; t < count; ++t) {
                    const float scale = view.values.scales ? view.values.scales[k + t] : 1.0f;
#pragma omp simd
                    for (int64_t r = 0; r < kRows; ++r) {
                        const float weight = exponential(scores[t * kRows + r] - top[r]);
                        whole[r] += weight;
                        scores[t * kRows + r] = weight * scale;
                    }
                }
                const float *const values = widened(view.values, k, count, e, widened_rows);
                for (int64_t i = 0; i < e; ++i)
#pragma omp simd
                    for (int64_t r = 0; r < kRows; ++r) sums[i * kRows + r] *= shrink[r];
                int64_t i = 0;
                for (; i + kTall <= e; i += kTall)
                    outer(values + i, 1, e, scores, count, true, sums + i * kRows);
                for (; i < e; ++i)
                    for (t = 0; t < count; ++t)
#pragma omp simd
                        for (int64_t r = 0; r < kRows; ++r)
                            sums[i * kRows + r] += values[t * e + i] * scores[t * kRows + r];
            }
            for (int64_t r = 0; r < real; ++r) {
                const float scale = 1.0f / whole[r];
                float *out = view.out + (start + r) * view.out_stride + h * e;
                for (int64_t i = 0; i < e; ++i) out[i] = sums[i * kRows + r] * scale;
            }
        }
}

// A row in bytes: symmetric, its largest number is 127. The twin is `_in_bytes` of cache.py.
void keep_bytes(const float *from, int64_t e, int8_t *to, float *scale) {
    float most = 0.0f, nothing = 0.0f;  // nothing: not a number where one is not finite
    for (int64_t i = 0; i < e; ++i) {
        const float size = __builtin_fabsf(from[i]);
        most = size > most ? size : most;
        nothing += from[i] * 0.0f;
    }
    const bool some = nothing == 0.0f && most >= 1e-30f;
    const float inverse = some ? 127.0f / most : 0.0f;
    for (int64_t i = 0; i < e; ++i) to[i] = some ? static_cast<int8_t>(__builtin_rintf(from[i] * inverse)) : 0;
    *scale = some ? most / 127.0f : nothing;
}

void keep(const float *from, int64_t e, const lfm2_kept &to, int64_t at) {
    if (to.scales) return keep_bytes(from, e, static_cast<int8_t *>(to.rows) + at * e, to.scales + at);
    for (int64_t i = 0; i < e; ++i)
        if (to.bf16)
            static_cast<uint16_t *>(to.rows)[at * e + i] = to_bf16(from[i]);
        else
            static_cast<float *>(to.rows)[at * e + i] = from[i];
}

constexpr lfm2_forward_path kPath = {norm, swiglu, convolve, attend, attend_rows, keep, dot};

}  // namespace
