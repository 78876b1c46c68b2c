#include <type_traits>

#include "delta_linear_decode.h"
#include "device.h"

namespace pefast {
namespace {

// a product's columns are SIDE rows of w; warps of a block share K
constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = DECODE_ROWS, SIDE = 8;
// which count is which: numbers drawn, waists made, blocks done
constexpr int DRAWN = 0, MADE = 1, DONE = 2;
constexpr int64_t NO_SLOT = -1;
// numbers in 16 bytes
template <class T>
constexpr int PACK = 16 / sizeof(T);

// a matrix with neighbouring columns
struct Matrix {
    const void* at;
    int64_t ld;
    bool fp32, wide;  // wide: every row begins where 16 bytes may be read at once
};

struct Delta {
    Matrix a, b;
    int64_t R, adapter;
    float scale;
};

// one launch
struct Step {
    Matrix x, w;
    const void *bias, *gain;
    const int64_t* ids;
    void* y;
    float* h;  // [M, slots]
    unsigned* counts;
    int64_t M, N, K, slots;
    unsigned waists;  // blocks that make h
    int count;
    bool fp32_bias, fp32_gain;
    Delta deltas[DECODE_DELTAS];
};

// 16 bytes as numbers, and as they are loaded
template <class T>
union Pack {
    uint4 bits;
    T numbers[PACK<T>];
};

// neighbouring numbers as 16 bytes of T
template <class T, class From>
__device__ uint4 pack(const From* at) {
    if constexpr (std::is_same_v<T, From>) {
        return unchanging(at);
    } else {
        Pack<float> from[2] = {{unchanging(at)}, {unchanging(at + 4)}};
        Pack<T> to;
#pragma unroll
        for (int i = 0; i < PACK<T>; ++i) narrow(from[i / 4].numbers[i % 4], to.numbers + i);
        return to.bits;
    }
}

// the same where only `left` of them are there, zeros for the others
template <class T, class From>
__device__ uint4 pack_some(const From* at, int64_t left) {
    Pack<T> to;
#pragma unroll
    for (int i = 0; i < PACK<T>; ++i) narrow(i < left ? widen(at[i]) : 0.f, to.numbers + i);
    return to.bits;
}

__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// what a lane holds of [16, SIDE·TILES] sums: tensor cores for 16 bits
template <class T, int TILES>
struct Sums {
    float d[TILES][4] = {};

    __device__ void add(const uint4 (&x)[2], const uint4 (&w)[TILES]) {
        const unsigned first[4] = {x[0].x, x[1].x, x[0].y, x[1].y};
        const unsigned second[4] = {x[0].z, x[1].z, x[0].w, x[1].w};
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            multiply(d[i], first, w[i].x, w[i].y, T());
            multiply(d[i], second, w[i].z, w[i].w, T());
        }
    }

    __device__ void put(float* to, int lane) const {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                to[(g + j / 2 * 8) * SIDE * TILES + i * SIDE + 2 * t + j % 2] = d[i][j];
    }
};

// fp32: a lane holds a column's sums over its own quarter of K and takes the rows of x from the others
template <int TILES>
struct Sums<float, TILES> {
    float d[TILES][ROWS] = {};

    __device__ void add(const uint4 (&x)[2], const uint4 (&w)[TILES]) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            const float4 from = of_lane(x[m / 8], m % 8 * 4 + t);
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                d[i][m] += from.x * __uint_as_float(w[i].x);
                d[i][m] += from.y * __uint_as_float(w[i].y);
                d[i][m] += from.z * __uint_as_float(w[i].z);
                d[i][m] += from.w * __uint_as_float(w[i].w);
            }
        }
    }

    __device__ void put(float* to, int lane) const {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int m = 0; m < ROWS; ++m) {
                const float all = of_four(d[i][m]);
                if (m % 4 == t) to[m * SIDE * TILES + i * SIDE + g] = all;
            }
    }
};

// which rows of which matrix a block multiplies x by
struct Task {
    Matrix from;
    int64_t first, end;
    int64_t slot;  // of h where the rows' results go, or NO_SLOT: they go to y
    float scale;
};

// parts [WARPS, 16, SIDE·TILES] = x times the task's rows: what each warp has summed of K. The last row stands in for
// those that are not there, so that nothing is masked; nobody looks at their sums.
template <class T, class From, int TILES>
__device__ void product(const Step& f, const Task& task, float* parts) {
    constexpr int STRIDE = 4 * PACK<T>, HOP = WARPS * STRIDE;
    // steps whose loads are under way together: 4 KB a warp of w, as many as fit into the registers
    constexpr int AHEAD = TILES == 2 && sizeof(From) == 2 ? 4 : 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int64_t inside = lane % 4 * PACK<T>;
    const T* x[2];
    const From* w[TILES];
#pragma unroll
    for (int i = 0; i < 2; ++i)
        x[i] = static_cast<const T*>(f.x.at) + smaller(int64_t(g + 8 * i), f.M - 1) * f.x.ld + inside;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
        w[i] = static_cast<const From*>(task.from.at) +
               smaller(task.first + SIDE * i + g, task.end - 1) * task.from.ld + inside;

    const bool wide = f.x.wide && task.from.wide;
    Sums<T, TILES> sums;
    int64_t k = warp * STRIDE;
    if (wide)
        for (; k + (AHEAD - 1) * HOP + STRIDE <= f.K; k += AHEAD * HOP) {
            uint4 xs[AHEAD][2], ws[AHEAD][TILES];
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
#pragma unroll
                for (int i = 0; i < TILES; ++i) ws[j][i] = pack<T>(w[i] + k + j * HOP);
#pragma unroll
                for (int i = 0; i < 2; ++i) xs[j][i] = pack<T>(x[i] + k + j * HOP);
            }
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) sums.add(xs[j], ws[j]);
        }
    for (; k < f.K; k += HOP) {
        const bool all = wide && k + STRIDE <= f.K;
        uint4 xs[2], ws[TILES];
#pragma unroll
        for (int i = 0; i < TILES; ++i)
            ws[i] = all ? pack<T>(w[i] + k) : pack_some<T>(w[i] + k, f.K - k - inside);
#pragma unroll
        for (int i = 0; i < 2; ++i)
            xs[i] = all ? pack<T>(x[i] + k) : pack_some<T>(x[i] + k, f.K - k - inside);
        sums.add(xs, ws);
    }
    sums.put(parts + warp * ROWS * SIDE * TILES, lane);
}

// what the warps have summed for one place of [16, WIDTH]
template <int WIDTH>
__device__ float whole(const float* parts, int place) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += parts[warp * ROWS * WIDTH + place];
    return sum;
}

template <int WIDTH>
__host__ __device__ int64_t padded(int64_t rank) {
    return (rank + WIDTH - 1) / WIDTH * WIDTH;
}

// the first blocks make the waist
template <int WIDTH>
__device__ Task task_of(const Step& f, unsigned block) {
    if (block >= f.waists) return {f.w, int64_t(block - f.waists) * WIDTH, f.N, NO_SLOT, 1};
    int64_t first = int64_t(block) * WIDTH, slot = first;
    int i = 0;
    for (; first >= padded<WIDTH>(f.deltas[i].R); ++i) first -= padded<WIDTH>(f.deltas[i].R);
    return {f.deltas[i].a, first, f.deltas[i].R, slot, f.deltas[i].scale};
}

// h of WIDTH slots of one delta, for every row; zeros behind the rank
template <int WIDTH>
__device__ void keep_waist(const Step& f, const Task& task, const float* parts) {
    for (int e = threadIdx.x; e < f.M * WIDTH; e += THREADS) {
        const bool there = task.first + e % WIDTH < task.end;
        f.h[e / WIDTH * f.slots + task.slot + e % WIDTH] = there ? task.scale * whole<WIDTH>(parts, e) : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) add_one(f.counts + MADE);
}

// h·b over the ranks of one delta
template <class From>
__device__ float dot(const float* h, const From* b, int64_t rank, bool wide) {
    float sum = 0;
    for (int64_t r = 0; r < rank; r += PACK<From>) {
        Pack<From> up;
        up.bits = wide && r + PACK<From> <= rank ? pack<From>(b + r) : pack_some<From>(b + r, rank - r);
#pragma unroll
        for (int i = 0; i < PACK<From>; i += 4) {
            const float4 four = fresh(h + r + i);
            sum += four.x * widen(up.numbers[i]);
            sum += four.y * widen(up.numbers[i + 1]);
            sum += four.z * widen(up.numbers[i + 2]);
            sum += four.w * widen(up.numbers[i + 3]);
        }
    }
    return sum;
}

// number n of a vector that is fp32 or T
template <class T>
__device__ float number(const void* vector, bool fp32, int64_t n) {
    return fp32 ? static_cast<const float*>(vector)[n] : widen(static_cast<const T*>(vector)[n]);
}

// WIDTH columns of y
template <class T, int WIDTH>
__device__ void keep_columns(const Step& f, int64_t first, const float* parts) {
    for (int e = threadIdx.x; e < f.M * WIDTH; e += THREADS) {
        const int64_t m = e / WIDTH, n = first + e % WIDTH;
        if (n >= f.N) continue;
        float y = whole<WIDTH>(parts, e);
        const int64_t id = f.ids ? f.ids[m] : EVERY_ROW;
        const float* h = f.h + m * f.slots;
        for (int i = 0; i < f.count; ++i) {
            const Delta& delta = f.deltas[i];
            const Matrix& b = delta.b;
            if (delta.adapter == EVERY_ROW || delta.adapter == id)
                y += b.fp32 ? dot(h, static_cast<const float*>(b.at) + n * b.ld, delta.R, b.wide)
                            : dot(h, static_cast<const T*>(b.at) + n * b.ld, delta.R, b.wide);
            h += padded<WIDTH>(delta.R);
        }
        if (f.gain) y *= number<T>(f.gain, f.fp32_gain, n);
        if (f.bias) y += number<T>(f.bias, f.fp32_bias, n);
        narrow(y, static_cast<T*>(f.y) + m * f.N + n);
    }
}

template <class T, int TILES>
__global__ void __launch_bounds__(THREADS, 2) decode(const __grid_constant__ Step f) {
    constexpr int WIDTH = SIDE * TILES;
    SHARED(float, parts, [WARPS * ROWS * WIDTH]);
    SHARED(unsigned, drawn, [1]);
    unsigned block = blockIdx.x;
    if (f.waists) {
        if (threadIdx.x == 0) *drawn = add_one(f.counts + DRAWN);
        __syncthreads();
        block = *drawn;
    }
    const Task task = task_of<WIDTH>(f, block);
    if (task.from.fp32)
        product<T, float, TILES>(f, task, parts);
    else
        product<T, T, TILES>(f, task, parts);
    // by now h is there, or nearly
    if (task.slot == NO_SLOT && f.waists && threadIdx.x == 0) await(f.counts + MADE, f.waists);
    __syncthreads();
    if (task.slot == NO_SLOT)
        keep_columns<T, WIDTH>(f, task.first, parts);
    else
        keep_waist<WIDTH>(f, task, parts);
    // the last one leaves zeros for the next launch
    if (f.waists && threadIdx.x == 0 && add_one(f.counts + DONE) == gridDim.x - 1)
        f.counts[DRAWN] = f.counts[MADE] = f.counts[DONE] = 0;
}

template <class T, int TILES>
int launch_wide(Step& step, void* stream) {
    constexpr int WIDTH = SIDE * TILES;
    for (int i = 0; i < step.count; ++i) step.slots += padded<WIDTH>(step.deltas[i].R);
    step.waists = static_cast<unsigned>(step.slots / WIDTH);
    return launch(decode<T, TILES>, step.waists + padded<WIDTH>(step.N) / WIDTH, THREADS, step, stream);
}

// wide blocks read x less often, but three quarters of the processors at least must have one; fp32 has registers for
// narrow ones alone
template <class T>
int launch_as(Step& step, int64_t processors, void* stream) {
    if constexpr (!std::is_same_v<T, float>)
        if (4 * step.N >= 3 * processors * 4 * SIDE) return launch_wide<T, 4>(step, stream);
    return launch_wide<T, 2>(step, stream);
}

Matrix matrix(const void* at, int64_t ld, int64_t fp32, int64_t type) {
    const int64_t bytes = fp32 || type == 0 ? 4 : 2;
    return {at, ld, fp32 && type != 0, reinterpret_cast<uintptr_t>(at) % 16 == 0 && ld * bytes % 16 == 0};
}

// what a launch reads, or false where the sizes do not fit
bool arrange(const DecodeCall& call, const DecodeDelta* deltas, Step* step) {
    const bool fits = call.M >= 0 && call.M <= DECODE_ROWS && call.N >= 0 && call.K >= 0 && call.type >= 0 &&
                      call.type <= 2 && call.count >= 0 && call.count <= DECODE_DELTAS;
    if (!fits) return false;
    step->x = matrix(call.x, call.ldx, 0, call.type), step->w = matrix(call.w, call.ldw, 0, call.type);
    step->bias = call.bias, step->gain = call.gain, step->ids = call.ids, step->y = call.y;
    step->h = call.h, step->counts = call.counts;
    step->M = call.M, step->N = call.N, step->K = call.K, step->count = static_cast<int>(call.count);
    step->fp32_bias = call.fp32_bias, step->fp32_gain = call.fp32_gain;
    for (int64_t i = 0; i < call.count; ++i) {
        const DecodeDelta& d = deltas[i];
        if (d.R < 1) return false;
        step->deltas[i] = {matrix(d.a, d.lda, d.fp32_a, call.type), matrix(d.b, d.ldb, d.fp32_b, call.type),
                           d.R, d.adapter, static_cast<float>(d.scale)};
    }
    return true;
}

int run(const DecodeCall& call, const DecodeDelta* deltas, void* stream) {
    Step step = {};
    if (!arrange(call, deltas, &step)) return cudaErrorInvalidValue;
    if (call.M == 0 || call.N == 0) return cudaSuccess;
    if (call.type == 0) return launch_as<float>(step, call.processors, stream);
    if (call.type == 1) return launch_as<bf16>(step, call.processors, stream);
    return launch_as<fp16>(step, call.processors, stream);
}

}  // namespace
}  // namespace pefast

extern "C" int pefast_delta_linear_decode(const pefast::DecodeCall* call, const pefast::DecodeDelta* deltas,
                                          void* stream) {
    return pefast::run(*call, deltas, stream);
}

extern "C" int64_t pefast_delta_linear_decode_layout() {
    return sizeof(pefast::DecodeCall) + sizeof(pefast::DecodeDelta);
}
