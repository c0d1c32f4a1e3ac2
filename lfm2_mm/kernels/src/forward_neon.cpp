// flags aarch64: -march=armv8.2-a+dotprod
// The fused step's parts with NEON.
#include "forward_path.h"

#if defined(__aarch64__)
const lfm2_forward_path &lfm2_forward_neon() { return kPath; }
#endif
