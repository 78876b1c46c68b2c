#include "delta_linear_amx.h"
#include "delta_linear_decode.h"

namespace pefast {

using namespace amx;

namespace {

// A step is as fast as memory: this many bytes ahead of the products the weight and a are called to the first cache,
// and the rows' b beside them. Without a and b 576 x 576 with rank 16 on 8 rows took 87 us instead of 81.
constexpr int64_t W_AHEAD = 8192, A_AHEAD = 4096;

inline void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(from) + i, _MM_HINT_T0);
}

class DecodeStep {
  public:
    explicit DecodeStep(const Decode& call)
        : f(call), steps(parts(f.K, STEP)), lda(spread(f.K)), height(padded(f.M, SIDE)), heads(f.count + 1) {
        Scratch& scratch = Scratch::of_this_thread();
        for (int64_t i = 0; i < f.count; ++i) heads[i + 1] = heads[i] + parts(f.deltas[i].R, 2) * 2;
        x = scratch.take<bf16>(height * lda);
        h = scratch.take<bf16>(heads[f.count]);
    }

    void run(Team team) {
        if (team.rank == 0) copy_rows(f.x, f.ldx, f.M, f.K, x, lda);
        team.wait();
        for (int64_t i = team.begin(f.count); i < team.end(f.count); ++i) waist(f.deltas[i], h + heads[i]);
        team.wait();
        alignas(64) float sums[BLOCK];
        const int64_t strips = parts(f.N, STRIP);
        for (int64_t s = team.begin(strips); s < team.end(strips); ++s) columns(s, sums);
    }

  private:
    // h = s·a x of one row, a zero behind an odd rank
    void waist(const RowDelta& delta, bf16* to) const {
        const bf16* row = x + delta.row * lda;
        for (int64_t r = 0; r < delta.R; ++r) {
            const bf16* a = delta.a + r * f.K;
            fetch(reinterpret_cast<const char*>(a) + A_AHEAD, f.K * 2);
            __m512 sums[4] = {};
            int64_t k = 0;
            for (; k + 128 <= f.K; k += 128)
                for (int i = 0; i < 4; ++i)
                    sums[i] = dot(sums[i], row + k + 32 * i, _mm512_loadu_si512(a + k + 32 * i));
            for (int i = 0; k < f.K; k += 32, ++i)
                sums[i] = dot(sums[i], row + k, _mm512_maskz_loadu_epi16(first(f.K - k), a + k));
            const __m512 sum =
                _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
            narrow(_mm512_reduce_add_ps(sum) * delta.scale, to + r);
        }
        if (delta.R % 2) to[delta.R] = {0};
    }

    static __m512 dot(__m512 sum, const bf16* x, __m512i a) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_load_si512(x), (__m512bh)a);
    }

    // 32 columns of y
    void columns(int64_t strip, float* sums) const {
        const int64_t n = strip * STRIP;
        const bf16* w = f.w + n * steps * STEP;
        const char* next = reinterpret_cast<const char*>(w) + W_AHEAD;
        // the lines of each row's b, a few with each step of the product
        int64_t i = 0, line = 0;
        const auto beside = [&] {
            fetch(next, 4 * TILE);
            next += 4 * TILE;
            for (int count = 0; count < 8 && i < f.count; ++count) {
                const int64_t lines = parts(f.deltas[i].R, 2) * 2;
                fetch(f.deltas[i].b + (strip * lines + line) * STRIP, 64);
                if (++line == lines) line = 0, ++i;
            }
        };
        const Factors factors = {x, lda, w, steps};
        sized(f.M, STRIP, [&](auto tall, auto) {
            constexpr int ROWS = decltype(tall)::value;
            clear_sums<ROWS, 2>();
            accumulate<ROWS, 2>(factors, beside);
            store_sums<ROWS, 2>(sums);
        });
        const __mmask32 inside = first(f.N - n);
        const __m512 low = bias_of(n), high = bias_of(n + SIDE);
        const RowDelta* delta = f.deltas;
        const bf16* waist = h;
        for (int64_t m = 0; m < f.M; ++m, sums += STRIP) {
            __m512 y[2] = {_mm512_add_ps(_mm512_load_ps(sums), low),
                           _mm512_add_ps(_mm512_load_ps(sums + SIDE), high)};
            for (; delta < f.deltas + f.count && delta->row == m; ++delta) {
                const int64_t pairs = parts(delta->R, 2);
                add(delta->b + strip * pairs * 2 * STRIP, waist, pairs, y);
                waist += 2 * pairs;
            }
            _mm512_mask_storeu_epi16(f.y + m * f.N + n, inside, rounded(y[0], y[1]));
        }
    }

    // y [2 x 16] += h b for 32 columns
    static void add(const bf16* b, const bf16* waist, int64_t pairs, __m512 y[2]) {
        for (int64_t p = 0; p < pairs; ++p, b += 2 * STRIP, waist += 2) {
            int32_t pair;
            std::memcpy(&pair, waist, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            y[0] = _mm512_dpbf16_ps(y[0], both, (__m512bh)_mm512_loadu_si512(b));
            y[1] = _mm512_dpbf16_ps(y[1], both, (__m512bh)_mm512_loadu_si512(b + STRIP));
        }
    }

    // 16 numbers of the bias from column n, or zeros
    __m512 bias_of(int64_t n) const {
        const __mmask16 inside = static_cast<__mmask16>(first(std::min<int64_t>(f.N - n, 16)));
        if (!f.bias.data) return _mm512_setzero_ps();
        if (f.bias.fp32) return _mm512_maskz_loadu_ps(inside, static_cast<const float*>(f.bias.data) + n);
        const __m256i half = _mm256_maskz_loadu_epi16(inside, static_cast<const bf16*>(f.bias.data) + n);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }

    const Decode& f;
    const int64_t steps, lda, height;
    std::vector<int64_t> heads;  // where each delta's h begins
    bf16 *x, *h;                 // [height, lda] and the rows' waists, one after another
};

}  // namespace

void delta_linear_decode_amx(const Decode& call, int threads) {
    DecodeStep step(call);
    together(threads, [&](Team team) { step.run(team); });
}

}  // namespace pefast
