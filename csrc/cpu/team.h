// Threads of one call, and the scratch memory of each.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace pefast {

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

// what(team) on every thread
template <class What>
inline void on_threads(int threads, const What& what) {
    if (threads == 1) {
        what(Team{0, 1});
        return;
    }
#pragma omp parallel num_threads(threads)
    what(Team{omp_get_thread_num(), omp_get_num_threads()});
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

}  // namespace pefast
