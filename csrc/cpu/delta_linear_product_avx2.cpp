#include "delta_linear_product_loops.h"

namespace pefast {

void product_avx2(const Product& call, int threads) { all_rows(call, threads); }

}  // namespace pefast
