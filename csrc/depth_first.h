// Neighbouring layers by rows: a few rows of an image go through all of them while they are in cache, where else a layer
// writes its whole output before the next one reads it.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "conv2d.h"

namespace sparsekd {

// A layer that can make some rows of an image's output; tensors are channels_last.
struct RowLayer {
  Conv2dGeometry geometry;  // of one image
  int64_t element_bytes, weight_bytes;
  // x begins with the first row that is read, y with the first that is made; h, p and pad_h of `part` are those of these
  // rows. On the calling thread. Empty: the layer cannot.
  std::function<void(const Conv2dGeometry& part, const void* x, const void* residual, void* y)> run;

  int64_t x_row() const { return geometry.w * geometry.c * element_bytes; }
  int64_t y_row() const { return geometry.q * geometry.k * element_bytes; }
};

// Layers that read and write channels_last tensors, by rows; they must outlive what is returned. Those can that read
// pixels where they lie: 1 x 1 without padding, and depthwise. Others would pack rows twice, which costs more than it saves.
template <class T>
RowLayer row_layer(const PackedConv2d<T>& layer);
RowLayer row_layer(const PackedDepthwise& layer);

// Layers each of which reads what the one before it makes, and nobody else does.
class RowChain {
 public:
  explicit RowChain(std::vector<RowLayer> layers);

  size_t size() const { return layers_.size(); }
  // Whether it is likely to take less time on one thread: the largest tensor between the layers leaves the cache, while
  // their weights and some rows stay in it; and two threads would make few rows twice.
  bool pays() const;
  // Whether so many images give every thread something to do, with few rows made twice where their shares meet.
  bool feeds(int64_t n, int threads) const;

  // x and y: n images, which share no memory; residuals: of each layer, or null. The same bits as layer by layer.
  void run(int64_t n, const void* x, const void* const* residuals, void* y, int threads) const;

 private:
  struct Rows {
    int64_t begin, end;
  };

  Rows read_by(size_t layer, Rows made) const;
  double extra_work(int64_t ranges) const;
  int64_t ranges(int threads) const;
  int64_t buffered_rows(size_t layer, int64_t rows) const;
  int64_t buffer_bytes(int64_t rows) const;
  void run_rows(const char* x, const void* const* residuals, int64_t image, char* y, Rows rows) const;

  std::vector<RowLayer> layers_;
  int64_t rows_;  // of the last output at a time
};

// The longest chain that pays of the first of these layers, or null.
std::shared_ptr<const RowChain> longest_chain(std::vector<RowLayer> layers);

}  // namespace sparsekd
