// flags x86-64: -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8 -mprefer-vector-width=512
// All layers of a bidirectional transformer (SigLIP's) in one call, products in int8 on AMX.
//
// Weights have one scale a row, and so have activations, which are rounded as soon as they are known:
// behind a norm, behind attention, behind the gates. Attention is in bf16, block by block of keys.
// Threads deal out rows; they meet where attention needs the keys of others, twice a layer.
#include "linear.h"

#if defined(__x86_64__)
#include "carver.h"
#include "encoder_rows.h"

// As native Python code fills it in. Weights are int8 with one scale a row.
struct lfm2_encoder_layer {
    const float *norm1, *norm1_bias;  // [d]
    const lfm2_weight *query, *key, *value, *out;
    const float *query_bias, *key_bias, *value_bias, *out_bias;
    const float *norm2, *norm2_bias;
    const lfm2_weight *up, *down;
    const float *up_bias, *down_bias;
};

namespace {

constexpr int64_t kRows = 512;         // of activations that go through a product together
constexpr int64_t kPanel = 384 << 10;  // bytes of weights that stay near meanwhile
constexpr int64_t kSteps = 12;         // of 64 inputs: the activations that stay nearest
constexpr int64_t kKeys = 256;         // whose scores are known before any value is read
constexpr float kFar = -1e30f;

// Where results go; `at` is called with a row, a column, 16 numbers and which of them exist.
struct Halves {
    uint16_t *to;
    int64_t stride;
    void at(int64_t row, int64_t column, __m512 value, __mmask16 real) const {
        store(to + row * stride + column, real, value);
    }
};
struct Gelu {
    uint16_t *to;
    int64_t stride;
    void at(int64_t row, int64_t column, __m512 value, __mmask16 real) const {
        store(to + row * stride + column, real, gelu(value));
    }
};
struct Residual {
    float *to;
    int64_t stride;
    void at(int64_t row, int64_t column, __m512 value, __mmask16 real) const {
        float *place = to + row * stride + column;
        _mm512_mask_storeu_ps(place, real, _mm512_add_ps(load(place, real), value));
    }
};

// Rows 32 by 32 times `steps` of 64 inputs, added to `sums`, [32, 32], or put there; meanwhile lines of
// what is read soon are asked for.
inline void tiles(const int8_t *x, int64_t cols, const uint8_t *left, const uint8_t *right, int64_t steps,
                  bool add, int32_t *sums, const uint8_t *soon, int64_t lines) {
    const int8_t *const below = x + 16 * cols;
    if (add) {
        _tile_loadd(0, sums, 128);
        _tile_loadd(1, sums + 16, 128);
        _tile_loadd(2, sums + 16 * 32, 128);
        _tile_loadd(3, sums + 16 * 32 + 16, 128);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < 64 * steps; k += 64) {
        _tile_loadd(4, x + k, cols);
        _tile_loadd(6, left + 16 * k, 64);
        _tile_dpbsud(0, 4, 6);
        for (int64_t i = 0; i < lines; ++i, soon += 64) _mm_prefetch(soon, _MM_HINT_T1);
        _tile_loadd(7, right + 16 * k, 64);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, below + k, cols);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
}

constexpr int64_t kPairs = 16;  // of blocks of a weight that stay near together

// Products of `n` rows with a weight; rows up to the next multiple of 32 are read.
template <class Out>
void multiply(const lfm2_weight &w, const float *bias, const Bytes &x, int64_t n, const Out &out) {
    fence();
    alignas(64) int32_t sums[kPairs * 32 * 32];
    const int64_t blocks = w.blocks(), cols = w.cols, size = 16 * cols, steps = cols / 64;
    int64_t most = kPanel / (2 * size);
    most = most < 1 ? 1 : most > kPairs ? kPairs : most;
    const int64_t turns = (n + 31) / 32 * most * steps;  // products of tiles until the next panel
    const int64_t lines = (2 * most * size / 64 + turns - 1) / turns;
    for (int64_t start = 0; start < blocks; start += 2 * most) {
        const int64_t end = start + 2 * most < blocks ? start + 2 * most : blocks;
        const uint8_t *soon = w.codes + end * size;
        const uint8_t *const over = w.codes + (end + 2 * most < blocks ? end + 2 * most : blocks) * size;
        for (int64_t m = 0; m < n; m += 32) {
            const int64_t count = n - m < 32 ? n - m : 32;
            for (int64_t k = 0; k < steps; k += kSteps) {
                const int64_t some = steps - k < kSteps ? steps - k : kSteps;
                for (int64_t b = start; b < end; b += 2) {
                    const uint8_t *const left = w.codes + b * size + 1024 * k;
                    const int64_t ask = soon + 64 * lines * some <= over ? lines : 0;
                    tiles(x.codes + m * cols + 64 * k, cols, left, b + 1 < blocks ? left + size : left, some,
                          k > 0, sums + (b - start) / 2 * 1024, soon, ask);
                    soon += 64 * ask * some;
                }
            }
            fence();
            for (int64_t b = start; b < end; ++b) {
                const int32_t *const from = sums + (b - start) / 2 * 1024 + (b - start) % 2 * 16;
                const __mmask16 real = first_of(w.rows - 16 * b);
                const __m512 scale = scales(w.scales + 16 * b);
                const __m512 offset = bias ? load(bias + 16 * b, real) : _mm512_setzero_ps();
                for (int64_t r = 0; r < count; ++r) {
                    const __m512i zero = _mm512_set1_epi32(-128 * x.sums[m + r]);
                    const __m512i sum = _mm512_add_epi32(_mm512_load_si512(from + 32 * r), zero);
                    const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[m + r]));
                    out.at(m + r, 16 * b, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, offset), real);
                }
            }
            fence();
        }
    }
}

// One head of one view. Queries, keys and values lie `stride` numbers a row apart; so do outputs,
// `out_stride`. 32 rows behind the queries may be read.
struct Head {
    uint16_t *keys, *values, *chances;  // [L / 16, E / 32, 512], [L / 32, E / 16, 512], [32, kKeys]
    float *scores, *sums;               // [32, kKeys], [32, E]

    static size_t bytes(int64_t length, int64_t wide) {
        return 2 * aligned(filled(length, 32) * wide * 2) + aligned(32 * kKeys * 6) + aligned(32 * wide * 4) + 64;
    }
    Head(Carver &from, int64_t length, int64_t wide)
        : keys(from.take<uint16_t>(filled(length, 32) * wide)),
          values(from.take<uint16_t>(filled(length, 32) * wide)), chances(from.take<uint16_t>(32 * kKeys)),
          scores(from.take<float>(32 * kKeys)), sums(from.take<float>(32 * wide)) {}

    // Keys as tiles of 32 dimensions by 16 keys, values as tiles of 32 keys by 16 dimensions.
    void lay_out(const uint16_t *k, const uint16_t *v, int64_t stride, int64_t length, int64_t e, int64_t wide) {
        const __m512i index = _mm512_mullo_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
            _mm512_set1_epi32(static_cast<int>(2 * stride)));
        uint16_t *to = keys;
        for (int64_t j = 0; j < filled(length, 32); j += 16)
            for (int64_t c = 0; c < wide; c += 2, to += 32) {
                const __mmask16 real = c < e ? first_of(length - j) : 0;
                _mm512_store_si512(to, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), real, index,
                                                                   k + j * stride + c, 1));
            }
        to = values;
        for (int64_t j = 0; j < filled(length, 32); j += 32)
            for (int64_t c = 0; c < wide; c += 16)
                for (int64_t p = j; p < j + 32; p += 2, to += 32) {
                    const __mmask16 real = first_of(e - c);
                    const uint16_t *from = v + p * stride + c;
                    const __m256i even = _mm256_maskz_loadu_epi16(p < length ? real : 0, from);
                    const __m256i odd = _mm256_maskz_loadu_epi16(p + 1 < length ? real : 0, from + stride);
                    _mm512_store_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
                }
    }

    void score(const uint16_t *q, int64_t stride, int64_t first, int64_t last, int64_t wide) const {
        const int64_t parts = wide / 32;
        for (int64_t j = first; j < last; j += 32) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            const uint16_t *left = keys + j / 16 * parts * 512, *right = left + parts * 512;
            for (int64_t c = 0; c < parts; ++c) {
                _tile_loadd(4, q + 32 * c, 2 * stride);
                _tile_loadd(5, q + 16 * stride + 32 * c, 2 * stride);
                _tile_loadd(6, left + 512 * c, 64);
                _tile_loadd(7, right + 512 * c, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            float *to = scores + (j - first);
            _tile_stored(0, to, 4 * kKeys);
            _tile_stored(1, to + 16, 4 * kKeys);
            _tile_stored(2, to + 16 * kKeys, 4 * kKeys);
            _tile_stored(3, to + 16 * kKeys + 16, 4 * kKeys);
        }
    }

    void weigh(int64_t first, int64_t last, int64_t wide) const {
        const int64_t parts = wide / 16;
        for (int64_t c = 0; c < parts; c += 2) {
            float *to = sums + 16 * c;
            _tile_loadd(0, to, 4 * wide);
            _tile_loadd(1, to + 16, 4 * wide);
            _tile_loadd(2, to + 16 * wide, 4 * wide);
            _tile_loadd(3, to + 16 * wide + 16, 4 * wide);
            for (int64_t j = first; j < last; j += 32) {
                const uint16_t *left = values + (j / 32 * parts + c) * 512;
                _tile_loadd(4, chances + (j - first), 2 * kKeys);
                _tile_loadd(5, chances + 16 * kKeys + (j - first), 2 * kKeys);
                _tile_loadd(6, left, 64);
                _tile_loadd(7, left + 512, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, to, 4 * wide);
            _tile_stored(1, to + 16, 4 * wide);
            _tile_stored(2, to + 16 * wide, 4 * wide);
            _tile_stored(3, to + 16 * wide + 16, 4 * wide);
        }
    }

    void attend(const uint16_t *q, int64_t stride, int64_t length, int64_t e, int64_t wide, uint16_t *out,
                int64_t out_stride) const {
        const __m512 pace = _mm512_set1_ps(1.44269504f / __builtin_sqrtf(static_cast<float>(e)));
        for (int64_t i = 0; i < length; i += 32) {
            const int64_t count = length - i < 32 ? length - i : 32;
            float most[32], total[32];
            for (int r = 0; r < 32; ++r) {
                most[r] = kFar;
                total[r] = 0.0f;
            }
            for (int64_t c = 0; c < 32 * wide; c += 16) _mm512_store_ps(sums + c, _mm512_setzero_ps());
            for (int64_t first = 0; first < length; first += kKeys) {
                const int64_t real = length - first < kKeys ? length - first : kKeys, last = first + filled(real, 32);
                fence();
                score(q + i * stride, stride, first, last, wide);
                fence();
                for (int64_t r = 0; r < count; ++r) soften(r, real, pace, wide, most[r], total[r]);
                fence();
                weigh(first, last, wide);
            }
            fence();
            for (int64_t r = 0; r < count; ++r) {
                const __m512 share = _mm512_set1_ps(1.0f / total[r]);
                for (int64_t c = 0; c < e; c += 16)
                    store(out + (i + r) * out_stride + c, first_of(e - c),
                          _mm512_mul_ps(_mm512_load_ps(sums + r * wide + c), share));
            }
        }
    }

    // The scores of a row become powers of two below the greatest; what was summed up shrinks to fit.
    inline void soften(int64_t r, int64_t real, __m512 pace, int64_t wide, float &most, float &total) const {
        float *const row = scores + r * kKeys;
        const int64_t all = filled(real, 32);
        for (int64_t j = real / 16 * 16; j < all; j += 16)
            _mm512_mask_store_ps(row + j, static_cast<__mmask16>(~first_of(real - j)), _mm512_set1_ps(kFar));
        __m512 high = _mm512_load_ps(row), other = _mm512_load_ps(row + 16);
        for (int64_t j = 32; j < all; j += 32) {
            high = _mm512_max_ps(high, _mm512_load_ps(row + j));
            other = _mm512_max_ps(other, _mm512_load_ps(row + j + 16));
        }
        const float here = _mm512_reduce_max_ps(_mm512_max_ps(high, other)) * _mm512_cvtss_f32(pace);
        const float top = here > most ? here : most;
        const __m512 ceiling = _mm512_set1_ps(top);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < all; j += 32) {
            const __m512 a = power(_mm512_fmsub_ps(_mm512_load_ps(row + j), pace, ceiling));
            const __m512 b = power(_mm512_fmsub_ps(_mm512_load_ps(row + j + 16), pace, ceiling));
            sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
            _mm512_store_si512(chances + r * kKeys + j, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
        if (top != most) {
            const float shrink = _mm512_cvtss_f32(power(_mm512_set1_ps(most - top)));
            const __m512 factor = _mm512_set1_ps(shrink);
            for (int64_t c = 0; c < wide; c += 16) {
                float *place = sums + r * wide + c;
                _mm512_store_ps(place, _mm512_mul_ps(_mm512_load_ps(place), factor));
            }
            total *= shrink;
            most = top;
        }
        total += _mm512_reduce_add_ps(sum);
    }
};

struct Shape {
    int64_t n, d, heads, e, wide, ffn, cols, longest;
    float eps;
};

// What one thread has for itself.
struct Room {
    Bytes narrow, broad;  // rows of d and of ffn numbers
    uint16_t *hidden;     // [kRows, ffn]
    float *row;           // [max(d, ffn)]

    static size_t bytes(const Shape &s) {
        const int64_t d = filled(s.d, 64), f = filled(s.ffn, 64);
        return aligned(kRows * d) + aligned(kRows * f) + 4 * aligned(kRows * 4) + aligned(kRows * f * 2) +
               aligned((d + f) * 4);
    }
    Room(Carver &from, const Shape &s) {
        const int64_t d = filled(s.d, 64), f = filled(s.ffn, 64);
        narrow = {from.take<int8_t>(kRows * d), from.take<float>(kRows), from.take<int32_t>(kRows), d};
        broad = {from.take<int8_t>(kRows * f), from.take<float>(kRows), from.take<int32_t>(kRows), f};
        hidden = from.take<uint16_t>(kRows * f);
        row = from.take<float>(d + f);
    }
};

}  // namespace

// x[n, d], fp32, through all layers; `lengths` of each view add up to n. Returns 1 without memory.
LFM2_EXPORT int lfm2_encode(const lfm2_encoder_layer *layers, int64_t n_layers, float *x, int64_t n, int64_t d,
                            int64_t heads, const int64_t *lengths, int64_t views, float eps, int threads) {
    Shape s{n, d, heads, d / heads, filled(d / heads, 32), 0, filled(d, 64), 0, eps};
    for (int64_t l = 0; l < n_layers; ++l) s.ffn = layers[l].up->rows > s.ffn ? layers[l].up->rows : s.ffn;
    for (int64_t v = 0; v < views; ++v) s.longest = lengths[v] > s.longest ? lengths[v] : s.longest;
    const int64_t rows = n + 64;  // some behind the last are read
    const size_t common = aligned(rows * 3 * d * 2) + aligned(rows * d * 2);
    char *memory = static_cast<char *>(lfm2_scratch(0, common));
    if (!memory) return 1;
    Carver carver{memory};
    uint16_t *const qkv = carver.take<uint16_t>(rows * 3 * d);
    uint16_t *const mixed = carver.take<uint16_t>(rows * d);
    lfm2_barrier barrier;
    int failed = 0;
    lfm2_parallel(threads, [&](int thread, int all) {
        const size_t size = Room::bytes(s) + Head::bytes(s.longest, s.wide);
        char *own = static_cast<char *>(lfm2_scratch(1, size));
        if (!own) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        barrier.wait(all);
        if (__atomic_load_n(&failed, __ATOMIC_RELAXED)) return;
        Carver mine{own};
        Room room(mine, s);
        Head head(mine, s.longest, s.wide);
        const TileConfig config;
        config.load();
        lfm2_part part((n + 31) / 32, thread, all);
        part.first *= 32;
        part.last = part.last * 32 < n ? part.last * 32 : n;
        for (int64_t l = 0; l < n_layers; ++l) {
            const lfm2_encoder_layer &layer = layers[l];
            for (int64_t m = part.first; m < part.last; m += kRows) {
                const int64_t count = part.last - m < kRows ? part.last - m : kRows;
                for (int64_t r = 0; r < count; ++r) {
                    norm_row(x + (m + r) * d, layer.norm1, layer.norm1_bias, eps, d, room.row);
                    round_row(room.row, d, room.narrow, r);
                }
                uint16_t *const to = qkv + m * 3 * d;
                multiply(*layer.query, layer.query_bias, room.narrow, count, Halves{to, 3 * d});
                multiply(*layer.key, layer.key_bias, room.narrow, count, Halves{to + d, 3 * d});
                multiply(*layer.value, layer.value_bias, room.narrow, count, Halves{to + 2 * d, 3 * d});
            }
            barrier.wait(all);
            const lfm2_part tasks(views * heads, thread, all);
            int64_t start = 0;
            for (int64_t v = 0; v < views; start += lengths[v], ++v)
                for (int64_t h = 0; h < heads; ++h) {
                    const int64_t task = v * heads + h;
                    if (task < tasks.first || task >= tasks.last || !lengths[v]) continue;
                    const uint16_t *const q = qkv + start * 3 * d + h * s.e;
                    head.lay_out(q + d, q + 2 * d, 3 * d, lengths[v], s.e, s.wide);
                    head.attend(q, 3 * d, lengths[v], s.e, s.wide, mixed + start * d + h * s.e, d);
                }
            barrier.wait(all);
            for (int64_t m = part.first; m < part.last; m += kRows) {
                const int64_t count = part.last - m < kRows ? part.last - m : kRows;
                for (int64_t r = 0; r < count; ++r) round_row(mixed + (m + r) * d, d, room.narrow, r);
                multiply(*layer.out, layer.out_bias, room.narrow, count, Residual{x + m * d, d});
                for (int64_t r = 0; r < count; ++r) {
                    norm_row(x + (m + r) * d, layer.norm2, layer.norm2_bias, eps, d, room.row);
                    round_row(room.row, d, room.narrow, r);
                }
                const int64_t f = layer.up->rows;
                multiply(*layer.up, layer.up_bias, room.narrow, count, Gelu{room.hidden, f});
                const Bytes broad{room.broad.codes, room.broad.scales, room.broad.sums, layer.down->cols};
                for (int64_t r = 0; r < count; ++r) round_row(room.hidden + r * f, f, broad, r);
                multiply(*layer.down, layer.down_bias, broad, count, Residual{x + m * d, d});
            }
        }
        _tile_release();
    });
    return failed;
}
#endif
