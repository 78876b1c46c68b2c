#include "delta_linear_fp32_amx.h"

namespace pefast {

using namespace amx;

namespace {

// da and db are summed over blocks of rows, then over blocks: the order depends on the shape alone
constexpr int64_t BLOCK_ROWS = 512, BLOCKS = 8;

template <int P>
class Backward {
  public:
    Backward(const Fp32Backward& call, int threads)
        : g(call),
          R(g.lora.R),
          steps(parts(g.N, STEP)),
          waist_steps(parts(R, STEP)),
          stretches(steps, P),
          lda(spread(stretches.longest() * STEP)),
          ldh(spread(R)),
          ld_keep(parts(g.K, 128) * 4),
          into_x(g.lora.a && g.dx),
          needs_dh(into_x || g.da || g.dh),
          dropout(g.lora.dropout && g.lora.a && needs_dh) {
        block_rows = std::max(BLOCK_ROWS, padded(parts(g.M, BLOCKS), 32));
        blocks = parts(g.M, block_rows);
        alone = blocks >= threads;
        height = std::clamp<int64_t>(padded(g.M, 32), 32, PART_ROWS);
        ldt = spread(height);

        Scratch& scratch = Scratch::of_this_thread();
        const int64_t tall = padded(R, STRIP);
        b = scratch.take<float>(g.N * R);
        a_packed = scratch.take<bf16>(into_x ? P * waist_steps * STEP * padded(g.K, STRIP) : 0);
        b_packed = scratch.take<bf16>(P * steps * STEP * tall);
        da_size = padded(g.K, STRIP) * padded(R, SIDE), db_size = padded(g.N, STRIP) * padded(R, SIDE);
        da = scratch.take<float>(g.da ? blocks * da_size : 0);
        db = scratch.take<float>(g.db ? blocks * db_size : 0);
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) {
            slot.dy = {scratch.take<bf16>(P * height * lda), lda, height * lda};
            slot.dh = {scratch.take<bf16>(P * height * ldh), ldh, height * ldh};
            slot.dh_t = {scratch.take<bf16>(P * tall * ldt), ldt, tall * ldt};
            slot.h_t = {scratch.take<bf16>(P * tall * ldt), ldt, tall * ldt};
            slot.waist = scratch.take<float>(height * tall);
            slot.sums =
                scratch.take<float>(height * (stretches.count > 1 ? padded(g.K, STRIP) : STRIP * threads));
            slot.keep = scratch.take<uint32_t>(dropout ? height * ld_keep : 0);
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.blocks = scratch.take<float>(4 * BLOCK);
            own.strip = scratch.take<bf16>(P * height * STRIP);
            own.h = {scratch.take<bf16>(P * 32 * ldh), ldh, 32 * ldh};
        }
    }

    void run(Team team) {
        pack(team);
        team.wait();
        Fp32Beside beside;
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
        Planes dy;       // [P][height, lda]  one stretch of the columns
        Planes dh;       // [P][height, ldh]
        Planes dh_t;     // [P][R, ldt]
        Planes h_t;      // [P][R, ldt]
        float* waist;    // [height / 32][R / 32][32, 32]  sums of dh
        float* sums;     // [K / 32][height, 32]  of dx; with one stretch one strip for each thread
        uint32_t* keep;  // [height, ld_keep]  the mask of dropout
    };
    // what each thread needs for itself
    struct Own {
        float* blocks;  // [4, 32, 32]
        bf16* strip;    // [P][height, 32]  rows of x̂ or dy in pairs
        Planes h;       // [P][32, ldh]
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
        for (int64_t i = team.begin(g.N) * R; i < team.end(g.N) * R; ++i) b[i] = g.lora.b[i] * g.lora.scale;
        team.wait();
        const int64_t strips = into_x ? parts(g.K, STRIP) : 0, narrow = parts(R, STRIP);
        for (int64_t s = team.begin(strips); s < team.end(strips); ++s)
            pack_parts<P, Terms::along>(g.lora.a, g.K, R, g.K, s, a_packed);
        for (int64_t s = team.begin(narrow); s < team.end(narrow); ++s)
            pack_parts<P, Terms::along>(b, R, g.N, R, s, b_packed);
    }

    void panel(const Panel& p, Team team, Slot& slot, const Own& own, Fp32Beside& beside) {
        const int64_t strips = parts(g.K, STRIP);
        float *to_a = da + p.block * da_size, *to_b = db + p.block * db_size;
        for (int64_t i = 0; i < stretches.count; ++i) {
            const int64_t step = stretches.begin(i), count = stretches.begin(i + 1) - step;
            for (int64_t row = 32 * team.rank; row < p.rows; row += 32 * team.size)
                waist(p, row, std::min<int64_t>(p.rows - row, 32), i, slot, own);
            team.wait();
            if (g.dx) all_columns(p, i, team, slot, own, beside);
            for (int64_t s = team.begin(count); g.db && s < team.end(count); ++s)
                sum_db(s, step, p, slot, own, to_b);
            team.wait();
        }
        for (int64_t s = team.begin(strips); g.da && s < team.end(strips); ++s) sum_da(s, p, slot, own, to_a);
        team.wait();
    }

    // for up to 32 rows of a panel: a stretch of dy in parts and its share of dh; once the mask and the transposes
    void waist(const Panel& p, int64_t i, int64_t rows, int64_t stretch, const Slot& slot, const Own& own) {
        const int64_t row = p.begin + i, step = stretches.begin(stretch),
                      count = stretches.begin(stretch + 1) - step;
        const bool first = stretch == 0, last = stretch == stretches.count - 1;
        const Planes dy = slot.dy.row(i), dh = slot.dh.row(i);
        split_rows<P>(g.dy + row * g.lddy + step * STEP, g.lddy, rows,
                      std::min(count * STEP, g.N - step * STEP), dy);
        float* sums = slot.waist + i * padded(R, STRIP);
        if (needs_dh)
            multiply_narrow_parts<P>({dy, b_packed + step * 2 * TILE * P, count}, steps * 2 * TILE * P, rows,
                                     R, first, sums);
        if (needs_dh && last)
            finish_narrow_parts<P>(sums, rows, R, 1, g.dh ? g.dh + row * R : nullptr, R, dh);
        if (g.da && last) transpose_planes<P>(dh, rows, R, {slot.dh_t.at + i, slot.dh_t.ld, slot.dh_t.plane});
        if (g.db && first) {
            split_rows<P>(g.h + row * R, R, rows, R, own.h);
            transpose_planes<P>(own.h, rows, R, {slot.h_t.at + i, slot.h_t.ld, slot.h_t.plane});
        }
        if (dropout && first && !beside_mask()) {
            KeepRows mask;
            mask.start(g.lora.draw, row, rows, g.K, slot.keep + i * ld_keep, ld_keep);
            mask.finish(parts(g.K, 128));
        }
    }

    // whether the mask is made beside dx: then a thread needs no other's part of it
    bool beside_mask() const { return dropout && alone && g.dx; }

    // a stretch of dx for the rows of a panel
    void all_columns(const Panel& p, int64_t stretch, Team team, const Slot& slot, const Own& own,
                     Fp32Beside& beside) {
        const int64_t strips = parts(g.K, STRIP);
        const bool last = stretch == stretches.count - 1;
        if (beside_mask() && stretch == 0)
            beside.keep.start(g.lora.draw, p.begin, p.rows, g.K, slot.keep, ld_keep);
        for (int64_t s = team.begin(strips); s < team.end(strips); ++s) {
            // four strips share a block of the mask; it is ready before the first of their rows is stored
            if (beside_mask() && last) beside.keep.finish(s / 4 + 1);
            columns(s, p, stretch, team.rank, slot, own, beside);
        }
        beside.finish();
    }

    // a stretch of 32 columns of dx for the rows of a panel
    void columns(int64_t strip, const Panel& p, int64_t stretch, int64_t rank, const Slot& slot,
                 const Own& own, Fp32Beside& beside) {
        const int64_t k = strip * STRIP, step = stretches.begin(stretch);
        const bf16* w = g.w + (strip * steps + step) * 2 * TILE * P;
        Fp32Strip s = {};
        s.main = {slot.dy, w, stretches.begin(stretch + 1) - step};
        if (into_x) s.side = {slot.dh, a_packed + k * waist_steps * STEP * P, waist_steps};
        s.to.to = g.dx + p.begin * g.K + k, s.to.ld = g.K, s.to.inside = first(g.K - k);
        if (dropout)
            s.to.keep = slot.keep + strip, s.to.ld_keep = ld_keep, s.to.keep_scale = g.lora.keep_scale;
        s.rows = p.rows, s.first = stretch == 0, s.last = stretch == stretches.count - 1;
        beside.strip = Fetch(w + steps * 2 * TILE * P, k + STRIP < g.K ? s.main.steps * 4 * TILE * P : 0,
                             parts(p.rows, 32) * s.main.steps * PRODUCTS<P>);
        s.sums = slot.sums + (stretches.count > 1 ? strip : rank) * height * STRIP;
        multiply_strip_parts<P>(s, own.blocks, beside);
    }

    // da += dhᵀ x̂ for 32 columns of x and the rows of a panel
    void sum_da(int64_t strip, const Panel& p, const Slot& slot, const Own& own, float* to) {
        const int64_t k = strip * STRIP;
        const __mmask32 inside = first(g.K - k);
        sum_rows(slot.dh_t, p, g.K - k, own, to + k * padded(R, SIDE), [&](int64_t row, bf16* tiles) {
            const float* x = g.x + (p.begin + row) * g.ldx + k;
            const uint32_t* keep = dropout ? slot.keep + row * ld_keep + strip : nullptr;
            for (int64_t pair = 0; pair < 16; ++pair, x += 2 * g.ldx, tiles += 32) {
                const int64_t left = p.rows - row - 2 * pair;
                const __mmask32 even = left > 0 ? inside & (keep ? keep[2 * pair * ld_keep] : ~0u) : 0;
                const __mmask32 odd = left > 1 ? inside & (keep ? keep[(2 * pair + 1) * ld_keep] : ~0u) : 0;
                pair_parts<P>(x, even, x + g.ldx, odd, tiles);
            }
        });
    }

    // dbᵀ += hᵀ dy for 32 columns of a stretch of dy and the rows of a panel
    void sum_db(int64_t strip, int64_t step, const Panel& p, const Slot& slot, const Own& own, float* to) {
        const int64_t n = (step + strip) * STRIP;
        sum_rows(slot.h_t, p, g.N - n, own, to + n * padded(R, SIDE), [&](int64_t row, bf16* tiles) {
            const bf16* dy = slot.dy.row(row).at + strip * STRIP;
            for (int part = 0; part < P; ++part, dy += slot.dy.plane, tiles += 2 * TILE)
                pack_step_along(dy, lda, p.rows - row, STRIP, tiles);
        });
    }

    // to [R, 32] += waist_t times 32 columns of rows; pair(row, tiles) packs 32 rows of them, beside the products
    template <class Pair>
    void sum_rows(const Planes& waist_t, const Panel& p, int64_t columns, const Own& own, float* to,
                  const Pair& pair) {
        const int64_t steps = parts(p.rows, STEP);
        // two steps ahead: a tile is not loaded from lines that were stored a moment ago
        int64_t next = 0, calls = 0;
        const auto pair_next = [&] {
            if (next < steps) pair(next * STEP, own.strip + next * 2 * TILE * P), ++next;
        };
        const auto once_a_step = [&] {
            if (++calls % EARLY_PRODUCTS<P> == 0) pair_next();
        };
        pair_next(), pair_next();
        for (int64_t r = 0; r < R; r += 32)
            sized(R - r, columns, [&](auto tall, auto wide) {
                constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
                clear_sums<ROWS, COLUMNS>();
                accumulate_parts<P, ROWS, COLUMNS>({waist_t.row(r), own.strip, steps}, once_a_step);
                store_sums<ROWS, COLUMNS>(p.first ? to + r * STRIP : own.blocks);
                if (!p.first) add_block(own.blocks, ROWS * SIDE * STRIP, to + r * STRIP);
            });
    }

    void finish_da(Team team) {
        const __m512 scale = _mm512_set1_ps(dropout ? g.lora.keep_scale : 1.0f);
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
        const __m512 scale = _mm512_set1_ps(g.lora.scale);
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

    const Fp32Backward& g;
    const int64_t R, steps, waist_steps;
    const Stretches stretches;
    const int64_t lda, ldh, ld_keep;
    const bool into_x, needs_dh, dropout;
    int64_t block_rows, blocks, height, ldt, da_size, db_size;
    bool alone;  // each block is one thread's
    float* b;
    bf16 *a_packed, *b_packed;
    float *da, *db;  // [blocks, strips, R, 32]
    std::vector<Slot> slots;
    std::vector<Own> owns;
};

template <int P>
void run(const Fp32Backward& call, int threads) {
    Backward<P> backward(call, threads);
    together(threads, [&](Team team) { backward.run(team); });
}

}  // namespace

void fp32_backward_amx(const Fp32Backward& call, int parts, int threads) {
    (parts == 1 ? run<1> : run<3>)(call, threads);
}

}  // namespace pefast
