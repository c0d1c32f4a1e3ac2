// Scores of stored token vectors: what the files for single instruction sets share.
//
// A passage is a run of tokens; a query has R rows, filled up to a multiple of 16. A token is a
// centroid plus a residual: packed levels of 2, 4 or 8 bits a dimension, and behind them one byte
// that numbers its scale. Levels stand for unsigned values of 7 bits, so that no sum of pairs leaves
// 16 bits; all sums are of integers, so every instruction set gives the same ones.
#pragma once

#include "native.h"

constexpr int64_t kMostRows = 256, kMostInputs = 1024;

// Centroid number of a token; they are stored as 16 or 32 bits.
struct lfm2_codes {
    const void *at;
    int64_t bytes;
    int64_t operator[](int64_t token) const {
        return bytes == 2 ? static_cast<const uint16_t *>(at)[token]
                          : static_cast<const uint32_t *>(at)[token];
    }
};

struct lfm2_passages {
    const int64_t *starts, *lengths;
};

// Scores of centroids in bytes, [centroids, rows].
struct lfm2_table {
    const uint8_t *scores;
    int64_t rows;
    lfm2_codes codes;
    lfm2_passages passages;
    int32_t *found;
};

// A token's score for a row is scores[centroid] + scale * (constant + factor * (query . levels)).
struct lfm2_residuals {
    const int8_t *query;    // [rows / 16, inputs / 4, 16, 4]; inputs in the order that unpacking gives
    const float *constant;  // [rows]
    const float *factor;    // [rows]
    int64_t rows;
    int64_t inputs;         // dimensions, filled up to a multiple of 64
    const float *scores;    // [centroids, rows]
    lfm2_codes codes;
    const uint8_t *packed;  // [tokens, stride]
    int64_t stride;
    int64_t bits;
    const uint8_t *levels;  // [2^bits], below 128
    const float *scales;    // [256]
    lfm2_passages passages;
    float *found;

    int64_t payload() const { return stride - 1; }
    float scale(int64_t token) const { return scales[packed[token * stride + stride - 1]]; }
};

// Each scores the passages first .. last - 1.
void lfm2_table_plain(const lfm2_table &, int64_t first, int64_t last);
void lfm2_table_avx2(const lfm2_table &, int64_t first, int64_t last);
void lfm2_table_neon(const lfm2_table &, int64_t first, int64_t last);
void lfm2_residuals_plain(const lfm2_residuals &, int64_t first, int64_t last);
void lfm2_residuals_avx2(const lfm2_residuals &, int64_t first, int64_t last);
void lfm2_residuals_avx512(const lfm2_residuals &, int64_t first, int64_t last);
void lfm2_residuals_amx(const lfm2_residuals &, int64_t first, int64_t last);
void lfm2_residuals_neon(const lfm2_residuals &, int64_t first, int64_t last);

namespace {

// The levels of a token, plane by plane: first the highest bits of all bytes. What lies behind them
// up to `inputs` is left as it is.
inline void lfm2_unpack(const lfm2_residuals &job, int64_t token, uint8_t *to) {
    const uint8_t *from = job.packed + token * job.stride;
    const int64_t bytes = job.payload(), mask = (1 << job.bits) - 1;
    for (int64_t shift = 8 - job.bits; shift >= 0; shift -= job.bits, to += bytes)
        for (int64_t i = 0; i < bytes; ++i) to[i] = job.levels[from[i] >> shift & mask];
}

}  // namespace
