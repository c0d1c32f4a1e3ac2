// flags x86-64: -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512
// Quantised products with AVX-512 VNNI: 16 rows of the weight a register, four inputs a step.
#include "linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

void quantize(const float *x, int64_t given, const lfm2_rows &rows, int64_t row, int64_t first,
              int64_t last) {
    const int64_t groups = rows.groups(), group = rows.group;
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t g = first; g < last; ++g) {
        const int64_t start = g * group;
        int8_t *codes = rows.codes + row * rows.cols + start;
        __m512 part[8];
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = 0; i < group / 16; ++i) {
            const int64_t left = given - start - 16 * i;
            const __mmask16 real = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
            part[i] = _mm512_maskz_loadu_ps(real, x + start + 16 * i);
            most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(part[i]), magnitude));
        }
        const uint32_t bits = _mm512_reduce_max_epu32(most);
        const float largest = bits_to_float(bits);
        const bool finite = bits < 0x7f800000u, some = finite && largest >= kTiny;
        const __m512 inverse = _mm512_set1_ps(some ? 127.0f / largest : 0.0f);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < group / 16; ++i) {
            const __m512 scaled = some ? _mm512_mul_ps(part[i], inverse) : _mm512_setzero_ps();
            const __m512i code = _mm512_cvtps_epi32(scaled);
            sum = _mm512_add_epi32(sum, code);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + 16 * i), _mm512_cvtepi32_epi8(code));
        }
        rows.scales[row * groups + g] = finite ? (some ? largest / 127.0f : 0.0f) : __builtin_nanf("");
        rows.sums[row * groups + g] = _mm512_reduce_add_epi32(sum);
    }
}

inline void store(__m512 value, void *out, int64_t at, __mmask16 real, bool bf16) {
    if (!bf16) {
        _mm512_mask_storeu_ps(static_cast<float *>(out) + at, real, value);
        return;
    }
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i half = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    half = _mm512_srli_epi32(half, 16);
    const __mmask16 none = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    half = _mm512_mask_mov_epi32(half, none, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(static_cast<uint16_t *>(out) + at, real, _mm512_cvtepi32_epi16(half));
}

inline __m512 halves(const uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

inline __m512i four(const int8_t *codes) {
    int32_t word;
    __builtin_memcpy(&word, codes, 4);
    return _mm512_set1_epi32(word);
}

// One block of 16 outputs for M rows of activations.
template <int BITS, int GROUP, bool ROW, bool MIN, int M>
void block(const lfm2_weight &w, const lfm2_rows &x, int64_t b, int64_t m0, void *out, int64_t stride,
           bool bf16) {
    constexpr int32_t kZero = MIN ? 0 : BITS == 8 ? 128 : 8;
    constexpr int64_t kBytes = GROUP * 16 * BITS / 8;
    const int64_t groups = w.groups(), cols = x.cols;
    const uint8_t *line = w.codes + b * groups * kBytes;
    const int8_t *codes = x.codes + m0 * cols;
    const float *scales = x.scales + m0 * groups;
    const int32_t *sums = x.sums + m0 * groups;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 total[M];
    for (auto &one : total) one = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, codes += GROUP) {
        __m512i acc[M];
        for (int m = 0; m < M; ++m) acc[m] = _mm512_set1_epi32(-kZero * sums[m * groups + g]);
#pragma GCC unroll 4
        for (int64_t k = 0; k < GROUP; k += BITS == 8 ? 4 : 8, line += 64) {
            _mm_prefetch(reinterpret_cast<const char *>(line) + 2048, _MM_HINT_T0);
            const __m512i u = _mm512_loadu_si512(line);
            if constexpr (BITS == 8) {
                for (int m = 0; m < M; ++m)
                    acc[m] = _mm512_dpbusd_epi32(acc[m], u, four(codes + m * cols + k));
            } else {
                const __m512i first = _mm512_and_si512(u, low);
                const __m512i second = _mm512_and_si512(_mm512_srli_epi16(u, 4), low);
                for (int m = 0; m < M; ++m)
                    acc[m] = _mm512_dpbusd_epi32(acc[m], first, four(codes + m * cols + k));
                for (int m = 0; m < M; ++m)
                    acc[m] = _mm512_dpbusd_epi32(acc[m], second, four(codes + m * cols + k + 4));
            }
        }
        __m512 scale, minimum;
        if constexpr (!ROW) scale = halves(w.scales + (b * groups + g) * 16);
        if constexpr (MIN) minimum = halves(w.minimums + (b * groups + g) * 16);
        for (int m = 0; m < M; ++m) {
            const __m512 given = _mm512_set1_ps(scales[m * groups + g]);
            const __m512 factor = ROW ? given : _mm512_mul_ps(scale, given);
            total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[m]), factor, total[m]);
            if constexpr (MIN) {
                const float sum = scales[m * groups + g] * static_cast<float>(sums[m * groups + g]);
                total[m] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sum), total[m]);
            }
        }
    }
    const int64_t left = w.rows - 16 * b;
    const __mmask16 real = left >= 16 ? 0xffff : (1u << left) - 1;
    for (int m = 0; m < M; ++m) {
        if constexpr (ROW) total[m] = _mm512_mul_ps(total[m], halves(w.scales + b * 16));
        store(total[m], out, (m0 + m) * stride + 16 * b, real, bf16);
    }
}

template <int BITS, int GROUP, bool ROW, bool MIN>
void blocks(const lfm2_weight &w, const lfm2_rows &x, int64_t first, int64_t last, void *out,
            int64_t stride, bool bf16) {
    for (int64_t b = first; b < last; ++b) {
        int64_t m = 0;
        for (; m + 8 <= x.n; m += 8) block<BITS, GROUP, ROW, MIN, 8>(w, x, b, m, out, stride, bf16);
        switch (x.n - m) {
            case 1: block<BITS, GROUP, ROW, MIN, 1>(w, x, b, m, out, stride, bf16); break;
            case 2: block<BITS, GROUP, ROW, MIN, 2>(w, x, b, m, out, stride, bf16); break;
            case 3: block<BITS, GROUP, ROW, MIN, 3>(w, x, b, m, out, stride, bf16); break;
            case 4: block<BITS, GROUP, ROW, MIN, 4>(w, x, b, m, out, stride, bf16); break;
            case 5: block<BITS, GROUP, ROW, MIN, 5>(w, x, b, m, out, stride, bf16); break;
            case 6: block<BITS, GROUP, ROW, MIN, 6>(w, x, b, m, out, stride, bf16); break;
            case 7: block<BITS, GROUP, ROW, MIN, 7>(w, x, b, m, out, stride, bf16); break;
        }
    }
}

}  // namespace

#include "linear_schemes.h"

const lfm2_linear_path &lfm2_linear_avx512() {
    static const lfm2_linear_path path = {quantize, multiply};
    return path;
}
#endif
