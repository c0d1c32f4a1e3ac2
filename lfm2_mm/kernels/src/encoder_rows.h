// Rows of an encoder on AVX-512: read, normed, gated and rounded to signed bytes. Knows no layers.
#pragma once

#if defined(__x86_64__)
#include "amx.h"

namespace {

inline __mmask16 first_of(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 load(const float *from, __mmask16 real) { return _mm512_maskz_loadu_ps(real, from); }
inline __m512 load(const uint16_t *from, __mmask16 real) {
    const __m256i halves = _mm256_maskz_loadu_epi16(real, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline void store(uint16_t *to, __mmask16 real, __m512 value) {
    _mm256_mask_storeu_epi16(to, real, (__m256i)_mm512_cvtneps_pbh(value));
}
inline __m512 scales(const uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

// 2^x within 5e-5 of its value; 0 far below.
inline __m512 power(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(9.6181291e-3f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// x / (1 + e^(-2 u)) with u = 0.79788456 (x + 0.044715 x^3): GELU, approximated with tanh
inline __m512 gelu(__m512 x) {
    const __m512 square = _mm512_mul_ps(x, x);
    const __m512 inner = _mm512_fmadd_ps(square, _mm512_set1_ps(-0.10294324f), _mm512_set1_ps(-2.3022082f));
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), power(_mm512_mul_ps(x, inner)));
    return _mm512_mul_ps(x, _mm512_rcp14_ps(below));
}

// Rows of activations as signed bytes with one scale each, zeros behind the real numbers.
struct Bytes {
    int8_t *codes;   // [rows, cols]
    float *scales;   // [rows]; not a number where an input is not finite
    int32_t *sums;   // [rows], of the codes
    int64_t cols;
};

template <class T>
inline void round_row(const T *x, int64_t given, const Bytes &to, int64_t row) {
    int8_t *codes = to.codes + row * to.cols;
    __m512 most = _mm512_setzero_ps();
    __mmask16 strange = 0;
    for (int64_t i = 0; i < given; i += 16) {
        const __m512 value = load(x + i, first_of(given - i));
        strange |= _mm512_fpclass_ps_mask(value, 0x99);  // not a number, infinite
        most = _mm512_max_ps(most, _mm512_abs_ps(value));
    }
    const float largest = _mm512_reduce_max_ps(most);
    const bool some = !strange && largest >= kTiny;
    const __m512 inverse = _mm512_set1_ps(some ? 127.0f / largest : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < to.cols; i += 16) {
        __m512i code = _mm512_setzero_si512();
        if (some && i < given) code = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + i, first_of(given - i)), inverse));
        sum = _mm512_add_epi32(sum, code);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + i), _mm512_cvtepi32_epi8(code));
    }
    to.scales[row] = strange ? __builtin_nanf("") : some ? largest / 127.0f : 0.0f;
    to.sums[row] = _mm512_reduce_add_epi32(sum);
}

// A row through LayerNorm; `out` has room for it.
inline void norm_row(const float *x, const float *weight, const float *bias, float eps, int64_t n, float *out) {
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, load(x + i, first_of(n - i)));
    const float mean = _mm512_reduce_add_ps(sum) / static_cast<float>(n);
    const __m512 middle = _mm512_set1_ps(mean);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 real = first_of(n - i);
        const __m512 away = _mm512_maskz_sub_ps(real, load(x + i, real), middle);
        squares = _mm512_fmadd_ps(away, away, squares);
    }
    const float scale = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / static_cast<float>(n) + eps);
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 real = first_of(n - i);
        const __m512 value = _mm512_mul_ps(_mm512_sub_ps(load(x + i, real), middle), factor);
        _mm512_mask_storeu_ps(out + i, real, _mm512_fmadd_ps(value, load(weight + i, real), load(bias + i, real)));
    }
}

}  // namespace
#endif
