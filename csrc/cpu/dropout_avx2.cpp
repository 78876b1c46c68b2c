#include "dropout_loops.h"

namespace pefast {

void dropout_tiles_avx2(const Dropout& d, Scalar type, int64_t begin, int64_t end) {
    tiles_by_type(d, type, begin, end);
}

}  // namespace pefast
