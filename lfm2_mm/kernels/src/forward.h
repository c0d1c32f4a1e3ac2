// The new rows of several sequences through all layers of an LFM2 backbone, dense or sparse.
//
// The numbers that pass between layers are fp32; products are those of linear.h. What is kept from
// call to call (keys, values, inputs of convolutions) has the caller's number format; keys and values
// may also be bytes, each row with a scale.
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
    // of a sparse layer, which has no gate, up and down of its own
    int64_t n_experts;
    const lfm2_weight *const *experts;  // [n_experts, 3]: gate, up, down; null until asked for
    const float *router;                // [n_experts, d]
    const float *router_bias;           // [n_experts] or null; it chooses, and does not weigh
};

struct lfm2_model {
    int64_t n_layers;
    const lfm2_layer *layers;
    int64_t d, heads, groups, e, taps, f;  // f: the widest feed-forward
    const float *norm;                     // [d]
    const float *frequencies;              // [e / 2]
    const float *eps;                      // [1]
    int64_t n_experts, top, normalise;     // most experts of a layer, those chosen
    const float *routing_scale;            // [1]
};

// One sequence: what a call reads and writes of it.
struct lfm2_sequence {
    int64_t position;        // where its first new row stands; as many rows are behind it
    int64_t count;           // its new rows
    void *keys, *values;     // [attention layers, g, capacity, e]
    // of bytes [attention layers, g, capacity]: what a row's codes are multiplied with; else null
    float *key_scales, *value_scales;
    int64_t capacity;
    void *const *states;     // of each convolution: its last k - 1 inputs, [k - 1, d], oldest first
    int64_t ends;            // how many states are wanted
    const int64_t *places;   // [ends]: behind how many of the new rows each
    void *const *next;       // [ends, convolutions]: the states there; other memory
};

// Keys or values of one group: rows of `e` numbers in fp32, in bf16, or, where there are scales, in int8.
struct lfm2_kept {
    void *rows;
    float *scales;  // [rows] or null
    bool bf16;
};

// A head's rows of several positions, and what they see.
struct lfm2_view {
    const float *q;           // [n, stride]: of each row the heads of one group side by side
    int64_t stride, n, heads, e;
    lfm2_kept keys, values;  // past + n rows
    int64_t past;
    float *out;  // [n, out_stride], the heads side by side
    int64_t out_stride;
};

// What has to be fast besides the products; states of convolutions are kept in fp32 or bf16.
struct lfm2_forward_path {
    // out = weight * x / rms(x)
    void (*norm)(const float *x, const float *weight, float eps, int64_t n, float *out);
    // gate = silu(gate) * up
    void (*swiglu)(float *gate, const float *up, int64_t n);
    // Gated convolution over the rows of a sequence, columns [first, last). `b` and `u` are
    // overwritten: by the inputs of the convolution, and by its gated outputs. All three start at
    // column `first` and have rows of `stride` numbers.
    void (*convolve)(const lfm2_layer &layer, float *b, const float *c, float *u, int64_t stride, int64_t d,
                     int64_t taps, int64_t first, int64_t last, const lfm2_sequence &sequence, int64_t slot,
                     int64_t slots, bool bf16);
    // Queries of one group, [count, e], scaled, over `length` keys and values; `out` is [count, e].
    void (*attend)(const float *q, int64_t count, int64_t e, const lfm2_kept &keys, const lfm2_kept &values,
                   int64_t length, float *out, char *room);
    // Many rows of one group, each seeing what is behind it and itself; queries are scaled.
    void (*attend_rows)(const lfm2_view &view, char *room);
    // A row of `e` numbers in fp32 becomes row `at` of what is kept.
    void (*keep)(const float *from, int64_t e, const lfm2_kept &to, int64_t at);
    // The product of two rows.
    float (*dot)(const float *a, const float *b, int64_t n);
};

const lfm2_forward_path &lfm2_forward_plain();
const lfm2_forward_path &lfm2_forward_avx2();
const lfm2_forward_path &lfm2_forward_avx512();
const lfm2_forward_path &lfm2_forward_neon();
const lfm2_forward_path &lfm2_forward_chosen();

// Bytes of `room` for `attend` and `attend_rows` of any path, given the most keys of a view.
inline int64_t lfm2_attend_room(int64_t keys, int64_t e) {
    const int64_t filled = (keys + 127) / 128 * 128;
    return 2 * filled * e * 4 + 4 * 32 * e * 4 + 4 * 128 * 32 * 4 + 4096;
}

// The same on AMX, in bf16, e a multiple of 32.
void lfm2_attend_amx(const lfm2_view &view, char *room);
