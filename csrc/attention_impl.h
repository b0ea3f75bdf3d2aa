// What distillation losses do to feature maps and logits; each part says what it computes, README.md beside this file
// how and how fast.
#pragma once

#include "attention_kd_impl.h"
#include "attention_match_impl.h"
#include "attention_stats_impl.h"

namespace {

constexpr sparsekd::AttentionKernels kAttention = {.feature_stats = feature_stats,
                                                   .feature_stats_grad = feature_stats_grad,
                                                   .match_maps = match_maps,
                                                   .kd_loss = kd_loss};

}  // namespace
