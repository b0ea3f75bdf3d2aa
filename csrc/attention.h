// Distillation losses as the bindings see them: lists of layers and sizes in, kernel calls out.
#pragma once

#include <vector>

#include "attention_kernels.h"

namespace sparsekd {

// The tapped layers of a network; their columns of means and energy follow from the order in which they are added.
class FeatureLayers {
 public:
  void add(const void* features, void* grad, Element element, bool channels_last, int64_t channels, int64_t pixels);

  void stats(int64_t batch, float* means, float* energy, int threads) const;
  void stats_grad(int64_t batch, const float* grad_means, const float* grad_energy, int threads) const;

 private:
  std::vector<FeatureLayer> layers_;
  int64_t means_ = 0, energy_ = 0;
};

// The maps of one network side by side in the rows of an image.
struct MapRows {
  const float* maps;
  const std::vector<int64_t>& sizes;  // height and width of every map, one after the other
};

void match_maps(int64_t batch, const float* attention, MapRows teacher, MapRows student, float* loss,
                float* grad_attention, float* grad_student, int threads);

}  // namespace sparsekd
