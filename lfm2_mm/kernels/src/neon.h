// What the files that use NEON with dot products share; include it only there.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdint>

// The sums of what is not inlined lie in memory.
#define LFM2_INLINE __attribute__((always_inline)) inline

namespace {

// 16 rows by 4 inputs, a line of 64 bytes, as four rows a register.
struct Line {
    int8x16_t part[4];
};

inline Line load_line(const void *from) {
    const int8_t *at = static_cast<const int8_t *>(from);
    return {{vld1q_s8(at), vld1q_s8(at + 16), vld1q_s8(at + 32), vld1q_s8(at + 48)}};
}

// Adds the products of a line with inputs 4 LANE .. 4 LANE + 3 of the 16 in each of M registers.
template <int LANE, int M>
LFM2_INLINE void dot(const Line &line, const int8x16_t (&x)[M], int32x4_t (&acc)[M][4]) {
    for (int m = 0; m < M; ++m)
        for (int i = 0; i < 4; ++i) acc[m][i] = vdotq_laneq_s32(acc[m][i], line.part[i], x[m], LANE);
}

}  // namespace
#endif
