#include "delta_linear_beside.h"
#include "delta_linear_sums.h"

namespace pefast {

using namespace amx;

namespace {

// as in the forward pass; the rows of x are fetched early where they take no more than EARLY_BYTES
constexpr int64_t PANEL_BYTES = 1 << 20, PANEL_ROWS = 256, EARLY_BYTES = 1 << 19;
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
        const int64_t most = std::clamp<int64_t>(PANEL_BYTES / (2 * lda) / 32 * 32, 64, PANEL_ROWS);
        block_rows = std::max(BLOCK_ROWS, padded(parts(g.M, BLOCKS), 32));
        blocks = parts(g.M, block_rows);
        alone = blocks >= threads;
        height = std::clamp<int64_t>(padded(g.M, 32), 32, most);
        ldt = spread(height);
        take_memory(threads);
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
        sums.finish(team);
    }

  private:
    // a panel of rows
    struct Slot {
        bf16* du;        // [height, lda]  of all siblings side by side
        bf16* dz;        // [height, ldh]
        bf16* dz_t;      // [slots, ldt]
        bf16* h_t;       // [slots, ldt]
        uint32_t* keep;  // [masks, height, ld_keep]
    };
    // what each thread needs for itself
    struct Own {
        float* sums;    // [max(height, 64), 32]
        float* masked;  // [masks, 64, 32]
        bf16* rows;     // [height, 32]  rows of x̂ or du in pairs
        bf16 *z, *h;    // [32, ldh]
        Strip strip;
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
        a = scratch.take<bf16>(chunks * STEP * padded(g.K, STRIP));
        sums.take_memory(scratch, blocks);
        for (size_t i = 0; i < wide.size(); ++i) {
            const SiblingBackward& one = g.siblings[i];
            Wide& w = wide[i];
            const int64_t N = padded(one.N, STRIP);
            w.b = scratch.take<bf16>((stack.siblings[i].end - stack.siblings[i].begin) * N * STRIP);
            if (one.gain.data) w.gain = scratch.take<float>(N);
        }
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) {
            slot.du = scratch.take<bf16>(height * lda), slot.dz = scratch.take<bf16>(height * ldh);
            slot.dz_t = scratch.take<bf16>(stack.slots * ldt);
            slot.h_t = scratch.take<bf16>(stack.slots * ldt);
            slot.keep = scratch.take<uint32_t>(masks * height * ld_keep);
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.sums = scratch.take<float>(std::max<int64_t>(height, 64) * STRIP);
            own.masked = scratch.take<float>(masks * 64 * STRIP);
            own.rows = scratch.take<bf16>(height * STRIP);
            own.z = scratch.take<bf16>(32 * ldh), own.h = scratch.take<bf16>(32 * ldh);
        }
        for (const Group& group : stack.groups)
            if (group.mask >= 0) scales.push_back(group.keep_scale);
    }

    void pack(Team team) {
        const int64_t chunks = stack.chunks.size(), across = parts(g.K, STRIP);
        if (g.dx && needs_dh)
            for (int64_t i = 0; i < chunks; ++i)
                waist.into_dx(i, team.begin(across), team.end(across), a + i * 2 * TILE, chunks * 2 * TILE);
        for (int64_t i = team.begin(chunks); needs_dh && i < team.end(chunks); ++i) {
            const int64_t of = stack.chunks[i].sibling;
            waist.into_dh(i, wide[of].b + (i - stack.siblings[of].begin) * wide[of].steps * 2 * TILE);
        }
        for (size_t i = 0; i < wide.size() && team.rank == 0; ++i)
            for (int64_t n = 0; wide[i].gain && n < g.siblings[i].N; ++n)
                wide[i].gain[n] = number_of(g.siblings[i].gain, n);
    }

    void panel(const Panel& p, Team team, Slot& slot, Own& own, Beside& beside) {
        for (int64_t row = 32 * team.rank; row < p.rows; row += 32 * team.size)
            rows_of(p, row, std::min<int64_t>(p.rows - row, 32), slot, own);
        team.wait();
        if (g.dx) all_columns(p, team, slot, own, beside);
        const int64_t across = parts(g.K, STRIP);
        for (int64_t s = team.begin(across); sums.any_da && s < team.end(across); ++s)
            sum_da(s, p, slot, own);
        for (size_t i = 0; i < wide.size(); ++i) {
            const int64_t before = wide[i].first_strip, count = parts(g.siblings[i].N, STRIP);
            const int64_t end = std::min(team.end(strips) - before, count);
            for (int64_t s = std::max<int64_t>(team.begin(strips) - before, 0); s < end; ++s)
                sum_db(i, s, p, slot, own);
        }
        if (sums.any_dc) sums.add_dc(slot.dz_t, ldt, p, team);
        team.wait();
    }

    // for up to 32 rows of a panel: du, dz, h, the masks, and the transposes of h and dz
    void rows_of(const Panel& p, int64_t i, int64_t rows, const Slot& slot, const Own& own) {
        const int64_t row = p.begin + i;
        for (size_t j = 0; j < wide.size(); ++j) copy_du(j, row, rows, slot.du + i * lda + wide[j].column);
        for (size_t at = 0; at < stack.chunks.size(); ++at) {
            const Chunk& c = stack.chunks[at];
            const Wide& w = wide[c.sibling];
            if (needs_h) load_h(c, row, rows, own);
            if (needs_h) transpose_rows(own.h + c.slot, ldh, rows, c.used, slot.h_t + c.slot * ldt + i, ldt);
            if (!needs_dh) continue;
            bf16* dz = slot.dz + i * ldh + c.slot;
            const int64_t number = at - stack.siblings[c.sibling].begin;
            multiply_narrow({slot.du + i * lda + w.column, lda, w.b + number * w.steps * 2 * TILE, w.steps},
                            rows, c.used, 1, nullptr, own.sums, dz, ldh);
            if (!c.plain) make_dz(stack, c, g.ids, row, rows, own.z + c.slot, ldh, dz, ldh);
            if (!c.plain) store_dh(c, row, rows, dz);
            transpose_rows(dz, ldh, rows, c.used, slot.dz_t + c.slot * ldt + i, ldt);
        }
        if (!masked() || beside_mask()) return;
        KeepRows masks;
        masks.start(stack.draws.data(), stack.draws.size(), row, rows, g.K, slot.keep + i * ld_keep, ld_keep,
                    height * ld_keep);
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
    bool beside_mask() const { return masked() && alone && g.dx; }

    // dx for the rows of a panel
    void all_columns(const Panel& p, Team team, const Slot& slot, Own& own, Beside& beside) {
        const int64_t across = parts(g.K, STRIP), begin = team.begin(across), end = team.end(across);
        const int64_t bytes = sums.any_da ? p.rows * g.ldx * 2 : 0;
        beside.rows = Fetch(g.x + p.begin * g.ldx, bytes <= EARLY_BYTES ? bytes : 0,
                            std::max<int64_t>(end - begin, 1) * parts(p.rows, 32) * steps);
        if (beside_mask())
            beside.keep.start(stack.draws.data(), stack.draws.size(), p.begin, p.rows, g.K, slot.keep,
                              ld_keep, height * ld_keep);
        for (int64_t s = begin; s < end; ++s) {
            // four strips share a block of the mask; it is ready before the first of their rows is stored
            if (beside_mask()) beside.keep.finish(s / 4 + 1);
            columns(s, p, slot, own, beside);
        }
        beside.finish();
    }

    // 32 columns of dx for the rows of a panel
    void columns(int64_t strip, const Panel& p, const Slot& slot, Own& own, Beside& beside) {
        const int64_t k = strip * STRIP, chunks = stack.chunks.size();
        Strip& s = own.strip;
        s.mains.clear(), s.sides.clear(), s.masked.clear();
        for (size_t i = 0; i < wide.size(); ++i)
            s.mains.push_back(
                {slot.du + wide[i].column, lda, g.siblings[i].w + k * wide[i].steps * STEP, wide[i].steps});
        for (const Group& group : stack.groups)
            if (group.computed)
                (group.mask < 0 ? s.sides : s.masked)
                    .push_back({slot.dz + group.chunk * 32, ldh,
                                a + (strip * chunks + group.chunk) * 2 * TILE, group.chunks});
        s.to = {};
        s.to.to = g.dx + p.begin * g.K + k, s.to.ld = g.K, s.to.inside = first(g.K - k);
        s.to.masks = {slot.keep + strip, height * ld_keep, ld_keep, static_cast<int64_t>(stack.draws.size()),
                      scales.data()};
        s.rows = p.rows;
        s.next = s.mains[0];
        s.next.strip = k + STRIP < g.K ? s.next.strip + s.next.steps * 2 * TILE : nullptr;
        multiply_strip(s, own.sums, own.masked, beside);
    }

    // da += dzᵀ x̂ for 32 columns of x and the rows of a panel
    void sum_da(int64_t strip, const Panel& p, const Slot& slot, const Own& own) {
        const int64_t k = strip * STRIP;
        const __mmask32 inside = first(g.K - k);
        float* to = sums.da_strip(p.block, strip);
        for (const Group& group : stack.groups) {
            if (!group.computed) continue;
            const uint32_t* keep =
                group.mask < 0 ? nullptr : slot.keep + group.mask * height * ld_keep + strip;
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
    void sum_db(size_t i, int64_t strip, const Panel& p, const Slot& slot, const Own& own) {
        const Range chunks = stack.siblings[i];
        const bf16* du = slot.du + wide[i].column + strip * STRIP;
        const auto pair = [&](int64_t row, bf16* tiles) {
            pack_step_along(du + row * lda, lda, p.rows - row, STRIP, tiles);
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
    bool alone;  // each block is one thread's
    bf16* a;     // [strips, chunks, 2 tiles]
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
