/* Exported networks from C: open a file, describe it, run it, close it. docs/deploy.md shows how.
 *
 * A function that can fail returns 0, or one of sparsekd_status; sparsekd_error() then says why. A session may be run by
 * several threads at once. Nothing here throws. */
#ifndef SPARSEKD_H
#define SPARSEKD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SPARSEKD_API __attribute__((visibility("default")))
#else
#define SPARSEKD_API
#endif

#define SPARSEKD_API_VERSION 1
#define SPARSEKD_MAX_RANK 8

typedef struct sparsekd_session sparsekd_session;

typedef enum {
  SPARSEKD_OK = 0,
  SPARSEKD_FILE = 1,     /* it cannot be opened or read */
  SPARSEKD_FORMAT = 2,   /* damaged, foreign, newer, or asks for what this version does not know */
  SPARSEKD_ARGUMENT = 3, /* of a call: a size, a null pointer, an id that no table has */
  SPARSEKD_MEMORY = 4,
  SPARSEKD_INTERNAL = 5
} sparsekd_status;

typedef enum {
  SPARSEKD_FLOAT32 = 0,
  SPARSEKD_BFLOAT16 = 1,
  SPARSEKD_INT8 = 2,
  SPARSEKD_UINT8 = 3,
  SPARSEKD_INT32 = 4,
  SPARSEKD_INT64 = 5
} sparsekd_dtype;

/* An input or output. A size of -k in `shape` is k times the batch of the call. */
typedef struct {
  const char* name; /* lives as long as the session */
  sparsekd_dtype dtype;
  int rank;
  int64_t shape[SPARSEKD_MAX_RANK];
} sparsekd_tensor;

/* Elements in row-major order, at a multiple of their size. `bytes` must be those of the tensor at the call's batch. */
typedef struct {
  void* data;
  size_t bytes;
} sparsekd_buffer;

/* threads: of one call, 1 or more. On failure *session is null. */
SPARSEKD_API int sparsekd_open(const char* path, int threads, sparsekd_session** session);
SPARSEKD_API void sparsekd_close(sparsekd_session* session); /* null is fine */

SPARSEKD_API int sparsekd_input_count(const sparsekd_session* session);
SPARSEKD_API int sparsekd_output_count(const sparsekd_session* session);
SPARSEKD_API int sparsekd_input(const sparsekd_session* session, int index, sparsekd_tensor* tensor);
SPARSEKD_API int sparsekd_output(const sparsekd_session* session, int index, sparsekd_tensor* tensor);
/* Bytes of a tensor for a batch; 0 where that is too large. */
SPARSEKD_API size_t sparsekd_bytes(const sparsekd_tensor* tensor, int64_t batch);

/* As many buffers as there are inputs and outputs, in their order. Inputs are not changed. */
SPARSEKD_API int sparsekd_run(const sparsekd_session* session, int64_t batch, const sparsekd_buffer* inputs,
                              const sparsekd_buffer* outputs);

SPARSEKD_API const char* sparsekd_error(void); /* of the last failure in this thread; "" where there was none */
SPARSEKD_API const char* sparsekd_note(const sparsekd_session* session); /* what a user should know, or "" */
SPARSEKD_API const char* sparsekd_isa(void);                             /* the instruction set in use */

#ifdef __cplusplus
}
#endif

#endif
