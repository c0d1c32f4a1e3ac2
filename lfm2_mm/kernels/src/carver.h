// Memory of one call, cut into the pieces that its parts need.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace {

inline size_t aligned(int64_t bytes) { return (static_cast<size_t>(bytes) + 63) / 64 * 64; }
inline int64_t filled(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory cut into pieces that start at borders of 64 bytes; without memory it only adds up.
struct Carver {
    char *start;
    size_t used = 0;
    template <class T>
    T *take(int64_t count) {
        T *piece = start ? reinterpret_cast<T *>(start + used) : nullptr;
        used += aligned(count * static_cast<int64_t>(sizeof(T)));
        return piece;
    }
};

}  // namespace
