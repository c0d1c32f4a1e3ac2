// Quantised products: the exported functions, and the path that every CPU can run.
#include "linear.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

void quantize_plain(const float *x, int64_t given, const lfm2_rows &rows, int64_t row, int64_t first,
                    int64_t last) {
    const int64_t groups = rows.groups();
    for (int64_t g = first; g < last; ++g) {
        int8_t *codes = rows.codes + row * rows.cols + g * rows.group;
        const int64_t start = g * rows.group;
        const int64_t count = given > start + rows.group ? rows.group : given > start ? given - start : 0;
        uint32_t most = 0;  // bits of a magnitude: as integers they are ordered, not-a-number last
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t bits = float_to_bits(x[start + i]) & 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        const float largest = bits_to_float(most);
        const bool finite = most < 0x7f800000u, some = finite && largest >= kTiny;
        const float inverse = some ? 127.0f / largest : 0.0f;
        int32_t sum = 0;
        for (int64_t i = 0; i < rows.group; ++i) {
            const int code = i < count && some ? static_cast<int>(lrintf(x[start + i] * inverse)) : 0;
            codes[i] = static_cast<int8_t>(code);
            sum += code;
        }
        rows.scales[row * groups + g] = finite ? (some ? largest / 127.0f : 0.0f) : NAN;
        rows.sums[row * groups + g] = sum;
    }
}

// 16 dot products of one group of one row.
void dot_plain(const uint8_t *line, const int8_t *codes, int64_t group, int64_t bits, int32_t *acc) {
    if (bits == 8) {
        for (int64_t k = 0; k < group; k += 4, line += 64)
            for (int r = 0; r < 16; ++r)
                for (int j = 0; j < 4; ++j) acc[r] += line[4 * r + j] * codes[k + j];
        return;
    }
    for (int64_t k = 0; k < group; k += 8, line += 64)
        for (int r = 0; r < 16; ++r)
            for (int j = 0; j < 4; ++j) {
                const int two = line[4 * r + j];
                acc[r] += (two & 15) * codes[k + j] + (two >> 4) * codes[k + 4 + j];
            }
}

void multiply_plain(const lfm2_weight &w, const lfm2_rows &x, int64_t first, int64_t last, void *out,
                    int64_t stride, bool bf16) {
    const int64_t groups = w.groups(), bytes = w.group * 16 * w.bits / 8;
    const int32_t zero = w.minimums ? 0 : w.bits == 8 ? 128 : 8;
    for (int64_t b = first; b < last; ++b) {
        const int64_t real = w.rows - 16 * b < 16 ? w.rows - 16 * b : 16;
        for (int64_t m = 0; m < x.n; ++m) {
            float total[16] = {};
            for (int64_t g = 0; g < groups; ++g) {
                const float scale = x.scales[m * groups + g];
                const int32_t sum = x.sums[m * groups + g];
                int32_t acc[16];
                for (int32_t &a : acc) a = -zero * sum;
                dot_plain(w.codes + (b * groups + g) * bytes, x.codes + m * x.cols + g * w.group, w.group,
                          w.bits, acc);
                const int64_t at = (b * groups + g) * 16;
                for (int r = 0; r < 16; ++r) {
                    const float factor = w.per_row ? scale : from_fp16(w.scales[at + r]) * scale;
                    total[r] += static_cast<float>(acc[r]) * factor;
                    if (w.minimums)
                        total[r] += from_fp16(w.minimums[at + r]) * (scale * static_cast<float>(sum));
                }
            }
            for (int64_t r = 0; r < real; ++r) {
                const float value = w.per_row ? total[r] * from_fp16(w.scales[b * 16 + r]) : total[r];
                const int64_t at = m * stride + 16 * b + r;
                if (bf16)
                    static_cast<uint16_t *>(out)[at] = to_bf16(value);
                else
                    static_cast<float *>(out)[at] = value;
            }
        }
    }
}

constexpr size_t kHuge = size_t{4} << 20;  // from which on pages of 2 MB are asked for

// Kept for each thread until it ends.
struct Scratch {
    static constexpr int kSlots = 6;
    void *memory[kSlots] = {};
    size_t size[kSlots] = {};
    ~Scratch() {
        for (void *one : memory) free(one);
    }
};
thread_local Scratch scratch;

}  // namespace

void *lfm2_scratch(int slot, size_t bytes) {
    if (scratch.size[slot] < bytes) {
        const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        free(scratch.memory[slot]);
        scratch.size[slot] = 0;
        const bool large = size >= kHuge;
        if (posix_memalign(&scratch.memory[slot], large ? kHuge / 2 : 4096, size)) scratch.memory[slot] = nullptr;
        if (!scratch.memory[slot]) return nullptr;
#if defined(__linux__)
        if (large) madvise(scratch.memory[slot], size, MADV_HUGEPAGE);
#endif
        scratch.size[slot] = size;
    }
    return scratch.memory[slot];
}

const lfm2_linear_path &lfm2_linear_plain() {
    static const lfm2_linear_path path = {quantize_plain, multiply_plain};
    return path;
}

const lfm2_linear_path &lfm2_linear_chosen() {
#if defined(__x86_64__)
    const int path = lfm2_path();
    if (path >= LFM2_AVX512) return lfm2_linear_avx512();
    if (path >= LFM2_AVX2) return lfm2_linear_avx2();
#elif defined(__aarch64__)
    if (lfm2_path() == LFM2_NEON) return lfm2_linear_neon();
#endif
    return lfm2_linear_plain();
}

// Codes of whole rows, [rows, words] of four bytes, into blocks of 16 rows, [blocks, padded, 16];
// `fill` stands for what is not there.
LFM2_EXPORT void lfm2_linear_pack(const uint32_t *codes, uint32_t *blocked, int64_t rows, int64_t words,
                                  int64_t padded, uint32_t fill, int threads) {
    const int64_t blocks = (rows + 15) / 16;
    lfm2_parallel(threads, [&](int thread, int all) {
        const lfm2_part part(blocks, thread, all);
        for (int64_t b = part.first; b < part.last; ++b) {
            const int64_t real = rows - 16 * b < 16 ? rows - 16 * b : 16;
            const uint32_t *from = codes + 16 * b * words;
            uint32_t *to = blocked + 16 * b * padded;
            for (int64_t k = 0; k < padded; ++k)
                for (int64_t r = 0; r < 16; ++r)
                    to[16 * k + r] = r < real && k < words ? from[r * words + k] : fill;
        }
    });
}

// out[n, rows] = x[n, given] times the weight; x and out are fp32 or bf16. Returns 1 without memory.
LFM2_EXPORT int lfm2_linear(const lfm2_weight *weight, const void *x, int64_t n, int64_t given,
                            int x_bf16, void *out, int out_bf16, int threads) {
    const lfm2_weight &w = *weight;
    const lfm2_linear_path &path = lfm2_linear_chosen();
    const int64_t blocks = w.blocks(), groups = w.groups();
    const bool amx = lfm2_path() == LFM2_AMX && n >= kAmxRows && w.cols % 32 == 0;
    const int64_t rows = amx ? (n + 31) / 32 * 32 : n;
    const size_t codes = (static_cast<size_t>(rows * w.cols) * (amx ? 2 : 1) + 63) / 64 * 64;
    const size_t numbers = (static_cast<size_t>(n * groups) * 4 + 63) / 64 * 64;
    char *memory = static_cast<char *>(lfm2_scratch(0, codes + (amx ? 0 : 2 * numbers)));
    if (!memory) return 1;
    lfm2_rows q{};
    if (!amx)
        q = {reinterpret_cast<int8_t *>(memory), reinterpret_cast<float *>(memory + codes),
             reinterpret_cast<int32_t *>(memory + codes + numbers), n, w.cols, w.group};
    uint16_t *const wide = reinterpret_cast<uint16_t *>(memory);
    lfm2_barrier barrier;
    int failed = 0;
    lfm2_parallel(threads, [&](int thread, int all) {
        const size_t own = amx ? static_cast<size_t>(lfm2_linear_amx_scratch(w)) * 2 : 0;
        void *mine = lfm2_scratch(1, (own > static_cast<size_t>(given) * 4 ? own : given * 4) + 64);
        if (!mine) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        const lfm2_part part(rows, thread, all);
        for (int64_t m = part.first; mine && m < part.last; ++m) {
            const uint16_t *halves = static_cast<const uint16_t *>(x) + m * given;
            const float *floats = static_cast<const float *>(x) + m * given;
            if (amx) {
                uint16_t *tile = wide + m / 32 * 32 * w.cols + m / 16 % 2 * 512 + m % 16 * 32;
                const int64_t real = m < n ? given : 0;
                for (int64_t i = 0; i < w.cols; i += 32, tile += 1024) {
                    const int64_t some = real >= i + 32 ? 32 : real > i ? real - i : 0;
                    if (some < 32) memset(tile, 0, 64);
                    if (x_bf16)
                        memcpy(tile, halves + i, static_cast<size_t>(some) * 2);
                    else
                        for (int64_t j = 0; j < some; ++j) tile[j] = to_bf16(floats[i + j]);
                }
            } else {
                if (x_bf16) {
                    float *row = static_cast<float *>(mine);
                    for (int64_t i = 0; i < given; ++i) row[i] = from_bf16(halves[i]);
                    floats = row;
                }
                path.quantize(floats, given, q, m, 0, groups);
            }
        }
        barrier.wait(all);
        if (__atomic_load_n(&failed, __ATOMIC_RELAXED)) return;
        const lfm2_part block(blocks, thread, all);
#if defined(__x86_64__)
        if (amx) {
            lfm2_linear_amx(w, wide, n, block.first, block.last, out, w.rows, out_bf16,
                            static_cast<uint16_t *>(mine));
            return;
        }
#endif
        path.multiply(w, q, block.first, block.last, out, w.rows, out_bf16);
    });
    return failed;
}

// What `lfm2_linear` makes of one row of activations, for the tests.
LFM2_EXPORT void lfm2_linear_quantize(const float *x, int64_t given, int64_t cols, int64_t group,
                                      int8_t *codes, float *scales, int32_t *sums) {
    const lfm2_rows rows{codes, scales, sums, 1, cols, group};
    lfm2_linear_chosen().quantize(x, given, rows, 0, 0, rows.groups());
}
