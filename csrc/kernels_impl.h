// The table of one instruction set: every kernel over the Vec16 that the including file has defined.
#pragma once

#include "attention_impl.h"
#include "between_impl.h"
#include "conv2d_impl.h"
#include "embedding_update_impl.h"
#include "int8_impl.h"
#include "kernel_table.h"
#include "norm_relu_impl.h"
#include "pool_impl.h"

namespace {

constexpr sparsekd::KernelTable kKernels = {
    .isa = Vec16::kIsa,
    .conv2d_f32 = conv2d_forward<FloatWords<float>>,
    .conv2d_plan_f32 = conv2d_forward_plan<FloatWords<float>>,
    .conv2d_grad_input_f32 = conv2d_grad_input<FloatWords<float>>,
    .conv2d_grad_values_f32 = conv2d_grad_values<FloatWords<float>>,
    .depthwise_f32 = depthwise,
    .pool = {.max_f32 = pool<float, false>,
             .mean_f32 = pool<float, true>,
             .max_bf16 = pool<Bfloat16, false>,
             .mean_bf16 = pool<Bfloat16, true>},
    .between = {.gate_f32 = gate<float>,
                .gate_bf16 = gate<Bfloat16>,
                .layer_norm_f32 = layer_norm<float>,
                .layer_norm_bf16 = layer_norm<Bfloat16>},
    .attention = kAttention,
    .embedding = kEmbedding,
    .norm_relu = {.forward = norm_relu, .grad = norm_relu_grad},
    .fma_burst = madd_burst<FloatSums, 1>,
    .bf16 = {.depth = FloatWords<Bfloat16>::kDepth,
             .conv2d = conv2d_forward<FloatWords<Bfloat16>>,
             .conv2d_plan = conv2d_forward_plan<FloatWords<Bfloat16>>,
             .conv2d_grad_input = conv2d_grad_input<FloatWords<Bfloat16>>,
             .conv2d_grad_values = conv2d_grad_values<FloatWords<Bfloat16>>,
             .burst = madd_burst<FloatSums, 1>},
    .int8 = {.depth = ShortWords<float>::kDepth,
             .zero = 0,
             .conv2d_float = conv2d_forward<ShortWords<float>>,
             .conv2d_byte = conv2d_forward<ShortWords<uint8_t>>,
             .burst = madd_burst<ShortSums, 2>},
    .quantize = quantize,
};

}  // namespace
