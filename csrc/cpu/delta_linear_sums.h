// The gradients of parameters: sums over rows, first within blocks of rows, then over blocks, in an order that only the
// shape decides.
#pragma once

#include "delta_linear_stack.h"

namespace pefast::amx {

// A panel of rows and its block; the first panel of a block begins the sums.
struct Panel {
    int64_t block, begin, rows;  // no rows: there is no such panel
    bool first;                  // of its block
};

// 32 columns of the sums of slots, and how many numbers further the next 32 columns lie; 0: nowhere.
struct SumsStrip {
    float* at;
    int64_t apart;
};

class ParameterSums {
  public:
    ParameterSums(const DeltaBackward& g, const Stack& stack) : g(g), stack(stack) {
        for (size_t i = 0; i < g.siblings.size(); ++i) {
            const Range chunks = stack.siblings[i];
            const int64_t rows = rows_before(chunks.end) - rows_before(chunks.begin);
            of.push_back({rows, db_size, nullptr, nullptr});
            db_size += padded(g.siblings[i].N, STRIP) * rows;
        }
        for (const Place& p : stack.places) {
            const Gradients& to = asked(p);
            any_da = any_da || to.da, any_db = any_db || to.db || to.dd, any_dc = any_dc || to.dc;
        }
        da_size = padded(g.K, STRIP) * stack.rows;
    }

    bool any_da = false, any_db = false, any_dc = false;

    const Gradients& asked(const Place& p) const { return g.siblings[p.sibling].gradients[p.number]; }
    bool columns_of(size_t sibling) const { return g.siblings[sibling].dbias || g.siblings[sibling].dgain; }

    // `by_strip`: each strip is finished before the next begins, so one has room enough
    void take_memory(Scratch& scratch, int64_t count, bool by_strip) {
        blocks = count, one_strip = by_strip;
        const auto size = [&](int64_t all) { return one_strip ? stack.rows * STRIP : blocks * all; };
        da = scratch.take<float>(any_da ? size(da_size) : 0);
        db = scratch.take<float>(any_db ? size(db_size) : 0);
        dc = scratch.take<float>(any_dc ? blocks * stack.slots : 0);
        for (size_t i = 0; i < of.size(); ++i) {
            const int64_t size = columns_of(i) ? blocks * padded(g.siblings[i].N, STRIP) : 0;
            of[i].dbias = scratch.take<float>(size), of[i].dgain = scratch.take<float>(size);
        }
    }

    // 32 columns of da of every slot [slots, 32], and of db of a sibling's slots
    SumsStrip da_strip(int64_t block, int64_t strip) const {
        if (one_strip) return {da, 0};
        return {da + block * da_size + strip * STRIP * stack.rows, STRIP * stack.rows};
    }
    SumsStrip db_strip(int64_t block, size_t sibling, int64_t strip) const {
        float* const all = db - rows_before(stack.siblings[sibling].begin) * STRIP;
        const int64_t apart = STRIP * of[sibling].rows;
        if (one_strip) return {all, 0};
        return {all + block * db_size + of[sibling].db + strip * apart, apart};
    }

    // chunks of a strip += waist_t [slots, ldt] times 32 columns of a panel's rows; pair(row, tiles) packs 32 rows of
    // them to room [rows, 32], beside the products
    template <class Pair>
    void add_rows(const bf16* waist_t, int64_t ldt, Range chunks, const Panel& p, int64_t columns, bf16* room,
                  SumsStrip strip, const Pair& pair) const {
        const int64_t steps = parts(p.rows, STEP);
        // two steps ahead: a tile is not loaded from lines that were stored a moment ago
        int64_t next = 0;
        const auto pair_next = [&] {
            if (next < steps) pair(next * STEP, room + next * 2 * TILE), ++next;
        };
        pair_next(), pair_next();
        // the sums of the next strip come to the first cache, from where the panel before has left them
        const int64_t before = rows_before(chunks.begin);
        const float* ahead = strip.at + strip.apart + before * STRIP;
        int64_t lines = strip.apart ? 2 * (rows_before(chunks.end) - before) : 0;
        const int64_t each = parts(lines, (chunks.end - chunks.begin) * (steps - 1) + 1);
        const auto beside = [&] {
            pair_next();
            for (int64_t i = 0; i < each && lines > 0; ++i, --lines, ahead += SIDE)
                _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
        };
        float* leaving = nullptr;  // where the sums in four tiles go while the next chunk begins
        const auto leave = [&] {
            if (leaving) store_sums<2, 2>(leaving);
            leaving = nullptr;
        };
        for (int64_t i = chunks.begin; i < chunks.end; ++i) {
            const Chunk& c = stack.chunks[i];
            float* sums = strip.at + c.rows_before * STRIP;
            Factors f = {waist_t + c.slot * ldt, ldt, room, steps};
            sized(c.used, columns, [&](auto tall, auto wide) {
                constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
                constexpr bool FOUR = ROWS == 2 && COLUMNS == 2;
                if (FOUR && leaving) {
                    p.first ? turn_over<false, Keep::strip>(f.a, ldt, room, leaving, nullptr, 0)
                            : turn_over<true, Keep::strip>(f.a, ldt, room, leaving, sums, STRIP * 4);
                    f = but_first_step(f);
                } else {
                    leave();
                    p.first ? clear_sums<ROWS, COLUMNS>() : load_sums<ROWS, COLUMNS>(sums);
                }
                accumulate<ROWS, COLUMNS>(f, beside);
                FOUR ? void(leaving = sums) : store_sums<ROWS, COLUMNS>(sums);
            });
        }
        leave();
    }

    // dbias += Σ dy and dgain += Σ dy ⊙ u for 32 columns
    void add_columns(size_t sibling, int64_t strip, const Panel& p) const {
        const SiblingBackward& one = g.siblings[sibling];
        const int64_t n = strip * STRIP, at = p.block * padded(one.N, STRIP) + n;
        const __mmask32 inside = first(one.N - n);
        float *bias = of[sibling].dbias + at, *gain = of[sibling].dgain + at;
        __m512 sums[4];
        for (int64_t j = 0; j < 4; ++j)
            sums[j] = p.first ? _mm512_setzero_ps() : _mm512_load_ps((j < 2 ? bias : gain) + j % 2 * SIDE);
        for (int64_t r = p.begin; r < p.begin + p.rows; ++r) {
            const __m512i dy = _mm512_maskz_loadu_epi16(inside, one.dy + r * one.lddy + n);
            const __m512 low = widen_low(dy), high = widen_high(dy);
            sums[0] = _mm512_add_ps(sums[0], low), sums[1] = _mm512_add_ps(sums[1], high);
            if (!one.u) continue;
            const __m512i u = _mm512_maskz_loadu_epi16(inside, one.u + r * one.N + n);
            sums[2] = _mm512_fmadd_ps(low, widen_low(u), sums[2]);
            sums[3] = _mm512_fmadd_ps(high, widen_high(u), sums[3]);
        }
        for (int64_t j = 0; j < 4; ++j) _mm512_store_ps((j < 2 ? bias : gain) + j % 2 * SIDE, sums[j]);
    }

    // dc += Σ dz: a row of dz_t [slots, ldt] for each slot
    void add_dc(const bf16* dz_t, int64_t ldt, const Panel& p, Team team) const {
        for (const Place& place : stack.places) {
            if (!asked(place).dc) continue;
            for (int64_t r = team.begin(place.s->R); r < team.end(place.s->R); ++r) {
                const bf16* row = dz_t + (place.slot + r) * ldt;
                __m512 sum = _mm512_setzero_ps();
                for (int64_t m = 0; m < p.rows; m += 32) {
                    const __m512i v = _mm512_maskz_loadu_epi16(first(p.rows - m), row + m);
                    sum = _mm512_add_ps(sum, _mm512_add_ps(widen_low(v), widen_high(v)));
                }
                float& to = dc[p.block * stack.slots + place.slot + r];
                to = _mm512_reduce_add_ps(sum) + (p.first ? 0 : to);
            }
        }
    }

    // all blocks together, to where they were asked for: 32 columns of da. Out of line, like finish_db: inside the walk
    // over the strips it cost 3 % of the backward pass at 64 rows.
    __attribute__((noinline)) void finish_da(int64_t strip) const {
        for (const Place& place : stack.places)
            if (float* to = asked(place).da) finish_da(place, strip, to);
    }

    // of a sibling's db and dd
    __attribute__((noinline)) void finish_db(size_t sibling, int64_t strip) const {
        for (const Place& place : stack.places) {
            const Gradients& to = asked(place);
            if (place.sibling != static_cast<int64_t>(sibling)) continue;
            if (to.db) finish_db(place, place.slot, place.s->R, strip, to.db);
            if (to.dd) finish_db(place, place.ones, 1, strip, to.dd);
        }
    }

    // and what was not finished by strip
    void finish(Team team) const {
        const int64_t across = any_da && !one_strip ? parts(g.K, STRIP) : 0;
        for (int64_t s = team.begin(across); s < team.end(across); ++s) finish_da(s);
        for (size_t i = 0; i < of.size() && !one_strip; ++i) {
            const int64_t down = parts(g.siblings[i].N, STRIP);
            for (int64_t s = team.begin(down); s < team.end(down); ++s) finish_db(i, s);
        }
        for (const Place& place : stack.places) {
            const Gradients& to = asked(place);
            for (int64_t r = team.begin(place.s->R); to.dc && r < team.end(place.s->R); ++r) {
                to.dc[r] = 0;
                for (int64_t i = 0; i < blocks; ++i) to.dc[r] += dc[i * stack.slots + place.slot + r];
            }
        }
        for (size_t i = 0; i < of.size(); ++i) {
            finish_columns(g.siblings[i].dbias, of[i].dbias, g.siblings[i].N, team);
            finish_columns(g.siblings[i].dgain, of[i].dgain, g.siblings[i].N, team);
        }
    }

  private:
    // of each sibling
    struct One {
        int64_t rows, db;      // its slots, each chunk filled up to 16, and where its db begins
        float *dbias, *dgain;  // [blocks, N filled up to 32]
    };

    int64_t rows_before(int64_t chunk) const {
        return chunk < static_cast<int64_t>(stack.chunks.size()) ? stack.chunks[chunk].rows_before
                                                                 : stack.rows;
    }

    // 16 columns of a slot, over all blocks
    __m512 over_blocks(const float* strip, int64_t slot, int64_t size) const {
        return over_blocks(strip + (stack.chunks[slot / 32].rows_before + slot % 32) * STRIP, size);
    }
    __m512 over_blocks(const float* from, int64_t size) const {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < blocks; ++i) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + i * size));
        return sum;
    }

    void finish_da(const Place& place, int64_t strip, float* to) const {
        const __m512 scale = _mm512_set1_ps(place.s->keep_scale);
        for (int64_t k = strip * STRIP; k < std::min((strip + 1) * STRIP, g.K); k += SIDE) {
            const __mmask16 inside = static_cast<__mmask16>(first(std::min(g.K - k, SIDE)));
            const float* sums = da_strip(0, strip).at + k % STRIP;
            for (int64_t r = 0; r < place.s->R; ++r)
                _mm512_mask_storeu_ps(to + r * g.K + k, inside,
                                      _mm512_mul_ps(over_blocks(sums, place.slot + r, da_size), scale));
        }
    }

    // rows of dbᵀ from a slot on, turned: to [N, R]
    void finish_db(const Place& place, int64_t slot, int64_t R, int64_t strip, float* to) const {
        const __m512 scale = _mm512_set1_ps(place.s->scale);
        const int64_t N = g.siblings[place.sibling].N;
        for (int64_t n = strip * STRIP; n < std::min((strip + 1) * STRIP, N); n += SIDE) {
            const float* sums = db_strip(0, place.sibling, strip).at + n % STRIP;
            for (int64_t r = 0; r < R; r += SIDE) {
                const int64_t count = std::min(R - r, SIDE);
                __m512i v[16];
#pragma GCC unroll 16
                for (int64_t i = 0; i < 16; ++i)
                    v[i] = i < count ? _mm512_castps_si512(
                                           _mm512_mul_ps(over_blocks(sums, slot + r + i, db_size), scale))
                                     : _mm512_setzero_si512();
                transpose(v);
                const __mmask16 inside = static_cast<__mmask16>(first(count));
                for (int64_t i = 0; i < std::min(N - n, SIDE); ++i)
                    _mm512_mask_storeu_epi32(to + (n + i) * R + r, inside, v[i]);
            }
        }
    }

    void finish_columns(float* to, const float* from, int64_t N, Team team) const {
        const int64_t halves = parts(N, SIDE);
        for (int64_t half = team.begin(halves); to && half < team.end(halves); ++half) {
            const __mmask16 inside = static_cast<__mmask16>(first(std::min(N - half * SIDE, SIDE)));
            _mm512_mask_storeu_ps(to + half * SIDE, inside,
                                  over_blocks(from + half * SIDE, padded(N, STRIP)));
        }
    }

    const DeltaBackward& g;
    const Stack& stack;
    bool one_strip = false;
    int64_t blocks = 0, da_size = 0, db_size = 0;
    float *da = nullptr, *db = nullptr,
          *dc = nullptr;  // [blocks, strips, slots, 32], so each sibling's; [blocks, slots]
    std::vector<One> of;
};

}  // namespace pefast::amx
