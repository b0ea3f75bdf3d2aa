#include "depth_first.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "parallel_impl.h"

namespace sparsekd {

namespace {

constexpr int64_t kCacheBytes = 256 * 1024;  // of L2, for what layers hand on
constexpr double kMost = 0.1;                // of all multiply-adds, that may be done twice

int64_t product_rows(const Conv2dGeometry& g) { return g.q * g.k * (g.c / g.groups) * g.r * g.s; }

}  // namespace

template <class T>
RowLayer row_layer(const PackedConv2d<T>& layer) {
  const Conv2dGeometry g = with_images(layer.shape().geometry, 1);
  if (g.r * g.s > 1 || g.pad_h > 0 || g.pad_w > 0) return {};
  return {.geometry = g,
          .element_bytes = sizeof(T),
          .weight_bytes = layer.weight_bytes(),
          .run = [&layer](const Conv2dGeometry& part, const void* x, const void* residual, void* y) {
            layer.run(part, {static_cast<const T*>(x), true}, static_cast<const T*>(residual),
                      {static_cast<T*>(y), true}, 1);
          }};
}

template RowLayer row_layer(const PackedConv2d<float>&);
template RowLayer row_layer(const PackedConv2d<Bfloat16>&);

RowLayer row_layer(const PackedDepthwise& layer) {
  const Conv2dGeometry g = with_images(layer.geometry(), 1);
  if (g.pad_h > (g.r - 1) * g.dilation_h || (g.r * g.s == 1 && g.pad_w > 0))
    return {};  // outputs that read padding alone
  return {.geometry = g,
          .element_bytes = sizeof(float),
          .weight_bytes = g.c * g.r * g.s * static_cast<int64_t>(sizeof(float)),
          .run = [&layer](const Conv2dGeometry& part, const void* x, const void* residual, void* y) {
            layer.run(part, static_cast<const float*>(x), static_cast<const float*>(residual), static_cast<float*>(y),
                      1);
          }};
}

RowChain::RowChain(std::vector<RowLayer> layers) : layers_(std::move(layers)), rows_(1) {
  const int64_t all = layers_.back().geometry.p;
  while (rows_ < all && buffer_bytes(rows_ + 1) <= kCacheBytes) ++rows_;
}

// The rows that `layer` reads to make these.
RowChain::Rows RowChain::read_by(size_t layer, Rows made) const {
  const Conv2dGeometry& g = layers_[layer].geometry;
  const int64_t last = (made.end - 1) * g.stride_h - g.pad_h + (g.r - 1) * g.dilation_h;
  return {std::max<int64_t>(0, made.begin * g.stride_h - g.pad_h), std::min(g.h, last + 1)};
}

// Multiply-adds that are done twice where an image is cut into so many ranges of rows, as a share of all.
double RowChain::extra_work(int64_t ranges) const {
  double all = 0, extra = 0, again = 0;  // again: rows of the layer's output that two ranges make
  for (size_t i = layers_.size(); i-- > 0;) {
    const Conv2dGeometry& g = layers_[i].geometry;
    const double row = static_cast<double>(product_rows(g));
    all += row * static_cast<double>(g.p);
    extra += row * again * static_cast<double>(ranges - 1);
    const int64_t shared = (g.r - 1) * g.dilation_h + 1 - g.stride_h;  // input rows of neighbouring outputs
    again = std::max(0.0, again * static_cast<double>(g.stride_h) + static_cast<double>(shared));
  }
  return extra / all;
}

// Rows of the output of `layer` that are kept while `rows` of the last output are made: what the next layer reads for
// the rows that it has to keep itself, and rows that a stride beyond its kernel passes over.
int64_t RowChain::buffered_rows(size_t layer, int64_t rows) const {
  for (size_t i = layers_.size() - 1; i > layer; --i) {
    const Conv2dGeometry& g = layers_[i].geometry;
    rows = std::min(g.h, rows * g.stride_h + std::max<int64_t>(0, (g.r - 1) * g.dilation_h + 1 - g.stride_h));
  }
  return rows;
}

int64_t RowChain::buffer_bytes(int64_t rows) const {
  int64_t bytes = 0;
  for (size_t i = 0; i + 1 < layers_.size(); ++i) bytes += buffered_rows(i, rows) * layers_[i].y_row();
  return bytes;
}

bool RowChain::pays() const {
  constexpr int64_t kNarrow = 8;  // a row of fewer pixels may be summed as few pixels are
  int64_t largest = 0, weights = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (layers_[i].geometry.q < kNarrow) return false;
    if (i + 1 < layers_.size()) largest = std::max(largest, layers_[i].geometry.p * layers_[i].y_row());
    weights += layers_[i].weight_bytes;
  }
  return largest >= kCacheBytes && weights <= kCacheBytes && buffer_bytes(1) <= kCacheBytes && extra_work(2) <= kMost;
}

// Of the rows of one image: two for a thread, since threads are not always equally fast, or as many as make few rows twice.
int64_t RowChain::ranges(int threads) const {
  constexpr double kLittle = 0.05;
  const int64_t rows = layers_.back().geometry.p;
  if (threads == 1) return 1;
  if (2 * threads <= rows && extra_work(2 * threads) <= kLittle) return 2 * threads;
  int64_t found = std::min<int64_t>(rows, threads);
  while (found > 1 && extra_work(found) > kMost) --found;
  return found;
}

bool RowChain::feeds(int64_t n, int threads) const {
  const int64_t rest = n % threads;
  return rest == 0 || rest * ranges(threads) >= threads;
}

void RowChain::run_rows(const char* x, const void* const* residuals, int64_t image, char* y, Rows rows) const {
  struct Held {  // of a layer's output: rows [first, made)
    char* buffer;
    int64_t first, made;
  };
  const size_t count = layers_.size();
  thread_local std::vector<Held> held;
  thread_local std::vector<int64_t> ends;
  held.resize(count);
  ends.resize(count);
  char* buffer = static_cast<char*>(scratch(kScratchRows, static_cast<size_t>(buffer_bytes(rows_))));
  for (size_t i = 0; i < count; ++i) {
    held[i].buffer = buffer;
    if (i + 1 < count) buffer += buffered_rows(i, rows_) * layers_[i].y_row();
  }
  Rows begin = rows;
  for (size_t i = count; i-- > 0; begin = read_by(i, begin)) held[i].first = held[i].made = begin.begin;

  const int64_t chunks = (rows.end - rows.begin + rows_ - 1) / rows_;
  for (int64_t chunk = 1; chunk <= chunks; ++chunk) {
    Rows wanted{0, rows.begin + (rows.end - rows.begin) * chunk / chunks};
    for (size_t i = count; i-- > 0; wanted = read_by(i, wanted)) ends[i] = wanted.end;
    for (size_t i = 0; i < count; ++i) {
      const RowLayer& layer = layers_[i];
      Held& out = held[i];
      const Rows make{out.made, ends[i]};
      if (make.begin >= make.end) continue;
      const bool last = i + 1 == count;
      if (!last) {  // what the next layer has read is given up
        const int64_t kept = std::min(out.made, read_by(i + 1, {held[i + 1].made, held[i + 1].made + 1}).begin);
        memmove(out.buffer, out.buffer + (kept - out.first) * layer.y_row(),
                static_cast<size_t>((out.made - kept) * layer.y_row()));
        out.first = kept;
      }
      const Rows read = read_by(i, make);
      const char* from = i == 0 ? x + read.begin * layer.x_row()
                                : held[i - 1].buffer + (read.begin - held[i - 1].first) * layer.x_row();
      char* to = last ? y + make.begin * layer.y_row() : out.buffer + (make.begin - out.first) * layer.y_row();
      const char* residual = static_cast<const char*>(residuals[i]);
      if (residual != nullptr) residual += (image * layer.geometry.p + make.begin) * layer.y_row();
      Conv2dGeometry part = layer.geometry;
      part.h = read.end - read.begin;
      part.p = make.end - make.begin;
      part.pad_h = read.begin - (make.begin * part.stride_h - part.pad_h);
      layer.run(part, from, residual, to);
      out.made = make.end;
    }
  }
}

// While there is an image for every thread each takes one alone; the rest are cut.
void RowChain::run(int64_t n, const void* x, const void* const* residuals, void* y, int threads) const {
  const RowLayer &first = layers_.front(), &last = layers_.back();
  const int64_t whole = n - n % threads, cut = ranges(threads), rows = last.geometry.p;
  parallel(threads, whole + (n - whole) * cut, [&](int64_t item) {
    const int64_t image = item < whole ? item : whole + (item - whole) / cut;
    const int64_t range = item < whole ? 0 : (item - whole) % cut, of = item < whole ? 1 : cut;
    run_rows(static_cast<const char*>(x) + image * first.geometry.h * first.x_row(), residuals, image,
             static_cast<char*>(y) + image * rows * last.y_row(), {rows * range / of, rows * (range + 1) / of});
  });
}

std::shared_ptr<const RowChain> longest_chain(std::vector<RowLayer> layers) {
  for (; layers.size() > 1; layers.pop_back())
    if (RowChain chain(layers); chain.pays()) return std::make_shared<const RowChain>(std::move(chain));
  return nullptr;
}

}  // namespace sparsekd
