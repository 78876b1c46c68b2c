#include <cmath>

#include "attention_amx.h"

namespace pefast {

using namespace amx;

namespace {

// keys between two looks at the largest x: x of 32 queries in fp32 and w in bf16 stay near the first cache
constexpr int64_t KEYS = 256;
// below everything, and finite: a difference of two of them must not be NaN
constexpr float LOWEST = -3e38f;

// As in backward x is computed transposed, keys down and queries across: the largest x and the sum of a query are then
// a lane of a vector, and nothing is added up within one.
class Forward {
  public:
    Forward(const AttentionForward<bf16>& call, int threads)
        : f(call),
          sight(call),
          steps(parts(f.D, STEP)),
          ldd(spread(f.D)),
          key_steps(parts(f.keys(), STEP)),
          ldk(spread(key_steps * STEP)),
          R(f.group_rows()),
          alone(f.B * f.G >= threads) {
        Scratch& scratch = Scratch::of_this_thread();
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) {
            slot.k = scratch.take<bf16>(key_steps * STEP * ldd);
            slot.v_t = scratch.take<bf16>(steps * STEP * ldk);
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.rows = scratch.take<bf16>(32 * ldd);
            own.q = scratch.take<bf16>(steps * 2 * TILE);
            own.x = scratch.take<float>(KEYS / STEP * BLOCK);
            own.w = scratch.take<bf16>(KEYS / STEP * 2 * TILE);
            own.o = scratch.take<float>(steps * BLOCK);
            own.see = scratch.take<uint32_t>(KEYS);
            own.keep = scratch.take<uint32_t>(KEYS);
        }
    }

    void run(Team team) {
        const int64_t items = f.B * f.G;
        if (alone) {
            for (int64_t i = team.rank; i < items; i += team.size) {
                foresee(i + team.size, owns[team.rank].ahead);
                item(i / f.G, i % f.G, Team{0, 1}, slots[team.rank], owns[team.rank]);
            }
        } else {
            for (int64_t i = 0; i < items; ++i) item(i / f.G, i % f.G, team, slots[0], owns[team.rank]);
        }
    }

  private:
    // the keys and values of one key head
    struct Slot {
        bf16* k;    // [key_steps * 32, ldd]
        bf16* v_t;  // [steps * 32, ldk]
    };
    // what each thread needs for itself
    struct Own {
        bf16* rows;            // [32, ldd]
        bf16* q;               // [steps, 2, 512]  packed: the sum runs over D
        float* x;              // [KEYS / 32, 32, 32]  k qᵀ
        bf16* w;               // [KEYS / 32, 2, 512]  2^(x - largest), packed: the sum runs over keys
        float* o;              // [steps, 32, 32]  transposed
        uint32_t *see, *keep;  // [KEYS / 32, 32]  bit j of a query's word is key j
        __m512 largest[2], sum[2];
        bool plain[KEYS / STEP];  // all queries see all keys of the step
        Ahead ahead;
    };
    // 32 queries of a group
    struct Block {
        int64_t b, g, row, rows;
    };

    // what key head i reads and writes; longer heads have enough to do to wait little
    void foresee(int64_t i, Ahead& ahead) const {
        ahead.clear();
        if (R > 512 || f.keys() > 512 || i >= f.B * f.G) return;
        const int64_t b = i / f.G, g = i % f.G, times = f.H / f.G;
        ahead.add(f.q, b, g * times, times, f.L, f.D);

        for (const auto& t : {f.k, f.v}) ahead.add(t, b, g, 1, f.S, f.D);
        ahead.add(f.o, b, g * times, times, f.L, f.D);
        ahead.share(parts(R, STRIP) * key_steps * 16);
    }

    void item(int64_t b, int64_t g, Team team, const Slot& slot, Own& own) {
        for (int64_t s = team.begin(key_steps); s < team.end(key_steps); ++s) {
            const int64_t j = s * STEP;
            copy_keys(f, f.prefix_k, f.k, b, g, j, slot.k + j * ldd, ldd);
            Lines v = {own.rows, ldd, STEP};
            if (j < f.P)
                copy_keys(f, f.prefix_v, f.v, b, g, j, own.rows, ldd);
            else
                v = {f.v.at(b, g, j - f.P), f.v.row, std::min(f.keys() - j, STEP)};
            transpose_rows(v.data, v.ld, v.count, f.D, slot.v_t + j, ldk);
        }
        team.wait();
        for (int64_t row = 32 * team.rank; row < R; row += 32 * team.size)
            queries({b, g, row, std::min<int64_t>(R - row, 32)}, slot, own);
        team.wait();
    }

    void queries(const Block& block, const Slot& slot, Own& own) {
        const Lines q = query_lines(f, f.q, block.b, block.g, block.row, own.rows, ldd);
        for (int64_t d = 0; d < steps; ++d)
            pack_step_across(q.data + d * STEP, q.ld, f.D - d * STEP, q.count, own.q + d * 2 * TILE);
        for (int half = 0; half < 2; ++half)
            own.largest[half] = _mm512_set1_ps(LOWEST), own.sum[half] = _mm512_setzero_ps();
        const int64_t limit = sight.limit(std::min(block.row % f.L + block.rows, f.L));
        for (int64_t key = 0; key < limit; key += KEYS) {
            const int64_t count = parts(std::min(KEYS, limit - key), STEP);
            __m512 high[2] = {_mm512_set1_ps(LOWEST), _mm512_set1_ps(LOWEST)};
            for (int64_t s = 0; s < count; ++s) scores(block, key, s, slot, own, high);
            if (f.dropout) keeps(block, key, count, own);
            renew(high, key > 0, own);
            for (int64_t s = 0; s < count; ++s) {
                if (f.dropout)
                    own.plain[s] ? weights<true, true>(s, own) : weights<false, true>(s, own);
                else
                    own.plain[s] ? weights<true, false>(s, own) : weights<false, false>(s, own);
            }
            values(key, count, block.rows, slot, own);
        }
        finish(block, own);
    }

    // x of 32 keys, and the largest of what is seen
    void scores(const Block& block, int64_t key, int64_t s, const Slot& slot, Own& own, __m512 high[2]) {
        float* x = own.x + s * BLOCK;
        clear_sums<2, 2>();
        accumulate<2, 2>({slot.k + (key + s * STEP) * ldd, ldd, own.q, steps});
        store_sums<2, 2>(x);
        uint32_t* see = own.see + s * 32;
        own.plain[s] = sight.look(block.b, block.row, key + s * STEP, see) == Seen::all;
        __m512 low[2] = {high[0], high[1]};
        for (int64_t j = 0; j < 32; ++j)
            for (int half = 0; half < 2; ++half) {
                const __m512 one = _mm512_load_ps(x + j * STRIP + half * SIDE);
                if (own.plain[s]) {
                    low[half] = _mm512_max_ps(low[half], one);
                } else {
                    const __m512i words = _mm512_load_si512(see + half * SIDE);
                    const __mmask16 seen = _mm512_test_epi32_mask(words, _mm512_set1_epi32(1u << j));
                    low[half] = _mm512_mask_max_ps(low[half], seen, low[half], one);
                }
            }
        high[0] = low[0], high[1] = low[1];
    }

    void keeps(const Block& block, int64_t key, int64_t count, const Own& own) {
        for (int64_t r = 0; r < block.rows; ++r)
            for (int64_t s = 0; s < count; s += 4) {
                uint32_t words[4];
                keep_keys(f, block.b, block.g, block.row + r, (key / STEP + s) / 4, words);
                for (int64_t i = 0; i < 4; ++i) own.keep[(s + i) * 32 + r] = words[i];
            }
    }

    // the largest x so far, and what o and the sums so far are worth beside it
    void renew(const __m512 high[2], bool again, Own& own) {
        __m512 shrink[2];
        for (int half = 0; half < 2; ++half) {
            const __m512 now = _mm512_mul_ps(high[half], _mm512_set1_ps(f.scale * LOG2_E));
            const __m512 largest = _mm512_max_ps(own.largest[half], now);
            shrink[half] = power_of_two(_mm512_sub_ps(own.largest[half], largest));
            own.largest[half] = largest, own.sum[half] = _mm512_mul_ps(own.sum[half], shrink[half]);
        }
        if (!again) return;
        for (float* o = own.o; o < own.o + steps * BLOCK; o += STRIP)
            for (int half = 0; half < 2; ++half)
                _mm512_store_ps(o + half * SIDE,
                                _mm512_mul_ps(_mm512_load_ps(o + half * SIDE), shrink[half]));
    }

    // w of 32 keys, packed, with dropout's mask on it; and the sums without
    template <bool PLAIN, bool DROPPED>
    void weights(int64_t s, Own& own) {
        const float* x = own.x + s * BLOCK;
        bf16* w = own.w + s * 2 * TILE;
        const __m512 factor = _mm512_set1_ps(f.scale * LOG2_E);
        __m512i see[2], keep[2];
        __m512 sum[2] = {own.sum[0], own.sum[1]}, largest[2] = {own.largest[0], own.largest[1]};
        for (int half = 0; half < 2; ++half) {
            if (!PLAIN) see[half] = _mm512_load_si512(own.see + s * 32 + half * SIDE);
            if (DROPPED) keep[half] = _mm512_load_si512(own.keep + s * 32 + half * SIDE);
        }
        for (int64_t j = 0; j < 32; j += 2) {
            own.ahead();
            for (int half = 0; half < 2; ++half) {
                __m512 p[2];
                for (int odd = 0; odd < 2; ++odd) {
                    const __m512i bit = _mm512_set1_epi32(1u << (j + odd));
                    const __m512 one = _mm512_load_ps(x + (j + odd) * STRIP + half * SIDE);
                    p[odd] = power_of_two(_mm512_fmsub_ps(one, factor, largest[half]));
                    if (!PLAIN) p[odd] = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(see[half], bit), p[odd]);
                    sum[half] = _mm512_add_ps(sum[half], p[odd]);
                    if (DROPPED)
                        p[odd] = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(keep[half], bit), p[odd]);
                }
                _mm512_store_si512(w + half * TILE + j / 2 * STEP, paired(p[0], p[1]));
            }
        }
        own.sum[0] = sum[0], own.sum[1] = sum[1];
    }

    // o += w v
    void values(int64_t key, int64_t count, int64_t rows, const Slot& slot, const Own& own) {
        for (int64_t d = 0; d < steps; ++d) {
            const Factors factors = {slot.v_t + d * STEP * ldk + key, ldk, own.w, count};
            float* o = own.o + d * BLOCK;
            sized(f.D - d * STRIP, rows, [&](auto tall, auto wide) {
                constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
                key ? load_sums<ROWS, COLUMNS>(o) : clear_sums<ROWS, COLUMNS>();
                accumulate<ROWS, COLUMNS>(factors);
                store_sums<ROWS, COLUMNS>(o);
            });
        }
    }

    void finish(const Block& block, const Own& own) {
        const __m512 one = _mm512_set1_ps(f.dropout ? f.keep_scale : 1);
        __m512 by[2];
        for (int half = 0; half < 2; ++half) {
            const __mmask16 some = _mm512_cmp_ps_mask(own.sum[half], _mm512_setzero_ps(), _CMP_NEQ_UQ);
            by[half] = _mm512_maskz_div_ps(some, one, own.sum[half]);
        }
        for (int64_t d = 0; d < steps; ++d)
            store_queries(f, f.o, block.b, block.g, block.row, d * STRIP, own.o + d * BLOCK, by);
        alignas(64) float largest[32], sum[32];
        for (int half = 0; half < 2; ++half) {
            _mm512_store_ps(largest + half * SIDE, own.largest[half]);
            _mm512_store_ps(sum + half * SIDE, own.sum[half]);
        }
        // rows of a group follow one another in lse too
        float* lse = f.lse + (block.b * f.H + block.g * (f.H / f.G)) * f.L + block.row;
        for (int64_t r = 0; r < block.rows; ++r) lse[r] = sum[r] == 0 ? 0 : largest[r] + std::log2(sum[r]);
    }

    const AttentionForward<bf16>& f;
    const Sight sight;
    const int64_t steps, ldd, key_steps, ldk, R;
    const bool alone;  // each key head is one thread's
    std::vector<Slot> slots;
    std::vector<Own> owns;
};

}  // namespace

void attention_forward_amx(const AttentionForward<bf16>& call, int threads) {
    Forward forward(call, threads);
    together(threads, [&](Team team) { forward.run(team); });
}

}  // namespace pefast
