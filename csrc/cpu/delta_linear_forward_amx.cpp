#include "delta_linear_beside.h"

namespace pefast {

using namespace amx;

namespace {

// A panel of rows stays in the second cache while the packed weight streams past it once.
constexpr int64_t PANEL_BYTES = 1 << 20, PANEL_ROWS = 256;
// The rows of the next panel are fetched early where they take no more than this.
constexpr int64_t EARLY_BYTES = 1 << 19;

class Forward {
  public:
    Forward(const DeltaForward& call, int threads)
        : f(call),
          steps(parts(f.K, STEP)),
          waist_steps(parts(f.waist.R, STEP)),
          lda(spread(f.K)),
          ldh(spread(f.waist.R)),
          ld_keep(parts(f.K, 128) * 4) {
        const int64_t most = std::clamp<int64_t>(PANEL_BYTES / (2 * lda) / 32 * 32, 64, PANEL_ROWS);
        panels = parts(f.M, most);
        // small panels only where that gives every thread its own
        if (f.M >= 128 * threads) panels = padded(panels, threads);
        height = std::max<int64_t>(padded(parts(f.M, std::max<int64_t>(panels, 1)), 32), 32);
        panels = parts(f.M, height);
        alone = panels >= threads;

        Scratch& scratch = Scratch::of_this_thread();
        const int64_t R = f.waist.R, N = padded(f.N, STRIP);
        a = scratch.take<bf16>(R * f.K), b = scratch.take<bf16>(f.N * R);
        a_packed = scratch.take<bf16>(steps * STEP * padded(R, STRIP));
        b_packed = scratch.take<bf16>(waist_steps * STEP * N);
        bias = scratch.take<float>(N);
        slots.resize(alone ? threads : 1);
        for (Slot& slot : slots) {
            slot.x = scratch.take<bf16>(height * lda);
            slot.h = scratch.take<bf16>(height * ldh);
            for (uint32_t*& keep : slot.keep)
                keep = scratch.take<uint32_t>(f.waist.dropout ? height * ld_keep : 0);
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.sums = scratch.take<float>(std::max<int64_t>(height, 64) * STRIP);
            own.x_hat = f.waist.dropout ? scratch.take<bf16>(32 * lda) : nullptr;
        }
    }

    void run(Team team) {
        pack(team);
        team.wait();
        Beside beside;
        if (alone) {
            const Own& own = owns[team.rank];
            Slot& slot = slots[team.rank];
            start(team.rank, slot, beside, 1);
            for (int64_t p = team.rank; p < panels; p += team.size)
                panel(p, p + team.size, Team{0, 1}, slot, own, beside);
        } else {
            for (int64_t p = 0; p < panels; ++p) panel(p, panels, team, slots[0], owns[team.rank], beside);
        }
    }

  private:
    // a panel of rows
    struct Slot {
        bf16* x;            // [height, lda]
        bf16* h;            // [height, ldh]
        uint32_t* keep[2];  // [height, ld_keep]  the masks of this panel and of the next
    };
    // what each thread needs for itself
    struct Own {
        float* sums;  // [max(height, 64), 32]
        bf16* x_hat;  // [32, lda]
    };

    void pack(Team team) {
        const int64_t R = f.waist.R;
        round_master(f.waist.a, team.begin(R) * f.K, team.end(R) * f.K, 1, a);
        round_master(f.waist.b, team.begin(f.N) * R, team.end(f.N) * R, f.waist.scale, b);
        if (f.bias.data && team.rank == 0) widen_bias();
        team.wait();
        const int64_t strips = parts(f.N, STRIP), narrow = parts(R, STRIP);
        for (int64_t s = team.begin(strips); s < team.end(strips); ++s)
            pack_strip<Terms::across>(b, R, R, f.N, s, b_packed);
        for (int64_t s = team.begin(narrow); s < team.end(narrow); ++s)
            pack_strip<Terms::across>(a, f.K, f.K, R, s, a_packed);
    }

    void widen_bias() {
        for (int64_t n = 0; n < f.N; ++n)
            bias[n] = f.bias.fp32 ? static_cast<const float*>(f.bias.data)[n]
                                  : widen(static_cast<const bf16*>(f.bias.data)[n]);
    }

    int64_t first_row(int64_t panel) const { return std::min(panel * height, f.M); }
    int64_t rows_of(int64_t panel) const { return first_row(panel + 1) - first_row(panel); }

    // a panel that one thread works on alone: fetched, and its mask made, beside so many steps of the one before
    void start(int64_t panel, Slot& slot, Beside& beside, int64_t steps_before) {
        const int64_t begin = first_row(panel), rows = rows_of(panel), bytes = rows * f.ldx * 2;
        beside.rows = Fetch(f.x + begin * f.ldx, bytes <= EARLY_BYTES ? bytes : 0, steps_before);
        if (f.waist.dropout) beside.keep.start(f.waist.draw, begin, rows, f.K, slot.keep[1], ld_keep);
    }

    void panel(int64_t index, int64_t next, Team team, Slot& slot, const Own& own, Beside& beside) {
        const int64_t begin = first_row(index), rows = rows_of(index), strips = parts(f.N, STRIP);
        if (alone) {
            beside.keep.finish(parts(f.K, 128));
            std::swap(slot.keep[0], slot.keep[1]);
            start(next, slot, beside, strips * parts(rows, 32) * steps);
        }
        for (int64_t row = 32 * team.rank; row < rows; row += 32 * team.size)
            waist(begin, row, std::min<int64_t>(rows - row, 32), slot, own);
        team.wait();
        for (int64_t s = team.begin(strips); s < team.end(strips); ++s)
            columns(s, begin, rows, slot, own, beside);
        beside.finish();
        team.wait();
    }

    // h of up to 32 rows of a panel
    void waist(int64_t begin, int64_t row, int64_t rows, const Slot& slot, const Own& own) {
        bf16 *x = slot.x + row * lda, *h = slot.h + row * ldh;
        copy_rows(f.x + (begin + row) * f.ldx, f.ldx, rows, f.K, x, lda);
        const bf16* x_hat =
            f.waist.dropout ? dropped(begin + row, rows, x, slot.keep[0] + row * ld_keep, own) : x;
        multiply_narrow({x_hat, lda, a_packed, steps}, rows, f.waist.R, f.waist.keep_scale, own.sums, h, ldh);
        store_h(begin + row, rows, h);
    }

    void store_h(int64_t row, int64_t rows, const bf16* h) {
        const int64_t R = f.waist.R;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < R; c += 32)
                _mm512_mask_storeu_epi16(f.h + (row + r) * R + c, first(R - c),
                                         _mm512_load_si512(h + r * ldh + c));
    }

    const bf16* dropped(int64_t row, int64_t rows, const bf16* x, uint32_t* keep, const Own& own) {
        if (!alone) {
            KeepRows mask;
            mask.start(f.waist.draw, row, rows, f.K, keep, ld_keep);
            mask.finish(parts(f.K, 128));
        }
        // rows beyond the last are zeros in x whatever their mask says
        for (int64_t r = 0; r < padded(rows, SIDE); ++r)
            for (int64_t w = 0; w < steps; ++w)
                _mm512_store_si512(own.x_hat + r * lda + w * 32,
                                   _mm512_maskz_loadu_epi16(keep[r * ld_keep + w], x + r * lda + w * 32));
        return own.x_hat;
    }

    // 32 columns of y for the rows of a panel
    void columns(int64_t strip, int64_t begin, int64_t rows, const Slot& slot, const Own& own,
                 Beside& beside) {
        const int64_t n = strip * STRIP;
        const bf16* w = f.w + n * steps * STEP;
        Strip s = {};
        s.main = {slot.x, lda, w, steps};
        s.side = {slot.h, ldh, b_packed + n * waist_steps * STEP, waist_steps};
        s.start = f.bias.data ? bias + n : nullptr;
        s.to.to = f.y + begin * f.N + n, s.to.ld = f.N, s.to.inside = first(f.N - n);
        s.rows = rows;
        beside.strip =
            Fetch(w + steps * 2 * TILE, n + STRIP < f.N ? steps * 4 * TILE : 0, parts(rows, 32) * steps);
        multiply_strip(s, own.sums, nullptr, beside);
    }

    const DeltaForward& f;
    const int64_t steps, waist_steps, lda, ldh, ld_keep;
    int64_t panels, height;
    bool alone;  // each panel is one thread's
    bf16 *a, *b, *a_packed, *b_packed;
    float* bias;
    std::vector<Slot> slots;
    std::vector<Own> owns;
};

}  // namespace

void delta_linear_forward_amx(const DeltaForward& call, int threads) {
    Forward forward(call, threads);
    together(threads, [&](Team team) { forward.run(team); });
}

}  // namespace pefast
