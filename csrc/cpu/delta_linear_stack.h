// How the segments of all siblings stand side by side in one waist, and their a and b, packed for AMX as they stand.
//
// A sibling's slots begin at a multiple of 32. Its segments without dropout stand close together and make one group,
// for they read the same x̂; each segment with dropout is a group by itself and begins at a multiple of 32, for its
// part of dx lies under a mask of its own. 32 slots are a chunk: one strip of aᵀ, one step of the sum over the waist.
#pragma once

#include <array>

#include "activations.h"
#include "delta_linear_amx.h"

namespace pefast::amx {

// One segment and its slots.
struct Place {
    const Segment* s;
    int64_t sibling, number;  // it is that segment of that sibling
    int64_t slot;
    int64_t ones;   // a slot whose waist is 1 on the segment's own rows: d's; -1: there is none
    int64_t saved;  // its columns of the saved waist
    bool computed() const { return s->a.data; }
    // a waist from elsewhere has been through its activation
    Activation activation() const { return computed() ? s->activation : Activation::identity; }
    // whether z, as it comes from the product, is h
    bool plain() const { return computed() && activation() == Activation::identity && !s->routed; }
};

// Which slots of a chunk are whose, and more of what the loops over chunks ask.
struct Chunk {
    int64_t slot, used, group, sibling;
    int64_t rows_before;   // slots of the chunks before, each filled up to 16
    int64_t begin, end;    // its places, those that reach into it and perhaps others
    int64_t only;          // the one place that all of it belongs to, computed; -1: there is no such place
    bool computed, plain;  // whether some of it comes from x, and whether all of it needs no more than that
};

// Chunks that read the same x̂.
struct Group {
    int64_t chunk, chunks, sibling, mask;  // mask -1: x itself
    bool computed;
    float keep_scale;
};

struct Range {
    int64_t begin, end;
};

class Stack {
  public:
    std::vector<Place> places;
    std::vector<Chunk> chunks;
    std::vector<Group> groups;
    std::vector<Range> siblings;  // the chunks of each
    std::vector<Draw> draws;      // of each mask
    int64_t slots = 0, saved = 0, rows = 0;

    // ones(place): whether it gets a slot of ones
    template <class One, class Ones>
    Stack(const std::vector<One>& all, const Ones& ones) {
        for (size_t i = 0; i < all.size(); ++i) add_sibling(all[i], static_cast<int64_t>(i), ones);
    }

    // the columns of a chunk that are the place's, and the slot of its that stands in the first of the chunk's
    static __mmask32 shared(const Chunk& c, const Place& p) {
        const int64_t from = std::max<int64_t>(p.slot - c.slot, 0);
        const int64_t to = std::min<int64_t>(p.slot + p.s->R - c.slot, 32);
        return to > from ? first(to) & ~first(from) : 0;
    }
    static __mmask32 ones(const Chunk& c, const Place& p) {
        return p.ones >= c.slot && p.ones < c.slot + 32 ? 1u << (p.ones - c.slot) : 0;
    }

  private:
    // a slot that no chunk reaches: of a segment that has not been given its own yet
    static constexpr int64_t NOWHERE = -(int64_t{1} << 40);

    template <class One, class Ones>
    void add_sibling(const One& one, int64_t sibling, const Ones& ones) {
        const int64_t place = places.size(), chunk = chunks.size();
        for (const Segment& s : one.segments) {
            const int64_t number = &s - one.segments.data();
            places.push_back({&s, sibling, number, NOWHERE, -1, saved});
            if (s.a.data) saved += s.R;
        }
        const int64_t end = places.size();
        // those that come from x first: chunks of given waists alone then need no product
        for (const bool given : {false, true})
            for (int64_t i = place; i < end; ++i)
                if (!places[i].s->dropout && places[i].computed() != given)
                    take(places[i].slot, places[i].s->R);
        for (int64_t i = place; i < end; ++i)
            if (ones(places[i])) take(places[i].ones, 1);
        close_group(sibling, place, end, -1, 1);
        for (int64_t i = place; i < end; ++i) {
            const Segment& s = *places[i].s;
            if (!s.dropout) continue;
            take(places[i].slot, s.R);
            draws.push_back(s.draw);
            close_group(sibling, i, i + 1, static_cast<int64_t>(draws.size()) - 1, s.keep_scale);
        }
        siblings.push_back({chunk, static_cast<int64_t>(chunks.size())});
    }

    void take(int64_t& slot, int64_t count) { slot = slots, slots += count; }

    void close_group(int64_t sibling, int64_t begin, int64_t end, int64_t mask, float keep_scale) {
        const int64_t first_slot = 32 * static_cast<int64_t>(chunks.size());
        if (slots == first_slot) return;
        Group group = {static_cast<int64_t>(chunks.size()), 0, sibling, mask, false, keep_scale};
        for (int64_t slot = first_slot; slot < slots; slot += 32) {
            Chunk c = {slot,
                       std::min<int64_t>(slots - slot, 32),
                       static_cast<int64_t>(groups.size()),
                       sibling,
                       rows,
                       begin,
                       end,
                       -1,
                       false,
                       true};
            for (int64_t i = begin; i < end; ++i) {
                const Place& p = places[i];
                const __mmask32 here = shared(c, p);
                c.computed = c.computed || (here && p.computed());
                c.plain = c.plain && !(here && !p.plain()) && !ones(c, p);
                if (here == first(c.used) && p.computed()) c.only = i;
            }
            rows += padded(c.used, SIDE);
            group.computed = group.computed || c.computed;
            chunks.push_back(c), ++group.chunks;
        }
        groups.push_back(group);
        slots = padded(slots, 32);
    }
};

// Reads 32 numbers of a parameter from `at`, those inside a mask, times a scale; an fp32 master is rounded once.
template <bool FP32>
struct Load {
    Load(const Master& m, __mmask32 mask, float by)
        : data(m.data),
          inside(mask),
          left(static_cast<__mmask16>(mask)),
          right(static_cast<__mmask16>(mask >> 16)),
          scale(by) {}

    __m512i operator()(int64_t at) const {
        const __m512 s = _mm512_set1_ps(scale);
        if (FP32) {
            const float* from = static_cast<const float*>(data) + at;
            return rounded(_mm512_mul_ps(_mm512_maskz_loadu_ps(left, from), s),
                           _mm512_mul_ps(_mm512_maskz_loadu_ps(right, from + 16), s));
        }
        const __m512i v = _mm512_maskz_loadu_epi16(inside, static_cast<const bf16*>(data) + at);
        return scale == 1 ? v : rounded(_mm512_mul_ps(widen_low(v), s), _mm512_mul_ps(widen_high(v), s));
    }

    const void* data;
    __mmask32 inside;
    __mmask16 left, right;
    float scale;
};

// what(load) for the type that the parameter has
template <class What>
inline void with_load(const Master& m, __mmask32 inside, float scale, const What& what) {
    m.fp32 ? what(Load<true>(m, inside, scale)) : what(Load<false>(m, inside, scale));
}

inline __m512i load_master(const Master& m, int64_t at, __mmask32 inside, float scale) {
    return m.fp32 ? Load<true>(m, inside, scale)(at) : Load<false>(m, inside, scale)(at);
}

inline float number_of(const Master& m, int64_t i) {
    return m.fp32 ? static_cast<const float*>(m.data)[i] : widen(static_cast<const bf16*>(m.data)[i]);
}

// a and b of a stack as right factors.
class PackedWaist {
  public:
    template <class One>
    PackedWaist(const Stack& stack, const std::vector<One>& all, int64_t K) : stack(stack), K(K) {
        for (const One& one : all) widths.push_back(one.N);
    }

    // aᵀ, the sum over K: strip number `chunk`
    void into_h(int64_t chunk, bf16* to) const {
        const Chunk& c = stack.chunks[chunk];
        for (int64_t k = 0; k < K; k += STEP, to += 2 * TILE)
            rows_of_a(c, k, [&](const auto& row) { pack_columns(row, to, parts(c.used, SIDE)); });
    }

    // a, the sum over the slots of a chunk: a step of each strip of 32 columns from `begin` to `end`, `apart`
    // numbers from one to the next
    void into_dx(int64_t chunk, int64_t begin, int64_t end, bf16* to, int64_t apart) const {
        for (int64_t strip = begin; strip < end; ++strip)
            rows_of_a(stack.chunks[chunk], strip * STRIP,
                      [&](const auto& row) { pack_terms(row, to + strip * apart, 2); });
    }

    // s·bᵀ, the sum over the slots of a chunk, in the same way
    void into_y(int64_t chunk, int64_t begin, int64_t end, bf16* to, int64_t apart) const {
        rows_of_b(stack.chunks[chunk], [&](const auto& row) {
            for (int64_t strip = begin; strip < end; ++strip)
                pack_columns([&](int64_t i) { return row(strip * STRIP + i); }, to + strip * apart, 2);
        });
    }

    // s·b, the sum over N: strip number `chunk`
    void into_dh(int64_t chunk, bf16* to) const {
        const Chunk& c = stack.chunks[chunk];
        rows_of_b(c, [&](const auto& row) {
            for (int64_t n = 0; n < widths[c.sibling]; n += STEP, to += 2 * TILE)
                pack_terms([&](int64_t i) { return row(n + i); }, to, parts(c.used, SIDE));
        });
    }

  private:
    // what(row): row(i) has columns k to k + 31 of the row of a that stands in slot i of a chunk
    template <class What>
    void rows_of_a(const Chunk& c, int64_t k, const What& what) const {
        if (c.only >= 0) {
            const Place& place = stack.places[c.only];
            const int64_t at = (c.slot - place.slot) * K + k;
            return with_load(place.s->a, first(K - k), 1, [&](const auto& load) {
                what([&](int64_t i) { return i < c.used ? load(at + i * K) : _mm512_setzero_si512(); });
            });
        }
        what([&](int64_t i) {
            for (int64_t p = c.begin; p < c.end; ++p) {
                const Place& place = stack.places[p];
                const int64_t r = c.slot + i - place.slot;
                if (r >= 0 && r < place.s->R && place.computed())
                    return load_master(place.s->a, r * K + k, first(K - k), 1);
            }
            return _mm512_setzero_si512();
        });
    }

    // what(row): row(n) has what row n of s·b has for the slots of a chunk
    template <class What>
    void rows_of_b(const Chunk& c, const What& what) const {
        const int64_t N = widths[c.sibling];
        if (c.only >= 0) {
            const Place& place = stack.places[c.only];
            const Segment& s = *place.s;
            return with_load(s.b, first(c.used), s.scale, [&](const auto& load) {
                const int64_t at = c.slot - place.slot, R = s.R;
                what([&](int64_t n) { return n < N ? load(n * R + at) : _mm512_setzero_si512(); });
            });
        }
        what([&](int64_t n) { return n < N ? mixed_row_of_b(c, n) : _mm512_setzero_si512(); });
    }

    __m512i mixed_row_of_b(const Chunk& c, int64_t n) const {
        __m512i v = _mm512_setzero_si512();
        for (int64_t p = c.begin; p < c.end; ++p) {
            const Place& place = stack.places[p];
            const Segment& s = *place.s;
            // not or: a scale below zero makes -0 of what lies outside
            if (const __mmask32 inside = Stack::shared(c, place))
                v = _mm512_mask_mov_epi16(v, inside,
                                          load_master(s.b, n * s.R + c.slot - place.slot, inside, s.scale));
            if (const __mmask32 one = Stack::ones(c, place)) {
                bf16 d;
                narrow(s.scale * number_of(s.d, n), &d);
                v = _mm512_mask_mov_epi16(v, one, _mm512_set1_epi16(static_cast<int16_t>(d.bits)));
            }
        }
        return v;
    }

    const Stack& stack;
    const int64_t K;
    std::vector<int64_t> widths;  // N of each sibling
};

// which of up to 32 rows are the segment's own
inline uint32_t own_rows(const Segment& s, const int64_t* ids, int64_t rows) {
    if (!s.routed) return first(rows);
    uint32_t own = 0;
    for (int64_t r = 0; r < rows; ++r) own |= static_cast<uint32_t>(ids[r] == s.adapter) << r;
    return own;
}

// what a chunk's z of up to 32 rows becomes before b: activated, given, or one, and zero on the rows of others.
// z and h [rows, 32], ld apart; `row` is the first in M. h may be z.
inline void make_h(const Stack& stack, const Chunk& c, const int64_t* ids, int64_t row, int64_t rows,
                   const bf16* z, int64_t ldz, bf16* h, int64_t ldh) {
    for (int64_t p = c.begin; p < c.end; ++p) {
        const Place& place = stack.places[p];
        const Segment& s = *place.s;
        const __mmask32 inside = Stack::shared(c, place), one = Stack::ones(c, place);
        if (!inside && !one) continue;
        const uint32_t own = own_rows(s, ids ? ids + row : nullptr, rows);
        const __m512i ones = _mm512_set1_epi16(0x3f80);
        const int64_t at = c.slot - place.slot;
        for (int64_t r = 0; r < rows; ++r) {
            const __mmask32 mine = own >> r & 1 ? ~0u : 0;
            const __m512i v = place.computed() ? _mm512_loadu_si512(z + r * ldz)
                                               : _mm512_maskz_loadu_epi16(inside, s.h + (row + r) * s.R + at);
            _mm512_mask_storeu_epi16(h + r * ldh, inside, _mm512_maskz_mov_epi16(mine, v));
            _mm512_mask_storeu_epi16(h + r * ldh, one, _mm512_maskz_mov_epi16(mine, ones));
        }
        with_activation(place.activation(), [&](auto sigma) {
            for (int64_t r = 0; r < rows; ++r)
                if (own >> r & 1) {
                    const __m512i v = _mm512_loadu_si512(z + r * ldz);
                    _mm512_mask_storeu_epi16(h + r * ldh, inside,
                                             rounded(sigma.value(widen_low(v)), sigma.value(widen_high(v))));
                }
        });
    }
}

// dh of up to 32 rows of a chunk becomes dz, in place: times σ', and zero on the rows of others
inline void make_dz(const Stack& stack, const Chunk& c, const int64_t* ids, int64_t row, int64_t rows,
                    const bf16* z, int64_t ldz, bf16* dh, int64_t ldh) {
    for (int64_t p = c.begin; p < c.end; ++p) {
        const Place& place = stack.places[p];
        const __mmask32 inside = Stack::shared(c, place);
        if (!inside || place.plain()) continue;
        const uint32_t own = own_rows(*place.s, ids ? ids + row : nullptr, rows);
        with_activation(place.activation(), [&](auto sigma) {
            for (int64_t r = 0; r < rows; ++r) {
                const __m512i v = _mm512_loadu_si512(z + r * ldz), d = _mm512_loadu_si512(dh + r * ldh);
                const __m512 low = _mm512_mul_ps(widen_low(d), sigma.slope(widen_low(v)));
                const __m512 high = _mm512_mul_ps(widen_high(d), sigma.slope(widen_high(v)));
                _mm512_mask_storeu_epi16(dh + r * ldh, inside, rounded(low, high));
            }
        });
        for (int64_t r = 0; r < rows; ++r)
            if (!(own >> r & 1)) _mm512_mask_storeu_epi16(dh + r * ldh, inside, _mm512_setzero_si512());
    }
}

}  // namespace pefast::amx
