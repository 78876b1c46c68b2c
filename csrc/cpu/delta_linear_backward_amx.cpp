#include "delta_linear_beside.h"
#include "delta_linear_sums.h"

namespace pefast {

using namespace amx;

namespace {

// as in the forward pass, a little lower: 0.94 to 0.98 of the time where N or K is 2048 or more. The rows of x are fetched
// early where they take no more than EARLY_BYTES; ROOM_BYTES are what the second cache keeps. Where strips pass by rows,
// 128 rows: da and db then find more of x and dy there (0.95 to 0.98 of the time at 384 columns).
constexpr int64_t PANEL_BYTES = 7 << 17, PANEL_ROWS = 256, EARLY_BYTES = 1 << 19, ROOM_BYTES = 1800 << 10;
// gradients of parameters are summed over blocks of rows, then over blocks: the order depends on the shape alone
constexpr int64_t BLOCK_ROWS = 512, BLOCKS = 8;

class Backward {
  public:
    Backward(const DeltaBackward& call, int threads)
        : g(call),
          stack(g.siblings,
                [&](const Place& p) { return g.siblings[p.sibling].gradients[p.number].dd != nullptr; }),
          waist(stack, g.siblings, g.K),
          sums(g, stack),
          ldh(spread(stack.slots)),
          ld_keep(parts(g.K, 128) * 4) {
        needs_dh = sums.any_da || sums.any_dc, needs_h = sums.any_db;
        for (const Place& p : stack.places) {
            needs_dh = needs_dh || sums.asked(p).dh || (g.dx && p.computed());
            needs_h = needs_h || p.activation() != Activation::identity;
        }
        for (const SiblingBackward& one : g.siblings) {
            wide.push_back({parts(one.N, STEP), strips, lda, nullptr, nullptr});
            lda += spread(one.N), strips += parts(one.N, STRIP), steps += parts(one.N, STEP);
        }
        rows_first = steps <= CHUNK && wide.size() == 1;
        const int64_t most =
            std::clamp<int64_t>(PANEL_BYTES / (2 * lda) / 32 * 32, 64, rows_first ? 128 : PANEL_ROWS);
        block_rows = std::max(BLOCK_ROWS, padded(parts(g.M, BLOCKS), 32));
        blocks = parts(g.M, block_rows);
        alone = blocks >= threads;
        height = std::clamp<int64_t>(padded(g.M, 32), 32, most);
        ldt = spread(height);
        one_panel = threads == 1 && g.M > 0 && g.M <= height;
        in_place = rows_first && !g.siblings[0].gain.data &&
                   lies_right(g.siblings[0].dy, g.siblings[0].lddy, g.siblings[0].N);
        take_memory(threads);
    }

    void run(Team team) {
        pack(team);
        team.wait();
        Beside beside;
        const Team us = alone ? Team{0, 1} : team;
        const int64_t stride = alone ? team.size : 1;
        Slot& slot = slots[alone ? team.rank : 0];
        Panel next = first_panel(alone ? team.rank : 0);
        start_masks(next.begin, std::min<int64_t>(next.rows, 32), slot.keep[1], beside);
        for (Panel p = next; p.rows; p = next) {
            next = after(p, stride);
            panel(p, next, us, slot, owns[team.rank], beside);
        }
        team.wait();
        sums.finish(team);
    }

  private:
    // a panel of rows
    struct Slot {
        bf16* du;           // [height, lda]  of all siblings side by side
        bf16* dz;           // [height, ldh]
        bf16* dz_t;         // [slots, ldt]
        bf16* h_t;          // [slots, ldt]
        uint32_t* keep[2];  // [masks, height, ld_keep]  of this panel and of the next
    };
    // what each thread needs for itself
    struct Own {
        float* sums;    // [max(height, 64), 32]
        float* narrow;  // [32, 32]
        float* masked;  // [masks, 64, 32]
        bf16* rows;     // [height, 32]  rows of x̂ or du in pairs
        bf16 *z, *h;    // [32, ldh]
        std::vector<Strip> strips;
    };
    // a sibling's part of what all siblings have
    struct Wide {
        int64_t steps, first_strip, column;  // of du
        float* gain;                         // [strips * 32]
        bf16* b;                             // [chunks, steps, 2 tiles]
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

    void take_memory(int threads) {
        Scratch& scratch = Scratch::of_this_thread();
        const int64_t chunks = stack.chunks.size(), masks = stack.draws.size();
        const int64_t size = chunks * STEP * padded(g.K, STRIP);
        a = g.kept.at ? g.kept.at : scratch.take<bf16>(size);
        sums.take_memory(scratch, blocks, one_panel);
        for (size_t i = 0; i < wide.size(); ++i) {
            const SiblingBackward& one = g.siblings[i];
            Wide& w = wide[i];
            const int64_t N = padded(one.N, STRIP), count = stack.siblings[i].end - stack.siblings[i].begin;
            w.b = g.kept.at ? a + size : scratch.take<bf16>(count * N * STRIP);
            if (one.gain.data) w.gain = scratch.take<float>(N);
        }
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) {
            slot.du = scratch.take<bf16>(height * lda), slot.dz = scratch.take<bf16>(height * ldh);
            slot.dz_t = scratch.take<bf16>(stack.slots * ldt);
            slot.h_t = scratch.take<bf16>(stack.slots * ldt);
            for (uint32_t*& keep : slot.keep) keep = scratch.take<uint32_t>(masks * height * ld_keep);
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.sums = scratch.take<float>(std::max<int64_t>(height, 64) * STRIP);
            own.narrow = scratch.take<float>(BLOCK);
            own.strips.resize(rows_first ? parts(g.K, STRIP) : 1);
            own.masked = scratch.take<float>(masks * 64 * STRIP);
            own.rows = scratch.take<bf16>(height * STRIP);
            own.z = scratch.take<bf16>(32 * ldh), own.h = scratch.take<bf16>(32 * ldh);
        }
        for (const Group& group : stack.groups)
            if (group.mask >= 0) scales.push_back(group.keep_scale);
    }

    void pack(Team team) {
        const int64_t chunks = stack.chunks.size(), across = parts(g.K, STRIP);
        for (size_t i = 0; i < wide.size() && team.rank == 0; ++i)
            for (int64_t n = 0; wide[i].gain && n < g.siblings[i].N; ++n)
                wide[i].gain[n] = number_of(g.siblings[i].gain, n);
        if (g.kept.ready) return;
        if (g.kept.at || (g.dx && needs_dh))
            for (int64_t i = 0; i < chunks; ++i)
                waist.into_dx(i, team.begin(across), team.end(across), a + i * 2 * TILE, chunks * 2 * TILE);
        for (int64_t i = team.begin(chunks); (g.kept.at || needs_dh) && i < team.end(chunks); ++i) {
            const int64_t of = stack.chunks[i].sibling;
            waist.into_dh(i, wide[of].b + (i - stack.siblings[of].begin) * wide[of].steps * 2 * TILE);
        }
    }

    // the masks of up to 32 rows, to be made beside those before
    void start_masks(int64_t begin, int64_t rows, uint32_t* keep, Beside& beside) {
        if (fused() && masked())
            beside.keep.start(stack.draws.data(), stack.draws.size(), begin, rows, g.K, keep, ld_keep,
                              height * ld_keep);
    }

    void panel(const Panel& p, const Panel& next, Team team, Slot& slot, Own& own, Beside& beside) {
        if (fused()) std::swap(slot.keep[0], slot.keep[1]);
        // tiles are read from dy itself where they lie right in it
        const SiblingBackward& one = g.siblings[0];
        const bool here = in_place && p.rows % 32 == 0;
        const Left du = {here ? one.dy + p.begin * one.lddy : slot.du, here ? one.lddy : lda};
        const auto waist_of = [&](int64_t row) {
            beside.clear_tiles();
            rows_of(p, row, std::min<int64_t>(p.rows - row, 32), du, slot, own);
        };
        for (int64_t row = 32 * team.rank; row < p.rows && !fused(); row += 32 * team.size) waist_of(row);
        team.wait();
        if (g.dx)
            all_columns(p, team, du, slot, own, beside, [&](int64_t row) {
                if (!fused()) return;
                beside.keep.finish(parts(g.K, 128));
                const bool inside = row + 32 < p.rows;
                const int64_t after = inside ? p.begin + row + 32 : next.begin;
                const int64_t rows = std::min<int64_t>(inside ? p.rows - row - 32 : next.rows, 32);
                start_masks(after, rows, inside ? slot.keep[0] + (row + 32) * ld_keep : slot.keep[1], beside);
                waist_of(row);
                // dy of the next rows, and x of these for da
                const int64_t group = std::min(strips_of_x(), strips_at_once(steps)),
                              block_steps = group * steps, these = std::min<int64_t>(p.rows - row, 32);
                if (group == strips_of_x())
                    beside.foresee(g.dx + after * g.K, std::max<int64_t>(rows, 0) * g.K, block_steps);
                if (here) beside.rows = rows_ahead(one.dy, one.lddy, after, rows, block_steps);
                if (sums.any_da) beside.more = rows_ahead(g.x, g.ldx, p.begin + row, these, block_steps);
            });
        for (int64_t s = team.begin(strips_of_x()); sums.any_da && s < team.end(strips_of_x()); ++s) {
            sum_da(s, p, slot, own);
            if (one_panel) sums.finish_da(s);
        }
        for (size_t i = 0; i < wide.size(); ++i) {
            const int64_t before = wide[i].first_strip, count = parts(g.siblings[i].N, STRIP);
            const int64_t end = std::min(team.end(strips) - before, count);
            for (int64_t s = std::max<int64_t>(team.begin(strips) - before, 0); s < end; ++s) {
                sum_db(i, s, p, du, slot, own);
                if (one_panel) sums.finish_db(i, s);
            }
        }
        if (sums.any_dc) sums.add_dc(slot.dz_t, ldt, p, team);
        team.wait();
    }

    // for up to 32 rows of a panel: du, dz, h, the masks, and the transposes of h and dz
    void rows_of(const Panel& p, int64_t i, int64_t rows, const Left& du, const Slot& slot, const Own& own) {
        const int64_t row = p.begin + i;
        for (size_t j = 0; j < wide.size() && du.at == slot.du; ++j)
            copy_du(j, row, rows, slot.du + i * lda + wide[j].column);
        for (size_t at = 0; at < stack.chunks.size(); ++at) {
            const Chunk& c = stack.chunks[at];
            const Wide& w = wide[c.sibling];
            if (needs_h) load_h(c, row, rows, own);
            if (needs_h) transpose_rows(own.h + c.slot, ldh, rows, c.used, slot.h_t + c.slot * ldt + i, ldt);
            if (!needs_dh) continue;
            bf16* dz = slot.dz + i * ldh + c.slot;
            const int64_t number = at - stack.siblings[c.sibling].begin;
            multiply_narrow({du.at + i * du.ld + w.column, du.ld, w.b + number * w.steps * 2 * TILE, w.steps},
                            {}, rows, c.used, 1, nullptr, own.narrow, dz, ldh);
            if (!c.plain) make_dz(stack, c, g.ids, row, rows, own.z + c.slot, ldh, dz, ldh);
            if (!c.plain) store_dh(c, row, rows, dz);
            transpose_rows(dz, ldh, rows, c.used, slot.dz_t + c.slot * ldt + i, ldt);
        }
        if (!masked() || beside_mask() || fused()) return;
        KeepRows masks;
        masks.start(stack.draws.data(), stack.draws.size(), row, rows, g.K, slot.keep[0] + i * ld_keep,
                    ld_keep, height * ld_keep);
        masks.finish(parts(g.K, 128));
    }

    // dy ⊙ gain of up to 32 rows
    void copy_du(size_t i, int64_t row, int64_t rows, bf16* to) {
        const SiblingBackward& one = g.siblings[i];
        copy_rows(one.dy + row * one.lddy, one.lddy, rows, one.N, to, lda);
        if (!wide[i].gain) return;
        for (int64_t r = 0; r < rows; ++r, to += lda)
            for (int64_t n = 0; n < one.N; n += 32) {
                const __m512i v = _mm512_load_si512(to + n);
                const float* gain = wide[i].gain + n;
                const __m512i du = rounded(_mm512_mul_ps(widen_low(v), _mm512_load_ps(gain)),
                                           _mm512_mul_ps(widen_high(v), _mm512_load_ps(gain + SIDE)));
                _mm512_store_si512(to + n, _mm512_maskz_mov_epi16(first(one.N - n), du));
            }
    }

    // h of a chunk, and z where it is another, from the saved waist
    void load_h(const Chunk& c, int64_t row, int64_t rows, const Own& own) {
        bf16 *z = own.z + c.slot, *h = own.h + c.slot;
        for (int64_t p = c.begin; p < c.end; ++p) {
            const Place& place = stack.places[p];
            const __mmask32 inside = Stack::shared(c, place);
            if (!inside || !place.computed()) continue;
            const bf16* from = g.waist + row * stack.saved + place.saved + c.slot - place.slot;
            for (int64_t r = 0; r < rows; ++r) {
                const __m512i v = _mm512_maskz_loadu_epi16(inside, from + r * stack.saved);
                _mm512_mask_storeu_epi16((c.plain ? h : z) + r * ldh, inside, v);
            }
        }
        if (!c.plain) make_h(stack, c, g.ids, row, rows, z, ldh, h, ldh);
    }

    void store_dh(const Chunk& c, int64_t row, int64_t rows, const bf16* dh) {
        for (int64_t p = c.begin; p < c.end; ++p) {
            const Place& place = stack.places[p];
            const __mmask32 inside = Stack::shared(c, place);
            bf16* to = sums.asked(place).dh;
            if (!inside || !to) continue;
            to += row * place.s->R + c.slot - place.slot;
            for (int64_t r = 0; r < rows; ++r)
                _mm512_mask_storeu_epi16(to + r * place.s->R, inside, _mm512_load_si512(dh + r * ldh));
        }
    }

    bool masked() const { return !stack.draws.empty() && needs_dh; }
    // whether the masks are made beside dx: then a thread needs no other's part of them
    bool beside_mask() const { return masked() && alone && g.dx && !rows_first; }
    // whether the waist and the masks of 32 rows are made just before their dx
    bool fused() const { return rows_first && g.dx && alone; }

    int64_t strips_of_x() const { return parts(g.K, STRIP); }

    // so many rows, to be fetched beside so many steps
    static Fetch<1> rows_ahead(const bf16* at, int64_t ld, int64_t begin, int64_t rows,
                               int64_t steps_before) {
        const int64_t bytes = std::max<int64_t>(rows, 0) * ld * 2;
        return Fetch<1>(at + begin * ld, bytes <= EARLY_BYTES ? bytes : 0, steps_before);
    }

    // dx for the rows of a panel; before(row) comes before each block of rows where the strips pass by it
    template <class Before>
    void all_columns(const Panel& p, Team team, const Left& du, const Slot& slot, Own& own, Beside& beside,
                     const Before& before) {
        const int64_t across = strips_of_x(), begin = team.begin(across), end = team.end(across);
        beside.rows = {};
        if (beside_mask())
            beside.keep.start(stack.draws.data(), stack.draws.size(), p.begin, p.rows, g.K, slot.keep[0],
                              ld_keep, height * ld_keep);
        // x for da comes late, for what is fetched earlier is pushed out again by the weight: so many strips before the
        // end that these, du and x fit into the second cache
        const int64_t room = ROOM_BYTES - p.rows * (lda + g.ldx) * 2, each = steps * 4 * TILE;
        const int64_t most = std::max<int64_t>((end - begin) / 2, 1);
        const int64_t late = end - std::clamp<int64_t>(room / each, (end - begin) / 16 + 1, most);
        for (int64_t s = begin; s < end; ++s) {
            Strip& strip = own.strips[rows_first ? s - begin : 0];
            columns(s, p, du, slot, strip);
            if (rows_first) continue;
            if (sums.any_da && s == late)
                beside.rows = rows_ahead(g.x, g.ldx, p.begin, p.rows, (end - s) * parts(p.rows, 32) * steps);
            // four strips share a block of the mask; it is ready before the first of their rows is stored
            if (beside_mask()) beside.keep.finish(s / 4 + 1);
            multiply_strip(strip, own.sums, own.masked, beside);
        }
        if (rows_first) multiply_rows_first(own.strips, end - begin, own.sums, own.masked, beside, before);
        beside.finish();
    }

    // 32 columns of dx for the rows of a panel
    void columns(int64_t strip, const Panel& p, const Left& du, const Slot& slot, Strip& s) {
        const int64_t k = strip * STRIP, chunks = stack.chunks.size();
        s.mains.clear(), s.sides.clear(), s.masked.clear();
        for (size_t i = 0; i < wide.size(); ++i)
            s.mains.push_back(
                {du.at + wide[i].column, du.ld, g.siblings[i].w + k * wide[i].steps * STEP, wide[i].steps});
        for (const Group& group : stack.groups)
            if (group.computed)
                (group.mask < 0 ? s.sides : s.masked)
                    .push_back({slot.dz + group.chunk * 32, ldh,
                                a + (strip * chunks + group.chunk) * 2 * TILE, group.chunks});
        s.to = {};
        s.to.to = g.dx + p.begin * g.K + k, s.to.ld = g.K, s.to.inside = first(g.K - k);
        s.to.masks = {slot.keep[0] + strip, height * ld_keep, ld_keep,
                      static_cast<int64_t>(stack.draws.size()), scales.data()};
        s.rows = p.rows;
        s.next = s.mains[0];
        s.next.strip = k + STRIP < g.K ? s.next.strip + s.next.steps * 2 * TILE : nullptr;
    }

    // da += dzᵀ x̂ for 32 columns of x and the rows of a panel
    void sum_da(int64_t strip, const Panel& p, const Slot& slot, const Own& own) {
        const int64_t k = strip * STRIP;
        const __mmask32 inside = first(g.K - k);
        const SumsStrip to = sums.da_strip(p.block, strip);
        for (const Group& group : stack.groups) {
            if (!group.computed) continue;
            const uint32_t* keep =
                group.mask < 0 ? nullptr : slot.keep[0] + group.mask * height * ld_keep + strip;
            const auto pair = [&](int64_t row, bf16* tiles) {
                const bf16* x = g.x + (p.begin + row) * g.ldx + k;
                const int64_t left = p.rows - row;
                const auto term = [&](int64_t i) {
                    const __mmask32 kept = keep && i < left ? keep[(row + i) * ld_keep] : ~0u;
                    return _mm512_maskz_loadu_epi16(i < left ? inside & kept : 0, x + i * g.ldx);
                };
                pack_terms(term, tiles, 2);
            };
            sums.add_rows(slot.dz_t, ldt, {group.chunk, group.chunk + group.chunks}, p, g.K - k, own.rows, to,
                          pair);
        }
    }

    // dbᵀ += hᵀ du for 32 columns of a sibling's du and the rows of a panel; dbias and dgain as well
    void sum_db(size_t i, int64_t strip, const Panel& p, const Left& du, const Slot& slot, const Own& own) {
        const Range chunks = stack.siblings[i];
        const bf16* columns = du.at + wide[i].column + strip * STRIP;
        const auto pair = [&](int64_t row, bf16* tiles) {
            pack_step_along(columns + row * du.ld, du.ld, p.rows - row, STRIP, tiles);
        };
        if (sums.any_db && chunks.end > chunks.begin)
            sums.add_rows(slot.h_t, ldt, chunks, p, g.siblings[i].N - strip * STRIP, own.rows,
                          sums.db_strip(p.block, i, strip), pair);
        if (sums.columns_of(i)) sums.add_columns(i, strip, p);
    }

    const DeltaBackward& g;
    const Stack stack;
    const PackedWaist waist;
    ParameterSums sums;
    const int64_t ldh, ld_keep;
    bool needs_dh, needs_h;
    int64_t lda = 0, strips = 0, steps = 0, block_rows, blocks, height, ldt;
    bool alone;       // each block is one thread's
    bool one_panel;   // and one thread: the sums of a strip are complete when it has passed
    bool rows_first;  // the strips pass by each block of rows
    bool in_place;    // dy as it lies can be the left factor
    bf16* a;          // [strips, chunks, 2 tiles]
    std::vector<float> scales;
    std::vector<Wide> wide;
    std::vector<Slot> slots;
    std::vector<Own> owns;
};

}  // namespace

void delta_linear_backward_amx(const DeltaBackward& call, int threads) {
    Backward backward(call, threads);
    together(threads, [&](Team team) { backward.run(team); });
}

}  // namespace pefast
