// The gradients of one layer's parameters in fp32: sums over rows, first within blocks of rows, then over blocks, in an
// order that only the shape decides.
#pragma once

#include "delta_linear_fp32_amx.h"
#include "delta_linear_sums.h"

namespace pefast::amx {

class Fp32Sums {
  public:
    Fp32Sums(const Fp32LayerBackward& layer, int64_t K, int64_t blocks, Scratch& scratch)
        : g(&layer),
          K(K),
          blocks(blocks),
          tall(padded(layer.lora.R, SIDE)),
          line(padded(layer.N, STRIP)),
          da_size(padded(K, STRIP) * tall),
          db_size(line * tall) {
        da = scratch.take<float>(g->da ? blocks * da_size : 0);
        db = scratch.take<float>(g->db ? blocks * db_size : 0);
        dgain = scratch.take<float>(g->dgain ? blocks * line : 0);
        dbias = scratch.take<float>(g->dbias ? blocks * line : 0);
    }

    // the strip [R, 32] of da from column k on, and of dbᵀ from column n on
    float* da_strip(int64_t block, int64_t k) const { return da + block * da_size + k * tall; }
    float* db_strip(int64_t block, int64_t n) const { return db + block * db_size + n * tall; }

    // whether something is summed over rows of dy as it is
    bool lines() const { return g->dbias || g->dgain; }

    // two lines of sums for each 32 rows of a panel
    int64_t size_of_lines(int64_t height) const { return lines() ? height / 32 * 2 * line : 0; }

    // Σ dy and Σ dy ⊙ u of up to 32 rows for some columns, to the two lines of these rows
    void sum_lines(int64_t row, int64_t rows, int64_t n, int64_t columns, float* to) const {
        for (int64_t r = 0; r < rows; r += 4)
            for (int64_t c = n; c < n + columns; c += SIDE) {
                const __mmask16 inside =
                    static_cast<__mmask16>(first(std::clamp<int64_t>(g->N - c, 0, SIDE)));
                __m512 bias = _mm512_setzero_ps(), gain = bias;
                for (int64_t i = row + r; i < row + std::min(rows, r + 4); ++i) {
                    const __m512 dy = _mm512_maskz_loadu_ps(inside, g->dy + i * g->lddy + c);
                    bias = _mm512_add_ps(bias, dy);
                    if (g->dgain)
                        gain = _mm512_fmadd_ps(dy, _mm512_maskz_loadu_ps(inside, g->u + i * g->N + c), gain);
                }
                add(r == 0, bias, to + c), add(r == 0, gain, to + line + c);
            }
    }

    // dbias and dgain += the lines of a panel, for 32 columns
    void add_lines(int64_t n, const Panel& p, const float* from) const {
        for (const int64_t end = n + STRIP; n < end; n += SIDE) {
            __m512 bias = _mm512_setzero_ps(), gain = bias;
            for (int64_t i = 0; i < parts(p.rows, 32); ++i) {
                bias = _mm512_add_ps(bias, _mm512_load_ps(from + 2 * i * line + n));
                gain = _mm512_add_ps(gain, _mm512_load_ps(from + (2 * i + 1) * line + n));
            }
            if (g->dbias) add(p.first, bias, dbias + p.block * line + n);
            if (g->dgain) add(p.first, gain, dgain + p.block * line + n);
        }
    }

    // all blocks together, to where they were asked for; da times a scale
    void finish(float scale, Team team) const {
        if (g->da) finish_da(scale, team);
        if (g->db) finish_db(team);
        finish_columns(g->dbias, dbias, team);
        finish_columns(g->dgain, dgain, team);
    }

  private:
    static void add(bool begins, __m512 sum, float* to) {
        _mm512_store_ps(to, begins ? sum : _mm512_add_ps(_mm512_load_ps(to), sum));
    }

    __m512 over_blocks(const float* from, int64_t size) const {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < blocks; ++i) sum = _mm512_add_ps(sum, _mm512_load_ps(from + i * size));
        return sum;
    }

    void finish_da(float scale, Team team) const {
        const int64_t halves = parts(K, SIDE);
        for (int64_t half = team.begin(halves); half < team.end(halves); ++half) {
            const __mmask16 inside = static_cast<__mmask16>(first(std::min(K - half * SIDE, SIDE)));
            const float* from = da_strip(0, half / 2 * STRIP) + half % 2 * SIDE;
            for (int64_t r = 0; r < g->lora.R; ++r, from += STRIP)
                _mm512_mask_storeu_ps(g->da + r * K + half * SIDE, inside,
                                      _mm512_mul_ps(over_blocks(from, da_size), _mm512_set1_ps(scale)));
        }
    }

    // turned: to [N, R]
    void finish_db(Team team) const {
        const __m512 scale = _mm512_set1_ps(g->lora.scale);
        const int64_t R = g->lora.R, halves = parts(g->N, SIDE);
        for (int64_t half = team.begin(halves); half < team.end(halves); ++half)
            for (int64_t r = 0; r < R; r += SIDE) {
                const float* from = db_strip(0, half / 2 * STRIP) + r * STRIP + half % 2 * SIDE;
                __m512i v[16];
                for (int64_t row = 0; row < SIDE; ++row, from += STRIP)
                    v[row] = _mm512_castps_si512(_mm512_mul_ps(over_blocks(from, db_size), scale));
                transpose(v);
                const __mmask16 inside = static_cast<__mmask16>(first(std::min(R - r, SIDE)));
                const int64_t n = half * SIDE, count = std::min(g->N - n, SIDE);
                for (int64_t i = 0; i < count; ++i)
                    _mm512_mask_storeu_epi32(g->db + (n + i) * R + r, inside, v[i]);
            }
    }

    void finish_columns(float* to, const float* from, Team team) const {
        const int64_t halves = to ? parts(g->N, SIDE) : 0;
        for (int64_t half = team.begin(halves); half < team.end(halves); ++half) {
            const __mmask16 inside = static_cast<__mmask16>(first(std::min(g->N - half * SIDE, SIDE)));
            _mm512_mask_storeu_ps(to + half * SIDE, inside, over_blocks(from + half * SIDE, line));
        }
    }

    const Fp32LayerBackward* g;
    int64_t K, blocks, tall, line, da_size, db_size;
    float *da, *db;        // [blocks, strips, R, 32]
    float *dgain, *dbias;  // [blocks, line]
};

}  // namespace pefast::amx
