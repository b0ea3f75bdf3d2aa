// Layers that the kernels run: convolutions, linear layers, pooling.
#include "../dispatch.h"
#include "../linear.h"
#include "../network.h"
#include "../quantize.h"
#include "elementwise.h"
#include "ops.h"
#include "weights.h"

namespace sparsekd {

namespace {

std::array<int64_t, 2> pair(const Json& attributes, const char* name, int64_t low) {
  const auto& sizes = attributes.at(name).array();
  expect(sizes.size() == 2, std::string("its ") + name + " has no two sizes");
  return {sizes[0].integer(low, 1 << 20), sizes[1].integer(low, 1 << 20)};
}

// The activation that the kernels apply, and the one that is left for a step behind them.
struct Ending {
  Activation inside = Activation::kNone;
  std::string behind = "none";
};

Ending ending_of(const Json& attributes) {
  Ending ending;
  ending.behind = attributes.at("activation").string();
  for (size_t i = 0; i < std::size(kActivationNames); ++i)
    if (ending.behind == kActivationNames[i]) return {static_cast<Activation>(i), "none"};
  expect(knows_activation(ending.behind), "it has the unknown activation '" + ending.behind + "'");
  return ending;
}

void give_ended(Compiler& compiler, const Node& node, const Ending& ending, int y) {
  if (ending.behind != "none") y = activated(compiler, ending.behind, y);
  compiler.give(node.outputs[0], y);
}

// Operands are x and, where there are two, a residual of the output's shape.
int residual_of(Compiler& compiler, const Node& node, DType dtype, const Shape& shape, Layout layout) {
  expect((node.inputs.size() == 1 || node.inputs.size() == 2) && node.outputs.size() == 1,
         "it takes an input and perhaps a residual, and makes one output");
  if (node.inputs.size() == 1) return -1;
  const int residual = compiler.of(node.inputs[1], layout);
  const Operand& one = compiler.operand(residual);
  expect(one.dtype == dtype && one.shape == shape, std::string("its residual is ") + name_of(one.dtype) + " " +
                                                       to_string(one.shape) + ", its output " + name_of(dtype) + " " +
                                                       to_string(shape));
  return residual;
}

template <class T>
const T* residual_at(const Frame& frame, int residual) {
  return residual < 0 ? nullptr : frame.address<T>(residual);
}

// x as bytes: an operand and how they stand for numbers.
struct Bytes {
  int operand;
  ByteScale scale;
};

Bytes quantized(Compiler& compiler, const Json& attributes, int x) {
  const Operand from = compiler.operand(x);
  expect(from.dtype == DType::kFloat32, "a layer of bytes takes float32");
  const double scale = attributes.at("x_scale").number();
  expect(scale > 1e-30 && scale < 1e30, "its x_scale is no scale");
  const ByteScale bytes{static_cast<float>(scale), static_cast<int>(attributes.at("x_zero").integer(0, 255))};
  const int y = compiler.fresh(DType::kUint8, from.shape, from.last);
  compiler.step({x}, {y}, [=](const Frame& frame) {
    const int64_t count = from.shape.elements() * (from.shape.batched() ? frame.n : 1);
    quantize_u8(frame.address<const float>(x), count, bytes.scale, bytes.zero, frame.address<uint8_t>(y),
                frame.threads);
  });
  return {y, bytes};
}

struct Maps {
  Conv2dShape shape;
  Shape y;
};

// The walk of a convolution or of pooling over maps [n, c, h, w].
Maps maps_of(const Json& attributes, const Shape& x, int64_t k, int64_t groups, std::array<int64_t, 2> kernel,
             int64_t bh, int64_t bw) {
  const auto stride = pair(attributes, "stride", 1), padding = pair(attributes, "padding", 0),
             dilation = pair(attributes, "dilation", 1);
  Maps maps{conv2d_shape({.n = 1,
                          .c = x.at(1),
                          .h = x.at(2),
                          .w = x.at(3),
                          .k = k,
                          .r = kernel[0],
                          .s = kernel[1],
                          .stride_h = stride[0],
                          .stride_w = stride[1],
                          .pad_h = padding[0],
                          .pad_w = padding[1],
                          .dilation_h = dilation[0],
                          .dilation_w = dilation[1],
                          .groups = groups},
                         bh, bw),
            {}};
  maps.y = shape_of({x.at(0), k, maps.shape.geometry.p, maps.shape.geometry.q});
  check_shape(maps.y);
  expect(k <= INT32_MAX / maps.shape.geometry.p / maps.shape.geometry.q, "it makes maps that are too large");
  return maps;
}

void expect_maps(const Operand& x) {
  expect(x.shape.rank == 4 && x.shape.leads() && x.shape.at(1) > 0 && x.shape.at(2) > 0 && x.shape.at(3) > 0,
         "it takes maps [N, C, H, W], got " + to_string(x.shape));
  // Kernels count the numbers of an image in 32 bits.
  expect(x.shape.at(1) <= INT32_MAX / x.shape.at(2) / x.shape.at(3), "its maps are too large: " + to_string(x.shape));
}

template <class T>
void add_conv2d(Compiler& compiler, const Maps& maps, const Weights& weights, Activation activation, int x,
                int residual, int y) {
  const auto layer = std::make_shared<PackedConv2d<T>>(
      maps.shape, reinterpret_cast<const T*>(weights.data()), weights.blocks,
      weights.bias == nullptr ? nullptr : reinterpret_cast<const float*>(weights.bias->data), activation);
  const bool x_last = compiler.operand(x).last, y_last = compiler.operand(y).last;
  const int64_t images = -maps.y.at(0);
  compiler.step(
      {x, residual}, {y},
      [=](const Frame& frame) {
        layer->run(with_images(layer->shape().geometry, images * frame.n), {frame.address<const T>(x), x_last},
                   residual_at<const T>(frame, residual), {frame.address<T>(y), y_last}, frame.threads);
      },
      residual);
  if (x_last && y_last) compiler.also_by_rows(row_layer(*layer), images, x, residual, y);
}

void add_conv2d_int8(Compiler& compiler, const Maps& maps, const Weights& weights, Activation activation,
                     const Bytes& x, int residual, int y) {
  const auto layer = std::make_shared<PackedConv2dInt8>(
      maps.shape, reinterpret_cast<const int8_t*>(weights.data()), weights.scale, weights.blocks,
      weights.bias == nullptr ? nullptr : reinterpret_cast<const float*>(weights.bias->data), activation, x.scale,
      nullptr);
  const bool x_last = compiler.operand(x.operand).last, y_last = compiler.operand(y).last;
  const int64_t images = -maps.y.at(0);
  const int bytes = x.operand;
  compiler.step({bytes, residual}, {y}, [=](const Frame& frame) {
    layer->run(with_images(layer->shape().geometry, images * frame.n), {frame.address<const uint8_t>(bytes), x_last},
               residual_at<const float>(frame, residual), {frame.at[y], y_last}, frame.threads);
  });
}

void conv2d_node(Compiler& compiler, const Node& node) {
  const Json& attributes = node.attributes;
  expect(!node.inputs.empty(), "it has no input");
  int x = compiler.of(node.inputs[0]);
  const Operand from = compiler.operand(x);
  expect_float(from.dtype);
  expect_maps(from);
  const auto kernel = pair(attributes, "kernel", 1);
  const int64_t groups = attributes.at("groups").integer(1, from.shape.at(1));
  const int64_t k = attributes.at("outputs").integer(1, 1 << 24);
  expect(from.shape.at(1) % groups == 0 && k % groups == 0, "its channels do not divide into its groups");
  const Weights weights =
      read_weights(compiler, node, from.dtype, shape_of({k, from.shape.at(1) / groups, kernel[0], kernel[1]}), groups);
  const Maps maps = maps_of(attributes, from.shape, k, groups, kernel, weights.bh, weights.bw);
  const Ending ending = ending_of(attributes);
  const bool last = compiler.graph().channels_last;
  const Layout layout = last ? Layout::kChannelsLast : Layout::kRowMajor;
  const int residual = residual_of(compiler, node, from.dtype, maps.y, layout);
  const int y = compiler.fresh(from.dtype, maps.y, last);
  if (weights.scale != nullptr)
    add_conv2d_int8(compiler, maps, weights, ending.inside, quantized(compiler, attributes, x), residual, y);
  else if (from.dtype == DType::kFloat32)
    add_conv2d<float>(compiler, maps, weights, ending.inside, x, residual, y);
  else
    add_conv2d<Bfloat16>(compiler, maps, weights, ending.inside, x, residual, y);
  give_ended(compiler, node, ending, y);
}

template <class T>
void add_linear(Compiler& compiler, const Conv2dShape& shape, const Weights& weights, Activation activation, int x,
                int residual, int y) {
  const auto layer = std::make_shared<PackedLinear<T>>(
      shape, reinterpret_cast<const T*>(weights.data()), weights.blocks,
      weights.bias == nullptr ? nullptr : reinterpret_cast<const float*>(weights.bias->data), activation);
  const Shape from = compiler.operand(x).shape;
  compiler.step(
      {x, residual}, {y},
      [=](const Frame& frame) {
        const int64_t rows = from.elements() / layer->shape().geometry.c * (from.batched() ? frame.n : 1);
        layer->run(with_batch(layer->shape().geometry, rows), {frame.address<const T>(x), true},
                   residual_at<const T>(frame, residual), {frame.address<T>(y), true}, frame.threads);
      },
      residual);
}

void add_linear_int8(Compiler& compiler, const Conv2dShape& shape, const Weights& weights, Activation activation,
                     const Bytes& x, int residual, int y) {
  const auto layer = std::make_shared<PackedLinearInt8>(
      shape, reinterpret_cast<const int8_t*>(weights.data()), weights.scale, weights.blocks,
      weights.bias == nullptr ? nullptr : reinterpret_cast<const float*>(weights.bias->data), activation, x.scale,
      nullptr);
  const int bytes = x.operand;
  const Shape from = compiler.operand(bytes).shape;
  compiler.step({bytes, residual}, {y}, [=](const Frame& frame) {
    const int64_t rows = from.elements() / layer->shape().geometry.c * (from.batched() ? frame.n : 1);
    layer->run(with_batch(layer->shape().geometry, rows), {frame.address<const uint8_t>(bytes), true},
               residual_at<const float>(frame, residual), {frame.at[y], true}, frame.threads);
  });
}

void linear_node(Compiler& compiler, const Node& node) {
  expect(!node.inputs.empty(), "it has no input");
  const int x = compiler.of(node.inputs[0], Layout::kRowMajor);
  const Operand from = compiler.operand(x);
  expect_float(from.dtype);
  const int64_t in = from.shape.rank ? from.shape.at(from.shape.rank - 1) : 0;
  expect(in > 0, "it takes [..., features], got " + to_string(from.shape));
  const int64_t k = node.attributes.at("outputs").integer(1, 1 << 30);
  const Weights weights = read_weights(compiler, node, from.dtype, shape_of({k, in}), 1);
  Shape shape = from.shape;
  shape.dims[static_cast<size_t>(shape.rank - 1)] = k;
  const Ending ending = ending_of(node.attributes);
  const int residual = residual_of(compiler, node, from.dtype, shape, Layout::kRowMajor);
  const int y = compiler.fresh(from.dtype, shape);
  const Conv2dShape geometry = linear_shape(1, in, k, weights.bh, weights.bw);
  if (weights.scale != nullptr)
    add_linear_int8(compiler, geometry, weights, ending.inside, quantized(compiler, node.attributes, x), residual, y);
  else if (from.dtype == DType::kFloat32)
    add_linear<float>(compiler, geometry, weights, ending.inside, x, residual, y);
  else
    add_linear<Bfloat16>(compiler, geometry, weights, ending.inside, x, residual, y);
  give_ended(compiler, node, ending, y);
}

// A kernel for each channel, and the scale and shift of a batch norm as its 1 x 1 case.
void depthwise_node(Compiler& compiler, const Node& node) {
  expect(!node.inputs.empty(), "it has no input");
  const int x = compiler.of(node.inputs[0], Layout::kChannelsLast);
  const Operand from = compiler.operand(x);
  expect_maps(from);
  expect(from.dtype == DType::kFloat32, "it takes float32");
  const int64_t c = from.shape.at(1);
  const auto kernel = pair(node.attributes, "kernel", 1);
  const Maps maps = maps_of(node.attributes, from.shape, c, c, kernel, 1, 1);
  const StoredTensor& weight = compiler.tensor(node.attributes.at("weight").string());
  expect_tensor(weight, DType::kFloat32, shape_of({c, 1, kernel[0], kernel[1]}), "weight");
  const StoredTensor* bias = nullptr;
  if (const Json* const given = node.attributes.find("bias")) {
    bias = &compiler.tensor(given->string());
    expect_tensor(*bias, DType::kFloat32, shape_of({c}), "bias");
  }
  const Ending ending = ending_of(node.attributes);
  const int residual = residual_of(compiler, node, from.dtype, maps.y, Layout::kChannelsLast);
  const int y = compiler.fresh(from.dtype, maps.y, true);
  const auto layer = std::make_shared<PackedDepthwise>(
      maps.shape, reinterpret_cast<const float*>(weight.data),
      bias == nullptr ? nullptr : reinterpret_cast<const float*>(bias->data), ending.inside);
  const int64_t images = -maps.y.at(0);
  compiler.step(
      {x, residual}, {y},
      [=](const Frame& frame) {
        layer->run(with_images(layer->geometry(), images * frame.n), frame.address<const float>(x),
                   residual_at<const float>(frame, residual), frame.address<float>(y), frame.threads);
      },
      residual);
  compiler.also_by_rows(row_layer(*layer), images, x, residual, y);
  give_ended(compiler, node, ending, y);
}

// activation(x * gate + residual), the gate a number for each channel of an image.
void gate_node(Compiler& compiler, const Node& node) {
  expect((node.inputs.size() == 2 || node.inputs.size() == 3) && node.outputs.size() == 1,
         "it takes maps, a gate and perhaps a residual, and makes one output");
  const bool last = compiler.graph().channels_last;
  const Layout layout = last ? Layout::kChannelsLast : Layout::kRowMajor;
  const int x = compiler.of(node.inputs[0], layout), by = compiler.of(node.inputs[1], layout);
  const Operand from = compiler.operand(x), factor = compiler.operand(by);
  expect_maps(from);
  expect_float(from.dtype);
  expect(factor.dtype == from.dtype && factor.shape == shape_of({from.shape.at(0), from.shape.at(1), 1, 1}),
         "its gate is " + to_string(factor.shape) + " for maps of " + to_string(from.shape));
  int residual = -1;
  if (node.inputs.size() == 3) {
    residual = compiler.of(node.inputs[2], layout);
    expect(compiler.operand(residual).dtype == from.dtype && compiler.operand(residual).shape == from.shape,
           "its residual is not of the shape " + to_string(from.shape));
  }
  const Ending ending = ending_of(node.attributes);
  const int64_t pixels = from.shape.at(2) * from.shape.at(3), images = -from.shape.at(0);
  const auto make = from.dtype == DType::kFloat32 ? gate_layer<float> : gate_layer<Bfloat16>;
  const NetworkLayer layer = make(pixels, from.shape.at(1), last, ending.inside);
  const int y = compiler.fresh(from.dtype, from.shape, last);
  compiler.step({x, by, residual}, {y}, [=](const Frame& frame) {
    const void* const in[] = {frame.at[x], frame.at[by], residual < 0 ? nullptr : frame.at[residual]};
    layer.run(images * frame.n, in, frame.at[y], frame.threads);
  });
  give_ended(compiler, node, ending, y);
}

template <bool kMean>
void pool_node(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int x = compiler.of(node.inputs[0], Layout::kChannelsLast);
  const Operand from = compiler.operand(x);
  expect_maps(from);
  expect_float(from.dtype);
  const Maps maps = maps_of(node.attributes, from.shape, from.shape.at(1), from.shape.at(1),
                            pair(node.attributes, "kernel", 1), 1, 1);
  // Where a window met padding alone its maximum would be minus infinity.
  const Conv2dGeometry& g = maps.shape.geometry;
  expect(2 * g.pad_h <= g.r && 2 * g.pad_w <= g.s, "its padding is more than half of its window");
  const NetworkLayer layer =
      from.dtype == DType::kFloat32 ? pool_layer<float>(maps.shape, kMean) : pool_layer<Bfloat16>(maps.shape, kMean);
  const int y = compiler.fresh(from.dtype, maps.y, true);
  const int64_t images = -maps.y.at(0);
  compiler.step({x}, {y}, [=](const Frame& frame) {
    const void* const in = frame.at[x];
    layer.run(images * frame.n, &in, frame.at[y], frame.threads);
  });
  compiler.give(node.outputs[0], y);
}

}  // namespace

void add_layers(OpTable& table) {
  table["conv2d"] = conv2d_node;
  table["linear"] = linear_node;
  table["depthwise"] = depthwise_node;
  table["gate"] = gate_node;
  table["max_pool"] = pool_node<false>;
  table["mean_pool"] = pool_node<true>;
}

}  // namespace sparsekd
