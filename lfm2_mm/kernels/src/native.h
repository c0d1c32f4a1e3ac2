// What every kernel file may use: the path chosen for this CPU, exported names, threads.
#pragma once

#include <cstddef>
#include <cstdint>

#define LFM2_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction sets that kernels exist for. Those of x86-64 contain each other in this order;
// NEON with dot products is the only one of aarch64.
enum lfm2_path_t : int { LFM2_PLAIN = 0, LFM2_AVX2 = 1, LFM2_AVX512 = 2, LFM2_AMX = 3, LFM2_NEON = 4 };

// The path in force: the one that was asked for, or the best one where this CPU lacks that.
int lfm2_path();

int lfm2_thread();
int lfm2_threads();

// Runs `body(thread, threads)` on that many threads, or fewer, the caller being the first; no thread
// may throw. With one thread, or without OpenMP, it is a plain call.
template <class Body>
inline void lfm2_parallel(int threads, const Body &body) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            body(lfm2_thread(), lfm2_threads());
        }
        return;
    }
#endif
    body(0, 1);
}

// The part of `count` things that a thread takes when they are dealt evenly, as [first, last).
struct lfm2_part {
    int64_t first, last;
    lfm2_part(int64_t count, int thread, int threads)
        : first(count * thread / threads), last(count * (thread + 1) / threads) {}
};

// Where all threads of a parallel region wait for each other; spins for some microseconds, then
// yields. `threads` is what the region's body was told.
struct lfm2_barrier {
    void wait(int threads);

  private:
    alignas(64) int arrived_ = 0;
    alignas(64) int phase_ = 0;
};
