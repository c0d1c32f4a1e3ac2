// flags x86-64: -mavx2 -mfma -mf16c
// Quantised products with AVX2: the same integers as everywhere, from products of bytes in pairs.
#include "linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

inline uint32_t largest_of(__m256i values) {
    alignas(32) uint32_t each[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(each), values);
    uint32_t most = 0;
    for (uint32_t one : each) most = one > most ? one : most;
    return most;
}

void quantize(const float *x, int64_t given, const lfm2_rows &rows, int64_t row, int64_t first,
              int64_t last) {
    const int64_t groups = rows.groups(), group = rows.group;
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t g = first; g < last; ++g) {
        const int64_t start = g * group;
        int8_t *codes = rows.codes + row * rows.cols + start;
        alignas(32) float part[128];
        __m256i most = _mm256_setzero_si256();
        for (int64_t i = 0; i < group; ++i) part[i] = start + i < given ? x[start + i] : 0.0f;
        for (int64_t i = 0; i < group; i += 8) {
            const __m256i bits = _mm256_castps_si256(_mm256_load_ps(part + i));
            most = _mm256_max_epu32(most, _mm256_and_si256(bits, magnitude));
        }
        const uint32_t bits = largest_of(most);
        const float largest = bits_to_float(bits);
        const bool finite = bits < 0x7f800000u, some = finite && largest >= kTiny;
        const __m256 inverse = _mm256_set1_ps(some ? 127.0f / largest : 0.0f);
        int32_t sum = 0;
        for (int64_t i = 0; i < group; i += 8) {
            alignas(32) int32_t code[8];
            const __m256 scaled = _mm256_mul_ps(_mm256_load_ps(part + i), inverse);
            const __m256i rounded = some ? _mm256_cvtps_epi32(scaled) : _mm256_setzero_si256();
            _mm256_store_si256(reinterpret_cast<__m256i *>(code), rounded);
            for (int j = 0; j < 8; ++j) {
                codes[i + j] = static_cast<int8_t>(code[j]);
                sum += code[j];
            }
        }
        rows.scales[row * groups + g] = finite ? (some ? largest / 127.0f : 0.0f) : __builtin_nanf("");
        rows.sums[row * groups + g] = sum;
    }
}

inline __m256 halves(const uint16_t *from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}

inline __m256i four(const int8_t *codes) {
    int32_t word;
    __builtin_memcpy(&word, codes, 4);
    return _mm256_set1_epi32(word);
}

inline __m256i load(const uint8_t *from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
}

// Eight outputs, `half` 0 or 1 of a block, for M rows of activations.
template <int BITS, int GROUP, bool ROW, bool MIN, int M>
void block(const lfm2_weight &w, const lfm2_rows &x, int64_t b, int half, int64_t m0, void *out,
           int64_t stride, bool bf16) {
    constexpr int32_t kZero = MIN || BITS == 8 ? 0 : 8;  // codes of 8 bit are made signed
    constexpr int64_t kBytes = GROUP * 16 * BITS / 8;
    const int64_t groups = w.groups(), cols = x.cols;
    const uint8_t *line = w.codes + b * groups * kBytes + 32 * half;
    const int8_t *codes = x.codes + m0 * cols;
    const float *scales = x.scales + m0 * groups;
    const int32_t *sums = x.sums + m0 * groups;
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const __m256i sign = _mm256_set1_epi8(-128);
    __m256 total[M];
    for (auto &one : total) one = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, codes += GROUP) {
        __m256i acc[M];
        for (int m = 0; m < M; ++m) acc[m] = _mm256_set1_epi32(-kZero * sums[m * groups + g]);
        if constexpr (BITS == 8) {
            for (int64_t k = 0; k < GROUP; k += 4, line += 64) {
                const __m256i s = _mm256_xor_si256(load(line), sign), u = _mm256_abs_epi8(s);
                for (int m = 0; m < M; ++m) {  // at most 2 * 128 * 127: no pair overflows
                    const __m256i a = _mm256_sign_epi8(four(codes + m * cols + k), s);
                    const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(u, a), ones);
                    acc[m] = _mm256_add_epi32(acc[m], pairs);
                }
            }
        } else {
            for (int64_t k0 = 0; k0 < GROUP; k0 += 32) {
                __m256i pairs[M];  // sums of 16 products of at most 15 * 127
                for (auto &one : pairs) one = _mm256_setzero_si256();
                for (int64_t k = k0; k < k0 + 32; k += 8, line += 64) {
                    const __m256i u = load(line), first = _mm256_and_si256(u, low);
                    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(u, 4), low);
                    for (int m = 0; m < M; ++m) {
                        const int8_t *at = codes + m * cols + k;
                        const __m256i one = _mm256_maddubs_epi16(first, four(at));
                        const __m256i two = _mm256_maddubs_epi16(second, four(at + 4));
                        pairs[m] = _mm256_add_epi16(pairs[m], _mm256_add_epi16(one, two));
                    }
                }
                for (int m = 0; m < M; ++m)
                    acc[m] = _mm256_add_epi32(acc[m], _mm256_madd_epi16(pairs[m], ones));
            }
        }
        const int64_t at = (b * groups + g) * 16 + 8 * half;
        __m256 scale, minimum;
        if constexpr (!ROW) scale = halves(w.scales + at);
        if constexpr (MIN) minimum = halves(w.minimums + at);
        for (int m = 0; m < M; ++m) {
            const __m256 given = _mm256_set1_ps(scales[m * groups + g]);
            const __m256 factor = ROW ? given : _mm256_mul_ps(scale, given);
            total[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[m]), factor, total[m]);
            if constexpr (MIN) {
                const float sum = scales[m * groups + g] * static_cast<float>(sums[m * groups + g]);
                total[m] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(sum), total[m]);
            }
        }
    }
    const int64_t row = 16 * b + 8 * half, real = w.rows - row < 8 ? w.rows - row : 8;
    for (int m = 0; m < M; ++m) {
        if constexpr (ROW) total[m] = _mm256_mul_ps(total[m], halves(w.scales + row));
        alignas(32) float each[8];
        _mm256_store_ps(each, total[m]);
        const int64_t at = (m0 + m) * stride + row;
        for (int64_t r = 0; r < real; ++r) {
            if (bf16)
                static_cast<uint16_t *>(out)[at + r] = to_bf16(each[r]);
            else
                static_cast<float *>(out)[at + r] = each[r];
        }
    }
}

template <int BITS, int GROUP, bool ROW, bool MIN>
void blocks(const lfm2_weight &w, const lfm2_rows &x, int64_t first, int64_t last, void *out,
            int64_t stride, bool bf16) {
    for (int64_t b = first; b < last; ++b)
        for (int half = 0; half < 2 && 16 * b + 8 * half < w.rows; ++half) {
            int64_t m = 0;
            for (; m + 4 <= x.n; m += 4)
                block<BITS, GROUP, ROW, MIN, 4>(w, x, b, half, m, out, stride, bf16);
            for (; m + 2 <= x.n; m += 2)
                block<BITS, GROUP, ROW, MIN, 2>(w, x, b, half, m, out, stride, bf16);
            if (m < x.n) block<BITS, GROUP, ROW, MIN, 1>(w, x, b, half, m, out, stride, bf16);
        }
}

}  // namespace

#include "linear_schemes.h"

const lfm2_linear_path &lfm2_linear_avx2() {
    static const lfm2_linear_path path = {quantize, multiply};
    return path;
}
#endif
