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

// Memory to bring to the second cache, some lines with each step.
struct Fetch {
    const char *next = nullptr, *end = nullptr;
    int each = 0;

    Fetch() = default;
    Fetch(const void* begin, int64_t bytes, int64_t steps)
        : next(static_cast<const char*>(begin)),
          end(next + bytes),
          each(static_cast<int>(parts(parts(bytes, 64), std::max<int64_t>(steps, 1)))) {}

    void step() {
        for (int i = 0; i < each && next < end; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    }
};

// What is done beside the tile products, a little with each step: rounding and storing the block of rows before,
// making the mask, and fetching what comes next. After the products it cost a fifth of the time at 768 x 768.
class Beside {
  public:
    Fetch strip, rows;  // the next strip of the weight, and rows of x
    KeepRows keep;      // of this panel, or of the next

    // before a block of rows that takes so many steps; its result will go to these rows
    void plan(int64_t steps, bf16* to, int64_t ld, int64_t rows) {
        each = static_cast<int>(parts(waiting.count, std::max<int64_t>(steps, 1)));
        soon = to, soon_ld = ld, soon_rows = rows;
        soon_each = static_cast<int>(parts(rows, std::max<int64_t>(steps, 1)));
    }

    void operator()() {
        for (int i = 0; i < each && waiting.count; ++i) store_row();
        for (int i = 0; i < soon_each && soon_rows; ++i, --soon_rows, soon += soon_ld)
            __builtin_prefetch(soon, 1, 2);
        strip.step();
        rows.step();
        keep.step();
    }

    // whether what waits has no mask and no gain, and there is no mask to make
    bool plain() const { return !waiting.masks.count && !waiting.gain && keep.done(); }

    // the same beside products(step), with all that a plain step reads in registers: written back at every step it
    // cost 3 to 5 of 100 at 512 x 384 x 384
    template <class Products>
    void plainly(const Products& products) {
        const float* sums = waiting.sums;
        bf16 *to = waiting.to, *ahead = soon;
        const int64_t ld = waiting.ld, ahead_ld = soon_ld;
        const __mmask32 inside = waiting.inside;
        int64_t count = waiting.count, ahead_count = soon_rows;
        const int stores = each, aheads = soon_each;
        Fetch of_strip = strip, of_rows = rows;
        products([&]() __attribute__((always_inline)) {
            for (int i = 0; i < stores && count; ++i, --count, sums += STRIP, to += ld)
                _mm512_mask_storeu_epi16(to, inside,
                                         rounded(_mm512_load_ps(sums), _mm512_load_ps(sums + SIDE)));
            for (int i = 0; i < aheads && ahead_count; ++i, --ahead_count, ahead += ahead_ld)
                __builtin_prefetch(ahead, 1, 2);
            of_strip.step();
            of_rows.step();
        });
        waiting.sums = sums, waiting.to = to, waiting.count = count;
        soon = ahead, soon_rows = ahead_count, strip = of_strip, rows = of_rows;
    }

    void wait(const Rows& next) {
        finish();
        waiting = next;
    }

    void finish() {
        while (waiting.count) store_row();
    }

  private:
    void store_row() {
        Rows& w = waiting;
        __m512 low = _mm512_load_ps(w.sums), high = _mm512_load_ps(w.sums + SIDE);
        if (w.masks.count) add_masked(low, high);
        if (w.gain) apply_gain(low, high);
        _mm512_mask_storeu_epi16(w.to, w.inside, rounded(low, high));
        w.sums += STRIP, w.to += w.ld, --w.count;
    }

    void add_masked(__m512& low, __m512& high) {
        Rows& w = waiting;
        const float* masked = w.masked;
        const uint32_t* keep = w.masks.keep;
        for (int64_t i = 0; i < w.masks.count; ++i, masked += 64 * STRIP, keep += w.masks.apart) {
            const __m512 scale = _mm512_set1_ps(w.masks.scales[i]);
            const uint32_t bits = *keep;
            const __mmask16 left = static_cast<__mmask16>(bits), right = static_cast<__mmask16>(bits >> 16);
            low = _mm512_mask3_fmadd_ps(_mm512_load_ps(masked), scale, low, left);
            high = _mm512_mask3_fmadd_ps(_mm512_load_ps(masked + SIDE), scale, high, right);
        }
        w.masked += STRIP, w.masks.keep += w.masks.ld;
    }

    void apply_gain(__m512& low, __m512& high) {
        Rows& w = waiting;
        if (w.u) {
            _mm512_mask_storeu_epi16(w.u, w.inside, rounded(low, high));
            w.u += w.ld;
        }
        low = _mm512_fmadd_ps(low, _mm512_load_ps(w.gain), _mm512_load_ps(w.bias));
        high = _mm512_fmadd_ps(high, _mm512_load_ps(w.gain + SIDE), _mm512_load_ps(w.bias + SIDE));
    }

    Rows waiting = {};
    bf16* soon = nullptr;
    int64_t soon_ld = 0, soon_rows = 0;
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

// steps of the sum walked at a time: 16 of a strip are 32 KB and stay in the first cache; 24 took a tenth longer
constexpr int64_t CHUNK = 16;

inline Factors rows_from(const Factors& f, int64_t row) {
    return {f.a + row * f.lda, f.lda, f.strip, f.steps};
}

// up to 32 rows of a strip, some steps of one main
inline void multiply_rows(const Strip& s, const Factors& main, int64_t row, bool first, bool last,
                          float* sums, float* masked, Beside& beside) {
    Rows rows = s.to;
    rows.sums = sums, rows.masked = masked, rows.count = std::min<int64_t>(s.rows - row, 32);
    rows.to += row * rows.ld, rows.masks.keep += row * rows.masks.ld;
    if (rows.u) rows.u += row * rows.ld;
    beside.plan(main.steps, rows.to, rows.ld, last ? rows.count : 0);
    sized(s.rows - row, STRIP, [&](auto tall, auto wide) {
        constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
        first ? begin_sums<ROWS, COLUMNS>(s.start) : load_sums<ROWS, COLUMNS>(sums);
        if (beside.plain())
            beside.plainly([&](auto&& step) __attribute__((always_inline)) {
                accumulate<ROWS, COLUMNS>(rows_from(main, row), step);
            });
        else
            accumulate<ROWS, COLUMNS>(rows_from(main, row), beside);
        for (const Factors& side : s.sides)
            if (last) accumulate<ROWS, COLUMNS>(rows_from(side, row));
        store_sums<ROWS, COLUMNS>(sums);
        for (const Factors& side : s.masked) {
            if (!last) break;
            clear_sums<ROWS, COLUMNS>();
            accumulate<ROWS, COLUMNS>(rows_from(side, row));
            store_sums<ROWS, COLUMNS>(masked);
            masked += 64 * STRIP;
        }
    });
    if (last) beside.wait(rows);
}

// sums [max(rows, 64), 32] and masked [masks, 64, 32] hold what waits: nothing may write them before beside.finish()
inline void multiply_strip(const Strip& s, float* sums, float* masked, Beside& beside) {
    int64_t chunks = 0, left;
    for (const Factors& f : s.mains) chunks += std::max<int64_t>(parts(f.steps, CHUNK), 1);
    left = chunks;
    for (size_t i = 0; i < s.mains.size(); ++i) {
        const Factors &f = s.mains[i], &next = i + 1 < s.mains.size() ? s.mains[i + 1] : s.next;
        // short strips come by themselves, one behind the other: 0.98 of the time at K=384
        const bool fetched = next.strip && f.steps > CHUNK;
        beside.strip = Fetch(next.strip, fetched ? next.steps * 4 * TILE : 0, parts(s.rows, 32) * f.steps);
        const int64_t own = std::max<int64_t>(parts(f.steps, CHUNK), 1);
        for (int64_t chunk = 0; chunk < own; ++chunk, --left) {
            const int64_t begin = f.steps * chunk / own, end = f.steps * (chunk + 1) / own;
            const Factors some = {f.a + begin * STEP, f.lda, f.strip + begin * 2 * TILE, end - begin};
            for (int64_t row = 0; row < s.rows; row += 32) {
                // with one chunk the sums leave soon, so two places in turn are enough
                float* c = sums + (chunks == 1 ? row % 64 : row) * STRIP;
                multiply_rows(s, some, row, left == chunks, left == 1, c, masked + row % 64 * STRIP, beside);
            }
        }
    }
}

}  // namespace pefast::amx
