// Search among stored token vectors: the exported functions, and the path that every CPU can run.
#include "search.h"

#include <atomic>
#include <cstring>

namespace {

constexpr int64_t kChunk = 16;  // passages that a thread takes at once

// Deals `count` passages to threads, a chunk at a time: they differ in length.
template <class Body>
void deal(int64_t count, int threads, const Body &body) {
    std::atomic<int64_t> next{0};
    lfm2_parallel(count > kChunk ? threads : 1, [&](int, int) {
        for (int64_t first; (first = next.fetch_add(kChunk, std::memory_order_relaxed)) < count;)
            body(first, first + kChunk < count ? first + kChunk : count);
    });
}

// The first place in an ascending list with at least this value.
const int32_t *reach(const int32_t *from, const int32_t *to, int64_t value) {
    while (from < to) {
        const int32_t *middle = from + (to - from) / 2;
        if (*middle < value)
            from = middle + 1;
        else
            to = middle;
    }
    return from;
}

}  // namespace

void lfm2_table_plain(const lfm2_table &job, int64_t first, int64_t last) {
    uint8_t best[kMostRows];
    for (int64_t p = first; p < last; ++p) {
        memset(best, 0, sizeof best);
        const int64_t begin = job.passages.starts[p], end = begin + job.passages.lengths[p];
        for (int64_t t = begin; t < end; ++t) {
            const uint8_t *row = job.scores + job.codes[t] * job.rows;
            for (int64_t r = 0; r < job.rows; ++r) best[r] = row[r] > best[r] ? row[r] : best[r];
        }
        int32_t sum = 0;
        for (int64_t r = 0; r < job.rows; ++r) sum += best[r];
        job.found[p] = sum;
    }
}

void lfm2_residuals_plain(const lfm2_residuals &job, int64_t first, int64_t last) {
    uint8_t levels[kMostInputs] = {};
    float best[kMostRows];
    for (int64_t p = first; p < last; ++p) {
        for (int64_t r = 0; r < job.rows; ++r) best[r] = -3.4e38f;
        const int64_t begin = job.passages.starts[p], end = begin + job.passages.lengths[p];
        for (int64_t t = begin; t < end; ++t) {
            lfm2_unpack(job, t, levels);
            const float scale = job.scale(t), *scores = job.scores + job.codes[t] * job.rows;
            for (int64_t b = 0; b < job.rows / 16; ++b) {
                int32_t sums[16] = {};
                const int8_t *query = job.query + b * job.inputs * 16;
                for (int64_t k = 0; k < job.inputs; k += 4, query += 64)
                    for (int r = 0; r < 16; ++r)
                        for (int j = 0; j < 4; ++j) sums[r] += levels[k + j] * query[4 * r + j];
                for (int r = 0; r < 16; ++r) {
                    const int64_t at = 16 * b + r;
                    const float dot = job.constant[at] + job.factor[at] * static_cast<float>(sums[r]);
                    const float score = scores[at] + scale * dot;
                    best[at] = score > best[at] ? score : best[at];
                }
            }
        }
        float sum = 0.0f;
        for (int64_t r = 0; r < job.rows; ++r) sum += best[r];
        job.found[p] = sum;
    }
}

// Adds up, for each passage, the best gain among each row's cells that hold it.
//
// lists, offsets: the ascending passages of each cell, behind each other. cells, gains: [rows, width],
// gains ascending. total: [passages], zeros at first. stamps: [passages], less than any row's number.
LFM2_EXPORT int lfm2_search_cells(const int32_t *lists, const int64_t *offsets, const int64_t *cells,
                                  const float *gains, int64_t rows, int64_t width, int64_t passages,
                                  float *total, int32_t *stamps, int threads) {
    lfm2_parallel(threads, [&](int thread, int all) {
        const lfm2_part part(passages, thread, all);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t w = width - 1; w >= 0; --w) {
                const int64_t cell = cells[r * width + w];
                const float gain = gains[r * width + w];
                const int32_t *end = lists + offsets[cell + 1];
                const int32_t *at = lists + offsets[cell];
                if (all > 1) at = reach(at, end, part.first);
                for (; at < end && *at < part.last; ++at) {
                    const int32_t passage = *at;
                    if (passage < part.first || stamps[passage] == r) continue;
                    stamps[passage] = static_cast<int32_t>(r);
                    total[passage] += gain;
                }
            }
    });
    return 0;
}

// Sums over rows of the greatest byte that a passage's centroids have there.
LFM2_EXPORT int lfm2_search_centroids(const uint8_t *scores, int64_t rows, const void *codes,
                                      int64_t code_bytes, const int64_t *starts, const int64_t *lengths,
                                      int64_t count, int32_t *found, int threads) {
    if (rows % 16 || rows > kMostRows) return 1;
    const lfm2_table job{scores, rows, {codes, code_bytes}, {starts, lengths}, found};
    auto run = lfm2_table_plain;
#if defined(__x86_64__)
    if (lfm2_path() >= LFM2_AVX2) run = lfm2_table_avx2;
#elif defined(__aarch64__)
    if (lfm2_path() == LFM2_NEON) run = lfm2_table_neon;
#endif
    deal(count, threads, [&](int64_t first, int64_t last) { run(job, first, last); });
    return 0;
}

// MaxSim of passages whose tokens are centroids plus residuals; see `lfm2_residuals`.
LFM2_EXPORT int lfm2_search_residuals(const int8_t *query, const float *constant, const float *factor,
                                      int64_t rows, int64_t inputs, const float *scores,
                                      const void *codes, int64_t code_bytes, const uint8_t *packed,
                                      int64_t stride, int64_t bits, const uint8_t *levels,
                                      const float *scales, const int64_t *starts, const int64_t *lengths,
                                      int64_t count, float *found, int threads) {
    if (rows % 16 || rows > kMostRows || inputs % 64 || inputs > kMostInputs) return 1;
    const lfm2_residuals job{query,  constant, factor, rows,   inputs, scores,           {codes, code_bytes},
                             packed, stride,   bits,   levels, scales, {starts, lengths}, found};
    auto run = lfm2_residuals_plain;
#if defined(__x86_64__)
    const int path = lfm2_path();
    if (path >= LFM2_AMX)
        run = lfm2_residuals_amx;
    else if (path >= LFM2_AVX512)
        run = lfm2_residuals_avx512;
    else if (path >= LFM2_AVX2)
        run = lfm2_residuals_avx2;
#elif defined(__aarch64__)
    if (lfm2_path() == LFM2_NEON) run = lfm2_residuals_neon;
#endif
    deal(count, threads, [&](int64_t first, int64_t last) { run(job, first, last); });
    return 0;
}
