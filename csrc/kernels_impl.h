// The table of one instruction set: every kernel over the Vec16 that the including file has defined.
#pragma once

#include "attention_impl.h"
#include "conv2d_impl.h"
#include "int8_impl.h"
#include "pool_impl.h"

namespace {

constexpr sparsekd::KernelTable kKernels = {
    Vec16::kIsa,
    conv2d_forward<FloatWords<float>>,
    conv2d_grad_input<FloatWords<float>>,
    conv2d_grad_values<FloatWords<float>>,
    depthwise,
    {pool<float, false>, pool<float, true>, pool<Bfloat16, false>, pool<Bfloat16, true>},
    kAttention,
    madd_burst<FloatSums, 1>,
    {FloatWords<Bfloat16>::kDepth, conv2d_forward<FloatWords<Bfloat16>>, conv2d_grad_input<FloatWords<Bfloat16>>,
     conv2d_grad_values<FloatWords<Bfloat16>>, madd_burst<FloatSums, 1>},
    {2, conv2d_forward<ShortWords<float>>, conv2d_forward<ShortWords<uint8_t>>, madd_burst<ShortSums, 2>},
    quantize,
};

}  // namespace
