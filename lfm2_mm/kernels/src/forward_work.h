// What the threads of `lfm2_forward` share, and the rooms that their rows lie in.
#pragma once

#include "carver.h"
#include "forward.h"

namespace {

constexpr int64_t kFew = 8;       // rows that every thread rounds for itself rather than wait
constexpr int64_t kTile = 256;    // columns of many rows that are computed, mixed and rounded together
constexpr int64_t kAhead = 8192;  // bytes

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of activations as a product takes them: bytes with scales, or bf16 in tiles.
struct Operand {
    bool tiles;
    lfm2_rows rows;
    uint16_t *wide;
    int64_t cols, group;

    // Some of its rows, the first of which begins a tile where there are tiles.
    Operand from(int64_t start) const {
        Operand part = *this;
        part.wide += start * cols;
        part.rows.codes += start * cols;
        part.rows.scales += start * (cols / group);
        part.rows.sums += start * (cols / group);
        return part;
    }
    bool fits(const lfm2_weight &w) const { return cols == w.cols && (tiles || group == w.group); }
    int64_t unit() const { return tiles ? 32 : group; }  // columns that are rounded together
};

// Room for `n` rows of at most `cols` numbers, a multiple of 128, whatever they become.
struct Room {
    char *at;
    int64_t n;
    Room(Carver &from, int64_t rows, int64_t cols) : n(filled(rows, 32)) { at = from.take<char>(n * cols * 2); }
    Operand operand(const lfm2_weight &w, bool tiles) const {
        char *const scales = at + n * w.cols, *const sums = scales + n * w.groups() * 4;
        const lfm2_rows rows{reinterpret_cast<int8_t *>(at), reinterpret_cast<float *>(scales),
                             reinterpret_cast<int32_t *>(sums), n, w.cols, w.group};
        return {tiles, rows, reinterpret_cast<uint16_t *>(at), w.cols, w.group};
    }
};

// What is asked for, and the sizes that follow.
struct Call {
    const lfm2_model &model;
    float *x;  // [n, d]
    int64_t n;
    const lfm2_sequence *sequences;
    int64_t n_sequences;
    bool bf16;
    int64_t *resume;
    const lfm2_linear_path &linear;
    const lfm2_forward_path &path;
    bool amx, tiles, many, single;  // tiles: products of dense layers; single: one row each
    bool mixed_groups;              // some gate and up are not rounded alike
    int64_t slots;                  // convolutions
    int64_t widest, deepest;        // inputs of products with x, and of others; multiples of 128
    int64_t most;                   // rows of an operand: more than n where several experts take each

    int64_t step() const { return many ? kTile : larger(widest, deepest); }
};

// What all threads write to.
struct Shared {
    float *wide;      // [n, (h + 2 g) e]
    float *mixed;     // [n, max(d, h e)]
    float *angles;    // [n, e]: cosines, then sines
    int32_t *chosen;  // [n, top]
    float *weights;   // [n, top]
    Room first, other, second;  // other: of `mixed_groups`
    Shared(Carver &from, const Call &call)
        : wide(from.take<float>(call.n * (call.model.heads + 2 * call.model.groups) * call.model.e)),
          mixed(from.take<float>(call.n * larger(call.model.d, call.model.heads * call.model.e))),
          angles(from.take<float>(call.n * call.model.e)),
          chosen(from.take<int32_t>(call.n * call.model.top)),
          weights(from.take<float>(call.n * call.model.top)),
          first(from, call.many ? call.most : 0, call.widest),
          other(from, call.many && call.mixed_groups ? call.most : 0, call.widest),
          second(from, call.most, call.deepest) {}
};

// One thread's own memory.
struct Own {
    float *row;    // [widest]
    float *tile;   // [3, n, step]
    float *scores; // [experts]
    int64_t *starts, *counts;  // [experts + 1], [experts]: slots of each
    int32_t *slot_rows;        // [most]: whose each slot is, -1 if nobody's
    float *slot_weights;       // [most]
    uint16_t *scratch;
    char *attend;
    Room first, other, second;  // of few rows
    Own(Carver &from, const Call &call, int64_t scratch_numbers, int64_t attend_bytes)
        : row(from.take<float>(larger(call.widest, call.deepest))),
          tile(from.take<float>(3 * filled(call.n, 32) * call.step())),
          scores(from.take<float>(call.model.n_experts)),
          starts(from.take<int64_t>(call.model.n_experts + 1)),
          counts(from.take<int64_t>(call.model.n_experts + 1)),
          slot_rows(from.take<int32_t>(call.model.n_experts ? call.most : 0)),
          slot_weights(from.take<float>(call.model.n_experts ? call.most : 0)),
          scratch(from.take<uint16_t>(scratch_numbers)),
          attend(from.take<char>(attend_bytes)),
          first(from, call.many ? 0 : call.most, call.widest),
          other(from, call.many || !call.mixed_groups ? 0 : call.most, call.widest),
          second(from, call.many ? 0 : call.n, call.deepest) {}
};

}  // namespace
