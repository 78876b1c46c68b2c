#include "delta_linear_fp32_sums.h"

namespace pefast {

using namespace amx;

namespace {

// sums over rows are taken over blocks of rows, then over blocks: the order depends on the shape alone
constexpr int64_t BLOCK_ROWS = 512, BLOCKS = 8;

template <int P>
class Backward {
  public:
    Backward(const Fp32Backward& call, int threads) : g(call), ld_keep(parts(g.K, 128) * 4) {
        block_rows = std::max(BLOCK_ROWS, padded(parts(g.M, BLOCKS), 32));
        blocks = parts(g.M, block_rows);
        alone = blocks >= threads;
        height = std::clamp<int64_t>(padded(g.M, 32), 32, PART_ROWS);
        ldt = spread(height);

        Scratch& scratch = Scratch::of_this_thread();
        for (const Fp32LayerBackward& layer : g.layers) add(layer, scratch);
        masks = static_cast<int64_t>(draws.size());
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) take(slot, threads, scratch);
        owns.resize(threads);
        for (Own& own : owns) {
            own.blocks = scratch.take<float>(4 * BLOCK);
            own.strip = scratch.take<bf16>(P * height * STRIP);
            own.h = {scratch.take<bf16>(P * 32 * ldh), ldh, 32 * ldh};
        }
    }

    void run(Team team) {
        for (const Layer& layer : layers) pack(layer, team);
        team.wait();
        Fp32Beside beside;
        const Team us = alone ? Team{0, 1} : team;
        const int64_t stride = alone ? team.size : 1;
        Slot& slot = slots[alone ? team.rank : 0];
        for (Panel p = first_panel(alone ? team.rank : 0); p.rows; p = after(p, stride))
            panel(p, us, slot, owns[team.rank], beside);
        team.wait();
        for (const Layer& layer : layers)
            layer.sums.finish(layer.mask >= 0 ? layer.g->lora.keep_scale : 1.0f, team);
    }

  private:
    // what one layer has for all panels
    struct Layer {
        const Fp32LayerBackward* g;
        int64_t steps, waist_steps;
        Stretches stretches;
        int64_t mask;                        // its number among all; -1: there is none
        bool into_x, needs_dh, first, last;  // first and last of the layers
        float* b;                            // [N, R]  times the scale
        bf16 *a_packed, *b_packed;
        Fp32Sums sums;
    };
    // a panel of rows; what is in parts is one layer's after another, but for dh_t
    struct Slot {
        Planes dy;                 // [P][height, lda]  du: one stretch of the columns
        Planes dh;                 // [P][height, ldh]
        std::vector<Planes> dh_t;  // [P][R, ldt] of each layer
        Planes h_t;                // [P][R, ldt]
        float* waist;              // [height / 32][R / 32][32, 32]  sums of dh
        float* sums;               // [K / 32][height, 32]  of dx; with one stretch one strip for each thread
        float* lines;              // [height / 32][2, N]  sums over rows of dy
        uint32_t* keep;            // [masks, height, ld_keep]
    };
    // what each thread needs for itself
    struct Own {
        float* blocks;  // [4, 32, 32]
        bf16* strip;    // [P][height, 32]  rows of x̂ or dy in pairs
        Planes h;       // [P][32, ldh]
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

    void add(const Fp32LayerBackward& one, Scratch& scratch) {
        const LowRank& lora = one.lora;
        const int64_t R = lora.R, steps = parts(one.N, STEP), waist_steps = parts(R, STEP);
        const bool into_x = lora.a && g.dx, needs_dh = into_x || one.da || one.dh;
        Layer layer = {&one,
                       steps,
                       waist_steps,
                       {steps, P},
                       -1,
                       into_x,
                       needs_dh,
                       layers.empty(),
                       &one == &g.layers.back(),
                       nullptr,
                       nullptr,
                       nullptr,
                       {one, g.K, blocks, scratch}};
        if (lora.dropout && lora.a && needs_dh) {
            layer.mask = static_cast<int64_t>(draws.size());
            draws.push_back(lora.draw);
        }
        tall = std::max(tall, padded(R, STRIP)), ldh = std::max(ldh, spread(R));
        most_lines = std::max(most_lines, layer.sums.size_of_lines(height));
        lda = std::max(lda, spread(layer.stretches.longest() * STEP));
        many = many || g.layers.size() > 1 || layer.stretches.count > 1;
        layer.b = scratch.take<float>(one.N * R);
        layer.a_packed = scratch.take<bf16>(into_x ? P * waist_steps * STEP * padded(g.K, STRIP) : 0);
        layer.b_packed = scratch.take<bf16>(P * steps * STEP * padded(R, STRIP));
        layers.push_back(layer);
    }

    void take(Slot& slot, int threads, Scratch& scratch) const {
        slot.dy = {scratch.take<bf16>(P * height * lda), lda, height * lda};
        slot.dh = {scratch.take<bf16>(P * height * ldh), ldh, height * ldh};
        for (const Layer& layer : layers) {
            const int64_t rows = layer.g->da ? padded(layer.g->lora.R, STRIP) : 0;
            slot.dh_t.push_back({scratch.take<bf16>(P * rows * ldt), ldt, rows * ldt});
        }
        slot.h_t = {scratch.take<bf16>(P * tall * ldt), ldt, tall * ldt};
        slot.waist = scratch.take<float>(height * tall);
        slot.sums = scratch.take<float>(height * (many ? padded(g.K, STRIP) : STRIP * threads));
        slot.lines = scratch.take<float>(most_lines);
        slot.keep = scratch.take<uint32_t>(masks * height * ld_keep);
    }

    void pack(const Layer& layer, Team team) {
        const LowRank& lora = layer.g->lora;
        const int64_t N = layer.g->N, R = lora.R;
        if (!layer.needs_dh) return;
        for (int64_t i = team.begin(N) * R; i < team.end(N) * R; ++i) layer.b[i] = lora.b[i] * lora.scale;
        team.wait();
        const int64_t strips = layer.into_x ? parts(g.K, STRIP) : 0, narrow = parts(R, STRIP);
        for (int64_t s = team.begin(strips); s < team.end(strips); ++s)
            pack_parts<P, Terms::along>(lora.a, g.K, R, g.K, s, layer.a_packed);
        for (int64_t s = team.begin(narrow); s < team.end(narrow); ++s)
            pack_parts<P, Terms::along>(layer.b, R, N, R, s, layer.b_packed);
    }

    void panel(const Panel& p, Team team, Slot& slot, const Own& own, Fp32Beside& beside) {
        if (beside_masks())
            beside.keep.start(draws.data(), masks, p.begin, p.rows, g.K, slot.keep, ld_keep,
                              height * ld_keep);
        for (size_t i = 0; i < layers.size(); ++i)
            for (int64_t stretch = 0; stretch < layers[i].stretches.count; ++stretch) {
                for (int64_t row = 32 * team.rank; row < p.rows; row += 32 * team.size)
                    waist(i, p, row, std::min<int64_t>(p.rows - row, 32), stretch, slot, own);
                team.wait();
                if (g.dx) all_columns(layers[i], p, stretch, team, slot, own, beside);
                sums_of_dy(layers[i], p, stretch, team, slot, own);
                team.wait();
            }
        const int64_t strips = parts(g.K, STRIP);
        for (int64_t s = team.begin(strips); s < team.end(strips); ++s) all_da(s, p, slot, own);
        team.wait();
    }

    // for up to 32 rows of a panel: a stretch of du in parts and its share of dh; once the masks and the transposes
    void waist(size_t index, const Panel& p, int64_t i, int64_t rows, int64_t stretch, const Slot& slot,
               const Own& own) {
        const Layer& layer = layers[index];
        const Fp32LayerBackward& one = *layer.g;
        const int64_t row = p.begin + i, step = layer.stretches.begin(stretch), R = one.lora.R,
                      count = layer.stretches.begin(stretch + 1) - step;
        const bool first = stretch == 0, last = stretch == layer.stretches.count - 1;
        const Planes dy = slot.dy.row(i), dh = slot.dh.row(i);
        split_rows<P>(one.dy + row * one.lddy + step * STEP, one.lddy, rows,
                      std::min(count * STEP, one.N - step * STEP), dy,
                      one.gain ? one.gain + step * STEP : nullptr);
        if (layer.sums.lines())
            layer.sums.sum_lines(row, rows, step * STEP, count * STEP,
                                 slot.lines + layer.sums.size_of_lines(i));
        float* sums = slot.waist + i * tall;
        if (layer.needs_dh)
            multiply_narrow_parts<P>({dy, layer.b_packed + step * 2 * TILE * P, count},
                                     layer.steps * 2 * TILE * P, rows, R, first, sums);
        if (layer.needs_dh && last)
            finish_narrow_parts<P>(sums, rows, R, 1, one.dh ? one.dh + row * R : nullptr, R, dh);
        if (one.da && last) {
            const Planes to = slot.dh_t[index];
            transpose_planes<P>(dh, rows, R, {to.at + i, to.ld, to.plane});
        }
        if (one.db && first) {
            split_rows<P>(one.h + row * R, R, rows, R, own.h);
            transpose_planes<P>(own.h, rows, R, {slot.h_t.at + i, slot.h_t.ld, slot.h_t.plane});
        }
        if (masks && !beside_masks() && layer.first && first) {
            KeepRows make;
            make.start(draws.data(), masks, row, rows, g.K, slot.keep + i * ld_keep, ld_keep,
                       height * ld_keep);
            make.finish(parts(g.K, 128));
        }
    }

    // whether the masks are made beside dx: then a thread needs no other's part of them
    bool beside_masks() const { return masks && alone && g.dx; }

    // a layer's stretch of dx for the rows of a panel
    void all_columns(const Layer& layer, const Panel& p, int64_t stretch, Team team, const Slot& slot,
                     const Own& own, Fp32Beside& beside) {
        const int64_t strips = parts(g.K, STRIP);
        const bool masked = layer.mask >= 0 && stretch == layer.stretches.count - 1;
        for (int64_t s = team.begin(strips); s < team.end(strips); ++s) {
            // four strips share a block of the mask; it is ready before the first of their rows is stored
            if (beside_masks() && masked) beside.keep.finish(s / 4 + 1);
            columns(layer, s, p, stretch, team.rank, slot, own, beside);
        }
        beside.finish();
    }

    // a layer's stretch of 32 columns of dx for the rows of a panel
    void columns(const Layer& layer, int64_t strip, const Panel& p, int64_t stretch, int64_t rank,
                 const Slot& slot, const Own& own, Fp32Beside& beside) {
        const int64_t k = strip * STRIP, step = layer.stretches.begin(stretch), steps = layer.steps;
        const bf16* w = layer.g->w + (strip * steps + step) * 2 * TILE * P;
        const bool last = stretch == layer.stretches.count - 1;
        Fp32Strip s = {};
        s.rows = p.rows, s.first = layer.first && stretch == 0, s.last = layer.last && last;
        s.main = {slot.dy, w, layer.stretches.begin(stretch + 1) - step};
        if (last && layer.into_x)
            s.side = {slot.dh, layer.a_packed + k * layer.waist_steps * STEP * P, layer.waist_steps};
        s.to.to = g.dx + p.begin * g.K + k, s.to.ld = g.K, s.to.inside = first(g.K - k);
        if (layer.mask >= 0) {
            s.to.keep = slot.keep + layer.mask * height * ld_keep + strip;
            s.to.ld_keep = ld_keep, s.to.keep_scale = layer.g->lora.keep_scale;
        }
        beside.strip = Fetch<4>(w + steps * 2 * TILE * P, k + STRIP < g.K ? s.main.steps * 4 * TILE * P : 0,
                                parts(p.rows, 32) * s.main.steps * PRODUCTS<P>);
        s.sums = slot.sums + (many ? strip : rank) * height * STRIP;
        multiply_strip_parts<P>(s, own.blocks, beside);
    }

    // what is summed over rows for a stretch of a layer's columns
    void sums_of_dy(const Layer& layer, const Panel& p, int64_t stretch, Team team, const Slot& slot,
                    const Own& own) {
        const int64_t step = layer.stretches.begin(stretch),
                      count = layer.stretches.begin(stretch + 1) - step;
        for (int64_t s = team.begin(count); s < team.end(count); ++s) {
            if (layer.g->db) sum_db(layer, s, step, p, slot, own);
            if (layer.sums.lines()) layer.sums.add_lines((step + s) * STRIP, p, slot.lines);
        }
    }

    // da += dhᵀ x̂ of every layer for 32 columns of x and the rows of a panel
    void all_da(int64_t strip, const Panel& p, const Slot& slot, const Own& own) {
        const int64_t k = strip * STRIP;
        const __mmask32 inside = first(g.K - k);
        // the mask that lies on the rows that are packed; none of them at first
        int64_t packed = -2;
        for (size_t i = 0; i < layers.size(); ++i) {
            const Layer& layer = layers[i];
            if (!layer.g->da) continue;
            const uint32_t* mask =
                layer.mask < 0 ? nullptr : slot.keep + layer.mask * height * ld_keep + strip;
            float* to = layer.sums.da_strip(p.block, k);
            sum_rows(slot.dh_t[i], layer.g->lora.R, p, g.K - k, own, to, packed == layer.mask,
                     [&](int64_t row, bf16* tiles) {
                         const float* x = g.x + (p.begin + row) * g.ldx + k;
                         const uint32_t* keep = mask ? mask + row * ld_keep : nullptr;
                         for (int64_t pair = 0; pair < 16; ++pair, x += 2 * g.ldx, tiles += 32) {
                             const int64_t left = p.rows - row - 2 * pair;
                             const __mmask32 even =
                                 left > 0 ? inside & (keep ? keep[2 * pair * ld_keep] : ~0u) : 0;
                             const __mmask32 odd =
                                 left > 1 ? inside & (keep ? keep[(2 * pair + 1) * ld_keep] : ~0u) : 0;
                             pair_parts<P>(x, even, x + g.ldx, odd, tiles);
                         }
                     });
            packed = layer.mask;
        }
    }

    // dbᵀ += hᵀ du for 32 columns of a stretch and the rows of a panel
    void sum_db(const Layer& layer, int64_t strip, int64_t step, const Panel& p, const Slot& slot,
                const Own& own) {
        const int64_t n = (step + strip) * STRIP, N = layer.g->N, R = layer.g->lora.R;
        float* to = layer.sums.db_strip(p.block, n);
        sum_rows(slot.h_t, R, p, N - n, own, to, false, [&](int64_t row, bf16* tiles) {
            const bf16* dy = slot.dy.row(row).at + strip * STRIP;
            for (int part = 0; part < P; ++part, dy += slot.dy.plane, tiles += 2 * TILE)
                pack_step_along(dy, lda, p.rows - row, STRIP, tiles);
        });
    }

    // to [R, 32] += waist_t times 32 columns of rows; pair(row, tiles) packs 32 rows of them, beside the products, if
    // that has not been done
    template <class Pair>
    void sum_rows(const Planes& waist_t, int64_t R, const Panel& p, int64_t columns, const Own& own,
                  float* to, bool packed, const Pair& pair) {
        const int64_t steps = parts(p.rows, STEP);
        // two steps ahead: a tile is not loaded from lines that were stored a moment ago
        int64_t next = packed ? steps : 0, calls = 0;
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

    const Fp32Backward& g;
    const int64_t ld_keep;
    int64_t block_rows, blocks, height, ldt, masks, tall = 0, lda = 0, ldh = 0, most_lines = 0;
    bool alone;         // each block is one thread's
    bool many = false;  // whether sums of dx wait from stretch to stretch
    std::vector<Layer> layers;
    std::vector<Draw> draws;  // of the masks
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
