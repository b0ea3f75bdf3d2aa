// A chain of frozen layers as one call: no interpreter between them, and one buffer for all they hand on.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "depth_first.h"
#include "linear.h"

namespace sparsekd {

// A tensor of the network, `bytes` for each image: address `pointer` of the call, or, where that is negative, what
// starts `offset` bytes times the images of the call into the buffer.
struct NetworkValue {
  int64_t pointer, offset, bytes;
};

// One layer of a network.
struct NetworkLayer {
  // Images, what it reads (null: not there), y, threads. Layers read x and a residual if not said otherwise.
  std::function<void(int64_t, const void* const*, void*, int)> run;
  RowLayer row_layer = {};  // the same by rows, if it can
};

class Network {
 public:
  // buffer_bytes: of one image.
  Network(std::vector<NetworkValue> values, int64_t buffer_bytes);

  // The layer behind those that were added before; operands (-1: none) and y number values.
  void add(NetworkLayer layer, std::vector<int64_t> operands, int64_t y);

  // Behind the last layer: lets neighbours run by rows where that pays (depth_first.h).
  void finish();
  // How many layers may do so together, of each such chain.
  std::vector<size_t> chain_lengths() const;

  // May be called from several threads at once. With 0 < images < n, the images go through the network in slices of at
  // most so many, which stay in cache, and while there is a slice for every thread each takes one alone. Slices depend
  // on n and images only, and so do results.
  void run(const std::vector<std::uintptr_t>& pointers, int64_t n, int64_t images, int threads) const;

 private:
  struct Step {
    NetworkLayer layer;
    std::vector<int64_t> operands;
    int64_t y;
    std::shared_ptr<const RowChain> chain = nullptr;  // of this step and those behind it
  };

  struct Place {  // in the buffer
    int64_t offset, bytes;
    size_t last_read;
  };

  std::vector<RowLayer> row_layers(size_t first) const;
  void move_result(size_t first, size_t last, std::vector<Place>& moved);
  void run_slice(const std::vector<std::uintptr_t>& pointers, int64_t first, int64_t n, int threads) const;

  std::vector<NetworkValue> values_;
  int64_t buffer_bytes_;
  std::vector<Step> steps_;
};

// Packed layers as layers of a network, which must outlive it. A linear layer has `rows` rows for every image.
template <class T>
NetworkLayer conv2d_layer(const PackedConv2d<T>& layer, bool x_channels_last, bool y_channels_last);
template <class T>
NetworkLayer linear_layer(const PackedLinear<T>& layer, int64_t rows);
NetworkLayer depthwise_layer(const PackedDepthwise& layer);

// Pooling as a layer; tensors are channels_last. Throws std::invalid_argument where outputs are not the channels.
template <class T>
NetworkLayer pool_layer(const Conv2dShape& shape, bool mean);

// x * gate + residual: reads x, the gate and the residual. Images are of `channels` maps of `pixels`.
template <class T>
NetworkLayer gate_layer(int64_t pixels, int64_t channels, bool channels_last, Activation activation);

// Layer norm of `rows` rows for every image; keeps copies of weight and bias.
template <class T>
NetworkLayer layer_norm_layer(int64_t rows, int64_t channels, const float* weight, const float* bias, float epsilon);

// Side by side what lies in the operands: in each of `rows` rows of an image widths[i] bytes of operand i.
NetworkLayer join_layer(int64_t rows, std::vector<int64_t> widths);

}  // namespace sparsekd
