#include "delta_linear_fp32_amx.h"

namespace pefast {

using namespace amx;

namespace {

template <int P>
class Forward {
  public:
    Forward(const Fp32Forward& call, int threads)
        : f(call),
          R(f.lora.R),
          steps(parts(f.K, STEP)),
          waist_steps(parts(R, STEP)),
          stretches(steps, P),
          lda(spread(stretches.longest() * STEP)),
          ldh(spread(R)),
          ld_keep(parts(f.K, 128) * 4),
          dropout(f.lora.dropout && f.lora.a) {
        panels = parts(f.M, PART_ROWS);
        // small panels only where that gives every thread its own
        if (f.M >= 128 * threads) panels = padded(panels, threads);
        height = std::max<int64_t>(padded(parts(f.M, std::max<int64_t>(panels, 1)), 32), 32);
        panels = parts(f.M, height);
        alone = panels >= threads;

        Scratch& scratch = Scratch::of_this_thread();
        const int64_t N = padded(f.N, STRIP), tall = padded(R, STRIP);
        b = scratch.take<float>(f.N * R);
        a_packed = scratch.take<bf16>(f.lora.a ? P * steps * STEP * tall : 0);
        b_packed = scratch.take<bf16>(P * waist_steps * STEP * N);
        bias = scratch.take<float>(N);
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) {
            slot.x = {scratch.take<bf16>(P * height * lda), lda, height * lda};
            slot.h = {scratch.take<bf16>(P * height * ldh), ldh, height * ldh};
            slot.waist = scratch.take<float>(height * tall);
            slot.sums = scratch.take<float>(height * (stretches.count > 1 ? N : STRIP * threads));
            for (uint32_t*& keep : slot.keep) keep = scratch.take<uint32_t>(dropout ? height * ld_keep : 0);
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.blocks = scratch.take<float>(4 * BLOCK);
            own.x_hat = {scratch.take<bf16>(dropout ? P * 32 * lda : 0), lda, 32 * lda};
        }
    }

    void run(Team team) {
        pack(team);
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
    // a panel of rows
    struct Slot {
        Planes x;           // [P][height, lda]  one stretch of the columns
        Planes h;           // [P][height, ldh]
        float* waist;       // [height / 32][R / 32][32, 32]  sums of h
        float* sums;        // [N / 32][height, 32]  of y; with one stretch one strip for each thread
        uint32_t* keep[2];  // [height, ld_keep]  the masks of this panel and of the next
    };
    // what each thread needs for itself
    struct Own {
        float* blocks;  // [4, 32, 32]
        Planes x_hat;   // [P][32, lda]
    };

    void pack(Team team) {
        for (int64_t i = team.begin(f.N) * R; i < team.end(f.N) * R; ++i) b[i] = f.lora.b[i] * f.lora.scale;
        if (f.bias && team.rank == 0) std::copy_n(f.bias, f.N, bias);
        team.wait();
        const int64_t strips = R ? parts(f.N, STRIP) : 0, narrow = f.lora.a ? parts(R, STRIP) : 0;
        for (int64_t s = team.begin(strips); s < team.end(strips); ++s)
            pack_parts<P, Terms::across>(b, R, R, f.N, s, b_packed);
        for (int64_t s = team.begin(narrow); s < team.end(narrow); ++s)
            pack_parts<P, Terms::across>(f.lora.a, f.K, f.K, R, s, a_packed);
    }

    int64_t first_row(int64_t panel) const { return std::min(panel * height, f.M); }
    int64_t rows_of(int64_t panel) const { return first_row(panel + 1) - first_row(panel); }

    // a panel that one thread works on alone: its mask is made beside the one before
    void start(int64_t panel, Slot& slot, Fp32Beside& beside) {
        if (dropout)
            beside.keep.start(f.lora.draw, first_row(panel), rows_of(panel), f.K, slot.keep[1], ld_keep);
    }

    void panel(int64_t index, int64_t next, Team team, Slot& slot, const Own& own, Fp32Beside& beside) {
        const int64_t begin = first_row(index), rows = rows_of(index), strips = parts(f.N, STRIP);
        if (alone) {
            beside.keep.finish(parts(f.K, 128));
            std::swap(slot.keep[0], slot.keep[1]);
            start(next, slot, beside);
        } else if (dropout) {
            make_mask(begin, rows, team, slot);
        }
        for (int64_t i = 0; i < stretches.count; ++i) {
            for (int64_t row = 32 * team.rank; row < rows; row += 32 * team.size)
                waist(begin, row, std::min<int64_t>(rows - row, 32), i, slot, own);
            team.wait();
            for (int64_t s = team.begin(strips); s < team.end(strips); ++s)
                columns(s, begin, rows, i, team.rank, slot, own, beside);
            beside.finish();
            team.wait();
        }
    }

    // each thread for the 32 rows that it takes in waist()
    void make_mask(int64_t begin, int64_t rows, Team team, const Slot& slot) {
        for (int64_t row = 32 * team.rank; row < rows; row += 32 * team.size) {
            KeepRows mask;
            mask.start(f.lora.draw, begin + row, std::min<int64_t>(rows - row, 32), f.K,
                       slot.keep[0] + row * ld_keep, ld_keep);
            mask.finish(parts(f.K, 128));
        }
    }

    // a stretch of x in parts, and its share of h, for up to 32 rows of a panel
    void waist(int64_t begin, int64_t row, int64_t rows, int64_t stretch, const Slot& slot, const Own& own) {
        const Planes x = slot.x.row(row), h = slot.h.row(row);
        const int64_t step = stretches.begin(stretch), count = stretches.begin(stretch + 1) - step;
        const bool first = stretch == 0, last = stretch == stretches.count - 1;
        const int64_t k = step * STEP, wide = std::min(count * STEP, f.K - k);
        split_rows<P>(f.x + (begin + row) * f.ldx + k, f.ldx, rows, wide, x);
        float *to = f.h + (begin + row) * R, *sums = slot.waist + row * padded(R, STRIP);
        if (!f.lora.a) {
            if (first && R) split_rows<P>(to, R, rows, R, h);
            return;
        }
        const uint32_t* keep = slot.keep[0] + row * ld_keep + step;
        const Planes x_hat = dropout ? dropped(rows, x, count, keep, own) : x;
        multiply_narrow_parts<P>({x_hat, a_packed + step * 2 * TILE * P, count}, steps * 2 * TILE * P, rows,
                                 R, first, sums);
        if (last) finish_narrow_parts<P>(sums, rows, R, dropout ? f.lora.keep_scale : 1.0f, to, R, h);
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

    // one stretch of 32 columns of y for the rows of a panel
    void columns(int64_t strip, int64_t begin, int64_t rows, int64_t stretch, int64_t rank, const Slot& slot,
                 const Own& own, Fp32Beside& beside) {
        const int64_t n = strip * STRIP, step = stretches.begin(stretch);
        const bf16* w = f.w + (strip * steps + step) * 2 * TILE * P;
        Fp32Strip s = {};
        s.main = {slot.x, w, stretches.begin(stretch + 1) - step};
        s.side = {slot.h, b_packed + n * waist_steps * STEP * P, waist_steps};
        s.to.bias = f.bias ? bias + n : nullptr;
        s.to.to = f.y + begin * f.N + n, s.to.ld = f.N, s.to.inside = pefast::first(f.N - n);
        s.rows = rows, s.first = stretch == 0, s.last = stretch == stretches.count - 1;
        beside.strip = Fetch(w + steps * 2 * TILE * P, n + STRIP < f.N ? s.main.steps * 4 * TILE * P : 0,
                             parts(rows, 32) * s.main.steps * PRODUCTS<P>);
        s.sums = slot.sums + (stretches.count > 1 ? strip : rank) * height * STRIP;
        multiply_strip_parts<P>(s, own.blocks, beside);
    }

    const Fp32Forward& f;
    const int64_t R, steps, waist_steps;
    const Stretches stretches;
    const int64_t lda, ldh, ld_keep;
    const bool dropout;
    int64_t panels, height;
    bool alone;  // each panel is one thread's
    float* b;
    bf16 *a_packed, *b_packed;
    float* bias;
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
