// One decode step: every layer of the backbone in one parallel region, without an allocation.
//
// Threads deal out the outputs of each product; where one thread's outputs are all that its next
// work needs, it goes on without waiting: from the gates through the convolution, from SwiGLU to its
// rounding. What is cheap and needs all of a row, such as norms, every thread computes for itself.
#include "forward.h"

#include <cmath>

namespace {

const lfm2_forward_path &chosen() {
#if defined(__x86_64__)
    const int path = lfm2_path();
    if (path >= LFM2_AVX512) return lfm2_forward_avx512();
    if (path >= LFM2_AVX2) return lfm2_forward_avx2();
#endif
    return lfm2_forward_plain();
}

size_t aligned(int64_t bytes) { return (static_cast<size_t>(bytes) + 63) / 64 * 64; }

// Memory cut into pieces that start at borders of 64 bytes.
struct Carver {
    char *at;
    template <class T>
    T *take(int64_t count) {
        T *piece = reinterpret_cast<T *>(at);
        at += aligned(count * static_cast<int64_t>(sizeof(T)));
        return piece;
    }
};

// Room for `n` quantised rows of at most `cols` numbers, whatever the group.
struct RowsRoom {
    int8_t *codes;
    float *scales;
    int32_t *sums;
    static size_t bytes(int64_t n, int64_t cols) { return aligned(n * cols) + 2 * aligned(n * cols / 8); }
    RowsRoom(Carver &from, int64_t n, int64_t cols)
        : codes(from.take<int8_t>(n * cols)), scales(from.take<float>(n * cols / 32)),
          sums(from.take<int32_t>(n * cols / 32)) {}
    lfm2_rows rows(int64_t n, const lfm2_weight &w) const { return {codes, scales, sums, n, w.cols, w.group}; }
};

constexpr int64_t kAhead = 8192;  // bytes

// What all threads of a step share.
struct Step {
    const lfm2_model &model;
    const lfm2_linear_path &linear;
    const lfm2_forward_path &path;
    const lfm2_sequence *sequences;
    float *x;  // [n, d]
    int64_t n;
    bool bf16;
    int64_t widest;  // inputs of any product, filled up
    float *wide;     // [n, max(3 d, 2 f, (h + 2 g) e)]
    float *mixed;    // [n, max(d, h e)]
    lfm2_barrier barrier;
};

struct Worker {
    Step &step;
    const int thread, threads;
    const RowsRoom shared;  // rows that every thread writes a part of
    const RowsRoom own;
    float *const row;  // [max(d, e, …)]
    float *const angles;  // [n, 2, e / 2]

    const lfm2_model &model() const { return step.model; }
    void wait() { step.barrier.wait(threads); }

    // Columns that this thread takes of `cols`, in units that the next product's groups demand.
    lfm2_part columns(int64_t cols, int64_t unit) const {
        lfm2_part part((cols + unit - 1) / unit, thread, threads);
        part.first *= unit;
        part.last = part.last * unit < cols ? part.last * unit : cols;
        return part;
    }

    // Products of columns [first, last) of the outputs, into rows of `stride` numbers.
    void multiply(const lfm2_weight &w, const lfm2_rows &rows, int64_t first, int64_t last, float *out,
                  int64_t stride) const {
        if (first < last) step.linear.multiply(w, rows, first / 16, (last + 15) / 16, out, stride, false);
    }

    // Ask for the start of what this thread reads next, while something else is computed.
    void ahead(const lfm2_weight &w, int64_t column) const {
        const int64_t start = column / 16 * w.cols * 2 * w.bits, size = w.blocks() * w.cols * 2 * w.bits;
        const int64_t end = start + kAhead < size ? start + kAhead : size;
        for (int64_t i = start; i < end; i += 64) __builtin_prefetch(w.codes + i, 0, 2);
    }

    // The residual stream, normalised and rounded for a product.
    lfm2_rows normalised(const float *norm, const lfm2_weight &w) const {
        const lfm2_rows rows = own.rows(step.n, w);
        for (int64_t i = 0; i < step.n; ++i) {
            step.path.norm(step.x + i * model().d, norm, *model().eps, model().d, row);
            step.linear.quantize(row, model().d, rows, i, 0, rows.groups());
        }
        return rows;
    }

    // x += w rows, and the bias
    void add(const lfm2_weight &w, const lfm2_rows &rows, const float *bias, float *room) const {
        const int64_t d = model().d;
        const lfm2_part part = columns(d, 16);
        multiply(w, rows, part.first, part.last, room, d);
        for (int64_t i = 0; i < step.n; ++i)
            for (int64_t c = part.first; c < part.last; ++c)
                step.x[i * d + c] += room[i * d + c] + (bias ? bias[c] : 0.0f);
    }

    void round_part(const float *from, int64_t stride, int64_t given, const lfm2_rows &rows,
                    const lfm2_part &part) const {
        if (part.first >= part.last) return;
        const int64_t last = part.last == given ? rows.groups() : part.last / rows.group;
        for (int64_t i = 0; i < step.n; ++i)
            step.linear.quantize(from + i * stride, given, rows, i, part.first / rows.group, last);
    }

    void convolution(const lfm2_layer &layer, int64_t slot) {
        const int64_t d = model().d;
        const lfm2_part part = columns(d, layer.out->group);
        ahead(*layer.in, part.first);
        const lfm2_rows rows = normalised(layer.operator_norm, *layer.in);
        for (int64_t third = 0; third < 3; ++third)
            multiply(*layer.in, rows, third * d + part.first, third * d + part.last, step.wide, 3 * d);
        for (int64_t i = 0; i < step.n; ++i)
            step.path.convolve(layer, step.wide + i * 3 * d, d, model().taps, part.first, part.last,
                               step.sequences[i].states[slot], step.sequences[i].next[slot], step.bf16,
                               step.mixed + i * d);
        const lfm2_rows gated = shared.rows(step.n, *layer.out);
        round_part(step.mixed, d, d, gated, part);
        ahead(*layer.out, columns(d, 16).first);
        wait();
        add(*layer.out, gated, layer.out_bias, step.wide);
        wait();
    }

    void rotate(float *head, const float *norm, const float *cosines, float scale) const {
        const int64_t e = model().e, half = e / 2;
        step.path.norm(head, norm, *model().eps, e, row);
        const float *sines = cosines + half;
        for (int64_t i = 0; i < half; ++i) {
            const float low = row[i], high = row[half + i];
            head[i] = (low * cosines[i] - high * sines[i]) * scale;
            head[half + i] = (high * cosines[i] + low * sines[i]) * scale;
        }
    }

    void attention(const lfm2_layer &layer, int64_t slot) {
        const int64_t e = model().e, groups = model().groups, count = model().heads / groups;
        const int64_t q_size = model().heads * e, kv_size = groups * e, stride = q_size + 2 * kv_size;
        const lfm2_weight *weights[3] = {layer.in, layer.keys, layer.values};
        const int64_t places[3] = {0, q_size, q_size + kv_size};
        ahead(*layer.in, columns(layer.in->rows, 16).first);
        lfm2_rows rows{};
        for (int part = 0; part < 3; ++part) {
            const lfm2_weight &w = *weights[part];
            if (rows.group != w.group || rows.cols != w.cols) rows = normalised(layer.operator_norm, w);
            const lfm2_part mine = columns(w.rows, 16);
            multiply(w, rows, mine.first, mine.last, step.wide + places[part], stride);
        }
        wait();
        const float scale = 1.0f / sqrtf(static_cast<float>(e));
        const lfm2_part tasks(step.n * groups, thread, threads);
        for (int64_t task = tasks.first; task < tasks.last; ++task) {
            const int64_t i = task / groups, g = task % groups;
            const lfm2_sequence &sequence = step.sequences[i];
            float *base = step.wide + i * stride;
            float *query = base + g * count * e, *key = base + q_size + g * e;
            const float *value = base + q_size + kv_size + g * e;
            const float *cosines = angles + i * e;
            rotate(key, layer.key_norm, cosines, 1.0f);
            for (int64_t h = 0; h < count; ++h) rotate(query + h * e, layer.query_norm, cosines, scale);
            const int64_t start = (slot * groups + g) * sequence.capacity * e;
            step.path.keep(key, e, sequence.keys, start + sequence.position * e, step.bf16);
            step.path.keep(value, e, sequence.values, start + sequence.position * e, step.bf16);
            const int64_t bytes = start * (step.bf16 ? 2 : 4);
            step.path.attend(query, count, e, static_cast<char *>(sequence.keys) + bytes,
                             static_cast<char *>(sequence.values) + bytes, sequence.position + 1,
                             step.bf16, step.mixed + i * q_size + g * count * e);
        }
        ahead(*layer.out, columns(model().d, 16).first);
        wait();
        const lfm2_rows seen = own.rows(step.n, *layer.out);
        for (int64_t i = 0; i < step.n; ++i)
            step.linear.quantize(step.mixed + i * q_size, q_size, seen, i, 0, seen.groups());
        add(*layer.out, seen, layer.out_bias, step.wide);
        wait();
    }

    void feed_forward(const lfm2_layer &layer) {
        const int64_t f = layer.gate->rows;
        const lfm2_part part = columns(f, layer.down->group);
        ahead(*layer.gate, part.first);
        lfm2_rows rows = normalised(layer.ffn_norm, *layer.gate);
        float *gate = step.wide, *up = step.wide + step.n * f;
        multiply(*layer.gate, rows, part.first, part.last, gate, f);
        if (layer.up->group != layer.gate->group) rows = normalised(layer.ffn_norm, *layer.up);
        multiply(*layer.up, rows, part.first, part.last, up, f);
        if (part.first < part.last)
            for (int64_t i = 0; i < step.n; ++i)
                step.path.swiglu(gate + i * f + part.first, up + i * f + part.first, part.last - part.first);
        const lfm2_rows wide = shared.rows(step.n, *layer.down);
        round_part(gate, f, f, wide, part);
        ahead(*layer.down, columns(model().d, 16).first);
        wait();
        add(*layer.down, wide, nullptr, step.mixed);
        wait();
    }

    void run() {
        const int64_t half = model().e / 2;
        for (int64_t i = 0; i < step.n; ++i)
            for (int64_t j = 0; j < half; ++j) {
                const float angle = static_cast<float>(step.sequences[i].position) * model().frequencies[j];
                angles[2 * half * i + j] = cosf(angle);
                angles[2 * half * i + half + j] = sinf(angle);
            }
        int64_t attentions = 0, convolutions = 0;
        for (int64_t l = 0; l < model().n_layers; ++l) {
            const lfm2_layer &layer = model().layers[l];
            if (layer.attention)
                attention(layer, attentions++);
            else
                convolution(layer, convolutions++);
            feed_forward(layer);
        }
        const lfm2_part rows(step.n, thread, threads);
        for (int64_t i = rows.first; i < rows.last; ++i)
            step.path.norm(step.x + i * model().d, model().norm, *model().eps, model().d,
                           step.x + i * model().d);
    }
};

int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

// x[n, d]: the embeddings of the new positions, and afterwards their hidden states behind the last
// norm. Keys, values and `next` of every sequence are written. Returns 1 without memory.
LFM2_EXPORT int lfm2_step(const lfm2_model *model, float *x, int64_t n, const lfm2_sequence *sequences,
                          int bf16, int threads) {
    const lfm2_model &m = *model;
    const int64_t heads = m.heads * m.e, filled = 128;
    const int64_t widest = (largest(largest(m.d, m.f), heads) + filled - 1) / filled * filled;
    const int64_t wide = largest(largest(3 * m.d, 2 * m.f), heads + 2 * m.groups * m.e);
    const int64_t mixed = largest(m.d, heads);
    const size_t rows = RowsRoom::bytes(n, widest);
    char *common = static_cast<char *>(lfm2_scratch(2, aligned(n * wide * 4) + aligned(n * mixed * 4) + rows));
    if (!common) return 1;
    Carver carver{common};
    float *const wide_room = carver.take<float>(n * wide);
    float *const mixed_room = carver.take<float>(n * mixed);
    const RowsRoom shared(carver, n, widest);
    Step step{m, lfm2_linear_chosen(), chosen(), sequences, x, n, bf16 != 0, widest, wide_room, mixed_room, {}};
    int failed = 0;
    lfm2_parallel(threads, [&](int thread, int all) {
        const size_t size = rows + aligned(widest * 4) + aligned(n * m.e * 4);
        char *memory = static_cast<char *>(lfm2_scratch(3, size));
        if (!memory) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        step.barrier.wait(all);
        if (__atomic_load_n(&failed, __ATOMIC_RELAXED)) return;
        Carver mine{memory};
        const RowsRoom own(mine, n, widest);
        float *const row = mine.take<float>(widest);
        float *const angles = mine.take<float>(n * m.e);
        Worker{step, thread, all, shared, own, row, angles}.run();
    });
    return failed;
}
