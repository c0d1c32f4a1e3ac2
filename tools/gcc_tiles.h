// For building llama.cpp with GCC 12, whose AMX intrinsics do not tell the compiler that they read
// memory: it then drops what was written there, and ldtilecfg faults. `make bench-text` includes it.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__AMX_TILE__)
#include <immintrin.h>

#undef _tile_loadconfig
#define _tile_loadconfig(config)                                                        \
    do {                                                                                \
        __asm__ volatile("" ::"r"(config) : "memory");                                  \
        __asm__ volatile("ldtilecfg (%0)" ::"r"((const void *)(config)) : "memory");    \
    } while (0)

#undef _tile_loadd_internal
#define _tile_loadd_internal(dst, base, stride)                                         \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #dst ::"r"((const void *)(base)),     \
                     "r"((long)(stride))                                                \
                     : "memory")
#endif
