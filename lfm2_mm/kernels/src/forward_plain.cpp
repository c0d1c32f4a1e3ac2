// The fused step's parts for every CPU, and the choice among the paths.
#include "forward_path.h"

const lfm2_forward_path &lfm2_forward_plain() { return kPath; }

const lfm2_forward_path &lfm2_forward_chosen() {
#if defined(__x86_64__)
    const int path = lfm2_path();
    if (path >= LFM2_AVX512) return lfm2_forward_avx512();
    if (path >= LFM2_AVX2) return lfm2_forward_avx2();
#elif defined(__aarch64__)
    if (lfm2_path() == LFM2_NEON) return lfm2_forward_neon();
#endif
    return lfm2_forward_plain();
}
