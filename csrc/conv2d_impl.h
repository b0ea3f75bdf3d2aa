// The kernels of one instruction set. Everything is written over Vec16, which the including file must have defined, and
// lives in anonymous namespaces; README.md beside this file explains the loops and shows figures.
#pragma once

#include "conv2d_forward_impl.h"
#include "conv2d_grad_input_impl.h"
#include "conv2d_grad_values_impl.h"
#include "depthwise_impl.h"
#include "madd_burst_impl.h"
