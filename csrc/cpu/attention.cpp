#include "attention.h"

#include "../check.h"
#include "isa.h"

namespace pefast {

#if defined(PEFAST_HAVE_AMX)

bool attention_here() { return isa() == Isa::amx; }

void attention_forward(const AttentionForward& call, int threads) {
    check(attention_here(), "prefix_attention: needs AMX, this process uses ", isa_name(isa()));
    attention_forward_amx(call, threads);
}

void attention_backward(const AttentionBackward& call, int threads) {
    check(attention_here(), "prefix_attention: needs AMX, this process uses ", isa_name(isa()));
    attention_backward_amx(call, threads);
}

#else

bool attention_here() { return false; }

void attention_forward(const AttentionForward&, int) {
    check(false, "prefix_attention: needs AMX, and the compiler of this build did not know it");
}

void attention_backward(const AttentionBackward&, int) {
    check(false, "prefix_attention: needs AMX, and the compiler of this build did not know it");
}

#endif

}  // namespace pefast
