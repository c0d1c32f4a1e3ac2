// flags x86-64: -mavx2 -mfma -mf16c
// The fused step's parts with AVX2.
#include "forward_path.h"

#if defined(__x86_64__)
const lfm2_forward_path &lfm2_forward_avx2() { return kPath; }
#endif
