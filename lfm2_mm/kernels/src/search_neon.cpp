// flags aarch64: -march=armv8.2-a+dotprod
// Search among stored token vectors with NEON.
#include "search.h"

#if defined(__aarch64__)
#include "neon.h"

namespace {

constexpr int kTokens = 4;

// Of 2 or 4 bits a level the table fits a register.
void unpack(const lfm2_residuals &job, int64_t token, uint8_t *to) {
    const int64_t bytes = job.payload();
    if (job.bits == 8 || bytes % 16) {
        lfm2_unpack(job, token, to);
        return;
    }
    const uint8_t *from = job.packed + token * job.stride;
    uint8_t table[16] = {};
    __builtin_memcpy(table, job.levels, job.bits == 4 ? 16 : 4);
    const uint8x16_t levels = vld1q_u8(table), mask = vdupq_n_u8(job.bits == 4 ? 15 : 3);
    for (int64_t shift = 8 - job.bits; shift >= 0; shift -= job.bits, to += bytes) {
        const int8x16_t right = vdupq_n_s8(static_cast<int8_t>(-shift));
        for (int64_t i = 0; i < bytes; i += 16) {
            const uint8x16_t number = vandq_u8(vshlq_u8(vld1q_u8(from + i), right), mask);
            vst1q_u8(to + i, vqtbl1q_u8(levels, number));
        }
    }
}

}  // namespace

void lfm2_table_neon(const lfm2_table &job, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
        const int64_t begin = job.passages.starts[p], end = begin + job.passages.lengths[p];
        int32_t total = 0;
        for (int64_t r = 0; r < job.rows; r += 16) {
            uint8x16_t best = vdupq_n_u8(0);
            for (int64_t t = begin; t < end; ++t)
                best = vmaxq_u8(best, vld1q_u8(job.scores + job.codes[t] * job.rows + r));
            total += vaddlvq_u8(best);
        }
        job.found[p] = total;
    }
}

void lfm2_residuals_neon(const lfm2_residuals &job, int64_t first, int64_t last) {
    int8_t levels[kTokens][kMostInputs] = {};  // below 128, and so signed
    float best[kMostRows];
    for (int64_t p = first; p < last; ++p) {
        for (int64_t r = 0; r < job.rows; ++r) best[r] = -3.4e38f;
        const int64_t begin = job.passages.starts[p], end = begin + job.passages.lengths[p];
        for (int64_t t = begin; t < end; t += kTokens) {
            const int count = end - t < kTokens ? static_cast<int>(end - t) : kTokens;
            for (int i = 0; i < count; ++i) unpack(job, t + i, reinterpret_cast<uint8_t *>(levels[i]));
            for (int64_t r = 0; r < job.rows; r += 16) {
                const int8_t *query = job.query + r * job.inputs;
                int32x4_t sums[kTokens][4];
                for (auto &token : sums)
                    for (auto &one : token) one = vdupq_n_s32(0);
                for (int64_t k = 0; k < job.inputs; k += 16, query += 256) {
                    int8x16_t given[kTokens];
                    for (int i = 0; i < kTokens; ++i) given[i] = vld1q_s8(levels[i] + k);
                    dot<0>(load_line(query), given, sums);
                    dot<1>(load_line(query + 64), given, sums);
                    dot<2>(load_line(query + 128), given, sums);
                    dot<3>(load_line(query + 192), given, sums);
                }
                for (int i = 0; i < count; ++i) {
                    const float scale = job.scale(t + i), *near = job.scores + job.codes[t + i] * job.rows + r;
                    for (int j = 0; j < 4; ++j) {
                        const float32x4_t constant = vld1q_f32(job.constant + r + 4 * j);
                        const float32x4_t factor = vld1q_f32(job.factor + r + 4 * j);
                        const float32x4_t dots = vfmaq_f32(constant, factor, vcvtq_f32_s32(sums[i][j]));
                        const float32x4_t score = vfmaq_n_f32(vld1q_f32(near + 4 * j), dots, scale);
                        float *const most = best + r + 4 * j;
                        vst1q_f32(most, vmaxq_f32(vld1q_f32(most), score));
                    }
                }
            }
        }
        float sum = 0.0f;
        for (int64_t r = 0; r < job.rows; ++r) sum += best[r];
        job.found[p] = sum;
    }
}
#endif
