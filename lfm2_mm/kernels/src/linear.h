// Products of quantised weights with activations that are quantised on the fly.
//
// A weight is cut into blocks of 16 rows; the last one is filled up with zero codes. Within a block
// the codes lie as the dot-product instructions want them: a line of 64 bytes holds 4 inputs of each
// of the 16 rows (8 bit), or 8 inputs, the first 4 in the low halves of the bytes (4 bit). A tile of
// AMX in int8 is 16 such lines. Scales and minimums are fp16, [block, group, 16].
//
//   weight = scale * (code - zero)            zero = 128 (8 bit) or 8 (4 bit)
//   weight = scale * code + minimum           where there are minimums
//
// Activations are signed bytes in [-127, 127] with one fp32 scale for each `group` inputs of a row:
// the weight's own group, or 64 where the weight has one scale a row.
#pragma once

#include "native.h"

// As native Python code fills it in: eight 64-bit words.
struct lfm2_weight {
    const uint8_t *codes;
    const uint16_t *scales;
    const uint16_t *minimums;  // or null
    int64_t rows;              // without the filling
    int64_t cols;              // a multiple of group
    int64_t bits;              // 4 or 8
    int64_t group;             // inputs that share a scale of the activations
    int64_t per_row;           // 1: one scale a row; 0: one for each group

    int64_t blocks() const { return (rows + 15) / 16; }
    int64_t groups() const { return cols / group; }
};

// Quantised rows of activations, one behind the other.
struct lfm2_rows {
    int8_t *codes;   // [n, cols]
    float *scales;   // [n, groups]; not a number where an input is not finite
    int32_t *sums;   // [n, groups], of the codes
    int64_t n, cols, group;

    int64_t groups() const { return cols / group; }
};

// The two halves of a product on one path.
struct lfm2_linear_path {
    // Groups [first, last) of one row of `given` fp32 numbers, zeros behind them up to `cols`.
    void (*quantize)(const float *x, int64_t given, const lfm2_rows &rows, int64_t row, int64_t first,
                     int64_t last);
    // Blocks [first, last) of the output, `stride` numbers a row, fp32 or bf16.
    void (*multiply)(const lfm2_weight &w, const lfm2_rows &x, int64_t first, int64_t last, void *out,
                     int64_t stride, bool bf16);
};

const lfm2_linear_path &lfm2_linear_plain();
const lfm2_linear_path &lfm2_linear_avx2();
const lfm2_linear_path &lfm2_linear_avx512();
const lfm2_linear_path &lfm2_linear_neon();
const lfm2_linear_path &lfm2_linear_chosen();

// Many rows on AMX: weights become bf16 in blocks that stay in the cache, activations are not
// quantised. `x` is bf16, [n / 32 rounded up, cols / 32, 2, 16, 32], zeros behind the real numbers:
// each 16 rows by 32 inputs are one tile.
void lfm2_linear_amx(const lfm2_weight &w, const uint16_t *x, int64_t n, int64_t first, int64_t last,
                     void *out, int64_t stride, bool bf16, uint16_t *scratch);
int64_t lfm2_linear_amx_scratch(const lfm2_weight &w);  // numbers of `scratch`, for each thread

// Columns [first, last), multiples of 32, of row `i` into such tiles of `cols` inputs; `x` is the
// start of the row, `given` its numbers, zeros behind them.
void lfm2_linear_amx_put(const float *x, int64_t given, int64_t first, int64_t last, int64_t i, int64_t cols,
                         uint16_t *to);
constexpr int64_t kAmxRows = 24;  // from which on dequantising blocks for AMX pays

// A thread's own memory, aligned to 64 bytes, kept for the next call; null where there is none left.
void *lfm2_scratch(int slot, size_t bytes);

namespace {

constexpr float kTiny = 1e-30f;  // groups whose largest activation is smaller count as zero

inline float bits_to_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

inline float from_bf16(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

inline uint16_t to_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float from_fp16(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
    const float small = static_cast<float>(magnitude) * 5.9604644775390625e-08f;  // 2^-24
    return sign ? -small : small;
}

}  // namespace
