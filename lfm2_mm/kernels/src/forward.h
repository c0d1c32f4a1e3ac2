// One step of a dense LFM2 backbone, one new position for each of several sequences.
//
// The numbers that pass between layers are fp32; products are those of linear.h. What is kept from
// step to step (keys, values, inputs of convolutions) has the caller's number format.
#pragma once

#include "linear.h"

// As native Python code fills it in; pointers that do not apply are null.
struct lfm2_layer {
    int64_t attention;               // 1: attention, 0: short convolution
    const float *operator_norm;      // [d]
    const float *ffn_norm;           // [d]
    const lfm2_weight *in;           // [3 d, d], or the queries' [h e, d]
    const lfm2_weight *keys;         // [g e, d]
    const lfm2_weight *values;       // [g e, d]
    const lfm2_weight *out;          // [d, d], or [d, h e]
    const lfm2_weight *gate;         // w1, [f, d]
    const lfm2_weight *up;           // w3, [f, d]
    const lfm2_weight *down;         // w2, [d, f]
    const float *query_norm;         // [e]
    const float *key_norm;           // [e]
    const float *taps;               // [k, d], the last is now
    const float *in_bias;            // [3 d] or null
    const float *conv_bias;          // [d] or null
    const float *out_bias;           // [d] or null
};

struct lfm2_model {
    int64_t n_layers;
    const lfm2_layer *layers;
    int64_t d, heads, groups, e, taps, f;  // f: the widest feed-forward
    const float *norm;                     // [d]
    const float *frequencies;              // [e / 2]
    const float *eps;                      // [1]
};

// One sequence: what the step reads and writes of it.
struct lfm2_sequence {
    int64_t position;        // where the new row stands; as many rows are behind it
    void *keys, *values;     // [attention layers, g, capacity, e]
    int64_t capacity;
    void *const *states;     // of each convolution: its last k - 1 inputs, [k - 1, d], oldest first
    void *const *next;       // the same after this step; other memory
};

// What has to be fast besides the products; the number format of what is kept is fp32 or bf16.
struct lfm2_forward_path {
    // out = weight * x / rms(x)
    void (*norm)(const float *x, const float *weight, float eps, int64_t n, float *out);
    // gate = silu(gate) * up
    void (*swiglu)(float *gate, const float *up, int64_t n);
    // One row of a gated convolution, columns [first, last): `bcx` is [3 d], y the gated output.
    void (*convolve)(const lfm2_layer &layer, const float *bcx, int64_t d, int64_t taps, int64_t first,
                     int64_t last, const void *state, void *next, bool bf16, float *y);
    // Queries of one group, [count, e], scaled, over `length` keys and values; `out` is [count, e].
    void (*attend)(const float *q, int64_t count, int64_t e, const void *keys, const void *values,
                   int64_t length, bool bf16, float *out);
    // fp32 numbers into the kept format.
    void (*keep)(const float *from, int64_t n, void *to, int64_t at, bool bf16);
};

const lfm2_forward_path &lfm2_forward_plain();
const lfm2_forward_path &lfm2_forward_avx2();
const lfm2_forward_path &lfm2_forward_avx512();
