// How much of a kernel runs at a time: asked of the device once.
#pragma once

#include "cuda/runtime/launch.h"
#include "cuda/runtime/occupancy.h"

namespace mfd {
namespace cuda {

// Blocks, or clusters where the shape has them, of a kernel that the device runs at a time; at least 1.
template <class... Parameters>
int64_t resident(void (*kernel)(Parameters...), const Where& where, const Shape& shape) {
  Occupancy o{reinterpret_cast<const void*>(kernel),
              where.device,
              shape.threads,
              shape.cluster,
              shape.shared_bytes,
              0};
  if (const int64_t kept = find_occupancy(o)) return kept;
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          "cudaFuncSetAttribute");
  int found = 0;
  if (shape.cluster > 1) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.cluster));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.attrs = &cluster;
    config.numAttrs = 1;
    check(cudaOccupancyMaxActiveClusters(&found, kernel, &config), "cudaOccupancyMaxActiveClusters");
    o.resident = found;
  } else {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, shape.threads,
                                                        static_cast<size_t>(shape.shared_bytes)),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    o.resident = int64_t{found} * facts_of(where.device).processors;
  }
  if (o.resident < 1) o.resident = 1;
  keep_occupancy(o);
  return o.resident;
}

}  // namespace cuda
}  // namespace mfd
