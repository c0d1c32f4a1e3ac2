// flags x86-64: -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
// The fused step's parts with AVX-512.
#include "forward_path.h"

#if defined(__x86_64__)
const lfm2_forward_path &lfm2_forward_avx512() { return kPath; }
#endif
