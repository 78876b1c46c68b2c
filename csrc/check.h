// The one file of checks: each binding checks its arguments once, at the door, and the kernels trust them.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace pefast {

// check(k >= 0, "dropout: K is ", k, "; 0 or more would be right") throws std::invalid_argument, ValueError in Python
template <class... Words>
inline void check(bool right, const Words&... words) {
    if (right) return;
    std::ostringstream sentence;
    (sentence << ... << words);
    throw std::invalid_argument(sentence.str());
}

inline void check_matrix(const char* function, const char* name, const void* data, int64_t rows,
                         int64_t columns, int64_t stride) {
    check(rows >= 0 && columns >= 0, function, ": ", name, " is [", rows, ", ", columns,
          "]; sizes of 0 or more would be right");
    check(data || rows == 0 || columns == 0, function, ": ", name, " has no storage");
    check(stride >= columns || rows <= 1, function, ": rows of ", name, " are ", stride, " apart and ",
          columns, " long; a stride of at least the length would be right");
}

inline void check_weight(const char* function, int64_t N, int64_t K, bool stored) {
    check(N > 0 && K > 0, function, ": w is [", N, ", ", K, "]; at least one row and column would be right");
    check(stored, function, ": w has no storage");
}

inline void check_threads(const char* function, int threads) {
    check(threads >= 1, function, ": threads is ", threads, "; 1 or more would be right");
}

}  // namespace pefast
