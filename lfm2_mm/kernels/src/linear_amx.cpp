// flags x86-64: -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mprefer-vector-width=512
// Products of many rows on AMX: blocks of the weight become bf16 in the cache, then 32 x 32 tiles.
#include "linear.h"

#if defined(__x86_64__)
#include "amx.h"

namespace {

inline __m512 halves(const uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

// Four inputs of each of 16 rows, a byte each, as two rows of a tile.
inline void widen(__m512i u, __m512 scale, __m512 offset, __m512i order, uint16_t *to) {
    const __m512i byte = _mm512_set1_epi32(255);
    __m512 v[4];
    v[0] = _mm512_cvtepi32_ps(_mm512_and_si512(u, byte));
    v[1] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(u, 8), byte));
    v[2] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(u, 16), byte));
    v[3] = _mm512_cvtepi32_ps(_mm512_srli_epi32(u, 24));
    for (auto &one : v) one = _mm512_fmadd_ps(one, scale, offset);
    _mm512_store_si512(to, beside(v[0], v[1], order));
    _mm512_store_si512(to + 32, beside(v[2], v[3], order));
}

// A block of 16 rows as tiles [cols / 32], 2 * 512 numbers apart. Where a row has one scale it is
// left out, so that the integers are exact.
template <int BITS>
void dequantize(const lfm2_weight &w, int64_t b, uint16_t *to) {
    const __m512i order = interleaved(), low = _mm512_set1_epi8(15);
    const float zero = BITS == 8 ? 128.0f : 8.0f;
    const int64_t groups = w.groups();
    const uint8_t *line = w.codes + b * w.cols * 16 * BITS / 8;
    __m512 scale = _mm512_set1_ps(1.0f), offset = _mm512_set1_ps(-zero);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = (b * groups + g) * 16;
        if (!w.per_row) {
            scale = halves(w.scales + at);
            offset = w.minimums ? halves(w.minimums + at) : _mm512_mul_ps(scale, _mm512_set1_ps(-zero));
        }
        for (int64_t k = 0; k < w.group; k += 32, to += 1024)
            for (int64_t i = 0; i < 32; i += BITS == 8 ? 4 : 8, line += 64) {
                const __m512i u = _mm512_loadu_si512(line);
                if constexpr (BITS == 8) {
                    widen(u, scale, offset, order, to + 16 * i);
                } else {
                    widen(_mm512_and_si512(u, low), scale, offset, order, to + 16 * i);
                    widen(_mm512_and_si512(_mm512_srli_epi16(u, 4), low), scale, offset, order,
                          to + 16 * i + 64);
                }
            }
    }
}

// 32 (or 16) rows of activations times one or two blocks, added to `sums`, [32, 32], or put there.
template <bool ROWS, bool BLOCKS>
void tiles(const uint16_t *x, const uint16_t *weights, int64_t steps, bool add, float *sums) {
    if (add) {
        _tile_loadd(0, sums, 128);
        if (BLOCKS) _tile_loadd(1, sums + 16, 128);
        if (ROWS) _tile_loadd(2, sums + 16 * 32, 128);
        if (ROWS && BLOCKS) _tile_loadd(3, sums + 16 * 32 + 16, 128);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; ++k, x += 1024, weights += 1024) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, weights, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (BLOCKS) {
            _tile_loadd(7, weights + 512, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (ROWS) {
            _tile_loadd(5, x + 512, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (BLOCKS) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    if (BLOCKS) _tile_stored(1, sums + 16, 128);
    if (ROWS) _tile_stored(2, sums + 16 * 32, 128);
    if (ROWS && BLOCKS) _tile_stored(3, sums + 16 * 32 + 16, 128);
}

// Up to 16 numbers of a row.
inline void store(__m512 value, void *out, int64_t at, int64_t count, bool bf16) {
    const __mmask16 real = count >= 16 ? 0xffff : (1u << count) - 1;
    if (bf16) {
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
        _mm256_mask_storeu_epi16(static_cast<uint16_t *>(out) + at, real, half);
    } else {
        _mm512_mask_storeu_ps(static_cast<float *>(out) + at, real, value);
    }
}

// 32 columns of a row, from a row of `sums`.
inline void store_row(const lfm2_weight &w, const float *sums, int64_t b, bool two, void *out, int64_t at,
                      bool bf16) {
    __m512 first = _mm512_load_ps(sums), second = _mm512_load_ps(sums + 16);
    if (w.per_row) first = _mm512_mul_ps(first, halves(w.scales + 16 * b));
    if (w.per_row && two) second = _mm512_mul_ps(second, halves(w.scales + 16 * b + 16));
    const int64_t left = w.rows - 16 * b;
    if (bf16 && two && left >= 32) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        _mm512_storeu_si512(static_cast<uint16_t *>(out) + at, both);
        return;
    }
    store(first, out, at, left, bf16);
    if (two) store(second, out, at + 16, left - 16, bf16);
}

constexpr int64_t kPairs = 8;        // of blocks, as bf16 in the cache together
constexpr int64_t kBytes = 1 << 20;  // of them at most
constexpr int64_t kSteps = 8;        // of 32 inputs: the activations that stay nearest

int64_t pairs_of(const lfm2_weight &w) {
    const int64_t fit = kBytes / (64 * w.cols);
    return fit < 1 ? 1 : fit < kPairs ? fit : kPairs;
}

}  // namespace

int64_t lfm2_linear_amx_scratch(const lfm2_weight &w) {
    return pairs_of(w) * (32 * w.cols + 2 * 32 * 32) + 32;
}

void lfm2_linear_amx(const lfm2_weight &w, const uint16_t *x, int64_t n, int64_t first, int64_t last,
                     void *out, int64_t stride, bool bf16, uint16_t *scratch) {
    const TileConfig config;
    config.load();
    uint16_t *const weights =
        reinterpret_cast<uint16_t *>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
    const int64_t steps = w.cols / 32, most = pairs_of(w), size = 32 * w.cols;
    float *const sums = reinterpret_cast<float *>(weights + most * size);
    for (int64_t start = first; start < last; start += 2 * most) {
        const int64_t end = start + 2 * most < last ? start + 2 * most : last;
        for (int64_t b = start; b < end; ++b) {
            uint16_t *const to = weights + (b - start) / 2 * size + (b - start) % 2 * 512;
            if (w.bits == 8)
                dequantize<8>(w, b, to);
            else
                dequantize<4>(w, b, to);
        }
        fence();
        for (int64_t m = 0; m < n; m += 32) {
            const uint16_t *const rows = x + m * w.cols;
            const bool more = m + 16 < n;
            for (int64_t k = 0; k < steps; k += kSteps) {
                const int64_t some = steps - k < kSteps ? steps - k : kSteps;
                for (int64_t b = start; b < end; b += 2) {
                    const uint16_t *const from = weights + (b - start) / 2 * size + 1024 * k;
                    float *const to = sums + (b - start) / 2 * 1024;
                    const auto step = b + 1 < end ? (more ? tiles<true, true> : tiles<false, true>)
                                                  : (more ? tiles<true, false> : tiles<false, false>);
                    step(rows + 1024 * k, from, some, k > 0, to);
                }
            }
            fence();
            const int64_t count = n - m < 32 ? n - m : 32;
            for (int64_t r = 0; r < count; ++r)
                for (int64_t b = start; b < end; b += 2)
                    store_row(w, sums + (b - start) / 2 * 1024 + 32 * r, b, b + 1 < end, out,
                              (m + r) * stride + 16 * b, bf16);
            fence();
        }
    }
    _tile_release();
}

void lfm2_linear_amx_put(const float *x, int64_t given, int64_t first, int64_t last, int64_t i, int64_t cols,
                         uint16_t *to) {
    uint16_t *tile = to + i / 32 * 32 * cols + first / 32 * 1024 + i / 16 % 2 * 512 + i % 16 * 32;
    for (int64_t c = first; c < last; c += 32, tile += 1024) {
        const int64_t left = given - c;
        const __mmask16 low = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        const __mmask16 high = left >= 32 ? 0xffff : left > 16 ? (1u << (left - 16)) - 1 : 0;
        const __m512 a = _mm512_maskz_loadu_ps(low, x + c), b = _mm512_maskz_loadu_ps(high, x + c + 16);
        _mm512_storeu_si512(tile, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}
#else
// Never asked for there; what calls it is compiled for every processor.
int64_t lfm2_linear_amx_scratch(const lfm2_weight &) { return 0; }
#endif
