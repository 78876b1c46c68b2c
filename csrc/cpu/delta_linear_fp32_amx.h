// The large products of delta_linear in fp32 on AMX, and what is done beside them.
#pragma once

#include "delta_linear_beside.h"
#include "delta_linear_fp32.h"
#include "parts_amx.h"

namespace pefast::amx {

// Rows of a panel, and how many steps of the sum are walked at a time: so much of the left factor, in parts, stays in
// the second cache while the packed weight streams past it. With all of a long sum in one go 64 rows would fill that
// cache, and the weight, which the third cache gives at 25 GB/s, would be read four times as often.
constexpr int64_t PART_ROWS = 256, PART_STEPS = 48;

// The sum of a product, cut into stretches of equal length.
struct Stretches {
    int64_t steps, count;
    Stretches(int64_t steps, int parts) : steps(steps), count(amx::parts(steps * parts, PART_STEPS)) {}
    int64_t begin(int64_t i) const { return steps * i / count; }
    int64_t longest() const { return amx::parts(steps, count); }
};

// Where 32 columns of a result go, and where the sums of up to 32 of its rows wait until then:
// u = sums + before + side, to = u ⊙ gain + bias, each but sums and to only where it is not null.
struct Fp32Rows {
    const float* sums;    // [count, 32]
    const float* before;  // [count, 32]  what was summed earlier
    const float* side;    // [count, 32]
    const uint32_t*
        keep;  // rows ld_keep apart; side counts where it has a bit, times keep_scale; null: everywhere
    int64_t ld_keep;
    float keep_scale;
    const float *gain, *bias;  // [32]
    float *to, *u;             // rows ld apart
    int64_t ld, count;
    __mmask32 inside;
};

// What is done beside the tile products, a little with each: adding and storing the block of rows before, making the
// mask, and fetching what comes next.
class Fp32Beside {
  public:
    Fetch<4> strip;  // the next strip of the weight
    KeepRows keep;   // of this panel, or of the next

    // before a block of rows that takes so many products
    void plan(int64_t products) {
        each = static_cast<int>(parts(waiting.count, std::max<int64_t>(products, 1)));
    }

    void operator()() {
        for (int i = 0; i < each && waiting.count; ++i) store_row();
        strip.step();
        keep.step();
    }

    void wait(const Fp32Rows& next) {
        finish();
        waiting = next;
    }

    void finish() {
        while (waiting.count) store_row();
    }

  private:
    void store_row() {
        Fp32Rows& w = waiting;
        for (int i = 0; i < 2; ++i) {
            __m512 v = _mm512_load_ps(w.sums + i * SIDE);
            if (w.before) v = _mm512_add_ps(v, _mm512_load_ps(w.before + i * SIDE));
            if (w.side && w.keep)
                v = _mm512_mask3_fmadd_ps(_mm512_load_ps(w.side + i * SIDE), _mm512_set1_ps(w.keep_scale), v,
                                          half(*w.keep, i));
            else if (w.side)
                v = _mm512_add_ps(v, _mm512_load_ps(w.side + i * SIDE));
            if (w.u) _mm512_mask_storeu_ps(w.u + i * SIDE, half(w.inside, i), v);
            if (w.gain) v = _mm512_mul_ps(v, _mm512_load_ps(w.gain + i * SIDE));
            if (w.bias) v = _mm512_add_ps(v, _mm512_load_ps(w.bias + i * SIDE));
            _mm512_mask_storeu_ps(w.to + i * SIDE, half(w.inside, i), v);
        }
        w.sums += STRIP, w.to += w.ld, --w.count;
        if (w.before) w.before += STRIP;
        if (w.side) w.side += STRIP;
        if (w.u) w.u += w.ld;
        if (w.keep) w.keep += w.ld_keep;
    }

    Fp32Rows waiting = {};
    int each = 0;
};

// steps of a strip that stay in the first cache while rows pass by
constexpr int64_t PART_CHUNK = 15;

// One stretch of a strip of columns of a panel of rows: main.a times main.strip, and side.a times side.strip.
struct Fp32Strip {
    PartFactors main, side;
    Fp32Rows to;  // of the first rows; gain, bias and u are for the end of the sum, the rest is filled in
    int64_t rows;
    bool first, last;  // stretch of the sum
    float* sums;       // [rows, 32]  from stretch to stretch
};

// Every PART_CHUNK steps the tiles begin as zeros again and what they held is added to the sums: as large sums collect
// fewer roundings, the error stays below that of a library's product. blocks [4, 32, 32] hold what waits: nothing may
// write them before beside.finish().
template <int P>
inline void multiply_strip_parts(const Fp32Strip& s, float* blocks, Fp32Beside& beside) {
    const int64_t chunks = parts(s.main.steps * P, PART_CHUNK);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = s.main.steps * chunk / chunks, end = s.main.steps * (chunk + 1) / chunks;
        const bool end_of_stretch = chunk == chunks - 1, last = s.last && end_of_stretch,
                   aside = end_of_stretch && s.side.steps;
        for (int64_t row = 0; row < s.rows; row += 32) {
            float *block = blocks + row % 64 * STRIP, *side_block = block + 2 * BLOCK;
            Fp32Rows to = s.to;
            to.sums = block, to.count = std::min<int64_t>(s.rows - row, 32);
            to.before = s.first && chunk == 0 ? nullptr : s.sums + row * STRIP;
            to.side = aside ? side_block : nullptr;
            if (to.keep) to.keep += row * to.ld_keep;
            beside.plan((end - begin) * PRODUCTS<P>);
            sized(s.rows - row, STRIP, [&](auto tall, auto wide) {
                constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
                const Planes at = s.main.a.row(row);
                clear_sums<ROWS, COLUMNS>();
                accumulate_parts<P, ROWS, COLUMNS>({{at.at + begin * STEP, at.ld, at.plane},
                                                    s.main.strip + begin * 2 * TILE * P,
                                                    end - begin},
                                                   beside);
                store_sums<ROWS, COLUMNS>(block);
                if (!aside) return;
                clear_sums<ROWS, COLUMNS>();
                accumulate_parts<P, ROWS, COLUMNS>({s.side.a.row(row), s.side.strip, s.side.steps});
                store_sums<ROWS, COLUMNS>(side_block);
            });
            if (last) {
                to.to += row * to.ld;
                if (to.u) to.u += row * to.ld;
            } else {
                to.to = s.sums + row * STRIP, to.ld = STRIP, to.inside = ~0u;
                to.gain = to.bias = nullptr, to.u = nullptr;
            }
            beside.wait(to);
        }
    }
}

}  // namespace pefast::amx
