#include "cuda/runtime/occupancy.h"

#include <map>
#include <mutex>
#include <tuple>

namespace mfd {
namespace cuda {
namespace {

typedef std::tuple<const void*, int, int, int, int64_t> Key;
Key key_of(const Occupancy& o) {
  return {o.kernel, o.device, o.threads, o.cluster, o.shared_bytes};
}

std::mutex mutex;
std::map<Key, int64_t>& known() {
  static std::map<Key, int64_t> map;
  return map;
}

}  // namespace

int64_t find_occupancy(const Occupancy& wanted) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto kept = known().find(key_of(wanted));
  return kept == known().end() ? 0 : kept->second;
}

void keep_occupancy(const Occupancy& found) {
  const std::lock_guard<std::mutex> lock(mutex);
  known()[key_of(found)] = found.resident;
}

void forget_occupancies() {
  const std::lock_guard<std::mutex> lock(mutex);
  known().clear();
}

}  // namespace cuda
}  // namespace mfd
