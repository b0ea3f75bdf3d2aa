// Linear layers: 1 x 1 convolutions over one image whose width is the batch. Their tensors are channels_last: a sample's
// features lie together.
#pragma once

#include "conv2d.h"

namespace sparsekd {

inline Conv2dShape linear_shape(int64_t batch, int64_t in_features, int64_t out_features, int64_t bh, int64_t bw) {
  return {.geometry = {.c = in_features, .w = batch, .k = out_features, .q = batch}, .bh = bh, .bw = bw};
}

// The geometry of a layer for another batch.
inline Conv2dGeometry with_batch(Conv2dGeometry geometry, int64_t batch) {
  geometry.w = geometry.q = batch;
  return geometry;
}

// Types of their own, because Python tells them from convolutions.
template <class T>
struct PackedLinear : PackedConv2d<T> {
  using PackedConv2d<T>::PackedConv2d;
};
struct PackedLinearInt8 : PackedConv2dInt8 {
  using PackedConv2dInt8::PackedConv2dInt8;
};

}  // namespace sparsekd
