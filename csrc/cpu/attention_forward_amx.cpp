#include <cmath>

#include "attention_amx.h"

namespace pefast {

using namespace amx;

namespace {

// keys between two looks at the largest x: 32 rows of x in fp32 and of w in bf16 stay near the first cache
constexpr int64_t KEYS = 256;
constexpr int64_t LDX = KEYS + SIDE, LDW = KEYS + STEP;

// the sums of up to 32 rows, into rows of LDX
template <int ROWS>
inline void store_wide(float* x) {
    _tile_stored(0, x, LDX * 4);
    _tile_stored(1, x + SIDE, LDX * 4);
    if (ROWS == 2) _tile_stored(2, x + SIDE * LDX, LDX * 4);
    if (ROWS == 2) _tile_stored(3, x + SIDE * LDX + SIDE, LDX * 4);
}

class Forward {
  public:
    Forward(const AttentionForward& call, int threads)
        : f(call),
          sight(call),
          steps(parts(f.D, STEP)),
          ldd(spread(f.D)),
          key_steps(parts(f.keys(), STEP)),
          R(f.group_rows()),
          factor(f.scale * LOG2_E),
          alone(f.B * f.G >= threads) {
        Scratch& scratch = Scratch::of_this_thread();
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) {
            slot.k = scratch.take<bf16>(key_steps * steps * 2 * TILE);
            slot.v = scratch.take<bf16>(key_steps * steps * 2 * TILE);
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.rows = scratch.take<bf16>(32 * ldd);
            own.x = scratch.take<float>(32 * LDX);
            own.w = scratch.take<bf16>(32 * LDW);
            own.o = scratch.take<float>(steps * BLOCK);
            own.keep = scratch.take<uint32_t>(32 * KEYS / 32);
        }
    }

    void run(Team team) {
        const int64_t items = f.B * f.G;
        if (alone) {
            for (int64_t i = team.rank; i < items; i += team.size)
                item(i / f.G, i % f.G, Team{0, 1}, slots[team.rank], owns[team.rank]);
        } else {
            for (int64_t i = 0; i < items; ++i) item(i / f.G, i % f.G, team, slots[0], owns[team.rank]);
        }
    }

  private:
    // the keys and values of one key head, packed
    struct Slot {
        bf16* k;  // [key_steps, steps, 2, 512]  the sum runs over D, columns are keys
        bf16* v;  // [steps, key_steps, 2, 512]  the sum runs over keys, columns are D
    };
    // what each thread needs for itself
    struct Own {
        bf16* rows;      // [32, ldd]
        float* x;        // [32, LDX]  q kᵀ
        bf16* w;         // [32, LDW]  2^(x - largest)
        float* o;        // [steps, 32, 32]
        uint32_t* keep;  // [32, KEYS / 32]
        float largest[32], sum[32];
    };
    // 32 rows of a group
    struct Block {
        int64_t b, g, row, rows;
    };

    void item(int64_t b, int64_t g, Team team, const Slot& slot, Own& own) {
        for (int64_t s = team.begin(key_steps); s < team.end(key_steps); ++s) pack(b, g, s, slot, own);
        team.wait();
        for (int64_t row = 32 * team.rank; row < R; row += 32 * team.size)
            rows({b, g, row, std::min<int64_t>(R - row, 32)}, slot, own);
        team.wait();
    }

    void pack(int64_t b, int64_t g, int64_t s, const Slot& slot, const Own& own) {
        copy_keys(f, f.prefix_k, f.k, b, g, s * STEP, own.rows, ldd);
        for (int64_t d = 0; d < steps; ++d)
            pack_step_across(own.rows + d * STEP, ldd, STEP, STRIP, slot.k + (s * steps + d) * 2 * TILE);
        copy_keys(f, f.prefix_v, f.v, b, g, s * STEP, own.rows, ldd);
        for (int64_t d = 0; d < steps; ++d)
            pack_step_along(own.rows + d * STEP, ldd, STEP, STRIP, slot.v + (d * key_steps + s) * 2 * TILE);
    }

    void rows(const Block& block, const Slot& slot, Own& own) {
        copy_queries(f, f.q, block.b, block.g, block.row, own.rows, ldd);
        // below everything, and finite: a difference of two of them must not be NaN
        std::fill_n(own.largest, 32, -3e38f);
        std::fill_n(own.sum, 32, 0.0f);
        const int64_t last = block.row % f.L + block.rows;
        const int64_t limit = sight.limit(std::min(last, f.L));
        for (int64_t key = 0; key < limit; key += KEYS) {
            const int64_t count = parts(std::min(KEYS, limit - key), STEP);
            scores(key / STEP, count, block.rows, slot, own);
            if (f.dropout) keeps(block, key, count, own);
            for (int64_t r = 0; r < block.rows; ++r) weights(block, r, key, count, own);
            values(key / STEP, count, block.rows, slot, own);
        }
        if (limit <= 0) std::fill_n(own.o, steps * BLOCK, 0.0f);
        for (int64_t r = 0; r < block.rows; ++r) finish(block, r, own);
    }

    // x of `count` strips of keys
    void scores(int64_t strip, int64_t count, int64_t rows, const Slot& slot, const Own& own) {
        for (int64_t s = 0; s < count; ++s) {
            const Factors factors = {own.rows, ldd, slot.k + (strip + s) * steps * 2 * TILE, steps};
            sized(rows, STRIP, [&](auto tall, auto) {
                constexpr int ROWS = decltype(tall)::value;
                clear_sums<ROWS, 2>();
                accumulate<ROWS, 2>(factors);
                store_wide<ROWS>(own.x + s * STRIP);
            });
        }
    }

    void keeps(const Block& block, int64_t key, int64_t count, const Own& own) {
        for (int64_t r = 0; r < block.rows; ++r)
            for (int64_t s = 0; s < count; s += 4)
                keep_keys(f, block.b, block.g, block.row + r, (key / STEP + s) / 4,
                          own.keep + r * (KEYS / 32) + s);
    }

    void weights(const Block& block, int64_t r, int64_t key, int64_t count, Own& own) {
        const int64_t l = (block.row + r) % f.L;
        // the last strip decides: the ones before it end earlier
        if (sight.plain(l, key + (count - 1) * STEP))
            weights_of<true>(block.b, l, r, key, count, own);
        else
            weights_of<false>(block.b, l, r, key, count, own);
    }

    // w of one row from its x, and what the sums so far are worth now
    template <bool PLAIN>
    void weights_of(int64_t b, int64_t l, int64_t r, int64_t key, int64_t count, Own& own) {
        float* x = own.x + r * LDX;
        bf16* w = own.w + r * LDW;
        __mmask32 see[KEYS / 32];
        __m512 high = _mm512_set1_ps(-3e38f);
        for (int64_t s = 0; s < count; ++s) {
            see[s] = PLAIN ? ~0u : sight(b, l, key + s * STEP);
            const __m512 one = _mm512_load_ps(x + s * STRIP), two = _mm512_load_ps(x + s * STRIP + SIDE);
            high = _mm512_mask_max_ps(high, static_cast<__mmask16>(see[s]), high, one);
            high = _mm512_mask_max_ps(high, static_cast<__mmask16>(see[s] >> 16), high, two);
        }
        const float before = own.largest[r];
        const float now = std::max(before, _mm512_reduce_max_ps(high) * factor);
        const __m512 scale = _mm512_set1_ps(factor), top = _mm512_set1_ps(now);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t s = 0; s < count; ++s) {
            __m512 low = _mm512_fmsub_ps(_mm512_load_ps(x + s * STRIP), scale, top);
            __m512 more = _mm512_fmsub_ps(_mm512_load_ps(x + s * STRIP + SIDE), scale, top);
            low = power_of_two(low), more = power_of_two(more);
            if (!PLAIN) {
                low = _mm512_maskz_mov_ps(static_cast<__mmask16>(see[s]), low);
                more = _mm512_maskz_mov_ps(static_cast<__mmask16>(see[s] >> 16), more);
            }
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, more));
            __m512i both = rounded(low, more);
            if (f.dropout) both = _mm512_maskz_mov_epi16(own.keep[r * (KEYS / 32) + s], both);
            _mm512_store_si512(w + s * STRIP, both);
        }
        const float shrink = std::exp2(before - now);
        own.largest[r] = now;
        own.sum[r] = own.sum[r] * shrink + _mm512_reduce_add_ps(sum);
        if (key > 0 && shrink != 1) shrink_row(r, shrink, own);
    }

    void shrink_row(int64_t r, float shrink, const Own& own) {
        const __m512 by = _mm512_set1_ps(shrink);
        for (float* o = own.o + r * STRIP; o < own.o + steps * BLOCK; o += BLOCK) {
            _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), by));
            _mm512_store_ps(o + SIDE, _mm512_mul_ps(_mm512_load_ps(o + SIDE), by));
        }
    }

    // o += w v
    void values(int64_t step, int64_t count, int64_t rows, const Slot& slot, const Own& own) {
        for (int64_t d = 0; d < steps; ++d) {
            const Factors factors = {own.w, LDW, slot.v + (d * key_steps + step) * 2 * TILE, count};
            float* o = own.o + d * BLOCK;
            sized(rows, f.D - d * STRIP, [&](auto tall, auto wide) {
                constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
                step ? load_sums<ROWS, COLUMNS>(o) : clear_sums<ROWS, COLUMNS>();
                accumulate<ROWS, COLUMNS>(factors);
                store_sums<ROWS, COLUMNS>(o);
            });
        }
    }

    void finish(const Block& block, int64_t r, const Own& own) {
        const int64_t head = block.g * (f.H / f.G) + (block.row + r) / f.L, l = (block.row + r) % f.L;
        const float sum = own.sum[r];
        const float by = sum == 0 ? 0 : (f.dropout ? f.keep_scale : 1) / sum;
        const __m512 scale = _mm512_set1_ps(by);
        bf16* to = f.o.at(block.b, head, l);
        for (int64_t d = 0; d < steps; ++d) {
            const float* o = own.o + d * BLOCK + r * STRIP;
            const __m512 low = _mm512_mul_ps(_mm512_load_ps(o), scale);
            const __m512 high = _mm512_mul_ps(_mm512_load_ps(o + SIDE), scale);
            _mm512_mask_storeu_epi16(to + d * STRIP, first(f.D - d * STRIP), rounded(low, high));
        }
        f.lse[(block.b * f.H + head) * f.L + l] = sum == 0 ? 0 : own.largest[r] + std::log2(sum);
    }

    const AttentionForward& f;
    const Sight sight;
    const int64_t steps, ldd, key_steps, R;
    const float factor;
    const bool alone;  // each key head is one thread's
    std::vector<Slot> slots;
    std::vector<Own> owns;
};

}  // namespace

void attention_forward_amx(const AttentionForward& call, int threads) {
    Forward forward(call, threads);
    together(threads, [&](Team team) { forward.run(team); });
}

}  // namespace pefast
