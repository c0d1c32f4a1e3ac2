// Runs the kernels on numbers of its own making and writes all results, for tools/check_kernels.py to
// compare: the same program on two paths, or on two processors. Linked with all of
// lfm2_mm/kernels/src.
//
//   neon_check          prints the paths of this CPU as bits, and the one in force
//   neon_check PATH     records on stdout: "name TAB kind TAB count", a line, and 32-bit words;
//                       kind is i (equal to the bit), f (fp32), h (what was rounded to bf16) or n
//                       (behind layers whose activations may round to the other side)
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "forward.h"
#include "native.h"
#include "search.h"

extern "C" {
int lfm2_paths();
int lfm2_choose(int path);
void lfm2_linear_pack(const uint32_t *, uint32_t *, int64_t, int64_t, int64_t, uint32_t, int);
int lfm2_linear(const lfm2_weight *, const void *, int64_t, int64_t, int, void *, int, int);
void lfm2_linear_quantize(const float *, int64_t, int64_t, int64_t, int8_t *, float *, int32_t *);
int lfm2_forward(const lfm2_model *, float *, int64_t, const lfm2_sequence *, int64_t, int, int64_t *, int);
int lfm2_search_centroids(const uint8_t *, int64_t, const void *, int64_t, const int64_t *, const int64_t *,
                          int64_t, int32_t *, int);
int lfm2_search_residuals(const int8_t *, const float *, const float *, int64_t, int64_t, const float *,
                          const void *, int64_t, const uint8_t *, int64_t, int64_t, const uint8_t *,
                          const float *, const int64_t *, const int64_t *, int64_t, float *, int);
}

namespace {

using std::vector;
using Floats = vector<float>;
using Halves = vector<uint16_t>;

[[noreturn]] void fail(const std::string &what) {
    fprintf(stderr, "neon_check: %s\n", what.c_str());
    exit(1);
}

// The same numbers on every processor: whole numbers times powers of two.
struct Source {
    uint64_t state = 88172645463325252u;
    uint32_t word() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return static_cast<uint32_t>(state >> 32);
    }
    int64_t below(int64_t n) { return word() % n; }
    float number(float scale = 1.0f) {  // between -2 and 2, mostly small
        int64_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += static_cast<int64_t>(word() >> 9) - (1 << 22);
        return static_cast<float>(sum >> 1) * 2.384185791015625e-07f * scale;
    }
    Floats numbers(int64_t n, float scale = 1.0f) {
        Floats made(n);
        for (float &one : made) one = number(scale);
        return made;
    }
    Floats activations(int64_t n, int64_t cols) {
        Floats made = numbers(n * cols);
        for (int64_t i = 0; i < n * cols; i += 17) made[i] *= 16.0f;
        return made;
    }
} source;

void record(const std::string &name, char kind, const void *words, size_t count) {
    printf("%s\t%c\t%zu\n", name.c_str(), kind, count);
    fwrite(words, 4, count, stdout);
}
void record(const std::string &name, const Floats &made, char kind = 'f') {
    record(name, kind, made.data(), made.size());
}
template <class T>
void record_exact(const std::string &name, const vector<T> &made) {
    const vector<int32_t> words(made.begin(), made.end());
    record(name, 'i', words.data(), words.size());
}
Floats widened(const Halves &halves) {
    Floats made;
    for (const uint16_t one : halves) made.push_back(from_bf16(one));
    return made;
}
Halves rounded(const Floats &numbers) {
    Halves made;
    for (const float one : numbers) made.push_back(to_bf16(one));
    return made;
}
std::string text(const char *what, std::initializer_list<int64_t> sizes) {
    std::string made = what;
    for (const int64_t one : sizes) made += " " + std::to_string(one);
    return made;
}

// ---- products ----

struct Form {
    int64_t bits, group;
    bool per_row, minimum;
};
constexpr Form kForms[] = {{8, 64, true, false}, {8, 32, false, false},  {4, 32, false, false},
                           {4, 32, false, true}, {4, 128, false, false}, {4, 128, false, true}};

struct Weight {
    lfm2_weight w;
    vector<uint32_t> raw, blocked;
    Halves scales, minimums;
    int64_t words, given;

    Weight(const Form &form, int64_t rows, int64_t cols, bool ones = false) : given(cols) {
        const int64_t wide = (cols + form.group - 1) / form.group * form.group;
        const int64_t blocks = (rows + 15) / 16, padded = wide * form.bits / 32;
        words = (cols + 32 / form.bits - 1) / (32 / form.bits);
        raw.resize(rows * words), blocked.resize(blocks * padded * 16);
        for (uint32_t &one : raw) one = source.word();
        lfm2_linear_pack(raw.data(), blocked.data(), rows, words, padded,
                         form.bits == 8 ? 0x80808080u : 0x88888888u, 2);
        const int64_t count = blocks * 16 * (form.per_row ? 1 : wide / form.group);
        for (int64_t i = 0; i < count; ++i) {  // among them one too small for a normal number
            const int64_t exponent = i % 31 == 30 ? 0 : 4 + source.below(4);
            scales.push_back(ones ? 0x3c00 : exponent << 10 | source.below(1024));
            if (form.minimum) minimums.push_back(ones ? 0 : 0x8000 | (7 + source.below(4)) << 10 | source.below(1024));
        }
        w = {reinterpret_cast<uint8_t *>(blocked.data()), scales.data(), form.minimum ? minimums.data() : nullptr,
             rows, wide, form.bits, form.group, form.per_row};
    }
    Weight(const Weight &) = delete;

    int code(int64_t row, int64_t col) const {
        const uint8_t *bytes = reinterpret_cast<const uint8_t *>(&raw[row * words]);
        if (w.bits == 8) return bytes[col] - 128;
        const int two = bytes[col / 8 * 4 + col % 4];
        return (col % 8 < 4 ? two & 15 : two >> 4) - (w.minimums ? 0 : 8);
    }

    Floats times(const Floats &x, int64_t n, int threads = 1) const {
        Floats out(n * w.rows);
        if (lfm2_linear(&w, x.data(), n, given, 0, out.data(), 0, threads)) fail("no memory");
        return out;
    }
};

void check_rounding() {
    for (const int64_t group : {32, 64, 128})
        for (const int64_t given : {1, 31, 32, 127, 128, 129, 255, 256, 384})
            for (int kind = 0; kind < 7; ++kind) {
                const int64_t cols = (given + group - 1) / group * group;
                Floats x = source.activations(1, given), scales(cols / group);
                if (kind == 1) x.assign(given, 0.0f);
                if (kind == 2) x.assign(given, 1e-31f);
                if (kind == 3) x[given / 2] = -__builtin_inff();
                if (kind == 4) x[given - 1] = __builtin_nanf("");
                if (kind == 5) x[0] = 3e38f;
                if (kind == 6)  // halves, which go to the even side
                    for (int64_t i = 0; i < given; ++i)
                        x[i] = i % group ? static_cast<float>(i % 100) - 50.5f : 127.0f;
                vector<int8_t> codes(cols);
                vector<int32_t> sums(cols / group), bits(cols / group);
                lfm2_linear_quantize(x.data(), given, cols, group, codes.data(), scales.data(), sums.data());
                memcpy(bits.data(), scales.data(), bits.size() * 4);
                const std::string name = text("rounding", {group, given, kind});
                record_exact(name + " codes", codes);
                record_exact(name + " sums", sums);
                record_exact(name + " scales", bits);
            }
}

void check_products() {
    for (const Form &form : kForms)
        for (const int64_t rows : {1, 15, 16, 37, 64})
            for (const int64_t cols : {128, 256, 640, 70}) {
                if (cols == 70 && !form.per_row) continue;
                const Weight weight(form, rows, cols), ones(form, rows, cols, true);
                const std::string name =
                    text("product", {form.bits, form.group, form.minimum, rows, cols});
                for (const int64_t n : {1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 40}) {
                    const Floats x = source.activations(n, cols), y = weight.times(x, n);
                    record(name + text(" n", {n}), y);
                    if (weight.times(x, n, 3) != y) fail(name + ": threads change the result");
                }
                const Halves x = rounded(source.activations(5, cols));
                Halves y(5 * rows);
                lfm2_linear(&weight.w, x.data(), 5, cols, 1, y.data(), 1, 1);
                record(name + " bf16", widened(y), 'h');
                // with scales of one what is added up are whole numbers
                Floats whole(5 * cols);
                for (int64_t i = 0; i < 5 * cols; ++i)
                    whole[i] = i % cols % form.group ? static_cast<float>(source.below(255) - 127) : 127.0f;
                const Floats found = ones.times(whole, 5);
                for (int64_t m = 0; m < 5; ++m)
                    for (int64_t r = 0; r < rows; ++r) {
                        int64_t sum = 0;
                        for (int64_t c = 0; c < cols; ++c)
                            sum += ones.code(r, c) * static_cast<int64_t>(whole[m * cols + c]);
                        if (static_cast<float>(sum) != found[m * rows + r]) fail(name + ": a wrong integer");
                    }
                record_exact(name + " integers", found);
            }
}

// ---- parts of the fused step ----

void check_parts() {
    const lfm2_forward_path &path = lfm2_forward_chosen();
    for (const int64_t n : {1, 3, 4, 7, 16, 31, 64, 100, 1029}) {
        const Floats x = source.numbers(n), y = source.numbers(n);
        Floats out(n), gate = source.numbers(n, 8.0f), products(1);
        path.norm(x.data(), y.data(), 1e-5f, n, out.data());
        record(text("norm", {n}), out);
        gate[0] = 200.0f, gate[n / 2] = -200.0f;
        path.swiglu(gate.data(), y.data(), n);
        record(text("swiglu", {n}), gate);
        products[0] = path.dot(x.data(), x.data(), n);
        record(text("dot", {n}), products);
        Floats kept(n), odd = x;
        odd[0] = __builtin_nanf(""), odd[n - 1] = bits_to_float(0x3f808000u), odd[n / 2] = -__builtin_inff();
        Halves halves(n);
        vector<int8_t> bytes(2 * n);
        Floats scales(2);
        path.keep(odd.data(), n, {halves.data(), nullptr, true}, 0);
        path.keep(x.data(), n, {kept.data(), nullptr, false}, 0);
        path.keep(odd.data(), n, {bytes.data(), scales.data(), false}, 0);
        path.keep(x.data(), n, {bytes.data(), scales.data(), false}, 1);
        if (scales[0] == scales[0]) fail("a row with an infinite number has a finite scale");
        record_exact(text("keep bf16", {n}), halves);
        record_exact(text("keep int8", {n}), bytes);
        record(text("keep", {n}), 'i', kept.data(), kept.size());
        record(text("scale", {n}), 'i', scales.data() + 1, 1);
    }
}

void check_convolution() {
    for (const bool bf16 : {false, true})
        for (const bool bias : {false, true})
            for (const int64_t taps : {3, 4})
                for (const int64_t n : {1, 2, 7})
                    for (const int64_t first : {0, 5}) {
                        const int64_t d = 43, last = first ? 36 : d, width = last - first;
                        const Floats weights = source.numbers(taps * d), in = source.numbers(3 * d);
                        const Floats out = source.numbers(d), state = source.numbers((taps - 1) * d);
                        const Floats c = source.numbers(n * width);
                        Floats b = source.numbers(n * width), u = source.numbers(n * width);
                        lfm2_layer layer{};
                        layer.taps = weights.data();
                        if (bias) layer.in_bias = in.data(), layer.conv_bias = out.data();
                        const Halves half = rounded(state);
                        Floats next[2] = {Floats(state.size()), Floats(state.size())};
                        Halves narrow[2] = {Halves(state.size()), Halves(state.size())};
                        void *const old[] = {bf16 ? (void *)half.data() : (void *)state.data()};
                        void *const fresh[] = {bf16 ? (void *)narrow[0].data() : (void *)next[0].data(),
                                               bf16 ? (void *)narrow[1].data() : (void *)next[1].data()};
                        const int64_t places[] = {1, n};
                        const lfm2_sequence sequence{0,   n, nullptr, nullptr, nullptr, nullptr, 0,
                                                     old, 2, places,  fresh};
                        lfm2_forward_chosen().convolve(layer, b.data(), c.data(), u.data(), width, d, taps, first,
                                                       last, sequence, 0, 1, bf16);
                        const std::string name = text("convolution", {bf16, bias, taps, n, first});
                        record(name, u, bf16 ? 'h' : 'f');
                        for (int i = 0; i < 2; ++i)
                            record(name + text(" state", {i}), bf16 ? widened(narrow[i]) : next[i], bf16 ? 'h' : 'f');
                    }
}

void check_attention() {
    for (const int kind : {0, 1, 2})  // fp32, bf16, int8
        for (const int64_t e : {20, 32, 64, 128})
            for (const int64_t past : {0, 5, 63, 64, 130})
                for (const int64_t n : {1, 9, 33, 70}) {
                    const int64_t heads = 3, total = past + n;
                    const Floats q = source.numbers(n * heads * e), k = source.numbers(total * e);
                    const Floats v = source.numbers(total * e);
                    vector<char> memory[2];
                    Floats scales[2];
                    lfm2_kept kept[2];
                    for (int i = 0; i < 2; ++i) {
                        memory[i].resize(total * e * 4), scales[i].resize(total);
                        kept[i] = {memory[i].data(), kind == 2 ? scales[i].data() : nullptr, kind == 1};
                        for (int64_t t = 0; t < total; ++t)
                            lfm2_forward_chosen().keep((i ? v : k).data() + t * e, e, kept[i], t);
                    }
                    Floats out(n * heads * e), one(heads * e);
                    void *room = nullptr;
                    if (posix_memalign(&room, 64, lfm2_attend_room(total, e))) fail("no memory");
                    const lfm2_view view{q.data(), heads * e, n, heads, e, kept[0], kept[1], past, out.data(), heads * e};
                    lfm2_forward_chosen().attend_rows(view, static_cast<char *>(room));
                    lfm2_forward_chosen().attend(q.data() + (n - 1) * heads * e, heads, e, kept[0], kept[1], total,
                                                 one.data(), static_cast<char *>(room));
                    free(room);
                    record(text("attention of rows", {kind, e, past, n}), out);
                    record(text("attention", {kind, e, total}), one);
                }
}

// ---- whole steps ----

void check_steps(const Form &form, bool bf16, int64_t experts) {
    const int64_t d = 128, f = 256, e = 32, heads = 4, groups = 2, taps = 3, capacity = 80;
    vector<const Weight *> made;  // few, and kept
    const auto weight = [&](int64_t rows, int64_t cols) {
        made.push_back(new Weight(form, rows, cols));
        return &made.back()->w;
    };
    const Floats ones(f, 1.0f), eps{1e-5f}, taps_of = source.numbers(taps * d), scaling{1.0f};
    const Floats router = source.numbers(experts * d, 0.1f), bias = source.numbers(experts, 0.1f);
    Floats frequencies(e / 2);
    for (int64_t i = 0; i < e / 2; ++i) frequencies[i] = 1.0f / static_cast<float>(1 << i / 2);
    vector<lfm2_layer> layers(4);
    vector<const lfm2_weight *> chosen;
    for (int64_t i = 0; i < 3 * experts; ++i) chosen.push_back(i % 3 < 2 ? weight(f, d) : weight(d, f));
    for (int64_t l = 0; l < 4; ++l) {
        lfm2_layer &one = layers[l];
        one = {};
        one.attention = l % 2;
        one.operator_norm = one.ffn_norm = one.query_norm = one.key_norm = ones.data();
        one.in = weight(l % 2 ? heads * e : 3 * d, d), one.out = weight(d, d), one.taps = taps_of.data();
        if (l % 2) one.keys = weight(groups * e, d), one.values = weight(groups * e, d);
        if (l == 3 && experts)
            one.n_experts = experts, one.experts = chosen.data(), one.router = router.data(),
            one.router_bias = bias.data();
        else
            one.gate = weight(f, d), one.up = weight(f, d), one.down = weight(d, f);
    }
    const lfm2_model model{4, layers.data(), d, heads, groups, e, taps, f, ones.data(), frequencies.data(),
                           eps.data(), experts, experts ? 2 : 0, 1, scaling.data()};
    constexpr int64_t kSequences = 2, kConvolutions = 2;
    const int64_t size = bf16 ? 2 : 4, kept = 2 * groups * capacity * e * size, state = (taps - 1) * d * size;
    Floats scales(2 * 2 * groups * capacity);  // the second sequence keeps bytes
    vector<char> keys[kSequences], values[kSequences], states[kSequences][kConvolutions], next[kSequences][kConvolutions];
    for (int s = 0; s < kSequences; ++s) {
        keys[s].resize(kept), values[s].resize(kept);
        for (int c = 0; c < kConvolutions; ++c) states[s][c].resize(state), next[s][c].resize(state);
    }
    int64_t positions[kSequences] = {};
    for (const auto &counts : vector<vector<int64_t>>{{37, 3}, {1, 1}, {1, 30}, {1, 1}}) {
        const int64_t n = counts[0] + counts[1];
        void *old[kSequences][kConvolutions], *fresh[kSequences][kConvolutions];
        lfm2_sequence sequences[kSequences];
        for (int s = 0; s < kSequences; ++s) {
            for (int c = 0; c < kConvolutions; ++c) old[s][c] = states[s][c].data(), fresh[s][c] = next[s][c].data();
            float *const by = s ? scales.data() : nullptr, *const more = s ? by + scales.size() / 2 : nullptr;
            sequences[s] = {positions[s], counts[s], keys[s].data(), values[s].data(), by, more, capacity, old[s], 1,
                            &counts[s], fresh[s]};
        }
        Floats x = source.numbers(n * d);
        vector<int64_t> resume(1 + experts);
        resume[0] = -1;
        if (lfm2_forward(&model, x.data(), n, sequences, kSequences, bf16, resume.data(), 3)) fail("a step failed");
        record(text("step", {form.bits, form.group, form.minimum, bf16, experts, positions[0], n}), x, 'n');
        for (int s = 0; s < kSequences; ++s) {
            positions[s] += counts[s];
            for (int c = 0; c < kConvolutions; ++c) states[s][c] = next[s][c];
        }
    }
    for (const Weight *one : made) delete one;
}

// ---- search ----

void check_search() {
    const vector<int64_t> lengths{1, 2, 3, 4, 5, 7, 8, 31, 1, 17, 4, 6, 3, 9, 2, 1, 12, 5, 40};
    vector<int64_t> starts;
    int64_t tokens = 0;
    for (const int64_t one : lengths) starts.push_back(tokens), tokens += one;
    const int64_t count = lengths.size(), centroids = 23;
    Halves narrow(tokens);
    for (uint16_t &one : narrow) one = source.below(centroids);
    const vector<uint32_t> wide(narrow.begin(), narrow.end());
    for (const int64_t rows : {16, 32, 48, 256})
        for (const int64_t bytes : {2, 4}) {
            const void *const codes = bytes == 2 ? (const void *)narrow.data() : (const void *)wide.data();
            vector<uint8_t> table(centroids * rows);
            for (uint8_t &one : table) one = source.word();
            vector<int32_t> found(count);
            lfm2_search_centroids(table.data(), rows, codes, bytes, starts.data(), lengths.data(), count, found.data(), 3);
            record_exact(text("centroids", {rows, bytes}), found);
            for (const int64_t bits : {2, 4, 8})
                for (const int64_t dim : {8, 64, 96, 128, 1024}) {
                    const int64_t inputs = (dim + 63) / 64 * 64, stride = dim * bits / 8 + 1;
                    const Floats constant = source.numbers(rows), factor = source.numbers(rows, 0.001f);
                    const Floats scores = source.numbers(centroids * rows), scales = source.numbers(256, 0.1f);
                    vector<int8_t> query(rows * inputs);
                    for (int64_t i = 0; i < rows * inputs; ++i)  // zeros behind the real dimensions
                        query[i] = i % (16 * inputs) / 64 * 4 + i % 4 < dim ? source.below(255) - 127 : 0;
                    vector<uint8_t> packed(tokens * stride), levels(1 << bits);
                    for (uint8_t &one : packed) one = source.word();
                    for (uint8_t &one : levels) one = source.below(128);
                    Floats scored(count);
                    lfm2_search_residuals(query.data(), constant.data(), factor.data(), rows, inputs, scores.data(),
                                          codes, bytes, packed.data(), stride, bits, levels.data(), scales.data(),
                                          starts.data(), lengths.data(), count, scored.data(), 3);
                    record(text("residuals", {rows, bytes, bits, dim}), scored);
                }
        }
}

}  // namespace

int main(int count, char **words) {
    if (count < 2) {
        printf("%d %d\n", lfm2_paths(), lfm2_choose(-1));
        return 0;
    }
    const int path = atoi(words[1]);
    if (lfm2_choose(path) != path) fail("this CPU lacks path " + std::to_string(path));
    check_rounding();
    check_products();
    check_parts();
    check_convolution();
    check_attention();
    for (const Form &form : kForms)
        for (const bool bf16 : {false, true})
            for (const int64_t experts : {0, 5}) check_steps(form, bf16, experts);
    check_search();
}
