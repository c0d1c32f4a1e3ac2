// Which instruction sets this CPU has, which of them is used, and the threads' meeting point.
#include "native.h"

#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(__APPLE__) && defined(__aarch64__)
#include <sys/sysctl.h>
#endif
#if !defined(_WIN32)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

// Raised whenever an exported function changes its arguments or meaning; native.py has the same.
static constexpr int kInterface = 2;

namespace {

struct Features {
    bool avx2 = false, avx512 = false, amx = false, neon = false;
};

#if defined(__x86_64__)
// AMX needs the leave of the operating system, once for a process.
bool amx_granted() {
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1, int8 = d >> 25 & 1;
    if (!(bf16 && tile && int8)) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}
#endif

#if defined(__aarch64__)
// Products of four bytes in one instruction: an extension of version 8.2, part of 8.4.
bool dot_products() {
#if defined(__linux__)
    constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & kDotProducts;
#elif defined(__APPLE__)
    int present = 0;
    size_t size = sizeof present;
    return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &present, &size, nullptr, 0) && present;
#else
    return false;
#endif
}
#endif

Features look() {
    Features found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    found.avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    found.avx512 = found.avx2 && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    found.amx = found.avx512 && __builtin_cpu_supports("avx512bf16") && amx_granted();
#elif defined(__aarch64__)
    found.neon = dot_products();
#endif
    return found;
}

const Features &features() {
    static const Features found = look();
    return found;
}

int paths() {
    const Features &found = features();
    return 1 << LFM2_PLAIN | found.avx2 << LFM2_AVX2 | found.avx512 << LFM2_AVX512 | found.amx << LFM2_AMX |
           found.neon << LFM2_NEON;
}

int best() {
    int path = LFM2_NEON;
    while (!(paths() >> path & 1)) --path;
    return path;
}

std::atomic<int> wanted{-1};

}  // namespace

int lfm2_path() {
    const int asked = wanted.load(std::memory_order_relaxed);
    const bool there = asked >= LFM2_PLAIN && asked <= LFM2_NEON && (paths() >> asked & 1);
    return there ? asked : best();
}

int lfm2_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

int lfm2_threads() {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

void lfm2_barrier::wait(int threads) {
    if (threads == 1) return;
    const int phase = __atomic_load_n(&phase_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int turn = 0; __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) == phase; ++turn) {
        if (turn < 1024) {
#if defined(__x86_64__)
            _mm_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        } else {
            sched_yield();
        }
    }
}

LFM2_EXPORT int lfm2_interface() { return kInterface; }

// The paths that this CPU can run, as bits: 1 << path.
LFM2_EXPORT int lfm2_paths() { return paths(); }

// Ask for a path, or for the best one with -1; returns the path then in force.
LFM2_EXPORT int lfm2_choose(int path) {
    wanted.store(path, std::memory_order_relaxed);
    return lfm2_path();
}

// Whether several threads can work at all.
LFM2_EXPORT int lfm2_parallel_built() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

// Used by the tests: how many threads took part, each of which waited for the others twice.
LFM2_EXPORT int lfm2_count_threads(int threads) {
    lfm2_barrier barrier;
    int arrived = 0, seen = 0;
    lfm2_parallel(threads, [&](int thread, int all) {
        __atomic_add_fetch(&arrived, 1, __ATOMIC_RELAXED);
        barrier.wait(all);
        if (thread == 0) seen = __atomic_load_n(&arrived, __ATOMIC_RELAXED);
        barrier.wait(all);
    });
    return seen;
}
