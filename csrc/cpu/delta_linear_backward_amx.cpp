#include "delta_linear_beside.h"

namespace pefast {

using namespace amx;

namespace {

// as in the forward pass; the rows of x are fetched early where they take no more than EARLY_BYTES
constexpr int64_t PANEL_BYTES = 1 << 20, PANEL_ROWS = 256, EARLY_BYTES = 1 << 19;
// da and db are summed over blocks of rows, then over blocks: the order depends on the shape alone
constexpr int64_t BLOCK_ROWS = 512, BLOCKS = 8;

class Backward {
  public:
    Backward(const DeltaBackward& call, int threads)
        : g(call),
          R(g.waist.R),
          steps(parts(g.N, STEP)),
          waist_steps(parts(R, STEP)),
          lda(spread(g.N)),
          ldh(spread(R)),
          ld_keep(parts(g.K, 128) * 4),
          needs_dh(g.dx || g.da) {
        const int64_t most = std::clamp<int64_t>(PANEL_BYTES / (2 * lda) / 32 * 32, 64, PANEL_ROWS);
        block_rows = std::max(BLOCK_ROWS, padded(parts(g.M, BLOCKS), 32));
        blocks = parts(g.M, block_rows);
        alone = blocks >= threads;
        height = std::clamp<int64_t>(padded(g.M, 32), 32, most);
        ldt = spread(height);

        Scratch& scratch = Scratch::of_this_thread();
        const int64_t tall = padded(R, STRIP);
        a = scratch.take<bf16>(R * g.K), b = scratch.take<bf16>(g.N * R);
        a_packed = scratch.take<bf16>(waist_steps * STEP * padded(g.K, STRIP));
        b_packed = scratch.take<bf16>(steps * STEP * tall);
        da_size = padded(g.K, STRIP) * padded(R, SIDE), db_size = padded(g.N, STRIP) * padded(R, SIDE);
        da = scratch.take<float>(g.da ? blocks * da_size : 0);
        db = scratch.take<float>(g.db ? blocks * db_size : 0);
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) {
            slot.dy = scratch.take<bf16>(height * lda), slot.dh = scratch.take<bf16>(height * ldh);
            slot.dh_t = scratch.take<bf16>(tall * ldt), slot.h_t = scratch.take<bf16>(tall * ldt);
            slot.keep = scratch.take<uint32_t>(g.waist.dropout ? height * ld_keep : 0);
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.sums = scratch.take<float>(std::max<int64_t>(height, 64) * STRIP);
            own.masked = scratch.take<float>(g.waist.dropout ? 64 * STRIP : 0);
            own.strip = scratch.take<bf16>(height * STRIP);
        }
    }

    void run(Team team) {
        pack(team);
        team.wait();
        Beside beside;
        const Team us = alone ? Team{0, 1} : team;
        const int64_t stride = alone ? team.size : 1;
        Slot& slot = slots[alone ? team.rank : 0];
        for (Panel p = first_panel(alone ? team.rank : 0); p.rows; p = after(p, stride))
            panel(p, us, slot, owns[team.rank], beside);
        team.wait();
        if (g.da) finish_da(team);
        if (g.db) finish_db(team);
    }

  private:
    // a panel of rows
    struct Slot {
        bf16* dy;        // [height, lda]
        bf16* dh;        // [height, ldh]
        bf16* dh_t;      // [R, ldt]
        bf16* h_t;       // [R, ldt]
        uint32_t* keep;  // [height, ld_keep]  the mask of dropout
    };
    // what each thread needs for itself
    struct Own {
        float* sums;    // [max(height, 64), 32]
        float* masked;  // [64, 32]
        bf16* strip;    // [height, 32]  rows of x̂ or dy in pairs
    };
    struct Panel {
        int64_t block, begin, rows;  // no rows: there is no such panel
        bool first;                  // of its block
    };

    int64_t end_of(int64_t block) const { return std::min((block + 1) * block_rows, g.M); }

    Panel first_panel(int64_t block) const {
        const int64_t begin = std::min(block * block_rows, g.M);
        return {block, begin, std::min(height, end_of(block) - begin), true};
    }

    // the panel after p for a thread that takes every stride-th block
    Panel after(const Panel& p, int64_t stride) const {
        const int64_t begin = p.begin + p.rows;
        if (begin == end_of(p.block)) return first_panel(p.block + stride);
        return {p.block, begin, std::min(height, end_of(p.block) - begin), false};
    }

    void pack(Team team) {
        if (!needs_dh) return;
        round_master(g.waist.a, team.begin(R) * g.K, team.end(R) * g.K, 1, a);
        round_master(g.waist.b, team.begin(g.N) * R, team.end(g.N) * R, g.waist.scale, b);
        team.wait();
        const int64_t strips = parts(g.K, STRIP), narrow = parts(R, STRIP);
        for (int64_t s = team.begin(strips); g.dx && s < team.end(strips); ++s)
            pack_strip<Terms::along>(a, g.K, R, g.K, s, a_packed);
        for (int64_t s = team.begin(narrow); s < team.end(narrow); ++s)
            pack_strip<Terms::along>(b, R, g.N, R, s, b_packed);
    }

    void panel(const Panel& p, Team team, Slot& slot, const Own& own, Beside& beside) {
        const int64_t strips = parts(g.K, STRIP), wide = parts(g.N, STRIP);
        for (int64_t row = 32 * team.rank; row < p.rows; row += 32 * team.size)
            waist(p, row, std::min<int64_t>(p.rows - row, 32), slot, own);
        team.wait();
        if (g.dx) all_columns(p, team, slot, own, beside);
        float *to_a = da + p.block * da_size, *to_b = db + p.block * db_size;
        for (int64_t s = team.begin(strips); g.da && s < team.end(strips); ++s) sum_da(s, p, slot, own, to_a);
        for (int64_t s = team.begin(wide); g.db && s < team.end(wide); ++s) sum_db(s, p, slot, own, to_b);
        team.wait();
    }

    // for up to 32 rows of a panel: dh, the mask, and the transposes of h and dh
    void waist(const Panel& p, int64_t i, int64_t rows, const Slot& slot, const Own& own) {
        const int64_t row = p.begin + i;
        bf16 *dy = slot.dy + i * lda, *dh = slot.dh + i * ldh;
        copy_rows(g.dy + row * g.lddy, g.lddy, rows, g.N, dy, lda);
        if (needs_dh) multiply_narrow({dy, lda, b_packed, steps}, rows, R, 1, own.sums, dh, ldh);
        if (g.da) transpose_rows(dh, ldh, rows, R, slot.dh_t + i, ldt);
        if (g.db) transpose_rows(g.h + row * R, R, rows, R, slot.h_t + i, ldt);
        if (masked() && !beside_mask()) {
            KeepRows mask;
            mask.start(g.waist.draw, row, rows, g.K, slot.keep + i * ld_keep, ld_keep);
            mask.finish(parts(g.K, 128));
        }
    }

    bool masked() const { return g.waist.dropout && needs_dh; }
    // whether the mask is made beside dx: then a thread needs no other's part of it
    bool beside_mask() const { return masked() && alone && g.dx; }

    // dx for the rows of a panel
    void all_columns(const Panel& p, Team team, const Slot& slot, const Own& own, Beside& beside) {
        const int64_t strips = parts(g.K, STRIP), begin = team.begin(strips), end = team.end(strips);
        const int64_t bytes = g.da ? p.rows * g.ldx * 2 : 0;
        beside.rows = Fetch(g.x + p.begin * g.ldx, bytes <= EARLY_BYTES ? bytes : 0,
                            std::max<int64_t>(end - begin, 1) * parts(p.rows, 32) * steps);
        if (beside_mask()) beside.keep.start(g.waist.draw, p.begin, p.rows, g.K, slot.keep, ld_keep);
        for (int64_t s = begin; s < end; ++s) {
            // four strips share a block of the mask; it is ready before the first of their rows is stored
            if (beside_mask()) beside.keep.finish(s / 4 + 1);
            columns(s, p, slot, own, beside);
        }
        beside.finish();
    }

    // 32 columns of dx for the rows of a panel
    void columns(int64_t strip, const Panel& p, const Slot& slot, const Own& own, Beside& beside) {
        const int64_t k = strip * STRIP;
        const bf16* w = g.w + k * steps * STEP;
        Strip s = {};
        s.main = {slot.dy, lda, w, steps};
        s.side = {slot.dh, ldh, a_packed + k * waist_steps * STEP, waist_steps};
        s.to.to = g.dx + p.begin * g.K + k, s.to.ld = g.K, s.to.inside = first(g.K - k);
        if (g.waist.dropout)
            s.to.keep = slot.keep + strip, s.to.ld_keep = ld_keep, s.to.keep_scale = g.waist.keep_scale;
        s.rows = p.rows;
        beside.strip =
            Fetch(w + steps * 2 * TILE, k + STRIP < g.K ? steps * 4 * TILE : 0, parts(p.rows, 32) * steps);
        multiply_strip(s, own.sums, own.masked, beside);
    }

    // da += dhᵀ x̂ for 32 columns of x and the rows of a panel
    void sum_da(int64_t strip, const Panel& p, const Slot& slot, const Own& own, float* to) {
        const int64_t k = strip * STRIP;
        const __mmask32 inside = first(g.K - k);
        sum_rows(slot.dh_t, p, g.K - k, own, to + k * padded(R, SIDE), [&](int64_t row, bf16* tiles) {
            const bf16* x = g.x + (p.begin + row) * g.ldx + k;
            const uint32_t* keep = masked() ? slot.keep + row * ld_keep + strip : nullptr;
            for (int64_t pair = 0; pair < 16; ++pair, x += 2 * g.ldx) {
                const int64_t left = p.rows - row - 2 * pair;
                const __mmask32 even = left > 0 ? inside & (keep ? keep[2 * pair * ld_keep] : ~0u) : 0;
                const __mmask32 odd = left > 1 ? inside & (keep ? keep[(2 * pair + 1) * ld_keep] : ~0u) : 0;
                __m512i low, high;
                pair_rows(_mm512_maskz_loadu_epi16(even, x), _mm512_maskz_loadu_epi16(odd, x + g.ldx), low,
                          high);
                _mm512_store_si512(tiles + pair * 32, low);
                _mm512_store_si512(tiles + TILE + pair * 32, high);
            }
        });
    }

    // dbᵀ += hᵀ dy for 32 columns of dy and the rows of a panel
    void sum_db(int64_t strip, const Panel& p, const Slot& slot, const Own& own, float* to) {
        const int64_t n = strip * STRIP;
        sum_rows(slot.h_t, p, g.N - n, own, to + n * padded(R, SIDE), [&](int64_t row, bf16* tiles) {
            pack_step_along(slot.dy + row * lda + n, lda, p.rows - row, STRIP, tiles);
        });
    }

    // to [R, 32] += waist_t times 32 columns of rows; pair(row, tiles) packs 32 rows of them, beside the products
    template <class Pair>
    void sum_rows(const bf16* waist_t, const Panel& p, int64_t columns, const Own& own, float* to,
                  const Pair& pair) {
        const int64_t steps = parts(p.rows, STEP);
        // two steps ahead: a tile is not loaded from lines that were stored a moment ago
        int64_t next = 0;
        const auto pair_next = [&] {
            if (next < steps) pair(next * STEP, own.strip + next * 2 * TILE), ++next;
        };
        pair_next(), pair_next();
        for (int64_t r = 0; r < R; r += 32)
            sized(R - r, columns, [&](auto tall, auto wide) {
                constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
                p.first ? clear_sums<ROWS, COLUMNS>() : load_sums<ROWS, COLUMNS>(to + r * STRIP);
                accumulate<ROWS, COLUMNS>({waist_t + r * ldt, ldt, own.strip, steps}, pair_next);
                store_sums<ROWS, COLUMNS>(to + r * STRIP);
            });
    }

    void finish_da(Team team) {
        const __m512 scale = _mm512_set1_ps(g.waist.keep_scale);
        const int64_t halves = parts(g.K, SIDE);
        for (int64_t half = team.begin(halves); half < team.end(halves); ++half) {
            const __mmask16 inside = static_cast<__mmask16>(first(std::min(g.K - half * SIDE, SIDE)));
            const float* from = da + half / 2 * STRIP * padded(R, SIDE) + half % 2 * SIDE;
            for (int64_t r = 0; r < R; ++r, from += STRIP) {
                __m512 sum = _mm512_setzero_ps();
                for (int64_t i = 0; i < blocks; ++i)
                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + i * da_size));
                _mm512_mask_storeu_ps(g.da + r * g.K + half * SIDE, inside, _mm512_mul_ps(sum, scale));
            }
        }
    }

    void finish_db(Team team) {
        const __m512 scale = _mm512_set1_ps(g.waist.scale);
        const int64_t halves = parts(g.N, SIDE);
        for (int64_t half = team.begin(halves); half < team.end(halves); ++half)
            for (int64_t r = 0; r < R; r += SIDE) {
                const float* from = db + (half / 2 * padded(R, SIDE) + r) * STRIP + half % 2 * SIDE;
                __m512i v[16];
                for (int64_t row = 0; row < SIDE; ++row, from += STRIP) {
                    __m512 sum = _mm512_setzero_ps();
                    for (int64_t i = 0; i < blocks; ++i)
                        sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + i * db_size));
                    v[row] = _mm512_castps_si512(_mm512_mul_ps(sum, scale));
                }
                transpose(v);
                const __mmask16 inside = static_cast<__mmask16>(first(std::min(R - r, SIDE)));
                const int64_t n = half * SIDE, count = std::min(g.N - n, SIDE);
                for (int64_t i = 0; i < count; ++i)
                    _mm512_mask_storeu_epi32(g.db + (n + i) * R + r, inside, v[i]);
            }
    }

    const DeltaBackward& g;
    const int64_t R, steps, waist_steps, lda, ldh, ld_keep;
    const bool needs_dh;
    int64_t block_rows, blocks, height, ldt, da_size, db_size;
    bool alone;  // each block is one thread's
    bf16 *a, *b, *a_packed, *b_packed;
    float *da, *db;  // [blocks, strips, R, 32]
    std::vector<Slot> slots;
    std::vector<Own> owns;
};

}  // namespace

void delta_linear_backward_amx(const DeltaBackward& call, int threads) {
    Backward backward(call, threads);
    together(threads, [&](Team team) { backward.run(team); });
}

}  // namespace pefast
