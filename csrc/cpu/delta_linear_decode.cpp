#include "delta_linear_decode.h"

#include <algorithm>

#include "../check.h"
#include "isa.h"

namespace pefast {

void delta_linear_decode(const Decode& call, int threads) {
    check(delta_linear_here(), "delta_linear: needs AMX, this process uses ", isa_name(isa()));
#if defined(PEFAST_HAVE_AMX)
    // a thread that is woken costs about as much as reading 256 KB of the weight
    const int64_t useful = call.N * call.K / (1 << 17);
    delta_linear_decode_amx(call, static_cast<int>(std::clamp<int64_t>(useful, 1, threads)));
#else
    (void)call, (void)threads;
#endif
}

}  // namespace pefast
