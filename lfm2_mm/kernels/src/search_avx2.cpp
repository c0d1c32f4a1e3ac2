// flags x86-64: -mavx2 -mfma -mf16c
// Search among stored token vectors with AVX2.
#include "search.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

constexpr int kTokens = 4;

inline __m256i load(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }

inline __m256i four(const uint8_t *from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return _mm256_set1_epi32(word);
}

inline void unpack(const lfm2_residuals &job, int64_t token, uint8_t *to) {
    const int64_t bytes = job.payload();
    if (job.bits != 4 || bytes % 32) {
        lfm2_unpack(job, token, to);
        return;
    }
    const uint8_t *from = job.packed + token * job.stride;
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i levels =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(job.levels)));
    for (int64_t i = 0; i < bytes; i += 32) {
        const __m256i two = load(from + i);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(two, 4), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i), _mm256_shuffle_epi8(levels, high));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + bytes + i),
                            _mm256_shuffle_epi8(levels, _mm256_and_si256(two, low)));
    }
}

inline float sum(const float *values, int64_t count) {
    float found = 0.0f;
    for (int64_t i = 0; i < count; ++i) found += values[i];
    return found;
}

}  // namespace

void lfm2_table_avx2(const lfm2_table &job, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
        const int64_t begin = job.passages.starts[p], end = begin + job.passages.lengths[p];
        __m256i total = _mm256_setzero_si256();
        int64_t r = 0;
        for (; r + 32 <= job.rows; r += 32) {
            __m256i best = _mm256_setzero_si256();
            for (int64_t t = begin; t < end; ++t)
                best = _mm256_max_epu8(best, load(job.scores + job.codes[t] * job.rows + r));
            total = _mm256_add_epi64(total, _mm256_sad_epu8(best, _mm256_setzero_si256()));
        }
        if (r < job.rows) {
            __m128i best = _mm_setzero_si128();
            for (int64_t t = begin; t < end; ++t)
                best = _mm_max_epu8(best, _mm_loadu_si128(reinterpret_cast<const __m128i *>(
                                              job.scores + job.codes[t] * job.rows + r)));
            total = _mm256_add_epi64(total, _mm256_zextsi128_si256(_mm_sad_epu8(best, _mm_setzero_si128())));
        }
        alignas(32) int64_t parts[4];
        _mm256_store_si256(reinterpret_cast<__m256i *>(parts), total);
        job.found[p] = static_cast<int32_t>(parts[0] + parts[1] + parts[2] + parts[3]);
    }
}

void lfm2_residuals_avx2(const lfm2_residuals &job, int64_t first, int64_t last) {
    alignas(32) uint8_t levels[kTokens][kMostInputs] = {};
    alignas(32) float best[kMostRows];
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t p = first; p < last; ++p) {
        for (int64_t r = 0; r < job.rows; ++r) best[r] = -3.4e38f;
        const int64_t begin = job.passages.starts[p], end = begin + job.passages.lengths[p];
        for (int64_t t = begin; t < end; t += kTokens) {
            const int count = end - t < kTokens ? static_cast<int>(end - t) : kTokens;
            for (int i = 0; i < count; ++i) unpack(job, t + i, levels[i]);
            for (int64_t r = 0; r < job.rows; r += 8) {
                const int8_t *query = job.query + (r / 16) * job.inputs * 16 + (r & 8) * 4;
                __m256i sums[kTokens];
                for (auto &one : sums) one = _mm256_setzero_si256();
                for (int64_t k = 0; k < job.inputs; k += 4, query += 64) {
                    const __m256i rows = load(query);
                    for (int i = 0; i < kTokens; ++i) {
                        const __m256i pairs = _mm256_maddubs_epi16(four(levels[i] + k), rows);
                        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
                    }
                }
                const __m256 constant = _mm256_loadu_ps(job.constant + r);
                const __m256 factor = _mm256_loadu_ps(job.factor + r);
                __m256 most = _mm256_load_ps(best + r);
                for (int i = 0; i < count; ++i) {
                    const __m256 dot = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(sums[i]), constant);
                    const __m256 near = _mm256_loadu_ps(job.scores + job.codes[t + i] * job.rows + r);
                    most = _mm256_max_ps(most, _mm256_fmadd_ps(_mm256_set1_ps(job.scale(t + i)), dot, near));
                }
                _mm256_store_ps(best + r, most);
            }
        }
        job.found[p] = sum(best, job.rows);
    }
}

#endif
