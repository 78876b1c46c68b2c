#include "attention_vector.h"

namespace pefast {
namespace {

class Backward {
  public:
    Backward(const AttentionBackward<float>& call, int threads)
        : f(call),
          sight(call),
          R(f.group_rows()),
          width(padded(f.D, BLOCK)),
          shared(f.P > 0 && f.prefix_k.batch == 0 && f.B > 1) {
        Scratch& scratch = Scratch::of_this_thread();
        const int64_t prefix = shared ? f.B * f.G * f.P * f.D : 0;
        prefix_dk = scratch.take<float>(prefix), prefix_dv = scratch.take<float>(prefix);
        owns.resize(threads);
        for (Own& own : owns) {
            own.k = scratch.take<float>(f.keys() * f.D);
            own.v = scratch.take<float>(f.keys() * f.D);
            own.dk = scratch.take<float>(f.keys() * width), own.dv = scratch.take<float>(f.keys() * width);
            for (Queries* each : {&own.q, &own.d_o}) {
                each->across = scratch.take<float>(width * BLOCK);
                each->rows = scratch.take<float>(width * BLOCK);
            }
            own.dq = scratch.take<float>(f.D * BLOCK);
            own.x = scratch.take<float>(KEYS * BLOCK), own.dw = scratch.take<float>(KEYS * BLOCK);
            own.keep = scratch.take<uint32_t>(KEYS);
        }
    }

    void run(Team team) {
        const int64_t heads = f.B * f.G;
        for (int64_t i = team.begin(heads); i < team.end(heads); ++i) head(i / f.G, i % f.G, owns[team.rank]);
        if (!shared) return;
        team.wait();
        for (int64_t g = team.rank; g < f.G; g += team.size)
            for (int64_t j = 0; j < f.P; ++j) {
                sum_batch(prefix_dk, g, j, f.dprefix_k);
                sum_batch(prefix_dv, g, j, f.dprefix_v);
            }
    }

  private:
    // a block of queries, or of do, in both forms
    struct Queries {
        float* across;  // [D, 32]
        float* rows;    // [32, width]
    };
    // what each thread needs for itself
    struct Own {
        float *k, *v;    // [P + S, D]  of the key head
        float *dk, *dv;  // [P + S, width]
        Queries q, d_o;
        float* dq;       // [D, 32]
        float *x, *dw;   // [KEYS, 32]  then w, with dropout's mask on it, and dx
        uint32_t* keep;  // [KEYS / 32, 32]  bit j of a query's word is key j
        __m512 largest[2], sum[2], one_over[2], delta[2];
    };

    void head(int64_t b, int64_t g, Own& own) {
        gather(f, f.prefix_k, f.k, b, g, own.k);
        gather(f, f.prefix_v, f.v, b, g, own.v);
        std::fill_n(own.dk, f.keys() * width, 0.0f);
        std::fill_n(own.dv, f.keys() * width, 0.0f);
        for (int64_t begin = 0; begin < R; begin += BLOCK)
            queries({b, g, begin, std::min(R - begin, BLOCK)}, own);
        finish(b, g, own.dk, f.scale, f.dk, f.dprefix_k, prefix_dk);
        finish(b, g, own.dv, f.dropout ? f.keep_scale : 1, f.dv, f.dprefix_v, prefix_dv);
    }

    void queries(const QueryBlock& block, Own& own) {
        load(block, own);
        std::fill_n(own.dq, f.D * BLOCK, 0.0f);
        const int64_t limit = sight.limit(std::min(block.begin % f.L + block.rows, f.L));
        for (int64_t key = 0; key < limit; key += KEYS) {
            const int64_t count = std::min(KEYS, limit - key);
            const float *k = own.k + key * f.D, *v = own.v + key * f.D;
            multiply<false>({k, f.D, 1}, count, own.q.across, BLOCK, f.D, own.x, BLOCK);
            multiply<false>({v, f.D, 1}, count, own.d_o.across, BLOCK, f.D, own.dw, BLOCK);
            if (f.dropout) keeps(block, key, own);
            for (int64_t j = 0; j < count; j += BLOCK)
                weights(block, key, j, std::min(count - j, BLOCK), own);
            for (int64_t d = 0; d < width; d += BLOCK) {
                const int64_t at = key * width + d;
                multiply<true>({own.x, BLOCK, 1}, count, own.d_o.rows + d, width, BLOCK, own.dv + at, width);
                multiply<true>({own.dw, BLOCK, 1}, count, own.q.rows + d, width, BLOCK, own.dk + at, width);
            }
            multiply<true>({k, 1, f.D}, f.D, own.dw, BLOCK, count, own.dq, BLOCK);
        }
        if (!f.dq.data) return;
        float* rows[BLOCK];
        block.pointers(f, f.dq, rows);
        const __m512 scale[2] = {_mm512_set1_ps(f.scale), _mm512_set1_ps(f.scale)};
        store_queries(own.dq, f.D, scale, rows);
    }

    // q and do of a block, and what belongs to each query
    void load(const QueryBlock& block, Own& own) {
        const float *q[BLOCK], *d_o[BLOCK], *o[BLOCK];
        block.pointers(f, f.q, q), block.pointers(f, f.d_o, d_o), block.pointers(f, f.o, o);
        for (Queries* each : {&own.q, &own.d_o}) std::fill_n(each->rows, width * BLOCK, 0.0f);
        transpose_queries(q, f.D, own.q.across, own.q.rows, width);
        transpose_queries(d_o, f.D, own.d_o.across, own.d_o.rows, width);
        alignas(64) float delta[BLOCK];
        for (int64_t r = 0; r < BLOCK; ++r) delta[r] = r < block.rows ? dot(o[r], d_o[r]) : 0;
        const float* lse = f.lse + (block.b * f.H + block.g * (f.H / f.G)) * f.L + block.begin;
        for (int half = 0; half < 2; ++half) {
            const __mmask16 inside = first_16(block.rows - half * LANES);
            own.largest[half] = _mm512_maskz_loadu_ps(inside, lse + half * LANES);
            own.sum[half] = _mm512_maskz_loadu_ps(inside, lse + f.B * f.H * f.L + half * LANES);
            const __mmask16 some = _mm512_cmp_ps_mask(own.sum[half], _mm512_setzero_ps(), _CMP_NEQ_UQ);
            own.one_over[half] = _mm512_maskz_div_ps(some, _mm512_set1_ps(1), own.sum[half]);
            own.delta[half] = _mm512_load_ps(delta + half * LANES);
        }
    }

    float dot(const float* one, const float* two) const {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < f.D; d += LANES) {
            const __mmask16 inside = first_16(f.D - d);
            sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(inside, one + d),
                                  _mm512_maskz_loadu_ps(inside, two + d), sum);
        }
        return _mm512_reduce_add_ps(sum);
    }

    void keeps(const QueryBlock& block, int64_t key, const Own& own) {
        for (int64_t r = 0; r < block.rows; ++r) {
            uint32_t words[4];
            keep_keys(f, block.b, block.g, block.begin + r, key / KEYS, words);
            for (int64_t i = 0; i < 4; ++i) own.keep[i * BLOCK + r] = words[i];
        }
    }

    static __mmask16 bit(const uint32_t* words, int64_t i, int half) {
        return _mm512_test_epi32_mask(_mm512_loadu_si512(words + half * LANES), _mm512_set1_epi32(1u << i));
    }

    // from x and dw of up to 32 keys: w and dx
    void weights(const QueryBlock& block, int64_t key, int64_t j, int64_t count, Own& own) {
        uint32_t see[32];
        const bool plain = sight.look(block.b, block.begin, key + j, see) == Seen::all;
        const __m512 scale = _mm512_set1_ps(f.scale), keep_scale = _mm512_set1_ps(f.keep_scale);
        for (int64_t i = 0; i < count; ++i)
            for (int half = 0; half < 2; ++half) {
                const int64_t at = (j + i) * BLOCK + half * LANES;
                const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(own.x + at), scale, own.largest[half]);
                __m512 w = over_sum(exponential(x), own, half), dw = _mm512_loadu_ps(own.dw + at);
                if (!plain) w = _mm512_maskz_mov_ps(bit(see, i, half), w);
                const __mmask16 kept = f.dropout ? bit(own.keep + j, i, half) : 0xffff;
                if (f.dropout) dw = _mm512_maskz_mul_ps(kept, dw, keep_scale);
                _mm512_storeu_ps(own.x + at, _mm512_maskz_mov_ps(kept, w));
                _mm512_storeu_ps(own.dw + at, _mm512_mul_ps(w, _mm512_sub_ps(dw, own.delta[half])));
            }
    }

    // e / sum, rounded once, in a third of a division's time
    static __m512 over_sum(__m512 e, const Own& own, int half) {
        const __m512 w = _mm512_mul_ps(e, own.one_over[half]);
        return _mm512_fmadd_ps(_mm512_fnmadd_ps(w, own.sum[half], e), own.one_over[half], w);
    }

    // dk or dv of a key head, times a factor, to where it belongs
    void finish(int64_t b, int64_t g, const float* sums, double by, const Heads<float>& to,
                const Heads<float>& to_prefix, float* over_batch) const {
        for (int64_t j = 0; j < f.keys(); ++j, sums += width) {
            float* row = j >= f.P         ? (to.data ? to.at(b, g, j - f.P) : nullptr)
                         : shared         ? over_batch + ((b * f.G + g) * f.P + j) * f.D
                         : to_prefix.data ? to_prefix.at(b, g, j)
                                          : nullptr;
            for (int64_t d = 0; row && d < f.D; ++d) row[d] = static_cast<float>(sums[d] * by);
        }
    }

    // a row of a shared prefix: the sum over the batch, in its order
    void sum_batch(const float* parts, int64_t g, int64_t j, const Heads<float>& to) const {
        if (!to.data) return;
        float* row = to.at(0, g, j);
        for (int64_t d = 0; d < f.D; ++d) {
            float sum = 0;
            for (int64_t b = 0; b < f.B; ++b) sum += parts[((b * f.G + g) * f.P + j) * f.D + d];
            row[d] = sum;
        }
    }

    const AttentionBackward<float>& f;
    const Sight sight;
    const int64_t R, width;
    const bool shared;             // one prefix for a batch of several rows
    float *prefix_dk, *prefix_dv;  // [B, G, P, D]
    std::vector<Own> owns;
};

}  // namespace

void attention_backward_avx512(const AttentionBackward<float>& call, int threads) {
    Backward backward(call, threads);
    on_threads(threads, [&](Team team) { backward.run(team); });
}

}  // namespace pefast
