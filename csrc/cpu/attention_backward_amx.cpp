#include "attention_amx.h"

namespace pefast {

using namespace amx;

namespace {

// Queries and keys that are held at once: dx of that many by that many, 512 KB in bf16, stays in the second cache.
constexpr int64_t QUERIES = 512, KEYS = 512;

// Everything is computed transposed, keys down and queries across: wᵀ and dxᵀ are then left factors as they lie, and
// what belongs to a query is a vector.
class Backward {
  public:
    Backward(const AttentionBackward<bf16>& call, int threads)
        : f(call),
          sight(call),
          steps(parts(f.D, STEP)),
          ldd(spread(f.D)),
          key_steps(parts(f.keys(), STEP)),
          R(f.group_rows()),
          height(std::min<int64_t>(padded(R, STRIP), QUERIES)),
          panels(parts(R, height)),
          chunk_steps(std::min<int64_t>(key_steps, KEYS / STEP)),
          ldr(spread(height)),
          ldk(spread(key_steps * STEP)),
          shared(f.P > 0 && f.prefix_k.batch == 0 && f.B > 1),
          alone((shared ? f.G : f.B * f.G) >= threads) {
        Scratch& scratch = Scratch::of_this_thread();
        const int64_t prefix = shared ? f.G * f.P * steps * STEP : 0;
        prefix_dk = scratch.take<float>(prefix), prefix_dv = scratch.take<float>(prefix);
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) take_slot(scratch, slot);
        owns.resize(threads);
        for (Own& own : owns) {
            own.rows = scratch.take<bf16>(32 * ldd);
            own.w = scratch.take<bf16>(32 * ldr);
            own.dx = scratch.take<bf16>(32 * ldr);
            own.x = scratch.take<float>(BLOCK);
            own.dw = scratch.take<float>(BLOCK);
        }
    }

    void run(Team team) {
        int64_t b, g;
        if (alone) {
            for (int64_t n = 0; nth(n, team, b, g); ++n) {
                foresee(n + 1, team, owns[team.rank].ahead);
                item(b, g, Team{0, 1}, slots[team.rank], owns[team.rank]);
            }
        } else {
            for (int64_t n = 0; nth(n, Team{0, 1}, b, g); ++n) item(b, g, team, slots[0], owns[team.rank]);
        }
    }

  private:
    // the queries of a panel in both packings: the sum runs over D, or over queries
    struct Packed {
        bf16* across;  // [height / 32, steps, 2, 512]
        bf16* along;   // [steps, height / 32, 2, 512]
    };
    // what belongs to one key head
    struct Slot {
        bf16 *k, *v;         // [key_steps * 32, ldd]
        bf16* k_t;           // [steps * 32, ldk]
        Packed q, d_o;       // of the panel
        float *lse, *delta;  // [height]
        uint32_t* keep;      // [chunk_steps, height]  dropout's mask: bit j of a query's word is key j
        bf16* dx;            // [height / 32, chunk_steps, 2, 512]  packed: the sum runs over keys
        float* dq;           // [height / 32, steps, 32, 32]  transposed
        float *dk, *dv;      // [key_steps, steps, 32, 32]  over panels
    };
    // what each thread needs for itself
    struct Own {
        bf16* rows;     // [32, ldd]
        bf16 *w, *dx;   // [32, ldr]  of 32 keys, transposed
        float *x, *dw;  // [32, 32]
        Ahead ahead;
    };
    // queries and keys of one step of the work
    struct Place {
        int64_t b, g;
        int64_t row, strips;        // the panel's first row of the group, and its strips of queries
        int64_t first_step, count;  // the chunk's strips of keys
    };

    void take_slot(Scratch& scratch, Slot& slot) {
        const int64_t keys = key_steps * STEP, strips = height / STRIP;
        slot.k = scratch.take<bf16>(keys * ldd), slot.v = scratch.take<bf16>(keys * ldd);
        slot.k_t = scratch.take<bf16>(steps * STEP * ldk);
        for (Packed* p : {&slot.q, &slot.d_o}) {
            p->across = scratch.take<bf16>(height * steps * STEP);
            p->along = scratch.take<bf16>(height * steps * STEP);
        }
        slot.lse = scratch.take<float>(height), slot.delta = scratch.take<float>(height);
        slot.keep = scratch.take<uint32_t>(f.dropout ? padded(chunk_steps, 4) * height : 0);
        slot.dx = scratch.take<bf16>(strips * chunk_steps * 2 * TILE);
        slot.dq = scratch.take<float>(strips * steps * BLOCK);
        const int64_t kept = panels > 1 ? key_steps * steps * BLOCK : 0;
        slot.dk = scratch.take<float>(kept), slot.dv = scratch.take<float>(kept);
    }

    // The key head that is number n for this thread. Heads of one batch row are neighbours in memory, so they follow
    // one another; under a shared prefix a thread keeps its heads for the whole batch, whose order is then the sum's.
    bool nth(int64_t n, Team team, int64_t& b, int64_t& g) const {
        const int64_t heads = shared ? parts(f.G - team.rank, team.size) : 0;
        const int64_t item = team.rank + n * team.size;
        b = shared ? n / heads : item / f.G;
        g = shared ? team.rank + n % heads * team.size : item % f.G;
        return b < f.B;
    }

    // what number n reads and writes; longer heads have enough to do to wait little
    void foresee(int64_t n, Team team, Ahead& ahead) const {
        int64_t b, g;
        ahead.clear();
        if (R > QUERIES || f.keys() > KEYS || !nth(n, team, b, g)) return;
        const int64_t times = f.H / f.G;
        for (const auto& t : {f.q, f.d_o, f.o}) ahead.add(t, b, g * times, times, f.L, f.D);
        for (const auto& t : {f.k, f.v}) ahead.add(t, b, g, 1, f.S, f.D);

        for (const auto& t : {f.dk, f.dv}) ahead.add(t, b, g, 1, f.S, f.D);
        ahead.add(f.dq, b, g * times, times, f.L, f.D);
        ahead.share(key_steps * parts(R, STRIP) * 16);
    }

    void item(int64_t b, int64_t g, Team team, const Slot& slot, Own& own) {
        for (int64_t s = team.begin(key_steps); s < team.end(key_steps); ++s) {
            const int64_t j = s * STEP;
            copy_keys(f, f.prefix_k, f.k, b, g, j, slot.k + j * ldd, ldd);
            copy_keys(f, f.prefix_v, f.v, b, g, j, slot.v + j * ldd, ldd);
            transpose_rows(slot.k + j * ldd, ldd, STEP, f.D, slot.k_t + j, ldk);
        }
        for (int64_t p = 0; p < panels; ++p) {
            Place at = {b, g, p * height, parts(std::min(R - p * height, height), STRIP), 0, 0};
            for (int64_t s = team.rank; s < at.strips; s += team.size) queries(at, s, slot, own);
            for (; at.first_step < key_steps; at.first_step += chunk_steps) {
                at.count = std::min(chunk_steps, key_steps - at.first_step);
                if (f.dropout) keeps(at, team, slot);
                team.wait();
                for (int64_t s = team.rank; s < at.count; s += team.size) keys(at, s, slot, own);
                team.wait();
                for (int64_t s = team.rank; s < at.strips; s += team.size) finish_queries(at, s, slot);
            }
            team.wait();
        }
    }

    // strip s of a panel's queries: q and do packed, lse, delta
    void queries(const Place& at, int64_t s, const Slot& slot, Own& own) {
        const int64_t begin = at.row + s * STRIP;
        pack_both(query_lines(f, f.q, at.b, at.g, begin, own.rows, ldd), s, slot.q);
        const Lines d_o = query_lines(f, f.d_o, at.b, at.g, begin, own.rows, ldd);
        pack_both(d_o, s, slot.d_o);
        // rows of a group follow one another in lse
        const float* lse = f.lse + (at.b * f.H + at.g * (f.H / f.G)) * f.L;
        int64_t head = at.g * (f.H / f.G) + begin / f.L, l = begin % f.L;
        for (int64_t i = 0; i < STRIP; ++i) {
            const bool inside = begin + i < R;
            slot.lse[s * STRIP + i] = inside ? lse[begin + i] : 0;
            slot.delta[s * STRIP + i] = inside ? dot(f.o.at(at.b, head, l), d_o.data + i * d_o.ld) : 0;
            if (++l == f.L) l = 0, ++head;
        }
    }

    void pack_both(const Lines& rows, int64_t s, const Packed& to) {
        for (int64_t d = 0; d < steps; ++d) {
            const bf16* from = rows.data + d * STEP;
            const int64_t columns = f.D - d * STEP, at_along = (d * (height / STRIP) + s) * 2 * TILE;
            pack_step_across(from, rows.ld, columns, rows.count, to.across + (s * steps + d) * 2 * TILE);
            pack_step_along(from, rows.ld, rows.count, columns, to.along + at_along);
        }
    }

    // two rows of D numbers
    float dot(const bf16* one, const bf16* two) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < f.D; d += 32) {
            const __mmask32 inside = first(f.D - d);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(inside, one + d),
                                   (__m512bh)_mm512_maskz_loadu_epi16(inside, two + d));
        }
        return _mm512_reduce_add_ps(sum);
    }

    // the mask of dropout for a panel and a chunk
    void keeps(const Place& at, Team team, const Slot& slot) {
        const int64_t rows = std::min(R - at.row, height);
        for (int64_t r = team.begin(rows); r < team.end(rows); ++r)
            for (int64_t s = 0; s < at.count; s += 4) {
                uint32_t words[4];
                keep_keys(f, at.b, at.g, at.row + r, (at.first_step + s) / 4, words);
                for (int64_t i = 0; i < 4; ++i) slot.keep[(s + i) * height + r] = words[i];
            }
    }

    // strip s of a chunk's keys, against the panel's queries
    void keys(const Place& at, int64_t s, const Slot& slot, Own& own) {
        const int64_t step = at.first_step + s, rows = std::min<int64_t>(f.keys() - step * STEP, STRIP);
        // strips of queries that see one of these keys
        int64_t begin = at.strips, end = 0;
        for (int64_t strip = 0; strip < at.strips; ++strip)
            if (meet(at, s, strip, slot, own)) begin = std::min(begin, strip), end = strip + 1;
        const int64_t count = std::max<int64_t>(end - begin, 0);
        begin = count ? begin : 0;
        for (int64_t d = 0; d < steps; ++d) {
            const int64_t at_d = (d * (height / STRIP) + begin) * 2 * TILE;
            gradient({own.w + begin * STRIP, ldr, slot.d_o.along + at_d, count}, at, step, d, rows, slot.dv,
                     own.x);
            gradient({own.dx + begin * STRIP, ldr, slot.q.along + at_d, count}, at, step, d, rows, slot.dk,
                     own.dw);
            if (at.row + height < R) continue;
            const float* dv = panels > 1 ? slot.dv + (step * steps + d) * BLOCK : own.x;
            const float* dk = panels > 1 ? slot.dk + (step * steps + d) * BLOCK : own.dw;
            finish_keys(at, step, d, rows, dv, f.dropout ? f.keep_scale : 1, f.dv, f.dprefix_v, prefix_dv);
            finish_keys(at, step, d, rows, dk, f.scale, f.dk, f.dprefix_k, prefix_dk);
        }
    }

    // 32 keys by 32 columns of dk or dv: the panel's part, added to those of panels before
    void gradient(const Factors& factors, const Place& at, int64_t step, int64_t d, int64_t rows, float* kept,
                  float* one) {
        float* sums = panels > 1 ? kept + (step * steps + d) * BLOCK : one;
        sized(rows, f.D - d * STRIP, [&](auto tall, auto wide) {
            constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
            at.row ? load_sums<ROWS, COLUMNS>(sums) : clear_sums<ROWS, COLUMNS>();
            accumulate<ROWS, COLUMNS>(factors);
            store_sums<ROWS, COLUMNS>(sums);
        });
    }

    // 32 columns of dk or dv, times a factor, to where they belong
    void finish_keys(const Place& at, int64_t step, int64_t d, int64_t rows, const float* sums, float by,
                     const Heads<bf16>& to, const Heads<bf16>& to_prefix, float* over_batch) {
        const __m512 scale = _mm512_set1_ps(by);
        const __mmask32 inside = first(f.D - d * STRIP);
        const int64_t begin = step * STEP, prefix = std::clamp<int64_t>(f.P - begin, 0, rows);
        const bool last = !shared || at.b == f.B - 1;
        for (int64_t i = 0; i < prefix; ++i) {
            __m512 low = _mm512_mul_ps(_mm512_load_ps(sums + i * STRIP), scale);
            __m512 high = _mm512_mul_ps(_mm512_load_ps(sums + i * STRIP + SIDE), scale);
            if (shared) {
                float* all = over_batch + ((at.g * f.P + begin + i) * steps + d) * STRIP;
                if (at.b > 0) low = _mm512_add_ps(low, _mm512_load_ps(all));
                if (at.b > 0) high = _mm512_add_ps(high, _mm512_load_ps(all + SIDE));
                _mm512_store_ps(all, low), _mm512_store_ps(all + SIDE, high);
            }
            if (!last || !to_prefix.data) continue;
            bf16* row = to_prefix.at(at.b, at.g, begin + i) + d * STRIP;
            _mm512_mask_storeu_epi16(row, inside, rounded(low, high));
        }
        if (!to.data || prefix == rows) return;
        bf16* row = to.at(at.b, at.g, begin + prefix - f.P) + d * STRIP;
        for (const float* from = sums + prefix * STRIP; from < sums + rows * STRIP;
             from += STRIP, row += to.row) {
            const __m512 low = _mm512_mul_ps(_mm512_load_ps(from), scale);
            const __m512 high = _mm512_mul_ps(_mm512_load_ps(from + SIDE), scale);
            _mm512_mask_storeu_epi16(row, inside, rounded(low, high));
        }
    }

    // w and dx of 32 keys and 32 queries; false, and zeros, where none sees another
    bool meet(const Place& at, int64_t s, int64_t strip, const Slot& slot, Own& own) {
        const int64_t step = at.first_step + s;
        alignas(64) uint32_t see[32];
        const Seen seen = sight.look(at.b, at.row + strip * STRIP, step * STEP, see);
        bf16* packed = slot.dx + (strip * chunk_steps + s) * 2 * TILE;
        if (seen == Seen::none) {
            for (int64_t i = 0; i < 32; ++i) {
                _mm512_store_si512(own.w + i * ldr + strip * STRIP, _mm512_setzero_si512());
                _mm512_store_si512(own.dx + i * ldr + strip * STRIP, _mm512_setzero_si512());
                _mm512_store_si512(packed + i * STEP, _mm512_setzero_si512());
            }
            return false;
        }
        const bf16 *q = slot.q.across + strip * steps * 2 * TILE,
                   *d_o = slot.d_o.across + strip * steps * 2 * TILE;
        clear_sums<2, 2>();
        accumulate<2, 2>({slot.k + step * STEP * ldd, ldd, q, steps});
        store_sums<2, 2>(own.x);
        clear_sums<2, 2>();
        accumulate<2, 2>({slot.v + step * STEP * ldd, ldd, d_o, steps});
        store_sums<2, 2>(own.dw);
        const uint32_t* keep = slot.keep + s * height + strip * STRIP;
        if (f.dropout)
            seen == Seen::all ? weights<true, true>(strip, see, keep, packed, slot, own)
                              : weights<false, true>(strip, see, keep, packed, slot, own);
        else
            seen == Seen::all ? weights<true, false>(strip, see, keep, packed, slot, own)
                              : weights<false, false>(strip, see, keep, packed, slot, own);
        return true;
    }

    // from x and dw: w, with dropout's mask on it, and dx, in rows; and dx packed
    template <bool PLAIN, bool DROPPED>
    void weights(int64_t strip, const uint32_t* see, const uint32_t* keep, bf16* packed, const Slot& slot,
                 Own& own) {
        const __m512 factor = _mm512_set1_ps(f.scale * LOG2_E), keep_scale = _mm512_set1_ps(f.keep_scale);
        __m512 lse[2], delta[2];
        __m512i sees[2], keeps[2];
        for (int half = 0; half < 2; ++half) {
            const int64_t at = strip * STRIP + half * SIDE;
            lse[half] = _mm512_load_ps(slot.lse + at), delta[half] = _mm512_load_ps(slot.delta + at);
            if (!PLAIN) sees[half] = _mm512_load_si512(see + half * SIDE);
            if (DROPPED) keeps[half] = _mm512_load_si512(keep + half * SIDE);
        }
        for (int64_t i = 0; i < 32; i += 2) {
            own.ahead();
            __m512 w[2][2], dx[2][2];
            for (int odd = 0; odd < 2; ++odd)
                for (int half = 0; half < 2; ++half) {
                    const int64_t at = (i + odd) * STRIP + half * SIDE;
                    const __m512i bit = _mm512_set1_epi32(1u << (i + odd));
                    __m512 p = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(own.x + at), factor, lse[half]));
                    if (!PLAIN) p = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(sees[half], bit), p);
                    __m512 dp = _mm512_load_ps(own.dw + at);
                    if (DROPPED) {
                        const __mmask16 kept = _mm512_test_epi32_mask(keeps[half], bit);
                        dp = _mm512_maskz_mul_ps(kept, dp, keep_scale);
                        w[odd][half] = _mm512_maskz_mov_ps(kept, p);
                    } else {
                        w[odd][half] = p;
                    }
                    dx[odd][half] = _mm512_mul_ps(p, _mm512_sub_ps(dp, delta[half]));
                }
            for (int odd = 0; odd < 2; ++odd) {
                const int64_t at = (i + odd) * ldr + strip * STRIP;
                _mm512_store_si512(own.w + at, rounded(w[odd][0], w[odd][1]));
                _mm512_store_si512(own.dx + at, rounded(dx[odd][0], dx[odd][1]));
            }
            for (int half = 0; half < 2; ++half) {
                _mm512_store_si512(packed + half * TILE + i / 2 * STEP, paired(dx[0][half], dx[1][half]));
            }
        }
    }

    // dq of strip s of the panel's queries: the chunk's part, and after the last chunk all of it
    void finish_queries(const Place& at, int64_t s, const Slot& slot) {
        const bf16* dx = slot.dx + s * chunk_steps * 2 * TILE;
        const int64_t rows = std::min<int64_t>(R - at.row - s * STRIP, STRIP);
        const __m512 scale[2] = {_mm512_set1_ps(f.scale), _mm512_set1_ps(f.scale)};
        for (int64_t d = 0; d < steps; ++d) {
            float* sums = slot.dq + (s * steps + d) * BLOCK;
            sized(f.D - d * STRIP, rows, [&](auto tall, auto wide) {
                constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
                at.first_step ? load_sums<ROWS, COLUMNS>(sums) : clear_sums<ROWS, COLUMNS>();
                const bf16* k_t = slot.k_t + d * STEP * ldk + at.first_step * STEP;
                accumulate<ROWS, COLUMNS>({k_t, ldk, dx, at.count});
                store_sums<ROWS, COLUMNS>(sums);
            });
            if (at.first_step + at.count == key_steps && f.dq.data)
                store_queries(f, f.dq, at.b, at.g, at.row + s * STRIP, d * STRIP, sums, scale);
        }
    }

    const AttentionBackward<bf16>& f;
    const Sight sight;
    const int64_t steps, ldd, key_steps, R, height, panels, chunk_steps, ldr, ldk;
    const bool shared;             // one prefix for a batch of several rows
    const bool alone;              // each key head is one thread's
    float *prefix_dk, *prefix_dv;  // [G, P, steps * 32]  over the batch
    std::vector<Slot> slots;
    std::vector<Own> owns;
};

}  // namespace

void attention_backward_amx(const AttentionBackward<bf16>& call, int threads) {
    Backward backward(call, threads);
    together(threads, [&](Team team) { backward.run(team); });
}

}  // namespace pefast
