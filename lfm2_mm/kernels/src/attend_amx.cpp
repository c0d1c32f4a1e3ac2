// flags x86-64: -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mprefer-vector-width=512 -Wno-maybe-uninitialized
// Attention of many rows on AMX: scores lie with the keys below each other and the queries side by
// side, so that softmax needs no sums across a vector, and their tiles feed the second product.
#include "forward.h"

#if defined(__x86_64__)
#include "amx.h"

namespace {

constexpr int64_t kRows = 32, kKeys = 128;  // queries and keys of a block

// 2^x within 3e-6 of its value; 0 from 2^-126 down. Not a number stays so.
inline __m512 power(__m512 x) {
    const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.33335581e-3f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(9.61812911e-3f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.55041087e-2f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.40226507e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.93147181e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(some, y, whole);
}

// 32 numbers of row `t` as bf16.
inline __m512i halves(const lfm2_kept &kept, int64_t t, int64_t e, int64_t k) {
    const int64_t at = t * e + k;
    if (kept.scales) {
        const int8_t *from = static_cast<const int8_t *>(kept.rows) + at;
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
        const __m512 scale = _mm512_set1_ps(kept.scales[t]);
        const auto scaled = [&](__m128i some) {
            return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some)), scale);
        };
        const __m512 low = scaled(_mm256_castsi256_si128(bytes)), high = scaled(_mm256_extracti128_si256(bytes, 1));
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    if (kept.bf16) return _mm512_loadu_si512(static_cast<const uint16_t *>(kept.rows) + at);
    const float *from = static_cast<const float *>(kept.rows) + at;
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
}

// Keys as tiles [total / 16, e / 32] of 16 keys by 32 numbers; zeros behind them.
void lay_keys(const lfm2_view &view, int64_t total, int64_t filled, uint16_t *to) {
    const int64_t steps = view.e / 32;
    for (int64_t t = 0; t < filled; ++t)
        for (int64_t k = 0; k < steps; ++k) {
            const __m512i row = t < total ? halves(view.keys, t, view.e, 32 * k) : _mm512_setzero_si512();
            _mm512_store_si512(to + (t / 16 * steps + k) * 512 + t % 16 * 32, row);
        }
}

// Values as tiles [total / 32, e / 16] of 16 numbers by 32 keys; zeros behind them.
void lay_values(const lfm2_view &view, int64_t total, int64_t filled, uint16_t *to) {
    alignas(64) uint16_t row[32];
    for (int64_t t = 0; t < filled; ++t)
        for (int64_t k = 0; k < view.e; k += 32) {
            const __m512i some = t < total ? halves(view.values, t, view.e, k) : _mm512_setzero_si512();
            _mm512_store_si512(row, some);
            uint16_t *column = to + (t / 32 * view.e + k) * 32 + t % 32;
            for (int64_t i = 0; i < 32; ++i) column[i * 32] = row[i];
        }
}

// 32 queries as two tiles for each 32 numbers, pairs of numbers below each other; 2^x becomes e^x.
void lay_queries(const lfm2_view &view, int64_t h, int64_t start, int64_t real, uint16_t *to) {
    alignas(64) uint32_t words[16];
    const __m512 scale = _mm512_set1_ps(1.44269504f);
    for (int64_t r = 0; r < kRows; ++r)
        for (int64_t k = 0; k < view.e; k += 32) {
            __m512 low = _mm512_setzero_ps(), high = low;
            if (r < real) {
                const float *from = view.q + (start + r) * view.stride + h * view.e + k;
                low = _mm512_mul_ps(_mm512_loadu_ps(from), scale);
                high = _mm512_mul_ps(_mm512_loadu_ps(from + 16), scale);
            }
            _mm512_store_si512(words, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            uint32_t *column = reinterpret_cast<uint32_t *>(to + (k / 32 * 2 + r / 16) * 512) + r % 16;
            for (int64_t i = 0; i < 16; ++i) column[i * 16] = words[i];
        }
}

// Two by two tiles: a's rows times b's columns, [32, 32].
inline void four(const uint16_t *a, int64_t a_beside, int64_t a_step, const uint16_t *b, int64_t steps, float *out) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < steps; ++k, a += a_step, b += 1024) {
        _tile_loadd(4, a, 64);
        _tile_loadd(5, a + a_beside, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 128);
    _tile_stored(1, out + 16, 128);
    _tile_stored(2, out + 16 * 32, 128);
    _tile_stored(3, out + 16 * 32 + 16, 128);
}

struct Block {
    __m512 most[2], whole[2];
};

// Scores [count, 32] become weights in pairs, as tiles; what was there before shrinks by the result.
inline void soften(float *scores, int64_t count, int64_t filled, int64_t seen, Block &block, uint16_t *weights,
                   __m512i order, __m512 *shrink) {
    const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t t = seen > 0 ? seen : 0; t < count; ++t)  // a row sees itself, not beyond
        for (int v = 0; v < 2; ++v) {
            const __m512i first = _mm512_set1_epi32(static_cast<int>(t - seen + 1 - 16 * v));
            const __mmask16 hidden = _mm512_cmplt_epi32_mask(lane, first);
            _mm512_mask_store_ps(scores + t * kRows + 16 * v, hidden, nothing);
        }
    for (int64_t t = count; t < filled; ++t)
        for (int v = 0; v < 2; ++v) _mm512_store_ps(scores + t * kRows + 16 * v, nothing);
    for (int v = 0; v < 2; ++v) {
        __m512 top = block.most[v];
        for (int64_t t = 0; t < count; ++t) top = _mm512_max_ps(top, _mm512_load_ps(scores + t * kRows + 16 * v));
        shrink[v] = power(_mm512_sub_ps(block.most[v], top));
        block.most[v] = top;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t t = 0; t < filled; t += 2) {
            const float *two = scores + t * kRows + 16 * v;
            const __m512 first = power(_mm512_sub_ps(_mm512_load_ps(two), top));
            const __m512 second = power(_mm512_sub_ps(_mm512_load_ps(two + kRows), top));
            sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
            _mm512_store_si512(weights + t / 32 * 1024 + v * 512 + t % 32 * 16, beside(first, second, order));
        }
        block.whole[v] = _mm512_fmadd_ps(block.whole[v], shrink[v], sum);
    }
}

}  // namespace

void lfm2_attend_amx(const lfm2_view &view, char *room) {
    const int64_t e = view.e, total = view.past + view.n, filled = (total + 31) / 32 * 32;
    uint16_t *const keys = reinterpret_cast<uint16_t *>((reinterpret_cast<uintptr_t>(room) + 63) / 64 * 64);
    uint16_t *const values = keys + filled * e, *const queries = values + filled * e;
    float *const scores = reinterpret_cast<float *>(queries + kRows * e);
    uint16_t *const weights = reinterpret_cast<uint16_t *>(scores + kKeys * kRows);
    float *const sums = reinterpret_cast<float *>(weights + kKeys * kRows), *const part = sums + e * kRows;
    const TileConfig config;
    config.load();
    const __m512i order = interleaved();
    lay_keys(view, total, filled, keys);
    lay_values(view, total, filled, values);
    for (int64_t h = 0; h < view.heads; ++h)
        for (int64_t start = 0; start < view.n; start += kRows) {
            const int64_t real = view.n - start < kRows ? view.n - start : kRows;
            lay_queries(view, h, start, real, queries);
            Block block;
            for (int v = 0; v < 2; ++v) {
                block.most[v] = _mm512_set1_ps(-__builtin_inff());
                block.whole[v] = _mm512_setzero_ps();
            }
            const int64_t seen = view.past + start + 1, last = seen + real - 1;
            for (int64_t k = 0; k < last; k += kKeys) {
                const int64_t count = last - k < kKeys ? last - k : kKeys, steps = (count + 31) / 32;
                fence();
                for (int64_t t = 0; t < steps; ++t)
                    four(keys + (k + 32 * t) * e, e * 16, 512, queries, e / 32, scores + t * 32 * kRows);
                fence();
                __m512 shrink[2];
                soften(scores, count, 32 * steps, seen - k, block, weights, order, shrink);
                fence();
                for (int64_t i = 0; i < e; i += 32) {
                    four(values + k * e + i * 32, 512, e * 32, weights, steps, part);
                    fence();
                    for (int64_t j = 0; j < 32; ++j)
                        for (int v = 0; v < 2; ++v) {
                            float *to = sums + (i + j) * kRows + 16 * v;
                            const __m512 more = _mm512_load_ps(part + j * kRows + 16 * v);
                            const __m512 old = k ? _mm512_load_ps(to) : _mm512_setzero_ps();
                            _mm512_store_ps(to, k ? _mm512_fmadd_ps(old, shrink[v], more) : more);
                        }
                    fence();
                }
            }
            alignas(64) float scale[kRows];
            for (int v = 0; v < 2; ++v)
                _mm512_store_ps(scale + 16 * v, _mm512_div_ps(_mm512_set1_ps(1.0f), block.whole[v]));
            for (int64_t r = 0; r < real; ++r) {
                float *out = view.out + (start + r) * view.out_stride + h * e;
                for (int64_t i = 0; i < e; ++i) out[i] = sums[i * kRows + r] * scale[r];
            }
        }
    _tile_release();
}
#endif
