#include "delta_linear_thin_loops.h"

namespace pefast {

void thin_forward_avx512(const ThinForward<float>& call, int threads) { forward(call, threads); }
void thin_forward_avx512(const ThinForward<bf16>& call, int threads) { forward(call, threads); }
void thin_backward_avx512(const ThinBackward<float>& call, int threads) {
    Backward<float>(call).run(threads);
}
void thin_backward_avx512(const ThinBackward<bf16>& call, int threads) { Backward<bf16>(call).run(threads); }

}  // namespace pefast
