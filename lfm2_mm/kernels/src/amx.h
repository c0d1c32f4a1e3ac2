// What the files that use the tiles of AMX share; include it only there.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "linear.h"

namespace {

// What follows must not be moved before what memory the tiles read, nor the other way round: the
// tile instructions of the compiler do not say that they touch memory.
inline void fence() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    void load() const {
        __asm__ volatile("" ::"r"(this) : "memory");
        _tile_loadconfig(this);
    }
};

// The order in which `beside` takes the numbers of two vectors: 0, 16, 1, 17, …
inline __m512i interleaved() {
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 16; ++i) {
        index[2 * i] = static_cast<uint16_t>(i);
        index[2 * i + 1] = static_cast<uint16_t>(16 + i);
    }
    return _mm512_load_si512(index);
}

// Two inputs of 16 rows each, side by side, as one row of a tile.
inline __m512i beside(__m512 first, __m512 second, __m512i order) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    return _mm512_permutexvar_epi16(order, both);
}

}  // namespace
#endif
