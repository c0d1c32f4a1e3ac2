// flags x86-64: -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8 -mprefer-vector-width=512
// Search among stored token vectors with AVX-512 VNNI, and with AMX tiles.
#include "search.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own header
#endif
#include <immintrin.h>

namespace {

constexpr int kTokens = 8, kTile = 16;

// The compiler's tile instructions do not say that they touch memory: nothing may pass this.
inline void fence() { __asm__ volatile("" ::: "memory"); }

inline __m512i four(const uint8_t *from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return _mm512_set1_epi32(word);
}

inline void unpack(const lfm2_residuals &job, int64_t token, uint8_t *to) {
    const int64_t bytes = job.payload();
    if (job.bits != 4 || bytes % 64) {
        lfm2_unpack(job, token, to);
        return;
    }
    const uint8_t *from = job.packed + token * job.stride;
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i levels =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(job.levels)));
    for (int64_t i = 0; i < bytes; i += 64) {
        const __m512i two = _mm512_loadu_si512(from + i);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(two, 4), low);
        _mm512_storeu_si512(to + i, _mm512_shuffle_epi8(levels, high));
        _mm512_storeu_si512(to + bytes + i, _mm512_shuffle_epi8(levels, _mm512_and_si512(two, low)));
    }
}

// The best scores of 16 rows, with the sums of `count` tokens.
inline void improve(const lfm2_residuals &job, int64_t token, int count, int64_t r, const __m512i *sums,
                    float *best) {
    const __m512 constant = _mm512_loadu_ps(job.constant + r);
    const __m512 factor = _mm512_loadu_ps(job.factor + r);
    __m512 most = _mm512_load_ps(best + r);
    for (int i = 0; i < count; ++i) {
        const __m512 dot = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(sums[i]), constant);
        const __m512 near = _mm512_loadu_ps(job.scores + job.codes[token + i] * job.rows + r);
        most = _mm512_max_ps(most, _mm512_fmadd_ps(_mm512_set1_ps(job.scale(token + i)), dot, near));
    }
    _mm512_store_ps(best + r, most);
}

inline float total(const float *best, int64_t rows) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; r += 16) sum = _mm512_add_ps(sum, _mm512_load_ps(best + r));
    return _mm512_reduce_add_ps(sum);
}

inline void reset(float *best, int64_t rows) {
    for (int64_t r = 0; r < rows; r += 16) _mm512_store_ps(best + r, _mm512_set1_ps(-3.4e38f));
}

// B blocks of 16 rows for 8 tokens, of which `count` are real.
template <int B>
inline void block(const lfm2_residuals &job, int64_t token, int count, int64_t r,
                  const uint8_t (*levels)[kMostInputs], float *best) {
    const int8_t *query = job.query + r * job.inputs;
    __m512i sums[B][kTokens];
    for (auto &row : sums)
        for (auto &one : row) one = _mm512_setzero_si512();
    for (int64_t k = 0; k < job.inputs; k += 4, query += 64) {
        __m512i rows[B];
        for (int b = 0; b < B; ++b) rows[b] = _mm512_loadu_si512(query + b * job.inputs * 16);
        for (int i = 0; i < kTokens; ++i) {
            const __m512i inputs = four(levels[i] + k);
            for (int b = 0; b < B; ++b) sums[b][i] = _mm512_dpbusd_epi32(sums[b][i], inputs, rows[b]);
        }
    }
    for (int b = 0; b < B; ++b) improve(job, token, count, r + 16 * b, sums[b], best);
}

struct alignas(64) Config {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

}  // namespace

void lfm2_residuals_avx512(const lfm2_residuals &job, int64_t first, int64_t last) {
    alignas(64) uint8_t levels[kTokens][kMostInputs] = {};
    alignas(64) float best[kMostRows];
    for (int64_t p = first; p < last; ++p) {
        reset(best, job.rows);
        const int64_t begin = job.passages.starts[p], end = begin + job.passages.lengths[p];
        for (int64_t t = begin; t < end; t += kTokens) {
            const int count = end - t < kTokens ? static_cast<int>(end - t) : kTokens;
            for (int i = 0; i < count; ++i) unpack(job, t + i, levels[i]);
            int64_t r = 0;
            for (; r + 32 <= job.rows; r += 32) block<2>(job, t, count, r, levels, best);
            if (r < job.rows) block<1>(job, t, count, r, levels, best);
        }
        job.found[p] = total(best, job.rows);
    }
}

void lfm2_residuals_amx(const lfm2_residuals &job, int64_t first, int64_t last) {
    alignas(64) uint8_t levels[kTile * kMostInputs] = {};
    alignas(64) int32_t sums[kTile][16];
    alignas(64) float best[kMostRows];
    const Config config = [] {
        Config made;
        for (int tile = 0; tile < 3; ++tile) made.bytes[tile] = 64, made.rows[tile] = 16;
        return made;
    }();
    fence();
    _tile_loadconfig(&config);
    for (int64_t p = first; p < last; ++p) {
        reset(best, job.rows);
        const int64_t begin = job.passages.starts[p], end = begin + job.passages.lengths[p];
        for (int64_t t = begin; t < end; t += kTile) {
            const int count = end - t < kTile ? static_cast<int>(end - t) : kTile;
            for (int i = 0; i < count; ++i) unpack(job, t + i, levels + i * job.inputs);
            for (int64_t r = 0; r < job.rows; r += 16) {
                fence();
                _tile_zero(0);
                for (int64_t k = 0; k < job.inputs; k += 64) {
                    _tile_loadd(1, levels + k, job.inputs);
                    _tile_loadd(2, job.query + r * job.inputs + k * 16, 64);
                    _tile_dpbusd(0, 1, 2);
                }
                _tile_stored(0, sums, 64);
                fence();
                improve(job, t, count, r, reinterpret_cast<const __m512i *>(sums), best);
            }
        }
        job.found[p] = total(best, job.rows);
    }
    _tile_release();
}

#endif
