// flags aarch64: -march=armv8.2-a+dotprod
// Quantised products with NEON: the same integers as everywhere, from products of four signed bytes.
#include "linear.h"

#if defined(__aarch64__)
#include "neon.h"

namespace {

void quantize(const float *x, int64_t given, const lfm2_rows &rows, int64_t row, int64_t first,
              int64_t last) {
    const int64_t groups = rows.groups(), group = rows.group;
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
    for (int64_t g = first; g < last; ++g) {
        const int64_t start = g * group;
        int8_t *codes = rows.codes + row * rows.cols + start;
        float filled[128];
        const float *part = x + start;
        if (start + group > given) {
            for (int64_t i = 0; i < group; ++i) filled[i] = start + i < given ? x[start + i] : 0.0f;
            part = filled;
        }
        uint32x4_t most = vdupq_n_u32(0);
        for (int64_t i = 0; i < group; i += 4) {
            const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(part + i));
            most = vmaxq_u32(most, vandq_u32(bits, magnitude));
        }
        const uint32_t bits = vmaxvq_u32(most);
        const float largest = bits_to_float(bits);
        const bool finite = bits < 0x7f800000u, some = finite && largest >= kTiny;
        const float inverse = some ? 127.0f / largest : 0.0f;
        int32x4_t sum = vdupq_n_s32(0);
        for (int64_t i = 0; i < group; i += 16) {
            int16x4_t code[4];
            for (int j = 0; j < 4; ++j) {
                const float32x4_t scaled = vmulq_n_f32(vld1q_f32(part + i + 4 * j), inverse);
                const int32x4_t rounded = some ? vcvtnq_s32_f32(scaled) : vdupq_n_s32(0);
                sum = vaddq_s32(sum, rounded);
                code[j] = vmovn_s32(rounded);
            }
            const int8x8_t low = vmovn_s16(vcombine_s16(code[0], code[1]));
            vst1q_s8(codes + i, vcombine_s8(low, vmovn_s16(vcombine_s16(code[2], code[3]))));
        }
        rows.scales[row * groups + g] = finite ? (some ? largest / 127.0f : 0.0f) : __builtin_nanf("");
        rows.sums[row * groups + g] = vaddvq_s32(sum);
    }
}

inline float32x4_t halves(const uint16_t *from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
}

// Codes of 8 bits less their zero.
inline Line less_zero(Line line) {
    const uint8x16_t sign = vdupq_n_u8(0x80);
    for (auto &part : line.part) part = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s8(part), sign));
    return line;
}

inline Line low_halves(Line line) {
    for (auto &part : line.part) part = vandq_s8(part, vdupq_n_s8(15));
    return line;
}

inline Line high_halves(Line line) {
    for (auto &part : line.part) part = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(part), 4));
    return line;
}

// The lines of 16 inputs: four of 8 bits, or two of 4 bits, whose codes are below 16 and so signed.
template <int BITS, int M>
LFM2_INLINE void dot_lines(const uint8_t *line, const int8x16_t (&x)[M], int32x4_t (&acc)[M][4]) {
    if constexpr (BITS == 8) {
        dot<0>(less_zero(load_line(line)), x, acc);
        dot<1>(less_zero(load_line(line + 64)), x, acc);
        dot<2>(less_zero(load_line(line + 128)), x, acc);
        dot<3>(less_zero(load_line(line + 192)), x, acc);
    } else {
        const Line first = load_line(line), second = load_line(line + 64);
        dot<0>(low_halves(first), x, acc);
        dot<1>(high_halves(first), x, acc);
        dot<2>(low_halves(second), x, acc);
        dot<3>(high_halves(second), x, acc);
    }
}

// One block of 16 outputs for M rows of activations.
template <int BITS, int GROUP, bool ROW, bool MIN, int M>
void block(const lfm2_weight &w, const lfm2_rows &x, int64_t b, int64_t m0, void *out, int64_t stride,
           bool bf16) {
    constexpr int32_t kZero = MIN || BITS == 8 ? 0 : 8;  // codes of 8 bit are made signed
    constexpr int64_t kBytes = GROUP * 16 * BITS / 8;
    const int64_t groups = w.groups(), cols = x.cols;
    const uint8_t *line = w.codes + b * groups * kBytes;
    const int8_t *codes = x.codes + m0 * cols;
    const float *scales = x.scales + m0 * groups;
    const int32_t *sums = x.sums + m0 * groups;
    float32x4_t total[M][4];
    for (auto &row : total)
        for (auto &one : row) one = vdupq_n_f32(0.0f);
    for (int64_t g = 0; g < groups; ++g, codes += GROUP) {
        int32x4_t acc[M][4];
        for (int m = 0; m < M; ++m)
            for (auto &one : acc[m]) one = vdupq_n_s32(-kZero * sums[m * groups + g]);
        for (int64_t k = 0; k < GROUP; k += 16, line += 32 * BITS) {
            int8x16_t given[M];
            for (int m = 0; m < M; ++m) given[m] = vld1q_s8(codes + m * cols + k);
            dot_lines<BITS>(line, given, acc);
        }
        const int64_t at = (b * groups + g) * 16;
        float32x4_t scale[4], minimum[4];
        for (int i = 0; i < 4; ++i) {
            if constexpr (!ROW) scale[i] = halves(w.scales + at + 4 * i);
            if constexpr (MIN) minimum[i] = halves(w.minimums + at + 4 * i);
        }
        for (int m = 0; m < M; ++m) {
            const float given = scales[m * groups + g];
            const float sum = given * static_cast<float>(sums[m * groups + g]);
            for (int i = 0; i < 4; ++i) {
                const float32x4_t factor = ROW ? vdupq_n_f32(given) : vmulq_n_f32(scale[i], given);
                total[m][i] = vfmaq_f32(total[m][i], vcvtq_f32_s32(acc[m][i]), factor);
                if constexpr (MIN) total[m][i] = vfmaq_n_f32(total[m][i], minimum[i], sum);
            }
        }
    }
    const int64_t row = 16 * b, real = w.rows - row < 16 ? w.rows - row : 16;
    for (int m = 0; m < M; ++m) {
        float each[16];
        for (int i = 0; i < 4; ++i) {
            if constexpr (ROW) total[m][i] = vmulq_f32(total[m][i], halves(w.scales + row + 4 * i));
            vst1q_f32(each + 4 * i, total[m][i]);
        }
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
    for (int64_t b = first; b < last; ++b) {
        int64_t m = 0;
        for (; m + 4 <= x.n; m += 4) block<BITS, GROUP, ROW, MIN, 4>(w, x, b, m, out, stride, bf16);
        for (; m + 2 <= x.n; m += 2) block<BITS, GROUP, ROW, MIN, 2>(w, x, b, m, out, stride, bf16);
        if (m < x.n) block<BITS, GROUP, ROW, MIN, 1>(w, x, b, m, out, stride, bf16);
    }
}

}  // namespace

#include "linear_schemes.h"

const lfm2_linear_path &lfm2_linear_neon() {
    static const lfm2_linear_path path = {quantize, multiply};
    return path;
}
#endif
