// What this processor and this operating system can run.
#include "cpu/runtime/isa.h"

#include <atomic>
#include <stdexcept>

#if defined(MFD_HAVE_X86_ISAS)
#include <cpuid.h>
#endif

namespace mfd {

namespace isa_baseline {
const Kernels& kernels();
}
#if defined(MFD_HAVE_X86_ISAS)
namespace isa_avx2 {
const Kernels& kernels();
}
namespace isa_avx512 {
const Kernels& kernels();
}
namespace isa_avx512_bf16 {
void product_of_pairs(const Product& p, int64_t begin, int64_t end, int64_t column);
}
#endif

namespace {

struct Isa {
  const char* name;
  bool supported;
  const Kernels& (*kernels)();
};

#if defined(MFD_HAVE_X86_ISAS)
struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512_bf16 = false;

  CpuFeatures() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c & bit_FMA, f16c = c & bit_F16C, avx = c & bit_AVX;
    if (!(c & bit_OSXSAVE)) return;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool os_ymm = (low & 0x06) == 0x06;  // the system saves xmm and ymm
    const bool os_zmm = (low & 0xe6) == 0xe6;  // and the mask and zmm registers
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = avx && fma && f16c && os_ymm && (b & bit_AVX2) && (b & bit_BMI) && (b & bit_BMI2);
    avx512 =
        avx2 && os_zmm && (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512VL) && (b & bit_AVX512DQ);
    avx512_bf16 = avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
  }
};
#endif

// Best first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = [] {
    std::vector<Isa> all;
#if defined(MFD_HAVE_X86_ISAS)
    const CpuFeatures features;
    all.push_back({"avx512", features.avx512, isa_avx512::kernels});
    all.push_back({"avx2", features.avx2, isa_avx2::kernels});
#endif
    all.push_back({"baseline", true, isa_baseline::kernels});
    return all;
  }();
  return list;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

void select_isa(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (name.empty() ? !isa.supported : name != isa.name) continue;
    if (!isa.supported)
      throw std::invalid_argument("MFD_FAST_CPU_ISA=" + name + ": this machine cannot run it");
    current = &isa.kernels();
    return;
  }
  std::string known;
  for (const Isa& isa : isas()) known += (known.empty() ? "" : ", ") + std::string(isa.name);
  throw std::invalid_argument("MFD_FAST_CPU_ISA=" + name + ": unknown instruction set, expected one of " +
                              known);
}

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_acquire);
  if (!table) {
    select_isa("");
    table = current;
  }
  return *table;
}

ProductKernel product_of_pairs() {
#if defined(MFD_HAVE_X86_ISAS)
  static const bool supported = CpuFeatures().avx512_bf16;
  if (supported && &kernels() == &isa_avx512::kernels()) return isa_avx512_bf16::product_of_pairs;
#endif
  return nullptr;
}

const char* current_isa() {
  return kernels().name;
}

}  // namespace mfd
