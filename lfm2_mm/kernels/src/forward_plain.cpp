// The fused step's parts for every CPU.
#include "forward_path.h"

const lfm2_forward_path &lfm2_forward_plain() { return kPath; }
