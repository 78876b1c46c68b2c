#include "attention_vector.h"

namespace pefast {
namespace {

// below everything, and finite: a difference of two of them must not be NaN
constexpr float LOWEST = -3e38f;

class Forward {
  public:
    Forward(const AttentionForward<float>& call, int threads)
        : f(call), sight(call), R(f.group_rows()), blocks(parts(R, BLOCK)) {
        Scratch& scratch = Scratch::of_this_thread();
        owns.resize(threads);
        for (Own& own : owns) {
            own.k = scratch.take<float>(f.keys() * f.D);
            own.v = scratch.take<float>(f.keys() * f.D);
            own.q = scratch.take<float>(padded(f.D, LANES) * BLOCK);
            own.o = scratch.take<float>(f.D * BLOCK);
            own.x = scratch.take<float>(KEYS * BLOCK);
            own.see = scratch.take<uint32_t>(KEYS);
            own.keep = scratch.take<uint32_t>(KEYS);
        }
    }

    void run(Team team) {
        Own& own = owns[team.rank];
        int64_t head = -1;
        const int64_t count = f.B * f.G * blocks;
        for (int64_t i = team.begin(count); i < team.end(count); ++i) {
            if (i / blocks != head) {
                head = i / blocks;
                gather(f, f.prefix_k, f.k, head / f.G, head % f.G, own.k);
                gather(f, f.prefix_v, f.v, head / f.G, head % f.G, own.v);
            }
            const int64_t begin = i % blocks * BLOCK;
            queries({head / f.G, head % f.G, begin, std::min(R - begin, BLOCK)}, own);
        }
    }

  private:
    // what each thread needs for itself
    struct Own {
        float *k, *v;          // [P + S, D]  of the key head
        float* q;              // [D, 32]
        float* o;              // [D, 32]
        float* x;              // [KEYS, 32]  k qᵀ, then e^(x - largest)
        uint32_t *see, *keep;  // [KEYS / 32, 32]  bit j of a query's word is key j
        __m512 largest[2], sum[2];
        bool plain[KEYS / BLOCK];  // all queries see all of 32 keys
    };

    void queries(const QueryBlock& block, Own& own) {
        const float* rows[BLOCK];
        block.pointers(f, f.q, rows);
        transpose_queries(rows, f.D, own.q, nullptr, 0);
        for (int half = 0; half < 2; ++half)
            own.largest[half] = _mm512_set1_ps(LOWEST), own.sum[half] = _mm512_setzero_ps();
        std::fill_n(own.o, f.D * BLOCK, 0.0f);
        const int64_t limit = sight.limit(std::min(block.begin % f.L + block.rows, f.L));
        for (int64_t key = 0; key < limit; key += KEYS) {
            const int64_t count = std::min(KEYS, limit - key);
            multiply<false>({own.k + key * f.D, f.D, 1}, count, own.q, BLOCK, f.D, own.x, BLOCK);
            __m512 high[2] = {_mm512_set1_ps(LOWEST), _mm512_set1_ps(LOWEST)};
            for (int64_t j = 0; j < count; j += BLOCK)
                largest(block, key, j, std::min(count - j, BLOCK), own, high);
            if (f.dropout) keeps(block, key, own);
            renew(high, own);
            for (int64_t j = 0; j < count; j += BLOCK) weights(j, std::min(count - j, BLOCK), own);
            multiply<true>({own.v + key * f.D, 1, f.D}, f.D, own.x, BLOCK, count, own.o, BLOCK);
        }
        finish(block, own);
    }

    // the largest x that is seen of up to 32 keys
    void largest(const QueryBlock& block, int64_t key, int64_t j, int64_t count, Own& own, __m512 high[2]) {
        uint32_t* see = own.see + j;
        const bool plain = sight.look(block.b, block.begin, key + j, see) == Seen::all;
        own.plain[j / BLOCK] = plain;
        for (int64_t i = 0; i < count; ++i)
            for (int half = 0; half < 2; ++half) {
                const __m512 x = _mm512_loadu_ps(own.x + (j + i) * BLOCK + half * LANES);
                const __mmask16 seen = plain ? 0xffff : bit(see, i, half);
                high[half] = _mm512_mask_max_ps(high[half], seen, high[half], x);
            }
    }

    static __mmask16 bit(const uint32_t* words, int64_t i, int half) {
        return _mm512_test_epi32_mask(_mm512_loadu_si512(words + half * LANES), _mm512_set1_epi32(1u << i));
    }

    void keeps(const QueryBlock& block, int64_t key, const Own& own) {
        for (int64_t r = 0; r < block.rows; ++r) {
            uint32_t words[4];
            keep_keys(f, block.b, block.g, block.begin + r, key / KEYS, words);
            for (int64_t i = 0; i < 4; ++i) own.keep[i * BLOCK + r] = words[i];
        }
    }

    // the largest x so far, and what o and the sums so far are worth beside it
    void renew(const __m512 high[2], Own& own) {
        __m512 shrink[2];
        for (int half = 0; half < 2; ++half) {
            const __m512 now = _mm512_mul_ps(high[half], _mm512_set1_ps(f.scale));
            const __m512 largest = _mm512_max_ps(own.largest[half], now);
            shrink[half] = exponential(_mm512_sub_ps(own.largest[half], largest));
            own.largest[half] = largest, own.sum[half] = _mm512_mul_ps(own.sum[half], shrink[half]);
        }
        for (float* o = own.o; o < own.o + f.D * BLOCK; o += BLOCK)
            for (int half = 0; half < 2; ++half)
                _mm512_storeu_ps(o + half * LANES,
                                 _mm512_mul_ps(_mm512_loadu_ps(o + half * LANES), shrink[half]));
    }

    // w of up to 32 keys in the place of x, with dropout's mask on it; and the sums without
    void weights(int64_t j, int64_t count, Own& own) {
        const __m512 scale = _mm512_set1_ps(f.scale);
        const bool plain = own.plain[j / BLOCK];
        for (int half = 0; half < 2; ++half) {
            // the strip's own sum first: one of all keys would be off by more
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < count; ++i) {
                float* x = own.x + (j + i) * BLOCK + half * LANES;
                __m512 w = exponential(_mm512_fmsub_ps(_mm512_loadu_ps(x), scale, own.largest[half]));
                if (!plain) w = _mm512_maskz_mov_ps(bit(own.see + j, i, half), w);
                sum = _mm512_add_ps(sum, w);
                if (f.dropout) w = _mm512_maskz_mov_ps(bit(own.keep + j, i, half), w);
                _mm512_storeu_ps(x, w);
            }
            own.sum[half] = _mm512_add_ps(own.sum[half], sum);
        }
    }

    void finish(const QueryBlock& block, const Own& own) {
        float* rows[BLOCK];
        block.pointers(f, f.o, rows);
        // rows of a group follow one another in lse too
        float* lse = f.lse + (block.b * f.H + block.g * (f.H / f.G)) * f.L + block.begin;
        __m512 by[2];
        for (int half = 0; half < 2; ++half) {
            const __mmask16 some = _mm512_cmp_ps_mask(own.sum[half], _mm512_setzero_ps(), _CMP_NEQ_UQ);
            const __m512 one_over = _mm512_maskz_div_ps(some, _mm512_set1_ps(1), own.sum[half]);
            by[half] = _mm512_mul_ps(one_over, _mm512_set1_ps(f.dropout ? f.keep_scale : 1));
            const __mmask16 inside = first_16(block.rows - half * LANES);
            _mm512_mask_storeu_ps(lse + half * LANES, inside, own.largest[half]);
            _mm512_mask_storeu_ps(lse + f.B * f.H * f.L + half * LANES, inside, own.sum[half]);
        }
        store_queries(own.o, f.D, by, rows);
    }

    const AttentionForward<float>& f;
    const Sight sight;
    const int64_t R, blocks;
    std::vector<Own> owns;
};

}  // namespace

void attention_forward_avx512(const AttentionForward<float>& call, int threads) {
    Forward forward(call, threads);
    on_threads(threads, [&](Team team) { forward.run(team); });
}

}  // namespace pefast
