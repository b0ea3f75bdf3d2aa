/* Classifies the images of a file with an exported network:
 *
 *     classify student.skd images.f32 [threads]
 *
 * images.f32 holds float32 images [N, C, H, W] one after the other, scaled as in training (numpy: x.tofile). For each
 * the class of the largest score is printed, and the score. */
#include <sparsekd.h>
#include <stdio.h>
#include <stdlib.h>

static int fail(const char* what) {
  fprintf(stderr, "classify: %s\n", what);
  return 1;
}

static float* read_floats(const char* path, size_t* count) {
  FILE* file = fopen(path, "rb");
  if (file == NULL) return NULL;
  fseek(file, 0, SEEK_END);
  *count = (size_t)ftell(file) / sizeof(float);
  rewind(file);
  float* data = malloc(*count * sizeof(float) + 1);
  if (data != NULL && fread(data, sizeof(float), *count, file) != *count) {
    free(data);
    data = NULL;
  }
  fclose(file);
  return data;
}

int main(int argc, char** argv) {
  if (argc < 3) return fail("expected a network and a file of images");
  sparsekd_session* session;
  if (sparsekd_open(argv[1], argc > 3 ? atoi(argv[3]) : 1, &session)) return fail(sparsekd_error());
  sparsekd_tensor image, scores;
  if (sparsekd_input(session, 0, &image) || sparsekd_output(session, 0, &scores)) return fail(sparsekd_error());
  if (image.dtype != SPARSEKD_FLOAT32 || scores.dtype != SPARSEKD_FLOAT32 || scores.rank != 2)
    return fail("expected a network of float32 images to scores [N, classes]");

  size_t count;
  float* pixels = read_floats(argv[2], &count);
  if (pixels == NULL) return fail("the images cannot be read");
  const int64_t batch = (int64_t)(count * sizeof(float) / sparsekd_bytes(&image, 1));
  sparsekd_buffer input = {pixels, count * sizeof(float)}, output = {NULL, sparsekd_bytes(&scores, batch)};
  float* result = output.data = malloc(output.bytes + 1);
  if (result == NULL) return fail("not enough memory");
  if (sparsekd_run(session, batch, &input, &output)) return fail(sparsekd_error());

  const int64_t classes = scores.shape[1];
  for (int64_t i = 0; i < batch; ++i) {
    int64_t best = 0;
    for (int64_t j = 1; j < classes; ++j)
      if (result[i * classes + j] > result[i * classes + best]) best = j;
    printf("%lld %.9g\n", (long long)best, result[i * classes + best]);
  }
  free(result);
  free(pixels);
  sparsekd_close(session);
  return 0;
}
