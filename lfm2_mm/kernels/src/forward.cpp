// New rows of several sequences through all layers in one parallel region, without an allocation.
//
// Threads deal out the outputs of each product; where one thread's outputs are all that its next
// work needs, it goes on without waiting: from the gates through the convolution, from SwiGLU to its
// rounding. Of few rows, what is cheap and needs all of a row every thread computes for itself.
#include "forward_work.h"

#include <cmath>

namespace {

struct Worker {
    const Call &call;
    const Shared &shared;
    const Own &own;
    lfm2_barrier &barrier;
    const int thread, threads;

    const lfm2_model &model() const { return call.model; }
    void wait() const { barrier.wait(threads); }

    // Columns that this thread takes of `cols`, in units.
    lfm2_part columns(int64_t cols, int64_t unit) const {
        lfm2_part part((cols + unit - 1) / unit, thread, threads);
        part.first *= unit;
        part.last = smaller(part.last * unit, cols);
        return part;
    }

    // Rows that this thread takes where they are dealt out.
    lfm2_part rows_of(int64_t n) const { return call.many ? lfm2_part(n, thread, threads) : lfm2_part(n, 0, 1); }

    // Rows [first, last) of a part: their number, their sequence and their number there.
    template <class Body>
    void each(const lfm2_part &part, const Body &body) const {
        int64_t at = 0;
        for (int64_t s = 0; s < call.n_sequences; ++s) {
            const lfm2_sequence &sequence = call.sequences[s];
            const int64_t end = smaller(sequence.count, part.last - at);
            for (int64_t i = larger(part.first - at, 0); i < end; ++i) body(at + i, sequence, i);
            at += sequence.count;
        }
    }

    // Products of columns [first, last) of the outputs; `out` begins at column `first`.
    void multiply(const lfm2_weight &w, const Operand &x, int64_t n, int64_t first, int64_t last, float *out,
                  int64_t stride) const {
        if (first >= last || !n) return;
        float *const origin = out - first;
#if defined(__x86_64__)
        if (x.tiles) {
            lfm2_linear_amx(w, x.wide, n, first / 16, (last + 15) / 16, origin, stride, false, own.scratch);
            return;
        }
#endif
        lfm2_rows rows = x.rows;
        rows.n = n;
        call.linear.multiply(w, rows, first / 16, (last + 15) / 16, origin, stride, false);
    }

    // Columns [first, last) of a row of `given` numbers, which starts at `row`, as row `i`.
    void put(const Operand &to, const float *row, int64_t given, int64_t i, int64_t first, int64_t last) const {
        const int64_t end = last == given ? to.cols : last;
#if defined(__x86_64__)
        if (to.tiles) {
            lfm2_linear_amx_put(row, given, first, end, i, to.cols, to.wide);
            return;
        }
#endif
        call.linear.quantize(row, given, to.rows, i, first / to.group, end / to.group);
    }

    // Ask for the start of what this thread reads next, while something else is computed.
    void ahead(const lfm2_weight &w, int64_t column) const {
        const int64_t start = column / 16 * w.cols * 2 * w.bits, size = w.blocks() * w.cols * 2 * w.bits;
        const int64_t end = smaller(start + kAhead, size);
        for (int64_t i = start; i < end; i += 64) __builtin_prefetch(w.codes + i, 0, 2);
    }

    // The residual stream, normalised and rounded for a product.
    Operand normalised(const float *norm, const lfm2_weight &w, const Room &common, const Room &mine) const {
        const Operand to = (call.many ? common : mine).operand(w, call.tiles);
        const lfm2_part rows = rows_of(call.n);
        for (int64_t i = rows.first; i < rows.last; ++i) {
            call.path.norm(call.x + i * model().d, norm, *model().eps, model().d, own.row);
            put(to, own.row, model().d, i, 0, model().d);
        }
        if (call.many) wait();
        return to;
    }

    // x += w rows, and the bias
    void add(const lfm2_weight &w, const Operand &rows, const float *bias) const {
        const int64_t d = model().d, stride = call.step();
        const lfm2_part part = columns(d, call.tiles ? 32 : 16);
        for (int64_t c = part.first; c < part.last; c += stride) {
            const int64_t width = smaller(stride, part.last - c);
            multiply(w, rows, call.n, c, c + width, own.tile, stride);
            for (int64_t i = 0; i < call.n; ++i) {
                float *to = call.x + i * d + c;
                const float *more = own.tile + i * stride;
                for (int64_t j = 0; j < width; ++j) to[j] += more[j] + (bias ? bias[c + j] : 0.0f);
            }
        }
    }

    void convolution(const lfm2_layer &layer, int64_t slot) const {
        const int64_t d = model().d, stride = call.step();
        const Operand gated = shared.second.operand(*layer.out, call.tiles);
        const lfm2_part part = columns(d, gated.unit());
        ahead(*layer.in, part.first);
        const Operand rows = normalised(layer.operator_norm, *layer.in, shared.first, own.first);
        float *const b = own.tile, *const gate = b + call.n * stride, *const u = gate + call.n * stride;
        for (int64_t c = part.first; c < part.last; c += stride) {
            const int64_t end = smaller(c + stride, part.last);
            multiply(*layer.in, rows, call.n, c, end, b, stride);
            multiply(*layer.in, rows, call.n, d + c, d + end, gate, stride);
            multiply(*layer.in, rows, call.n, 2 * d + c, 2 * d + end, u, stride);
            int64_t at = 0;
            for (int64_t s = 0; s < call.n_sequences; ++s) {
                call.path.convolve(layer, b + at * stride, gate + at * stride, u + at * stride, stride, d,
                                   model().taps, c, end, call.sequences[s], slot, call.slots, call.bf16);
                at += call.sequences[s].count;
            }
            for (int64_t i = 0; i < call.n; ++i) put(gated, u + i * stride - c, d, i, c, end);
        }
        ahead(*layer.out, columns(d, 16).first);
        wait();
        add(*layer.out, gated, layer.out_bias);
        wait();
    }

    void rotate(float *head, const float *norm, const float *cosines, float scale) const {
        const int64_t e = model().e, half = e / 2;
        call.path.norm(head, norm, *model().eps, e, own.row);
        const float *sines = cosines + half;
        for (int64_t i = 0; i < half; ++i) {
            const float low = own.row[i], high = own.row[half + i];
            head[i] = (low * cosines[i] - high * sines[i]) * scale;
            head[half + i] = (high * cosines[i] + low * sines[i]) * scale;
        }
    }

    // One group's queries, keys and values of a new row, at `base`; keys and values are kept.
    void enter(const lfm2_layer &layer, int64_t slot, int64_t g, float *base, const lfm2_sequence &sequence,
               int64_t i, const float *cosines) const {
        const int64_t e = model().e, groups = model().groups, count = model().heads / groups;
        float *query = base + g * count * e, *key = base + (model().heads + g) * e;
        const float *value = key + groups * e;
        rotate(key, layer.key_norm, cosines, 1.0f);
        const float scale = 1.0f / sqrtf(static_cast<float>(e));
        for (int64_t h = 0; h < count; ++h) rotate(query + h * e, layer.query_norm, cosines, scale);
        const int64_t at = sequence.position + i;
        call.path.keep(key, e, kept(sequence, sequence.keys, sequence.key_scales, slot, g), at);
        call.path.keep(value, e, kept(sequence, sequence.values, sequence.value_scales, slot, g), at);
    }

    // One group's rows of keys or values.
    lfm2_kept kept(const lfm2_sequence &sequence, void *rows, float *scales, int64_t slot, int64_t g) const {
        const int64_t first = (slot * model().groups + g) * sequence.capacity;
        const int64_t size = scales ? 1 : call.bf16 ? 2 : 4;
        return {static_cast<char *>(rows) + first * model().e * size, scales ? scales + first : nullptr, call.bf16};
    }

    // One group of one sequence, whose rows begin at row `at`.
    void attend(const lfm2_sequence &sequence, int64_t slot, int64_t g, int64_t at) const {
        const int64_t e = model().e, groups = model().groups, count = model().heads / groups;
        const int64_t q_size = model().heads * e, stride = q_size + 2 * groups * e;
        const lfm2_kept keys = kept(sequence, sequence.keys, sequence.key_scales, slot, g);
        const lfm2_kept values = kept(sequence, sequence.values, sequence.value_scales, slot, g);
        const float *query = shared.wide + at * stride + g * count * e;
        float *out = shared.mixed + at * q_size + g * count * e;
        if (sequence.count <= kFew) {
            for (int64_t i = 0; i < sequence.count; ++i)
                call.path.attend(query + i * stride, count, e, keys, values, sequence.position + i + 1,
                                 out + i * q_size, own.attend);
            return;
        }
        const lfm2_view view{query, stride, sequence.count, count, e, keys, values, sequence.position, out, q_size};
#if defined(__x86_64__)
        if (call.amx && e % 32 == 0) return lfm2_attend_amx(view, own.attend);
#endif
        call.path.attend_rows(view, own.attend);
    }

    void attention(const lfm2_layer &layer, int64_t slot) const {
        const int64_t e = model().e, groups = model().groups;
        const int64_t q_size = model().heads * e, stride = q_size + 2 * groups * e;
        const lfm2_weight *weights[3] = {layer.in, layer.keys, layer.values};
        const int64_t places[3] = {0, q_size, q_size + groups * e};
        ahead(*layer.in, columns(layer.in->rows, 16).first);
        Operand rows = normalised(layer.operator_norm, *layer.in, shared.first, own.first);
        for (int part = 0; part < 3; ++part) {
            const lfm2_weight &w = *weights[part];
            if (!rows.fits(w)) {
                if (call.many) wait();
                rows = normalised(layer.operator_norm, w, shared.first, own.first);
            }
            const lfm2_part mine = columns(w.rows, call.tiles ? 32 : 16);
            multiply(w, rows, call.n, mine.first, mine.last, shared.wide + places[part] + mine.first, stride);
        }
        wait();
        if (!call.single) {
            each(lfm2_part(call.n, thread, threads), [&](int64_t row, const lfm2_sequence &sequence, int64_t i) {
                for (int64_t g = 0; g < groups; ++g)
                    enter(layer, slot, g, shared.wide + row * stride, sequence, i, shared.angles + row * e);
            });
            wait();
        }
        const lfm2_part tasks(call.n_sequences * groups, thread, threads);
        int64_t at = 0;
        for (int64_t s = 0; s < call.n_sequences; at += call.sequences[s++].count)
            for (int64_t g = larger(tasks.first - s * groups, 0); g < smaller(groups, tasks.last - s * groups); ++g) {
                const lfm2_sequence &sequence = call.sequences[s];
                if (call.single) enter(layer, slot, g, shared.wide + at * stride, sequence, 0, shared.angles + at * e);
                attend(sequence, slot, g, at);
            }
        ahead(*layer.out, columns(model().d, 16).first);
        wait();
        const Operand seen = (call.many ? shared.second : own.second).operand(*layer.out, call.tiles);
        const lfm2_part mine = rows_of(call.n);
        for (int64_t i = mine.first; i < mine.last; ++i) put(seen, shared.mixed + i * q_size, q_size, i, 0, q_size);
        if (call.many) wait();
        add(*layer.out, seen, layer.out_bias);
        wait();
    }

    // silu(gate rows) * (up rows) of `n` rows, rounded into `to`.
    void gates(const lfm2_weight &gate, const lfm2_weight &up, const Operand &rows, const Operand &others,
               int64_t n, const Operand &to) const {
        const int64_t f = gate.rows, stride = call.step();
        const lfm2_part part = columns(f, to.unit());
        float *const first = own.tile, *const second = first + call.n * stride;
        for (int64_t c = part.first; c < part.last; c += stride) {
            const int64_t end = smaller(c + stride, part.last);
            multiply(gate, rows, n, c, end, first, stride);
            multiply(up, others, n, c, end, second, stride);
            for (int64_t i = 0; i < n; ++i) {
                call.path.swiglu(first + i * stride, second + i * stride, end - c);
                put(to, first + i * stride - c, f, i, c, end);
            }
        }
    }

    void feed_forward(const lfm2_layer &layer) const {
        const Operand wide = shared.second.operand(*layer.down, call.tiles);
        ahead(*layer.gate, columns(layer.gate->rows, wide.unit()).first);
        const Operand rows = normalised(layer.ffn_norm, *layer.gate, shared.first, own.first);
        const Operand others =
            rows.fits(*layer.up) ? rows : normalised(layer.ffn_norm, *layer.up, shared.other, own.other);
        gates(*layer.gate, *layer.up, rows, others, call.n, wide);
        ahead(*layer.down, columns(model().d, 16).first);
        wait();
        add(*layer.down, wide, nullptr);
        wait();
    }

    // Which experts a normalised row goes through, and their weights.
    void route(const lfm2_layer &layer, const float *row, int32_t *chosen, float *weights) const {
        float *const scores = own.scores;
        for (int64_t k = 0; k < layer.n_experts; ++k)
            scores[k] = 1.0f / (1.0f + expf(-call.path.dot(row, layer.router + k * model().d, model().d)));
        float sum = 0.0f;
        for (int64_t t = 0; t < model().top; ++t) {
            int64_t best = -1;
            float most = 0.0f;
            for (int64_t k = 0; k < layer.n_experts; ++k) {
                bool taken = false;
                for (int64_t j = 0; j < t; ++j) taken = taken || chosen[j] == k;
                const float ranked = scores[k] + (layer.router_bias ? layer.router_bias[k] : 0.0f);
                if (!taken && (best < 0 || ranked > most)) best = k, most = ranked;
            }
            chosen[t] = static_cast<int32_t>(best);
            weights[t] = scores[best];
            sum += scores[best];
        }
        const float scale = *model().routing_scale / (model().normalise ? sum + 1e-6f : 1.0f);
        for (int64_t t = 0; t < model().top; ++t) weights[t] *= scale;
    }

    // Slots of all rows, those of an expert together; returns their number.
    int64_t deal(const lfm2_layer &layer, int64_t unit) const {
        const int64_t pairs = call.n * model().top;
        for (int64_t k = 0; k < layer.n_experts; ++k) own.counts[k] = 0;
        for (int64_t p = 0; p < pairs; ++p) ++own.counts[shared.chosen[p]];
        own.starts[0] = 0;
        for (int64_t k = 0; k < layer.n_experts; ++k) {
            own.starts[k + 1] = own.starts[k] + filled(own.counts[k], unit);
            own.counts[k] = 0;
        }
        const int64_t all = own.starts[layer.n_experts];
        for (int64_t s = 0; s < all; ++s) own.slot_rows[s] = -1;
        for (int64_t p = 0; p < pairs; ++p) {
            const int64_t k = shared.chosen[p], s = own.starts[k] + own.counts[k]++;
            own.slot_rows[s] = static_cast<int32_t>(p / model().top);
            own.slot_weights[s] = shared.weights[p];
        }
        return all;
    }

    // Returns whether an expert is missing; nothing of x has changed then.
    bool experts(const lfm2_layer &layer, int64_t number) const {
        const int64_t d = model().d, n_experts = layer.n_experts, stride = call.step();
        const lfm2_part rows(call.n, thread, threads);
        for (int64_t i = rows.first; i < rows.last; ++i) {
            float *row = shared.mixed + i * d;
            call.path.norm(call.x + i * d, layer.ffn_norm, *model().eps, d, row);
            route(layer, row, shared.chosen + i * model().top, shared.weights + i * model().top);
        }
        wait();
        const bool tiles = call.amx && call.n * model().top >= 16 * n_experts;
        const int64_t slots = deal(layer, tiles ? 32 : 1);
        const lfm2_weight *any = nullptr, *down = nullptr;
        bool missing = false;
        for (int64_t k = 0; k < n_experts; ++k) {
            if (!own.counts[k]) continue;
            any = layer.experts[3 * k];
            down = layer.experts[3 * k + 2];
            missing = missing || !any;
            if (thread == 0) call.resume[1 + k] = !any;
        }
        if (missing) {
            if (thread == 0) call.resume[0] = number;
            return true;
        }
        const Operand in = (call.many ? shared.first : own.first).operand(*any, tiles);
        const Operand wide = shared.second.operand(*down, tiles);
        const lfm2_part mine = rows_of(slots);
        for (int64_t s = mine.first; s < mine.last; ++s)
            if (own.slot_rows[s] >= 0) put(in, shared.mixed + own.slot_rows[s] * d, d, s, 0, d);
        if (call.many) wait();
        for (int64_t k = 0; k < n_experts; ++k)
            if (own.counts[k]) {
                const Operand some = in.from(own.starts[k]);
                gates(*layer.experts[3 * k], *layer.experts[3 * k + 1], some, some, own.counts[k],
                      wide.from(own.starts[k]));
            }
        wait();
        const lfm2_part part = columns(d, tiles ? 32 : 16);
        for (int64_t k = 0; k < n_experts; ++k) {
            const int64_t start = own.starts[k], count = own.counts[k];
            for (int64_t c = part.first; count && c < part.last; c += stride) {
                const int64_t width = smaller(stride, part.last - c);
                multiply(*layer.experts[3 * k + 2], wide.from(start), count, c, c + width, own.tile, stride);
                for (int64_t i = 0; i < count; ++i) {
                    float *to = call.x + own.slot_rows[start + i] * d + c;
                    const float *more = own.tile + i * stride;
                    for (int64_t j = 0; j < width; ++j) to[j] += own.slot_weights[start + i] * more[j];
                }
            }
        }
        wait();
        return false;
    }

    void run() const {
        const int64_t half = model().e / 2, from = call.resume[0];
        each(lfm2_part(call.n, thread, threads), [&](int64_t row, const lfm2_sequence &sequence, int64_t i) {
            float *const cosines = shared.angles + row * 2 * half;
            for (int64_t j = 0; j < half; ++j) {
                const float angle = static_cast<float>(sequence.position + i) * model().frequencies[j];
                cosines[j] = cosf(angle);
                cosines[half + j] = sinf(angle);
            }
        });
        wait();  // also before `resume` is written
        int64_t attentions = 0, convolutions = 0;
        for (int64_t l = 0; l < model().n_layers; ++l) {
            const lfm2_layer &layer = model().layers[l];
            const int64_t slot = layer.attention ? attentions++ : convolutions++;
            if (l < from) continue;
            if (l > from && layer.attention) attention(layer, slot);
            if (l > from && !layer.attention) convolution(layer, slot);
            if (!layer.n_experts)
                feed_forward(layer);
            else if (experts(layer, l))
                return;
        }
        const lfm2_part rows(call.n, thread, threads);
        for (int64_t i = rows.first; i < rows.last; ++i) {
            float *row = call.x + i * model().d;
            call.path.norm(row, model().norm, *model().eps, model().d, row);
        }
        if (thread == 0) call.resume[0] = -1;
    }
};

}  // namespace

// x[n, d]: the embeddings of the new rows, and afterwards their hidden states behind the last norm.
// Keys, values and `next` of every sequence are written. `resume` is -1 and a word for each expert.
// Returns 1 without memory, and 2 where the experts whose words are 1 must be brought to the layer
// `resume[0]`: then the same call, with the same x, goes on from there.
LFM2_EXPORT int lfm2_forward(const lfm2_model *model, float *x, int64_t n, const lfm2_sequence *sequences,
                             int64_t n_sequences, int bf16, int64_t *resume, int threads) {
    const lfm2_model &m = *model;
    bool mixed_groups = false;
    int64_t slots = 0, scratch = 0, longest = 0;
    const bool amx = lfm2_path() == LFM2_AMX;
    const auto widest = [&](const lfm2_weight *w) {
        if (w) scratch = larger(scratch, lfm2_linear_amx_scratch(*w));
    };
    for (int64_t l = 0; amx && l < m.n_layers; ++l) {
        const lfm2_layer &layer = m.layers[l];
        const lfm2_weight *own[] = {layer.in,   layer.keys, layer.values, layer.out,
                                    layer.gate, layer.up,   layer.down};
        for (const lfm2_weight *w : own) widest(w);
        for (int64_t k = 0; k < 3 * layer.n_experts; ++k) widest(layer.experts[k]);
    }
    for (int64_t l = 0; l < m.n_layers; ++l) {
        const lfm2_layer &layer = m.layers[l];
        slots += !layer.attention;
        if (layer.gate && (layer.gate->group != layer.up->group || layer.gate->cols != layer.up->cols))
            mixed_groups = true;
    }
    for (int64_t s = 0; s < n_sequences; ++s)
        if (sequences[s].count > kFew) longest = larger(longest, sequences[s].position + sequences[s].count);
    const int64_t d = filled(m.d, 128), deep = filled(larger(larger(m.d, m.f), m.heads * m.e), 128);
    const bool tiles = amx && n >= kAmxRows;
    const int64_t pads = amx && n * m.top >= 16 * m.n_experts ? 32 * m.n_experts : 0;
    const Call call{m, x, n, sequences, n_sequences, bf16 != 0, resume, lfm2_linear_chosen(), lfm2_forward_chosen(),
                    amx, tiles, n > kFew, n == n_sequences, mixed_groups, slots, d, deep,
                    m.n_experts ? larger(n, n * m.top + pads) : n};
    Carver sum{nullptr};
    Shared counted(sum, call);
    char *common = static_cast<char *>(lfm2_scratch(2, sum.used));
    if (!common) return 1;
    Carver carver{common};
    const Shared shared(carver, call);
    const int64_t attend = lfm2_attend_room(larger(longest, 1), m.e);
    lfm2_barrier barrier;
    int failed = 0;
    lfm2_parallel(threads, [&](int thread, int all) {
        Carver need{nullptr};
        Own unused(need, call, scratch, attend);
        char *memory = static_cast<char *>(lfm2_scratch(3, need.used));
        if (!memory) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        barrier.wait(all);
        if (__atomic_load_n(&failed, __ATOMIC_RELAXED)) return;
        Carver mine{memory};
        const Own own(mine, call, scratch, attend);
        Worker{call, shared, own, barrier, thread, all}.run();
    });
    return failed ? 1 : resume[0] >= 0 ? 2 : 0;
}
