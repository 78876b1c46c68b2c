#include "delta_linear_amx.h"

namespace pefast {

using namespace amx;

namespace {

// A panel of rows stays in the second cache while the packed weight streams past it once.
constexpr int64_t PANEL_BYTES = 1 << 20, PANEL_ROWS = 512;

class Forward {
  public:
    Forward(const DeltaForward& call, int threads)
        : f(call),
          steps(parts(f.K, STEP)),
          waist_steps(parts(f.waist.R, STEP)),
          lda(spread(f.K)),
          ldh(spread(f.waist.R)) {
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
        }
        owns.resize(threads);
        for (Own& own : owns) {
            own.sums = scratch.take<float>(std::max<int64_t>(height, 64) * STRIP);
            own.x_hat = f.waist.dropout ? scratch.take<bf16>(32 * lda) : nullptr;
            own.keep = scratch.take<uint32_t>(padded(f.K, 128) / 32);
        }
    }

    void run(Team team) {
        pack(team);
        team.wait();
        if (alone) {
            for (int64_t p = team.rank; p < panels; p += team.size)
                panel(p, Team{0, 1}, slots[team.rank], owns[team.rank]);
        } else {
            for (int64_t p = 0; p < panels; ++p) panel(p, team, slots[0], owns[team.rank]);
        }
    }

  private:
    // a panel of rows
    struct Slot {
        bf16* x;  // [height, lda]
        bf16* h;  // [height, ldh]
    };
    // what each thread needs for itself
    struct Own {
        float* sums;     // [max(height, 64), 32]
        bf16* x_hat;     // [32, lda]
        uint32_t* keep;  // [K / 32]
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

    void panel(int64_t index, Team team, const Slot& slot, const Own& own) {
        const int64_t begin = index * height, rows = std::min(height, f.M - begin);
        for (int64_t row = 32 * team.rank; row < rows; row += 32 * team.size)
            waist(begin + row, std::min<int64_t>(rows - row, 32), slot.x + row * lda, slot.h + row * ldh,
                  own);
        team.wait();
        const int64_t strips = parts(f.N, STRIP);
        Beside beside;
        for (int64_t s = team.begin(strips); s < team.end(strips); ++s)
            columns(s, begin, rows, slot, own, beside);
        beside.finish();
        team.wait();
    }

    // h of up to 32 rows, and the rows themselves into the panel
    void waist(int64_t row, int64_t rows, bf16* x, bf16* h, const Own& own) {
        copy_rows(f.x + row * f.ldx, f.ldx, rows, f.K, x, lda);
        if (f.waist.dropout) drop(row, rows, x, own);
        const bf16* x_hat = f.waist.dropout ? own.x_hat : x;
        multiply_narrow({x_hat, lda, a_packed, steps}, rows, f.waist.R, f.waist.keep_scale, own.sums, h, ldh);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(h + r * ldh, f.waist.R, f.h + (row + r) * f.waist.R);
    }

    void drop(int64_t row, int64_t rows, const bf16* x, const Own& own) {
        const int64_t words = steps;
        for (int64_t r = 0; r < padded(rows, SIDE); ++r) {
            if (r < rows) keep_rows(f.waist.draw, row + r, 1, f.K, own.keep, 0);
            for (int64_t w = 0; w < words; ++w)
                _mm512_store_si512(own.x_hat + r * lda + w * 32,
                                   _mm512_maskz_loadu_epi16(own.keep[w], x + r * lda + w * 32));
        }
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
        beside.fetch(w + steps * 2 * TILE, n + STRIP < f.N ? steps * 4 * TILE : 0, parts(1024, rows));
        multiply_strip(s, own.sums, nullptr, beside);
    }

    const DeltaForward& f;
    const int64_t steps, waist_steps, lda, ldh;
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
