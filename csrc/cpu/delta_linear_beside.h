// The large products of delta_linear on AMX, and what is done beside them.
#pragma once

#include "delta_linear_amx.h"
#include "delta_linear_keep.h"

namespace pefast::amx {

// Where 32 columns of a result go, and where the fp32 sums of up to 32 of its rows wait until then.
struct Rows {
    const float* sums;     // [count, 32]
    const float* masked;   // [count, 32]  added where keep has a bit, times keep_scale; null: nothing to add
    const uint32_t* keep;  // rows ld_keep apart
    int64_t ld_keep;
    float keep_scale;
    bf16* to;  // rows ld apart
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
        if (w.masked) {
            const __m512 scale = _mm512_set1_ps(w.keep_scale);
            const uint32_t bits = *w.keep;
            const __mmask16 left = static_cast<__mmask16>(bits), right = static_cast<__mmask16>(bits >> 16);
            low = _mm512_mask3_fmadd_ps(_mm512_load_ps(w.masked), scale, low, left);
            high = _mm512_mask3_fmadd_ps(_mm512_load_ps(w.masked + SIDE), scale, high, right);
            w.masked += STRIP, w.keep += w.ld_keep;
        }
        _mm512_mask_storeu_epi16(w.to, w.inside, rounded(low, high));
        w.sums += STRIP, w.to += w.ld, --w.count;
    }

    Rows waiting = {};
    bf16* soon = nullptr;
    int64_t soon_ld = 0, soon_rows = 0;
    int each = 0, soon_each = 0;
};

// One strip of columns of a panel of rows, rounded: start + main.a times main.strip + side.a times side.strip.
// With to.keep the second product has sums of its own, and the mask lies on it.
struct Strip {
    Factors main, side;
    const float* start;  // [32]  null: zeros
    Rows to;             // of the first rows; sums, masked and count are filled in
    int64_t rows;
};

// steps of the sum walked at a time: 16 of a strip are 32 KB and stay in the first cache; 24 took a tenth longer
constexpr int64_t CHUNK = 16;

// sums [max(rows, 64), 32] and masked [64, 32] hold what waits: nothing may write them before beside.finish()
inline void multiply_strip(const Strip& s, float* sums, float* masked, Beside& beside) {
    const int64_t chunks = std::max<int64_t>(parts(s.main.steps, CHUNK), 1);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = s.main.steps * chunk / chunks, end = s.main.steps * (chunk + 1) / chunks;
        const bool last = chunk == chunks - 1;
        for (int64_t row = 0; row < s.rows; row += 32) {
            // with one chunk the sums leave soon, so two places in turn are enough
            float* c = sums + (chunks == 1 ? row % 64 : row) * STRIP;
            float* d = s.to.keep ? masked + row % 64 * STRIP : nullptr;
            Rows rows = s.to;
            rows.sums = c, rows.masked = d, rows.count = std::min<int64_t>(s.rows - row, 32);
            rows.to += row * rows.ld, rows.keep += row * rows.ld_keep;
            beside.plan(end - begin, rows.to, rows.ld, last ? rows.count : 0);
            sized(s.rows - row, STRIP, [&](auto tall, auto wide) {
                constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
                const Factors main = {s.main.a + row * s.main.lda + begin * STEP, s.main.lda,
                                      s.main.strip + begin * 2 * TILE, end - begin};
                const Factors side = {s.side.a + row * s.side.lda, s.side.lda, s.side.strip, s.side.steps};
                chunk ? load_sums<ROWS, COLUMNS>(c) : begin_sums<ROWS, COLUMNS>(s.start);
                accumulate<ROWS, COLUMNS>(main, beside);
                if (last && d) {
                    store_sums<ROWS, COLUMNS>(c);
                    clear_sums<ROWS, COLUMNS>();
                    accumulate<ROWS, COLUMNS>(side);
                    store_sums<ROWS, COLUMNS>(d);
                } else {
                    if (last) accumulate<ROWS, COLUMNS>(side);
                    store_sums<ROWS, COLUMNS>(c);
                }
            });
            if (last) beside.wait(rows);
        }
    }
}

}  // namespace pefast::amx
