// Which instance of `blocks` a packed weight wants; a path's file writes `blocks`, then includes this.
#pragma once
#include "linear.h"

namespace {

void multiply(const lfm2_weight &w, const lfm2_rows &x, int64_t first, int64_t last, void *out,
              int64_t stride, bool bf16) {
    const bool minimum = w.minimums != nullptr;
    if (w.per_row) return blocks<8, 64, true, false>(w, x, first, last, out, stride, bf16);
    if (w.bits == 8) return blocks<8, 32, false, false>(w, x, first, last, out, stride, bf16);
    if (w.group == 32 && minimum) return blocks<4, 32, false, true>(w, x, first, last, out, stride, bf16);
    if (w.group == 32) return blocks<4, 32, false, false>(w, x, first, last, out, stride, bf16);
    if (minimum) return blocks<4, 128, false, true>(w, x, first, last, out, stride, bf16);
    return blocks<4, 128, false, false>(w, x, first, last, out, stride, bf16);
}

}  // namespace
