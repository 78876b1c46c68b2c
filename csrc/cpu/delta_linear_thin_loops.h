// delta_linear's thin products in registers, for the vectors of each file that includes it. Three shapes of product,
// each for a block of rows that stays in the second cache:
//
//     narrow   u[m, r] = Σ_c t[m, c] p[c, r]        h from x̂ and aᵀ; dh from dy and b
//     widen    t[m, c] += Σ_r u[m, r] q[r, c]       y from h and bᵀ; dx from dh and a
//     outer    g[r, c] += Σ_m u[m, r] t[m, c]       da from dh and x̂; dbᵀ from h and dy
#pragma once

#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "delta_linear_thin.h"
#include "vector_fp32.h"

namespace pefast {
namespace {

constexpr int64_t W = Vector::WIDTH;
// rows of a block; sums of da and db are taken over blocks of rows, then over those: the order depends on M alone
constexpr int64_t ROWS = 32, SHARE_ROWS = 128, SHARES = 16;
// columns of a row that are brought to fp32 at a time: so many of some rows stay in the first cache
constexpr int64_t STRETCH = 512;
// registers of sums in each product: rows of t by registers of columns, and rows of u by registers of columns
constexpr int64_t TALL = W == 16 ? 8 : 4, WIDE = W == 16 ? 3 : 2, DEEP = W == 16 ? 8 : 4;

inline int64_t rounded_up(int64_t n, int64_t size) { return (n + size - 1) / size * size; }

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Free>;

// words of the masks of a block of rows: the last register of the last row may ask beyond its columns
inline int64_t mask_size(int64_t ld_keep) { return ROWS * ld_keep + WIDE * W / 32 + 1; }

inline Floats floats(int64_t count) {
    void* memory = std::aligned_alloc(64, rounded_up(std::max<int64_t>(count, 1) * 4, 64));
    if (!memory) throw std::bad_alloc();
    return Floats(static_cast<float*>(memory));
}

// Rows of t as the caller has them, with the mask that lies on them.
template <class T>
struct Source {
    const T* data;  // rows ld apart
    int64_t ld, columns;
    const uint32_t* keep;  // rows ld_keep apart; null: all stay
    int64_t ld_keep;

    // inside: which columns of this register there are
    Vector at(int64_t row, int64_t column, Vector::Mask inside) const {
        if (keep) inside = Vector::both(inside, Vector::kept(keep + row * ld_keep, column));
        return Vector::load(data + row * ld + column, inside);
    }
};

// sums [COUNT rows, PARTS registers] += near [COUNT, count] times p [count, ldp]
template <int COUNT, int PARTS>
inline void narrow_block(const float* near, int64_t count, const float* p, int64_t ldp, float* u, int64_t ldu,
                         bool first) {
    Vector sum[COUNT][PARTS];
    for (auto& row : sum)
        for (Vector& v : row) v = Vector::zero();
    for (int64_t c = 0; c < count; ++c, p += ldp) {
        Vector right[PARTS];
        for (int i = 0; i < PARTS; ++i) right[i] = Vector::load(p + i * W);
#pragma GCC unroll 8
        for (int m = 0; m < COUNT; ++m) {
            const Vector left = Vector::all(near[m * STRETCH + c]);
            for (int i = 0; i < PARTS; ++i) sum[m][i] = Vector::plus_product(left, right[i], sum[m][i]);
        }
    }
    for (int m = 0; m < COUNT; ++m)
        for (int i = 0; i < PARTS; ++i) {
            float* to = u + m * ldu + i * W;
            (first ? sum[m][i] : Vector::plus(sum[m][i], Vector::load(to))).store(to);
        }
}

// u [rows, ldu] = t times p [columns, ldu]; near [TALL, STRETCH]
template <class T>
void narrow(const Source<T>& t, int64_t rows, const float* p, float* u, int64_t ldu, float* near) {
    for (int64_t m = 0; m < rows; m += TALL)
        for (int64_t c = 0; c < t.columns; c += STRETCH) {
            const int64_t count = std::min(t.columns - c, STRETCH);
            // rows beyond the last repeat it, and what comes of them is not looked at
            for (int64_t i = 0; i < TALL; ++i)
                for (int64_t j = 0; j < count; j += W)
                    t.at(std::min(m + i, rows - 1), c + j, Vector::first(count - j))
                        .store(near + i * STRETCH + j);
            for (int64_t r = 0; r < ldu; r += W)
                narrow_block<TALL, 1>(near, count, p + c * ldu + r, ldu, u + m * ldu + r, ldu, c == 0);
        }
}

// t [COUNT, PARTS registers] += u [COUNT, depth] times q [depth, ldq], times a scale where the mask has a bit
template <class T, int COUNT, int PARTS>
inline void widen_block(const float* u, int64_t ldu, int64_t depth, const float* q, int64_t ldq, T* to,
                        int64_t ld, int64_t left, const uint32_t* keep, int64_t ld_keep, int64_t column,
                        float scale) {
    Vector sum[COUNT][PARTS];
    for (auto& row : sum)
        for (Vector& v : row) v = Vector::zero();
    for (int64_t r = 0; r < depth; ++r, q += ldq) {
        Vector right[PARTS];
        for (int i = 0; i < PARTS; ++i) right[i] = Vector::load(q + i * W);
#pragma GCC unroll 8
        for (int m = 0; m < COUNT; ++m) {
            const Vector one = Vector::all(u[m * ldu + r]);
            for (int i = 0; i < PARTS; ++i) sum[m][i] = Vector::plus_product(one, right[i], sum[m][i]);
        }
    }
    const Vector by = Vector::all(scale);
    for (int m = 0; m < COUNT; ++m)
        for (int i = 0; i < PARTS; ++i) {
            if (i * W >= left) break;
            const Vector::Mask inside = Vector::first(left - i * W);
            T* at = to + m * ld + i * W;
            Vector step = sum[m][i];
            if (keep) step = Vector::masked(step, Vector::kept(keep + m * ld_keep, column + i * W));
            Vector::plus_product(step, by, Vector::load(at, inside)).store(at, inside);
        }
}

// t [rows, columns] += u [rows, ldu] times q [depth, ldq]; q is filled up to whole blocks of registers
template <class T>
void widen(const float* u, int64_t ldu, int64_t depth, const float* q, int64_t ldq, int64_t rows, T* t,
           int64_t ld, int64_t columns, const uint32_t* keep, int64_t ld_keep, float scale) {
    const auto block = [&](auto tall, int64_t m) {
        constexpr int COUNT = decltype(tall)::value;
        for (int64_t c = 0; c < columns; c += WIDE * W)
            widen_block<T, COUNT, WIDE>(u + m * ldu, ldu, depth, q + c, ldq, t + m * ld + c, ld, columns - c,
                                        keep ? keep + m * ld_keep : nullptr, ld_keep, c, scale);
    };
    int64_t m = 0;
    for (; m + TALL <= rows; m += TALL) block(std::integral_constant<int, TALL>(), m);
    for (; m < rows; ++m) block(std::integral_constant<int, 1>(), m);
}

// g [DEEP rows, PARTS registers] += uᵀ t for a block of rows
template <class T, int PARTS>
inline void outer_block(const float* u, int64_t ldu, const Source<T>& t, int64_t rows, int64_t c, float* g,
                        int64_t ldg, bool first) {
    Vector sum[DEEP][PARTS];
    Vector::Mask inside[PARTS];
    for (int i = 0; i < PARTS; ++i) inside[i] = Vector::first(t.columns - c - i * W);
    for (int r = 0; r < DEEP; ++r)
        for (int i = 0; i < PARTS; ++i) sum[r][i] = Vector::zero();
    for (int64_t m = 0; m < rows; ++m, u += ldu) {
        Vector right[PARTS];
        for (int i = 0; i < PARTS; ++i) right[i] = t.at(m, c + i * W, inside[i]);
#pragma GCC unroll 8
        for (int r = 0; r < DEEP; ++r) {
            const Vector one = Vector::all(u[r]);
            for (int i = 0; i < PARTS; ++i) sum[r][i] = Vector::plus_product(one, right[i], sum[r][i]);
        }
    }
    for (int r = 0; r < DEEP; ++r)
        for (int i = 0; i < PARTS; ++i) {
            float* to = g + r * ldg + i * W;
            (first ? sum[r][i] : Vector::plus(sum[r][i], Vector::load(to))).store(to);
        }
}

// g [ldu, ldg] += uᵀ t; columns of u and of g are filled up to whole blocks of registers
template <class T>
void outer(const float* u, int64_t ldu, const Source<T>& t, int64_t rows, float* g, int64_t ldg, bool first) {
    for (int64_t c = 0; c < t.columns; c += WIDE * W)
        for (int64_t r = 0; r < ldu; r += DEEP)
            outer_block<T, WIDE>(u + r, ldu, t, rows, c, g + r * ldg + c, ldg, first);
}

// Rows that a product will walk column by column, brought near in the order in which they lie: the processor does not
// foresee the other.
template <class T>
inline void fetch(const T* rows, int64_t ld, int64_t count, int64_t columns) {
    for (int64_t m = 0; m < count; ++m)
        for (int64_t c = 0; c < columns; c += static_cast<int64_t>(64 / sizeof(T)))
            __builtin_prefetch(rows + m * ld + c, 0, 2);
}

// to [rows, ldu] in fp32 from [rows, R], zeros beyond R
template <class T>
void spread_waist(const T* from, int64_t R, int64_t rows, float* to, int64_t ldu) {
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t r = 0; r < ldu; r += W)
            Vector::load(from + m * R + r, Vector::first(R - r)).store(to + m * ldu + r);
}

// [rows, columns] times a scale into rows ld apart, zeros beyond; transposed where asked
inline void copy_factor(const float* from, int64_t rows, int64_t columns, bool transposed, float scale,
                        float* to, int64_t tall, int64_t ld) {
    std::fill_n(to, tall * ld, 0.0f);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            to[transposed ? j * ld + i : i * ld + j] = from[i * columns + j] * scale;
}

// for each share of the rows what(share, begin, end), shares split over threads
template <class What>
void shared_rows(int64_t M, int threads, const What& what) {
    const int64_t rows = std::max(SHARE_ROWS, rounded_up((M + SHARES - 1) / SHARES, ROWS));
    const int64_t shares = (M + rows - 1) / rows;
    const int team = static_cast<int>(std::min<int64_t>(threads, shares));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t share = 0; share < shares; ++share)
        what(share, share * rows, std::min((share + 1) * rows, M));
}

inline int64_t shares_of(int64_t M) {
    const int64_t rows = std::max(SHARE_ROWS, rounded_up((M + SHARES - 1) / SHARES, ROWS));
    return (M + rows - 1) / rows;
}

template <class T>
void forward(const ThinForward<T>& f, int threads) {
    const LowRank& lora = f.lora;
    const int64_t R = lora.R, ldu = rounded_up(R, std::max(W, DEEP)), ldq = rounded_up(f.N, WIDE * W);
    const int64_t ld_keep = (f.K + 127) / 128 * 4;
    const Floats p = floats(f.K * ldu), q = floats(R * ldq);
    copy_factor(lora.a, R, f.K, true, lora.dropout ? lora.keep_scale : 1.0f, p.get(), f.K, ldu);
    copy_factor(lora.b, f.N, R, true, lora.scale, q.get(), R, ldq);
    shared_rows(f.M, threads, [&](int64_t, int64_t begin, int64_t end) {
        const Floats u = floats((ROWS + TALL) * ldu), near = floats(TALL * STRETCH);
        std::vector<uint32_t> keep(lora.dropout ? mask_size(ld_keep) : 0);
        for (int64_t row = begin; row < end; row += ROWS) {
            const int64_t rows = std::min(end - row, ROWS);
            fetch(f.y + row * f.N, f.N, rows, f.N);
            for (int64_t m = 0; lora.dropout && m < rows; ++m)
                keep_row(lora.draw, static_cast<uint32_t>(row + m), f.K, keep.data() + m * ld_keep);
            const Source<T> x = {f.x + row * f.ldx, f.ldx, f.K, lora.dropout ? keep.data() : nullptr,
                                 ld_keep};
            narrow(x, rows, p.get(), u.get(), ldu, near.get());
            // h as it is stored: backward reads that one
            for (int64_t m = 0; m < rows; ++m)
                for (int64_t r = 0; r < R; r += W)
                    Vector::load(u.get() + m * ldu + r).store(f.h + (row + m) * R + r, Vector::first(R - r));
            spread_waist(f.h + row * R, R, rows, u.get(), ldu);
            widen(u.get(), ldu, R, q.get(), ldq, rows, f.y + row * f.N, f.N, f.N, nullptr, 0, 1.0f);
        }
    });
}

template <class T>
class Backward {
  public:
    explicit Backward(const ThinBackward<T>& call)
        : g(call),
          lora(g.lora),
          R(lora.R),
          ldu(rounded_up(R, std::max(W, DEEP))),
          ldk(rounded_up(g.K, WIDE * W)),
          ldn(rounded_up(g.N, WIDE * W)),
          ld_keep((g.K + 127) / 128 * 4),
          needs_dh(g.dx || g.da),
          dropout(lora.dropout && needs_dh),
          p(floats(needs_dh ? g.N * ldu : 0)),
          q(floats(g.dx ? R * ldk : 0)),
          da(floats(g.da ? shares_of(g.M) * ldu * ldk : 0)),
          db(floats(g.db ? shares_of(g.M) * ldu * ldn : 0)) {
        if (needs_dh) copy_factor(lora.b, g.N, R, false, lora.scale, p.get(), g.N, ldu);
        if (g.dx) copy_factor(lora.a, R, g.K, false, 1.0f, q.get(), R, ldk);
    }

    void run(int threads) {
        shared_rows(g.M, threads,
                    [&](int64_t share, int64_t begin, int64_t end) { rows(share, begin, end); });
        if (g.da)
            for (int64_t r = 0; r < R; ++r)
                for (int64_t k = 0; k < g.K; k += W)
                    sum(da.get() + r * ldk + k, ldu * ldk, dropout ? lora.keep_scale : 1.0f)
                        .store(g.da + r * g.K + k, Vector::first(g.K - k));
        if (g.db)
            for (int64_t n = 0; n < g.N; n += W)
                for (int64_t r = 0; r < R; ++r) {
                    float column[W];
                    sum(db.get() + r * ldn + n, ldu * ldn, lora.scale).store(column);
                    for (int64_t i = 0; i < std::min(W, g.N - n); ++i) g.db[(n + i) * R + r] = column[i];
                }
    }

  private:
    // one share of the rows, into sums of its own
    void rows(int64_t share, int64_t begin, int64_t end) const {
        const Floats u = floats((ROWS + TALL) * ldu), h = floats(ROWS * ldu), near = floats(TALL * STRETCH);
        std::vector<uint32_t> keep(dropout ? mask_size(ld_keep) : 0);
        for (int64_t row = begin; row < end; row += ROWS) {
            const int64_t count = std::min(end - row, ROWS);
            if (g.dx) fetch(g.dx + row * g.K, g.K, count, g.K);
            if (g.da) fetch(g.x + row * g.ldx, g.ldx, count, g.K);
            for (int64_t m = 0; dropout && m < count; ++m)
                keep_row(lora.draw, static_cast<uint32_t>(row + m), g.K, keep.data() + m * ld_keep);
            const uint32_t* mask = dropout ? keep.data() : nullptr;
            const Source<T> dy = {g.dy + row * g.lddy, g.lddy, g.N, nullptr, 0};
            if (needs_dh) narrow(dy, count, p.get(), u.get(), ldu, near.get());
            if (g.dx)
                widen(u.get(), ldu, R, q.get(), ldk, count, g.dx + row * g.K, g.K, g.K, mask, ld_keep,
                      dropout ? lora.keep_scale : 1.0f);
            if (g.da)
                outer(u.get(), ldu, Source<T>{g.x + row * g.ldx, g.ldx, g.K, mask, ld_keep}, count,
                      da.get() + share * ldu * ldk, ldk, row == begin);
            if (!g.db) continue;
            spread_waist(g.h + row * R, R, count, h.get(), ldu);
            outer(h.get(), ldu, dy, count, db.get() + share * ldu * ldn, ldn, row == begin);
        }
    }

    // of the shares' sums, in order
    Vector sum(const float* from, int64_t stride, float scale) const {
        Vector total = Vector::zero();
        for (int64_t share = 0; share < shares_of(g.M); ++share)
            total = Vector::plus(total, Vector::load(from + share * stride));
        return Vector::times(total, Vector::all(scale));
    }

    const ThinBackward<T>& g;
    const LowRank& lora;
    const int64_t R, ldu, ldk, ldn, ld_keep;
    const bool needs_dh, dropout;
    const Floats p, q;    // [N, ldu], [R, ldk]
    const Floats da, db;  // [shares, ldu, ldk], [shares, ldu, ldn]
};

}  // namespace
}  // namespace pefast
