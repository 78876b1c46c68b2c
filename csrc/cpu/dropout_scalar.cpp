#include "dropout_loops.h"

namespace pefast {

void dropout_tiles_scalar(const Dropout& d, Scalar type, int64_t begin, int64_t end) {
    tiles_by_type(d, type, begin, end);
}

}  // namespace pefast
