#include "delta_linear_beside.h"
#include "delta_linear_stack.h"

namespace pefast {

using namespace amx;

namespace {

// A panel of rows stays in the second cache while the packed weights stream past it once.
constexpr int64_t PANEL_BYTES = 1 << 20, PANEL_ROWS = 256;
// The rows of the next panel are fetched early where they take no more than this.
constexpr int64_t EARLY_BYTES = 1 << 19;

class Forward {
  public:
    Forward(const DeltaForward& call, int threads)
        : f(call),
          stack(f.siblings, [](const Place& p) { return p.s->d.data && p.s->routed; }),
          waist(stack, f.siblings, f.K),
          steps(parts(f.K, STEP)),
          lda(spread(f.K)),
          ldh(spread(stack.slots)),
          ld_keep(parts(f.K, 128) * 4) {
        const int64_t most = std::clamp<int64_t>(PANEL_BYTES / (2 * lda) / 32 * 32, 64, PANEL_ROWS);
        panels = parts(f.M, most);
        // small panels only where that gives every thread its own
        if (f.M >= 128 * threads) panels = padded(panels, threads);
        height = std::max<int64_t>(padded(parts(f.M, std::max<int64_t>(panels, 1)), 32), 32);
        panels = parts(f.M, height);
        alone = panels >= threads;
        rows_first = steps <= CHUNK;
        in_place = rows_first && lies_right(f.x, f.ldx, f.K);
        take_memory(threads);
    }

    void run(Team team) {
        pack(team);
        team.wait();
        Beside beside;
        Own& own = owns[team.rank];
        if (alone) {
            Slot& slot = slots[team.rank];
            const int64_t begin = first_row(team.rank);
            start(begin, rows_first ? std::min<int64_t>(f.M - begin, 32) : rows_of(team.rank), slot, beside);
            for (int64_t p = team.rank; p < panels; p += team.size)
                panel(p, p + team.size, Team{0, 1}, slot, own, beside);
        } else {
            for (int64_t p = 0; p < panels; ++p) panel(p, panels, team, slots[0], own, beside);
        }
    }

  private:
    // a panel of rows
    struct Slot {
        bf16* x;            // [height, lda]
        bf16* h;            // [height, ldh]
        uint32_t* keep[2];  // [masks, height, ld_keep]  of this panel and of the next
    };
    // what each thread needs for itself
    struct Own {
        float* sums;    // [max(height, 64), 32]
        float* narrow;  // [32, 32]
        bf16* room;     // [2, 32, 64]  steps of x̂
        std::vector<Strip> strips;
    };
    // a sibling's factors as its strips read them
    struct Wide {
        int64_t first_strip, strips;
        bf16* b;                     // [strips, chunks, 2 tiles]
        float *start, *gain, *bias;  // [strips * 32]  null: there is none
    };

    void take_memory(int threads) {
        Scratch& scratch = Scratch::of_this_thread();
        const int64_t a_size = steps * STEP * stack.slots;
        a = f.kept.at ? f.kept.at : scratch.take<bf16>(a_size);
        c = scratch.take<float>(stack.slots);
        for (size_t i = 0; i < f.siblings.size(); ++i) {
            const SiblingForward& one = f.siblings[i];
            const int64_t count = parts(one.N, STRIP), N = count * STRIP;
            bool starts = one.bias.data && !one.gain.data;
            for (const Segment& s : one.segments) starts = starts || (s.d.data && !s.routed);
            const auto row = [&](bool there) { return there ? scratch.take<float>(N) : nullptr; };
            const int64_t chunks = stack.siblings[i].end - stack.siblings[i].begin;
            bf16* const b = f.kept.at ? a + a_size : scratch.take<bf16>(chunks * STEP * N);
            wide.push_back({strips, count, b, row(starts), row(one.gain.data), row(one.gain.data)});
            strips += count;
        }
        const int64_t masks = stack.draws.size();
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) {
            slot.x = scratch.take<bf16>(height * lda);
            slot.h = scratch.take<bf16>(height * ldh);
            for (uint32_t*& keep : slot.keep) keep = scratch.take<uint32_t>(masks * height * ld_keep);
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.sums = scratch.take<float>(std::max<int64_t>(height, 64) * STRIP);
            own.narrow = scratch.take<float>(BLOCK);
            own.strips.resize(rows_first ? strips : 1);
            own.room = masks ? scratch.take<bf16>(4 * BLOCK) : nullptr;
        }
    }

    void pack(Team team) {
        if (team.rank == 0) widen_rows();
        if (f.kept.ready) return;
        const int64_t chunks = stack.chunks.size();
        for (int64_t i = team.begin(chunks); i < team.end(chunks); ++i)
            if (stack.chunks[i].computed) waist.into_h(i, a + i * steps * 2 * TILE);
        for (size_t i = 0; i < wide.size(); ++i) {
            const Wide& w = wide[i];
            const Range own = stack.siblings[i];
            const int64_t count = own.end - own.begin, begin = team.begin(w.strips), end = team.end(w.strips);
            for (int64_t j = 0; j < count; ++j)
                waist.into_y(own.begin + j, begin, end, w.b + j * 2 * TILE, count * 2 * TILE);
        }
    }

    // what is added to whole columns, in fp32
    void widen_rows() {
        for (const Place& p : stack.places)
            for (int64_t r = 0; r < p.s->R && p.computed(); ++r)
                c[p.slot + r] = p.s->c.data ? number_of(p.s->c, r) : 0;
        for (size_t i = 0; i < wide.size(); ++i) {
            const SiblingForward& one = f.siblings[i];
            const Wide& w = wide[i];
            for (int64_t n = 0; n < one.N; ++n) {
                const float bias = one.bias.data ? number_of(one.bias, n) : 0;
                if (w.gain) w.gain[n] = number_of(one.gain, n), w.bias[n] = bias;
                if (!w.start) continue;
                w.start[n] = w.gain ? 0 : bias;
                for (const Segment& s : one.segments)
                    if (s.d.data && !s.routed) w.start[n] += s.scale * number_of(s.d, n);
            }
        }
    }

    int64_t first_row(int64_t panel) const { return std::min(panel * height, f.M); }
    int64_t rows_of(int64_t panel) const { return first_row(panel + 1) - first_row(panel); }

    // the masks of rows that one thread works on alone, to be made beside those before
    void start(int64_t begin, int64_t rows, Slot& slot, Beside& beside) {
        beside.keep.start(stack.draws.data(), stack.draws.size(), begin, std::max<int64_t>(rows, 0), f.K,
                          slot.keep[1], ld_keep, height * ld_keep);
    }

    // the masks of the rows that come now are complete, those that come next are begun
    void next_masks(int64_t begin, int64_t rows, Slot& slot, Beside& beside) {
        beside.keep.finish(parts(f.K, 128));
        std::swap(slot.keep[0], slot.keep[1]);
        start(begin, rows, slot, beside);
    }

    // so many rows of x from `begin` on, to be fetched beside so many steps
    Fetch<1> rows_ahead(int64_t begin, int64_t rows, int64_t steps_before) const {
        begin = std::min(begin, f.M);
        const int64_t bytes = std::min(rows, f.M - begin) * f.ldx * 2;
        return Fetch<1>(f.x + begin * f.ldx, bytes <= EARLY_BYTES ? bytes : 0, steps_before);
    }

    void panel(int64_t index, int64_t next, Team team, Slot& slot, Own& own, Beside& beside) {
        const int64_t begin = first_row(index), rows = rows_of(index);
        const bool fused = rows_first && alone;
        if (alone && !fused) {
            next_masks(first_row(next), rows_of(next), slot, beside);
            beside.rows = rows_ahead(first_row(next), rows_of(next), strips * parts(rows, 32) * steps);
        }
        // tiles are read from x itself where they lie right in it
        const bool here = in_place && rows % 32 == 0;
        const Left x = {here ? f.x + begin * f.ldx : slot.x, here ? f.ldx : lda};
        const auto waist_of = [&](int64_t row) {
            beside.clear_tiles();
            block(begin, row, std::min<int64_t>(rows - row, 32), x, slot, own);
        };
        for (int64_t row = 32 * team.rank; row < rows && !fused; row += 32 * team.size) waist_of(row);
        team.wait();
        int64_t count = 0;
        for (size_t i = 0; i < wide.size(); ++i) {
            const int64_t before = wide[i].first_strip;
            const int64_t last = std::min(team.end(strips) - before, wide[i].strips);
            for (int64_t s = std::max<int64_t>(team.begin(strips) - before, 0); s < last; ++s) {
                Strip& strip = own.strips[rows_first ? count++ : 0];
                columns(i, s, begin, rows, x, slot, strip);
                if (!rows_first) multiply_strip(strip, own.sums, nullptr, beside);
            }
        }
        multiply_rows_first(own.strips, count, own.sums, nullptr, beside, [&](int64_t row) {
            if (!fused) return;
            const int64_t after = row + 32 < rows ? begin + row + 32 : first_row(next);
            next_masks(after, std::min<int64_t>(f.M - after, 32), slot, beside);
            waist_of(row);
            const int64_t group = strips_at_once(steps), block_steps = std::min(strips, group) * steps;
            beside.rows = rows_ahead(after, 32, block_steps);
            const SiblingForward& one = f.siblings[0];
            if (wide.size() == 1 && strips <= group)
                beside.foresee(one.y + after * one.N, std::min<int64_t>(f.M - after, 32) * one.N,
                               block_steps);
        });
        beside.finish();
        team.wait();
    }

    // the waist of up to 32 rows of a panel
    void block(int64_t begin, int64_t row, int64_t rows, const Left& in, const Slot& slot, const Own& own) {
        bf16* h = slot.h + row * ldh;
        if (in.at == slot.x)
            copy_rows(f.x + (begin + row) * f.ldx, f.ldx, rows, f.K, slot.x + row * lda, lda);
        for (const Group& g : stack.groups) {
            const Left x = in.from(row);
            const Dropped dropped = {g.mask < 0 ? nullptr : mask_of(begin + row, rows, g.mask, slot, row),
                                     ld_keep, own.room};
            for (int64_t i = g.chunk; i < g.chunk + g.chunks; ++i) {
                const Chunk& chunk = stack.chunks[i];
                bf16* to = h + chunk.slot;
                if (chunk.computed)
                    multiply_narrow({x.at, x.ld, a + i * steps * 2 * TILE, steps}, dropped, rows, chunk.used,
                                    g.keep_scale, c + chunk.slot, own.narrow, to, ldh);
                else
                    for (int64_t r = 0; r < padded(rows, SIDE); ++r)
                        _mm512_store_si512(to + r * ldh, _mm512_setzero_si512());
                save(chunk, begin + row, rows, to);
                if (!chunk.plain) make_h(stack, chunk, f.ids, begin + row, rows, to, ldh, to, ldh);
            }
        }
    }

    void save(const Chunk& chunk, int64_t row, int64_t rows, const bf16* z) {
        for (int64_t p = chunk.begin; p < chunk.end; ++p) {
            const Place& place = stack.places[p];
            const __mmask32 inside = Stack::shared(chunk, place);
            if (!inside || !place.computed()) continue;
            bf16* to = f.waist + row * stack.saved + place.saved + chunk.slot - place.slot;
            for (int64_t r = 0; r < rows; ++r)
                _mm512_mask_storeu_epi16(to + r * stack.saved, inside, _mm512_load_si512(z + r * ldh));
        }
    }

    // of up to 32 rows
    const uint32_t* mask_of(int64_t row, int64_t rows, int64_t mask, const Slot& slot, int64_t at) {
        uint32_t* keep = slot.keep[0] + (mask * height + (rows_first && alone ? 0 : at)) * ld_keep;
        if (!alone) {
            KeepRows make;
            make.start(&stack.draws[mask], 1, row, rows, f.K, keep, ld_keep, 0);
            make.finish(parts(f.K, 128));
        }
        return keep;
    }

    // 32 columns of a sibling's y for the rows of a panel
    void columns(size_t i, int64_t strip, int64_t begin, int64_t rows, const Left& x, const Slot& slot,
                 Strip& s) {
        const SiblingForward& one = f.siblings[i];
        const Wide& wide_i = wide[i];
        const Range chunks = stack.siblings[i];
        const int64_t n = strip * STRIP, count = chunks.end - chunks.begin;
        const bf16* w = one.w + n * steps * STEP;
        s.mains.assign(1, {x.at, x.ld, w, steps});
        s.sides.assign(1, {slot.h + chunks.begin * 32, ldh, wide_i.b + strip * count * 2 * TILE, count});
        s.start = wide_i.start ? wide_i.start + n : nullptr;
        s.to = {};
        s.to.to = one.y + begin * one.N + n, s.to.ld = one.N, s.to.inside = first(one.N - n);
        if (wide_i.gain) {
            s.to.gain = wide_i.gain + n, s.to.bias = wide_i.bias + n;
            s.to.u = one.u ? one.u + begin * one.N + n : nullptr;
        }
        s.rows = rows;
        s.next = {nullptr, 0, strip + 1 < wide_i.strips ? w + steps * 2 * TILE : nullptr, steps};
        if (!s.next.strip && i + 1 < wide.size()) s.next.strip = f.siblings[i + 1].w;
    }

    const DeltaForward& f;
    const Stack stack;
    const PackedWaist waist;
    const int64_t steps, lda, ldh, ld_keep;
    int64_t panels, height, strips = 0;
    bool alone;       // each panel is one thread's
    bool rows_first;  // the strips pass by each block of rows
    bool in_place;    // x as it lies can be the left factor
    bf16* a;          // [chunks, steps, 2 tiles]
    float* c;         // [slots]
    std::vector<Wide> wide;
    std::vector<Slot> slots;
    std::vector<Own> owns;
};

}  // namespace

void delta_linear_forward_amx(const DeltaForward& call, int threads) {
    Forward forward(call, threads);
    together(threads, [&](Team team) { forward.run(team); });
}

}  // namespace pefast
