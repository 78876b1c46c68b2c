// The large products of delta_linear on AMX, and what is done beside them.
#pragma once

#include "delta_linear_amx.h"
#include "delta_linear_keep.h"

namespace pefast::amx {

// The masks that lie on parts of a result, and their scales 1 / (1 - p).
struct Masks {
    const uint32_t* keep;  // [count] masks `apart` from each other, rows ld apart
    int64_t apart, ld, count;
    const float* scales;  // [count]
};

// Where 32 columns of a result go, and where the fp32 sums of up to 32 of its rows wait until then.
struct Rows {
    const float* sums;    // [count, 32]
    const float* masked;  // [masks, 64, 32]  added where the mask has a bit, times its scale
    Masks masks;
    const float *gain, *bias;  // [32]  result = sums ⊙ gain + bias; null: sums alone
    bf16* u;                   // rows ld apart: the sums themselves; null: nobody asks for them
    bf16* to;                  // rows ld apart
    int64_t ld, count;
    __mmask32 inside;
};

// Memory to bring to the second cache, some lines with each step: as it lies, or from STREAMS parts of it in turn. What
// is foreseen of memory ends with a page; from four pages at a time a cold weight comes 1.4 times as fast.
template <int STREAMS>
struct Fetch {
    const char *next = nullptr, *end = nullptr;  // of the first part
    int64_t apart = 0;                           // from part to part
    int each = 0;

    Fetch() = default;
    Fetch(const void* begin, int64_t bytes, int64_t steps)
        : next(static_cast<const char*>(begin)),
          end(next + padded(parts(bytes, STREAMS), 64)),
          apart(end - next),
          each(static_cast<int>(parts(apart / 64, std::max<int64_t>(steps, 1)))) {}

    void step() {
        for (int i = 0; i < each && next < end; ++i, next += 64)
            for (int part = 0; part < STREAMS; ++part) _mm_prefetch(next + part * apart, _MM_HINT_T1);
    }
};

// What is done beside the tile products, a little with each step: rounding and storing the block of rows before,
// making the mask, and fetching what comes next. After the products it cost a fifth of the time at 768 x 768.
class Beside {
  public:
    Fetch<4> strip;       // the next strip of the weight, where strips stay
    Fetch<1> rows, more;  // of x and of dy; more where rows stay
    KeepRows keep;        // of this panel, or of the next

    // before a block of rows that takes so many steps; its result will go to these rows
    void plan(int64_t steps, bf16* to, int64_t ld, int64_t rows) {
        each = static_cast<int>(parts(waiting().count, std::max<int64_t>(steps, 1)));
        if (!foreseen) expect(to, ld, rows, steps);
    }

    // whole rows of a result that come next, so many numbers as they lie: memory brings them sooner than a line of each
    // row, 0.90 to 0.95 of forward at K=N=384. For results of one group of strips: a second walk over the rows came to
    // lines that were gone again, up to 1.39 of backward at 4096x1536x384.
    void foresee(bf16* to, int64_t numbers, int64_t steps) {
        foreseen = true;
        expect(to, STRIP, parts(numbers, STRIP), steps);
    }

    void operator()() {
        for (int i = 0; i < each && waiting().count; ++i) store_row();
        for (int i = 0; i < soon_each && soon_rows; ++i, --soon_rows, soon += soon_ld)
            __builtin_prefetch(soon, 1, 2);
        strip.step();
        more.step();
        rows.step();
        keep.step();
    }

    // products(step), step being what is done beside one of theirs
    template <Keep KEEP, class Products>
    void with(const Products& products) {
        const Rows& w = waiting();
        if (w.masks.count > 1 || w.gain) return products(*this);
        const auto simple = [&](auto masked) __attribute__((always_inline)) {
            constexpr bool MASKED = decltype(masked)::value;
            keep.done() ? simply<KEEP, MASKED, false>(products) : simply<KEEP, MASKED, true>(products);
        };
        w.masks.count ? simple(std::true_type()) : simple(std::false_type());
    }

    // the first step of a block of 32 rows: the sums of the block before leave the tiles, those of this one begin as
    // rows `stride` bytes apart, or as zeros
    template <bool FROM, Keep KEEP>
    void turn_over(const Factors& f, const float* from = nullptr, int64_t stride = 0) {
        finish_waiting();
        amx::turn_over<FROM, KEEP>(f.a, f.lda, f.strip, leaving, from, stride);
        left();
    }

    // the sums in the tiles are to leave for `sums` [32, 32] when the next block begins; `complete`: then the next rows
    // have all they wait for
    void hold(float* sums, bool complete) { leaving = sums, held = complete; }

    // to be filled in for the block that is in the tiles
    Rows& next_rows() { return rows_of[1 - now]; }

    // the sums of the next rows have left the tiles
    void wait() {
        finish_waiting();
        now = 1 - now;
    }

    // before somebody else needs the tiles
    void clear_tiles() {
        if (leaving == nowhere) return;
        finish_waiting();
        store_sums<2, 2>(leaving);
        left();
    }

    void finish() {
        clear_tiles();
        finish_waiting();
    }

  private:
    // a line of each of so many rows, beside so many steps
    void expect(bf16* to, int64_t ld, int64_t rows, int64_t steps) {
        soon = to, soon_ld = ld, soon_rows = rows;
        soon_each = static_cast<int>(parts(rows, std::max<int64_t>(steps, 1)));
    }

    // one mask at most and no gain: all that a step reads in registers. Written back at every step it cost 3 to 5 of
    // 100 at 512 x 384 x 384.
    template <Keep KEEP, bool MASKED, bool MAKING, class Products>
    __attribute__((always_inline)) void simply(const Products& products) {
        Rows& w = waiting();
        const float *sums = w.sums, *masked = w.masked;
        const uint32_t* bits = w.masks.keep;
        bf16 *to = w.to, *ahead = soon;
        const int64_t ld = w.ld, ahead_ld = soon_ld, bits_ld = w.masks.ld;
        const __mmask32 inside = w.inside;
        const __m512 scale = _mm512_set1_ps(MASKED ? w.masks.scales[0] : 0);
        int64_t count = w.count, ahead_count = soon_rows;
        const int stores = each, aheads = soon_each;
        auto of_first = fetched<KEEP>();
        auto of_rows = rows;
        KeepRows::Row made;
        products([&](auto part) __attribute__((always_inline)) {
            constexpr int PART = decltype(part)::value;
            if constexpr (MAKING && PART == 0) made = keep.begin();
            if constexpr (MAKING)
                if (made.to) keep.rounds<PART == 0 ? 3 : 2 * PART + 2, PART == 3 ? 10 : 2 * PART + 4>(made);
            if constexpr (PART < 3) return;
            if (MAKING && made.to) keep.store(made);
            for (int i = 0; i < stores && count; ++i, --count, sums += STRIP, to += ld) {
                __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + SIDE);
                if (MASKED) {
                    add_where(*bits, masked, scale, low, high);
                    masked += STRIP, bits += bits_ld;
                }
                _mm512_mask_storeu_epi16(to, inside, rounded(low, high));
            }
            for (int i = 0; i < aheads && ahead_count; ++i, --ahead_count, ahead += ahead_ld)
                __builtin_prefetch(ahead, 1, 2);
            of_first.step();
            of_rows.step();
        });
        w.sums = sums, w.masked = masked, w.masks.keep = bits, w.to = to, w.count = count;
        soon = ahead, soon_rows = ahead_count, rows = of_rows;
        fetched<KEEP>() = of_first;
    }

    template <Keep KEEP>
    auto& fetched() {
        if constexpr (KEEP == Keep::strip)
            return strip;
        else
            return more;
    }

    // low and high += scale · 32 masked sums, where the mask has a bit
    static void add_where(uint32_t bits, const float* masked, __m512 scale, __m512& low, __m512& high) {
        const __mmask16 left = static_cast<__mmask16>(bits), right = static_cast<__mmask16>(bits >> 16);
        low = _mm512_mask3_fmadd_ps(_mm512_load_ps(masked), scale, low, left);
        high = _mm512_mask3_fmadd_ps(_mm512_load_ps(masked + SIDE), scale, high, right);
    }

    Rows& waiting() { return rows_of[now]; }
    const Rows& waiting() const { return rows_of[now]; }

    void left() {
        leaving = nowhere;
        now ^= held, held = 0;
    }

    // in time for their place to be written again
    void finish_waiting() {
        while (waiting().count) store_row();
    }

    void store_row() {
        Rows& w = waiting();
        __m512 low = _mm512_load_ps(w.sums), high = _mm512_load_ps(w.sums + SIDE);
        if (w.masks.count) add_masked(low, high);
        if (w.gain) apply_gain(low, high);
        _mm512_mask_storeu_epi16(w.to, w.inside, rounded(low, high));
        w.sums += STRIP, w.to += w.ld, --w.count;
    }

    void add_masked(__m512& low, __m512& high) {
        Rows& w = waiting();
        const float* masked = w.masked;
        const uint32_t* keep = w.masks.keep;
        for (int64_t i = 0; i < w.masks.count; ++i, masked += 64 * STRIP, keep += w.masks.apart) {
            add_where(*keep, masked, _mm512_set1_ps(w.masks.scales[i]), low, high);
        }
        w.masked += STRIP, w.masks.keep += w.masks.ld;
    }

    void apply_gain(__m512& low, __m512& high) {
        Rows& w = waiting();
        if (w.u) {
            _mm512_mask_storeu_epi16(w.u, w.inside, rounded(low, high));
            w.u += w.ld;
        }
        low = _mm512_fmadd_ps(low, _mm512_load_ps(w.gain), _mm512_load_ps(w.bias));
        high = _mm512_fmadd_ps(high, _mm512_load_ps(w.gain + SIDE), _mm512_load_ps(w.bias + SIDE));
    }

    alignas(64) float nowhere[BLOCK];  // takes what nobody waits for
    float* leaving = nowhere;          // where the sums in the tiles go
    // of sums that have left the tiles, and of those in them; in turn, for a copy of what was stored a moment ago waits
    // until the tiles before it are stored
    Rows rows_of[2] = {};
    int now = 0, held = 0;
    bf16* soon = nullptr;
    int64_t soon_ld = 0, soon_rows = 0;
    bool foreseen = false;  // the lines to be written are those of the next rows
    int each = 0, soon_each = 0;
};

// One strip of columns of a panel of rows, rounded: start + Σ mains + Σ sides, and Σ masked under to.masks. The mains are
// long sums and walked some steps at a time, the sides are short.
struct Strip {
    std::vector<Factors> mains, sides, masked;
    const float* start;  // [32]  null: zeros
    Rows to;             // of the first rows; sums, masked and count are filled in
    int64_t rows;
    Factors next;  // the main that comes after this strip, to be fetched; without a strip: none
};

// strips of so many steps stay in the first cache while rows pass by: 32 KB
constexpr int64_t CHUNK = 16;
// steps of longer strips that are walked at a time: the sums of all rows, up to 32 KB, pass by beside them. 16 took 1.01 to
// 1.06 of the time where N or K is 2048 or more, 24 took 1.1.
constexpr int64_t WALK = 12;

inline Factors rows_from(const Factors& f, int64_t row) {
    return {f.a + row * f.lda, f.lda, f.strip, f.steps};
}

// 32 columns of up to 16 * ROWS rows, some steps of one main. With 32 rows the sums stay in the tiles until the next
// block begins.
template <int ROWS, Keep KEEP>
inline void multiply_block(const Strip& s, const Factors& main, int64_t row, bool first, bool last,
                           float* sums, float* masked, Beside& beside) {
    Factors f = rows_from(main, row);
    const float* from = first ? s.start : sums;
    const int64_t stride = first ? 0 : STRIP * 4;
    if constexpr (ROWS == 2) {
        from ? beside.turn_over<true, KEEP>(f, from, stride) : beside.turn_over<false, KEEP>(f);
        f = but_first_step(f);
    } else {
        beside.clear_tiles();
        first ? begin_sums<1, 2>(s.start) : load_sums<1, 2>(sums);
    }
    const int64_t count = last ? std::min<int64_t>(s.rows - row, 32) : 0;
    bf16* to = s.to.to + row * s.to.ld;
    beside.plan(f.steps, to, s.to.ld, count);
    if (last) {
        Rows& rows = beside.next_rows();
        rows.sums = sums, rows.masked = masked, rows.count = count, rows.inside = s.to.inside;
        rows.masks = s.to.masks, rows.masks.keep += row * s.to.masks.ld;
        rows.gain = s.to.gain, rows.bias = s.to.bias, rows.u = s.to.u ? s.to.u + row * s.to.ld : nullptr;
        rows.to = to, rows.ld = s.to.ld;
    }
    beside.with<KEEP>([&](auto&& step)
                          __attribute__((always_inline)) { accumulate<ROWS, 2, KEEP>(f, step); });
    if (last)
        for (const Factors& side : s.sides) accumulate<ROWS, 2>(rows_from(side, row));
    const auto leave = [&](float* to, bool complete) {
        if constexpr (ROWS == 2) return beside.hold(to, complete);
        store_sums<1, 2>(to);
        if (complete) beside.wait();
    };
    leave(sums, last && s.masked.empty());
    if (!last) return;
    int64_t masks = s.masked.size();
    for (const Factors& masked_side : s.masked) {
        Factors side = rows_from(masked_side, row);
        if constexpr (ROWS == 2)
            beside.turn_over<false, KEEP>(side), side = but_first_step(side);
        else
            clear_sums<1, 2>();
        accumulate<ROWS, 2>(side);
        leave(masked, --masks == 0);
        masked += 64 * STRIP;
    }
}

template <Keep KEEP>
inline void multiply_rows(const Strip& s, const Factors& main, int64_t row, bool first, bool last,
                          float* sums, float* masked, Beside& beside) {
    s.rows - row > SIDE ? multiply_block<2, KEEP>(s, main, row, first, last, sums, masked, beside)
                        : multiply_block<1, KEEP>(s, main, row, first, last, sums, masked, beside);
}

// sums [max(rows, 64), 32] and masked [masks, 64, 32] hold what waits: nothing may write them before beside.finish()
inline void multiply_strip(const Strip& s, float* sums, float* masked, Beside& beside) {
    // one block of rows has nothing that the first cache should keep for the next
    const int64_t most =
        s.rows > 64 || (s.rows > 32 && s.mains[0].steps <= 2 * CHUNK) ? WALK : int64_t{1} << 40;
    int64_t chunks = 0, left;
    for (const Factors& f : s.mains) chunks += parts(f.steps, most);
    left = chunks;
    for (size_t i = 0; i < s.mains.size(); ++i) {
        const Factors &f = s.mains[i], &next = i + 1 < s.mains.size() ? s.mains[i + 1] : s.next;
        // short strips come by themselves, one behind the other: 0.98 of the time at K=384
        const bool fetched = next.strip && f.steps > CHUNK;
        beside.strip = Fetch<4>(next.strip, fetched ? next.steps * 4 * TILE : 0, parts(s.rows, 32) * f.steps);
        const int64_t own = parts(f.steps, most);
        for (int64_t chunk = 0; chunk < own; ++chunk, --left) {
            const int64_t begin = f.steps * chunk / own, end = f.steps * (chunk + 1) / own;
            const Factors some = {f.a + begin * STEP, f.lda, f.strip + begin * 2 * TILE, end - begin};
            for (int64_t row = 0; row < s.rows; row += 32) {
                // with one chunk the sums leave soon, so two places in turn are enough
                float* c = sums + (chunks == 1 ? row % 64 : row) * STRIP;
                multiply_rows<Keep::strip>(s, some, row, left == chunks, left == 1, c,
                                           masked + row % 64 * STRIP, beside);
            }
        }
    }
}

// how many strips of so many steps, a group, stay in the second cache while rows pass by
inline int64_t strips_at_once(int64_t steps) {
    const int64_t GROUP_BYTES = 3 << 18;
    return std::max<int64_t>(GROUP_BYTES / (steps * 4 * TILE), 1);
}

// strips of the same rows, each of one chunk: a block of rows stays in the first cache while a group of strips, which
// stays in the second, passes by. before(row) comes before each block of rows of the first group.
template <class Before>
inline void multiply_rows_first(const std::vector<Strip>& strips, int64_t count, float* sums, float* masked,
                                Beside& beside, const Before& before) {
    if (!count) return;
    const int64_t group = strips_at_once(strips[0].mains[0].steps);
    int64_t turn = 0;
    beside.strip = {};
    for (int64_t begin = 0; begin < count; begin += group)
        for (int64_t row = 0; row < strips[0].rows; row += 32) {
            if (!begin) before(row);
            for (int64_t i = begin; i < std::min(begin + group, count); ++i, turn = 32 - turn)
                multiply_rows<Keep::rows>(strips[i], strips[i].mains[0], row, true, true, sums + turn * STRIP,
                                          masked + turn * STRIP, beside);
        }
}

}  // namespace pefast::amx
