// What the forward and the backward pass of delta_linear share on AMX: threads, scratch memory, panels of rows.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "delta_linear.h"
#include "pack_tiles.h"

namespace pefast::amx {

// Threads that share one piece of work.
struct Team {
    int rank, size;
    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
    int64_t begin(int64_t count) const { return count * rank / size; }
    int64_t end(int64_t count) const { return count * (rank + 1) / size; }
};

// what(team) on every thread, each with its tiles
template <class What>
inline void together(int threads, const What& what) {
    if (threads == 1) {
        const Tiles tiles;
        what(Team{0, 1});
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        what(Team{omp_get_thread_num(), omp_get_num_threads()});
    }
}

// Scratch memory of one thread that lives as long as it: a fresh megabyte a call would cost 256 page faults.
class Scratch {
  public:
    template <class T>
    T* take(int64_t count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (blocks.empty() || used + bytes > blocks.back().size) {
            const size_t size = std::max<size_t>(bytes, 1 << 20);
            blocks.push_back({Memory(allocate(size)), size});
            used = 0;
        }
        char* start = blocks.back().memory.get() + used;
        used += bytes;
        return reinterpret_cast<T*>(start);
    }

    // everything taken is given back; several blocks become one for the next call
    void reset() {
        if (blocks.size() > 1) {
            size_t size = 0;
            for (const Block& block : blocks) size += block.size;
            blocks.clear();
            blocks.push_back({Memory(allocate(size)), size});
        }
        used = 0;
    }

    static Scratch& of_this_thread() {
        static thread_local Scratch scratch;
        scratch.reset();
        return scratch;
    }

  private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    using Memory = std::unique_ptr<char, Free>;
    struct Block {
        Memory memory;
        size_t size;
    };
    static char* allocate(size_t bytes) {
        void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (!memory) throw std::bad_alloc();
        return static_cast<char*>(memory);
    }
    std::vector<Block> blocks;
    size_t used = 0;
};

// 32 rows at most, columns and rows filled up with zeros to full tiles
inline void copy_rows(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, bf16* to, int64_t ld) {
    const int64_t whole = columns / 32 * 32, height = padded(rows, SIDE);
    const __mmask32 tail = first(columns - whole);
    for (int64_t r = 0; r < height; ++r, x += ldx, to += ld) {
        const __mmask32 inside = r < rows ? ~0u : 0;
        for (int64_t c = 0; c < whole; c += 32)
            _mm512_store_si512(to + c, _mm512_maskz_loadu_epi16(inside, x + c));
        if (tail) _mm512_store_si512(to + whole, _mm512_maskz_loadu_epi16(inside & tail, x + whole));
    }
}

// 32 sums in fp32, rounded
inline __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// a or b as bf16 in rows, times a scale: fp32 masters are rounded once
inline void round_master(const Master& m, int64_t begin, int64_t end, float scale, bf16* to) {
    const __m512 s = _mm512_set1_ps(scale);
    for (int64_t i = begin; i < end; i += 16) {
        const __mmask16 inside = static_cast<__mmask16>(first(std::min<int64_t>(end - i, 16)));
        __m512 v;
        if (m.fp32) {
            v = _mm512_maskz_loadu_ps(inside, static_cast<const float*>(m.data) + i);
        } else {
            const __m256i half = _mm256_maskz_loadu_epi16(inside, static_cast<const bf16*>(m.data) + i);
            v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
        _mm256_mask_storeu_epi16(to + i, inside, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(v, s)));
    }
}

// h or dh of 32 rows, [rows, columns] with rows ld apart, as 32 columns of its transpose
inline void transpose_rows(const bf16* src, int64_t ld, int64_t rows, int64_t columns, bf16* to,
                           int64_t ld_to) {
    for (int64_t c = 0; c < columns; c += 32) {
        const __mmask32 inside = first(columns - c);
        __m512i low[16], high[16];
#pragma GCC unroll 16
        for (int64_t pair = 0; pair < 16; ++pair) {
            const bf16* row = src + 2 * pair * ld + c;
            const __m512i even = _mm512_maskz_loadu_epi16(2 * pair < rows ? inside : 0, row);
            const __m512i odd = _mm512_maskz_loadu_epi16(2 * pair + 1 < rows ? inside : 0, row + ld);
            pair_rows(even, odd, low[pair], high[pair]);
        }
        transpose(low);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + (c + i) * ld_to, low[i]);
        if (columns - c <= SIDE) continue;
        transpose(high);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + (c + SIDE + i) * ld_to, high[i]);
    }
}

// steps of the sum walked at a time: 24 of a strip are 48 KB, the first cache
constexpr int64_t CHUNK = 24;

// Where 32 columns of a result go, and where the fp32 sums of up to 32 of its rows wait until then.
struct Rows {
    const float* sums;     // [count, 32]
    const float* masked;   // [count, 32]  added where keep has a bit, times keep_scale; null: nothing to add
    const uint32_t* keep;  // rows ld_keep apart
    int64_t ld_keep;
    float keep_scale;
    bf16* to;  // rows ld apart
    int64_t ld, count;
    __mmask32 inside;
};

// What is done beside the tile products, a little with each step: rounding and storing the block of rows before,
// and fetching what comes next. Done in one piece after each block it cost a fifth of the time at K=384.
class Beside {
  public:
    // before a block of rows that takes so many steps; its result will go to these rows
    void plan(int64_t steps, bf16* to, int64_t ld, int64_t rows) {
        each = static_cast<int>(parts(waiting.count, std::max<int64_t>(steps, 1)));
        soon = to, soon_ld = ld, soon_rows = rows;
        soon_each = static_cast<int>(parts(rows, std::max<int64_t>(steps, 1)));
    }

    // bring these bytes to the second cache, so many cache lines with each step
    void fetch(const void* begin, int64_t bytes, int64_t lines) {
        next = static_cast<const char*>(begin), end = next + bytes, lines_each = static_cast<int>(lines);
    }

    void operator()() {
        for (int i = 0; i < each && waiting.count; ++i) store_row();
        for (int i = 0; i < soon_each && soon_rows; ++i, --soon_rows, soon += soon_ld)
            __builtin_prefetch(soon, 1, 2);
        for (int i = 0; i < lines_each && next < end; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    }

    void wait(const Rows& rows) {
        finish();
        waiting = rows;
    }

    void finish() {
        while (waiting.count) store_row();
    }

  private:
    void store_row() {
        Rows& w = waiting;
        __m512 low = _mm512_load_ps(w.sums), high = _mm512_load_ps(w.sums + SIDE);
        if (w.masked) {
            const __m512 scale = _mm512_set1_ps(w.keep_scale);
            const uint32_t keep = *w.keep;
            low = _mm512_mask3_fmadd_ps(_mm512_load_ps(w.masked), scale, low, static_cast<__mmask16>(keep));
            high = _mm512_mask3_fmadd_ps(_mm512_load_ps(w.masked + SIDE), scale, high,
                                         static_cast<__mmask16>(keep >> 16));
            w.masked += STRIP, w.keep += w.ld_keep;
        }
        _mm512_mask_storeu_epi16(w.to, w.inside, rounded(low, high));
        w.sums += STRIP, w.to += w.ld, --w.count;
    }

    Rows waiting = {};
    bf16* soon = nullptr;
    const char *next = nullptr, *end = nullptr;
    int64_t soon_ld = 0, soon_rows = 0;
    int each = 0, soon_each = 0, lines_each = 0;
};

// One strip of columns of a panel of rows, rounded into to: start + main.a times main.strip + side.a times side.strip.
// With keep the second product has sums of its own, and the mask lies on it.
struct Strip {
    Factors main, side;
    const float* start;  // [32]  null: zeros
    Rows to;             // of the first rows; sums, masked and count are filled in
    int64_t rows;
};

// sums [max(rows, 64), 32] and masked [64, 32] hold what waits: nothing may write them before beside.finish()
inline void multiply_strip(const Strip& s, float* sums, float* masked, Beside& beside) {
    const int64_t chunks = std::max<int64_t>(parts(s.main.steps, CHUNK), 1);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = s.main.steps * chunk / chunks, end = s.main.steps * (chunk + 1) / chunks;
        const bool last = chunk == chunks - 1;
        for (int64_t row = 0; row < s.rows; row += 32) {
            // with one chunk the sums leave soon, so two places in turn are enough
            float* c = sums + (chunks == 1 ? row % 64 : row) * STRIP;
            float* d = s.to.keep ? masked + row % 64 * STRIP : nullptr;
            Rows rows = s.to;
            rows.sums = c, rows.masked = d, rows.count = std::min<int64_t>(s.rows - row, 32);
            rows.to += row * rows.ld, rows.keep += row * rows.ld_keep;
            beside.plan(end - begin, rows.to, rows.ld, last ? rows.count : 0);
            sized(s.rows - row, STRIP, [&](auto tall, auto wide) {
                constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
                chunk ? load_sums<ROWS, COLUMNS>(c) : begin_sums<ROWS, COLUMNS>(s.start);
                accumulate<ROWS, COLUMNS>({s.main.a + row * s.main.lda + begin * STEP, s.main.lda,
                                           s.main.strip + begin * 2 * TILE, end - begin},
                                          beside);
                const Factors side = {s.side.a + row * s.side.lda, s.side.lda, s.side.strip, s.side.steps};
                if (last && d) {
                    store_sums<ROWS, COLUMNS>(c);
                    clear_sums<ROWS, COLUMNS>();
                    accumulate<ROWS, COLUMNS>(side);
                    store_sums<ROWS, COLUMNS>(d);
                } else {
                    if (last) accumulate<ROWS, COLUMNS>(side);
                    store_sums<ROWS, COLUMNS>(c);
                }
            });
            if (last) beside.wait(rows);
        }
    }
}

// up to 32 rows times a right factor [steps * 32, columns], rounded: the waist; to [rows, ceil(columns / 32) * 32]
inline void multiply_narrow(const Factors& all, int64_t rows, int64_t columns, float scale, float* sums,
                            bf16* to, int64_t ld_to) {
    const __m512 s = _mm512_set1_ps(scale);
    for (int64_t c = 0; c < columns; c += STRIP) {
        sized(rows, columns - c, [&](auto tall, auto wide) {
            constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
            clear_sums<ROWS, COLUMNS>();
            accumulate<ROWS, COLUMNS>({all.a, all.lda, all.strip + c * all.steps * STEP, all.steps});
            store_sums<ROWS, COLUMNS>(sums);
        });
        const __mmask32 inside = first(columns - c);
        for (int64_t r = 0; r < padded(rows, SIDE); ++r) {
            const __m512 low = _mm512_load_ps(sums + r * STRIP),
                         high = _mm512_load_ps(sums + r * STRIP + SIDE);
            const __m512i both = rounded(_mm512_mul_ps(low, s), _mm512_mul_ps(high, s));
            _mm512_store_si512(to + r * ld_to + c, _mm512_maskz_mov_epi16(inside, both));
        }
    }
}

// the mask of up to 32 rows: 4 words for each 128 columns, rows ld words apart
inline void keep_rows(const Draw& draw, int64_t row, int64_t rows, int64_t columns, uint32_t* keep,
                      int64_t ld) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t block = 0; block < parts(columns, 128); ++block)
            keep_128(draw, static_cast<uint32_t>(row + r), static_cast<uint32_t>(block),
                     keep + r * ld + block * 4);
}

}  // namespace pefast::amx
