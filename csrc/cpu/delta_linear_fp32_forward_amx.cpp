#include "delta_linear_fp32_amx.h"

namespace pefast {

using namespace amx;

namespace {

template <int P>
class Forward {
  public:
    Forward(const Fp32Forward& call, int threads)
        : f(call),
          steps(parts(f.K, STEP)),
          stretches(steps, P),
          lda(spread(stretches.longest() * STEP)),
          ld_keep(parts(f.K, 128) * 4) {
        panels = parts(f.M, PART_ROWS);
        // small panels only where that gives every thread its own
        if (f.M >= 128 * threads) panels = padded(panels, threads);
        height = std::max<int64_t>(padded(parts(f.M, std::max<int64_t>(panels, 1)), 32), 32);
        panels = parts(f.M, height);
        alone = panels >= threads;

        Scratch& scratch = Scratch::of_this_thread();
        for (const Fp32Layer& layer : f.layers) add(layer, scratch);
        masks = static_cast<int64_t>(draws.size());
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) {
            slot.x = {scratch.take<bf16>(P * height * lda), lda, height * lda};
            for (const Layer& layer : layers) {
                slot.h.push_back({scratch.take<bf16>(P * height * layer.ldh), layer.ldh, height * layer.ldh});
                slot.waist.push_back(scratch.take<float>(height * padded(layer.g->lora.R, STRIP)));
            }
            const int64_t waiting = stretches.count > 1 ? static_cast<int64_t>(strips.size()) : threads;
            slot.sums = scratch.take<float>(height * STRIP * waiting);
            for (uint32_t*& keep : slot.keep) keep = scratch.take<uint32_t>(masks * height * ld_keep);
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.blocks = scratch.take<float>(4 * BLOCK);
            own.x_hat = {scratch.take<bf16>(masks ? P * 32 * lda : 0), lda, 32 * lda};
        }
    }

    void run(Team team) {
        for (const Layer& layer : layers) pack(layer, team);
        team.wait();
        Fp32Beside beside;
        if (alone) {
            const Own& own = owns[team.rank];
            Slot& slot = slots[team.rank];
            start(team.rank, slot, beside);
            for (int64_t p = team.rank; p < panels; p += team.size)
                panel(p, p + team.size, Team{0, 1}, slot, own, beside);
        } else {
            for (int64_t p = 0; p < panels; ++p) panel(p, panels, team, slots[0], owns[team.rank], beside);
        }
    }

  private:
    // what one layer has for all panels
    struct Layer {
        const Fp32Layer* g;
        int64_t waist_steps, ldh, mask;  // mask: its number among all; -1: there is none
        float* b;                        // [N, R]  times the scale
        bf16 *a_packed, *b_packed;
        float *gain, *bias;  // [N], filled up to whole strips; null: there is none
    };
    // 32 columns of one layer's result
    struct Column {
        int64_t layer, n;
    };
    // a panel of rows
    struct Slot {
        Planes x;                   // [P][height, lda]  one stretch of the columns
        std::vector<Planes> h;      // [P][height, ldh] of each layer
        std::vector<float*> waist;  // [height / 32][R / 32][32, 32] of each layer: sums of h
        float* sums;                // [strips][height, 32]  of y; with one stretch one strip for each thread
        uint32_t* keep[2];          // [masks, height, ld_keep]  of this panel and of the next
    };
    // what each thread needs for itself
    struct Own {
        float* blocks;  // [4, 32, 32]
        Planes x_hat;   // [P][32, lda]
    };

    void add(const Fp32Layer& g, Scratch& scratch) {
        const int64_t N = padded(g.N, STRIP), R = g.lora.R;
        Layer layer = {&g, parts(R, STEP), spread(R), -1, nullptr, nullptr, nullptr, nullptr, nullptr};
        layer.b = scratch.take<float>(g.N * R);
        layer.a_packed = scratch.take<bf16>(g.lora.a ? P * steps * STEP * padded(R, STRIP) : 0);
        layer.b_packed = scratch.take<bf16>(P * layer.waist_steps * STEP * N);
        if (g.gain) layer.gain = scratch.take<float>(N);
        if (g.bias) layer.bias = scratch.take<float>(N);
        if (g.lora.a && g.lora.dropout) {
            layer.mask = static_cast<int64_t>(draws.size());
            draws.push_back(g.lora.draw);
        }
        for (int64_t n = 0; n < g.N; n += STRIP) strips.push_back({static_cast<int64_t>(layers.size()), n});
        layers.push_back(layer);
    }

    void pack(const Layer& layer, Team team) {
        const Fp32Layer& g = *layer.g;
        const int64_t R = g.lora.R;
        for (int64_t i = team.begin(g.N) * R; i < team.end(g.N) * R; ++i)
            layer.b[i] = g.lora.b[i] * g.lora.scale;
        if (g.gain && team.rank == 0) std::copy_n(g.gain, g.N, layer.gain);
        if (g.bias && team.rank == 0) std::copy_n(g.bias, g.N, layer.bias);
        team.wait();
        const int64_t wide = R ? parts(g.N, STRIP) : 0, narrow = g.lora.a ? parts(R, STRIP) : 0;
        for (int64_t s = team.begin(wide); s < team.end(wide); ++s)
            pack_parts<P, Terms::across>(layer.b, R, R, g.N, s, layer.b_packed);
        for (int64_t s = team.begin(narrow); s < team.end(narrow); ++s)
            pack_parts<P, Terms::across>(g.lora.a, f.K, f.K, R, s, layer.a_packed);
    }

    int64_t first_row(int64_t panel) const { return std::min(panel * height, f.M); }
    int64_t rows_of(int64_t panel) const { return first_row(panel + 1) - first_row(panel); }

    // a panel that one thread works on alone: its masks are made beside the one before
    void start(int64_t panel, Slot& slot, Fp32Beside& beside) {
        beside.keep.start(draws.data(), masks, first_row(panel), rows_of(panel), f.K, slot.keep[1], ld_keep,
                          height * ld_keep);
    }

    void panel(int64_t index, int64_t next, Team team, Slot& slot, const Own& own, Fp32Beside& beside) {
        const int64_t begin = first_row(index), rows = rows_of(index),
                      count = static_cast<int64_t>(strips.size());
        if (alone) {
            beside.keep.finish(parts(f.K, 128));
            std::swap(slot.keep[0], slot.keep[1]);
            start(next, slot, beside);
        } else if (masks) {
            make_masks(begin, rows, team, slot);
        }
        for (int64_t i = 0; i < stretches.count; ++i) {
            for (int64_t row = 32 * team.rank; row < rows; row += 32 * team.size)
                waists(begin, row, std::min<int64_t>(rows - row, 32), i, slot, own);
            team.wait();
            for (int64_t s = team.begin(count); s < team.end(count); ++s)
                columns(s, begin, rows, i, team.rank, slot, own, beside);
            beside.finish();
            team.wait();
        }
    }

    // each thread for the 32 rows that it takes in waists()
    void make_masks(int64_t begin, int64_t rows, Team team, const Slot& slot) {
        for (int64_t row = 32 * team.rank; row < rows; row += 32 * team.size) {
            KeepRows make;
            make.start(draws.data(), masks, begin + row, std::min<int64_t>(rows - row, 32), f.K,
                       slot.keep[0] + row * ld_keep, ld_keep, height * ld_keep);
            make.finish(parts(f.K, 128));
        }
    }

    // a stretch of x in parts, and its share of every h, for up to 32 rows of a panel
    void waists(int64_t begin, int64_t row, int64_t rows, int64_t stretch, const Slot& slot, const Own& own) {
        const Planes x = slot.x.row(row);
        const int64_t step = stretches.begin(stretch), count = stretches.begin(stretch + 1) - step;
        const int64_t k = step * STEP, wide = std::min(count * STEP, f.K - k);
        split_rows<P>(f.x + (begin + row) * f.ldx + k, f.ldx, rows, wide, x);
        for (size_t i = 0; i < layers.size(); ++i) {
            const Layer& layer = layers[i];
            const LowRank& lora = layer.g->lora;
            const int64_t R = lora.R;
            float *to = layer.g->h + (begin + row) * R, *sums = slot.waist[i] + row * padded(R, STRIP);
            const Planes h = slot.h[i].row(row);
            if (!lora.a) {
                if (stretch == 0 && R) split_rows<P>(to, R, rows, R, h);
                continue;
            }
            Planes x_hat = x;
            if (layer.mask >= 0)
                x_hat =
                    dropped(rows, x, count, slot.keep[0] + (layer.mask * height + row) * ld_keep + step, own);
            multiply_narrow_parts<P>({x_hat, layer.a_packed + step * 2 * TILE * P, count},
                                     steps * 2 * TILE * P, rows, R, stretch == 0, sums);
            if (stretch == stretches.count - 1)
                finish_narrow_parts<P>(sums, rows, R, layer.mask >= 0 ? lora.keep_scale : 1.0f, to, R, h);
        }
    }

    Planes dropped(int64_t rows, Planes x, int64_t count, const uint32_t* keep, const Own& own) {
        // rows beyond the last are zeros in x whatever their mask says
        for (int p = 0; p < P; ++p)
            for (int64_t r = 0; r < padded(rows, SIDE); ++r) {
                const bf16* from = x.row(r).at + p * x.plane;
                bf16* to = own.x_hat.row(r).at + p * own.x_hat.plane;
                for (int64_t w = 0; w < count; ++w)
                    _mm512_store_si512(to + w * 32,
                                       _mm512_maskz_loadu_epi16(keep[r * ld_keep + w], from + w * 32));
            }
        return own.x_hat;
    }

    // where a stretch of 32 columns of a packed weight begins
    const bf16* strip_of(const Column& column, int64_t step) const {
        return layers[column.layer].g->w + (column.n / STRIP * steps + step) * 2 * TILE * P;
    }

    // one stretch of 32 columns of a result for the rows of a panel
    void columns(int64_t index, int64_t begin, int64_t rows, int64_t stretch, int64_t rank, const Slot& slot,
                 const Own& own, Fp32Beside& beside) {
        const Column& column = strips[index];
        const Layer& layer = layers[column.layer];
        const Fp32Layer& g = *layer.g;
        const int64_t n = column.n, step = stretches.begin(stretch), place = begin * g.N + n;
        Fp32Strip s = {};
        s.rows = rows, s.first = stretch == 0, s.last = stretch == stretches.count - 1;
        s.main = {slot.x, strip_of(column, step), stretches.begin(stretch + 1) - step};
        if (s.last)
            s.side = {slot.h[column.layer], layer.b_packed + n * layer.waist_steps * STEP * P,
                      layer.waist_steps};
        s.to.gain = g.gain ? layer.gain + n : nullptr, s.to.bias = g.bias ? layer.bias + n : nullptr;
        s.to.to = g.y + place, s.to.u = g.u ? g.u + place : nullptr;
        s.to.ld = g.N, s.to.inside = first(g.N - n);
        const bool more = index + 1 < static_cast<int64_t>(strips.size());
        beside.strip =
            Fetch<4>(more ? strip_of(strips[index + 1], step) : nullptr,
                     more ? s.main.steps * 4 * TILE * P : 0, parts(rows, 32) * s.main.steps * PRODUCTS<P>);
        s.sums = slot.sums + (stretches.count > 1 ? index : rank) * height * STRIP;
        multiply_strip_parts<P>(s, own.blocks, beside);
    }

    const Fp32Forward& f;
    const int64_t steps;
    const Stretches stretches;
    const int64_t lda, ld_keep;
    int64_t panels, height, masks;
    bool alone;  // each panel is one thread's
    std::vector<Layer> layers;
    std::vector<Column> strips;
    std::vector<Draw> draws;  // of the masks
    std::vector<Slot> slots;
    std::vector<Own> owns;
};

template <int P>
void run(const Fp32Forward& call, int threads) {
    Forward<P> forward(call, threads);
    together(threads, [&](Team team) { forward.run(team); });
}

}  // namespace

void fp32_forward_amx(const Fp32Forward& call, int parts, int threads) {
    (parts == 1 ? run<1> : run<3>)(call, threads);
}

}  // namespace pefast
