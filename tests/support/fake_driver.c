// What Triton's launcher and mfd_fast's plans ask of libcuda.so.1, for machines without a GPU: every launch
// goes to a function of the test's, and every address is one of the device's.
#include <stdint.h>

struct config {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

typedef void (*seen_function)(uint64_t function, unsigned programs, unsigned threads, unsigned shared_bytes,
                              void** parameters);
static seen_function seen;
void set_seen(seen_function function) {
  seen = function;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
  if (y != 1 || z != 1 || block_y != 1 || block_z != 1 || stream || extra) return 1;
  seen((uint64_t)function, x, threads, shared_bytes, parameters);
  return 0;
}

int cuLaunchKernelEx(const struct config* c, void* function, void** parameters, void** extra) {
  if (c->attribute_count) return 1;
  return cuLaunchKernel(function, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2],
                        c->shared_bytes, c->stream, parameters, extra);
}

int cuPointerGetAttribute(void* value, int attribute, uint64_t address) {
  (void)attribute;
  *(uint64_t*)value = address;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = &seen;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
