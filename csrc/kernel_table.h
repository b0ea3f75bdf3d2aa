// The table of kernels that every instruction set fills: the contract between the baseline code (bindings, weight
// packing, dispatch) and the kernels. What each kernel is given stands in <op>_kernels.h.
//
// These headers and parallel.h hold plain structs, raw pointers and function pointers. None may define an inline
// function, because they are compiled with different -m flags and the linker is free to keep any one copy.
#pragma once

#include "attention_kernels.h"
#include "between_kernels.h"
#include "conv2d_kernels.h"
#include "embedding_kernels.h"
#include "norm_relu_kernels.h"
#include "pool_kernels.h"

namespace sparsekd {

struct KernelTable {
  const char* isa;
  void (*conv2d_f32)(const Conv2dForward<float>&);
  PlanFn<float> conv2d_plan_f32;
  void (*conv2d_grad_input_f32)(const Conv2dGradInput<float>&);
  void (*conv2d_grad_values_f32)(const Conv2dGradValues<float>&);
  void (*depthwise_f32)(const Depthwise&);
  PoolKernels pool;
  BetweenKernels between;
  AttentionKernels attention;
  EmbeddingKernels embedding;
  NormReluKernels norm_relu;
  // Multiply-adds on registers, `rounds` times a fixed amount, seeded from and written to sink [32]; returns the number
  // of floating point operations.
  double (*fma_burst)(int64_t rounds, float* sink);
  Bf16Kernels bf16;
  Int8Kernels int8;
  // target[i] = round(x[i] * inverse) + zero, ties to even, within 0..255
  void (*quantize)(const float* x, int64_t n, float inverse, int zero, uint8_t* target);
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kNeonKernels;
// What some CPUs of an instruction set have faster; the rest comes from its table.
extern const Int8Kernels kAvx512VnniKernels, kNeonDotprodKernels;
extern const Bf16Kernels kAvx512Bf16Kernels, kNeonBf16Kernels;

}  // namespace sparsekd
