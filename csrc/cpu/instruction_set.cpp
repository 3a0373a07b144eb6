#include "instruction_set.h"

#if defined(NF4LORA_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace nf4lora {

// CMake writes a line for each set of this machine, the best last: NF4LORA_SET(its name, whether the processor has it).
#define NF4LORA_SET(name, available) const Loops& loops_##name();
#include "instruction_sets.inc"
#undef NF4LORA_SET

namespace {

struct Candidate {
  const Loops& (*loops)();
  bool available;
};

#if defined(NF4LORA_AMX)
// Whether the processor has it and the system lets this process use its registers, which must be asked for once.
bool amx_is_permitted() {
  static const bool permitted = [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return permitted;
}

// Those of AVX512-BF16, but for products of bfloat16 matrices. Built here: whoever looks for a name may do so on a
// processor without either.
const Loops& loops_amx() {
  static const Loops table = [] {
    Loops loops = loops_avx512bf16();
    loops.name = "amx";
    loops.gemm[static_cast<int>(Dtype::bf16)] = &gemm_amx();
    return loops;
  }();
  return table;
}
#endif

std::vector<Candidate> candidates() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  std::vector<Candidate> sets = {
#define NF4LORA_SET(name, available) {loops_##name, available},
#include "instruction_sets.inc"
#undef NF4LORA_SET
  };
#if defined(NF4LORA_AMX)
  sets.push_back({loops_amx, sets.back().available && amx_is_permitted()});
#endif
  return sets;
}

const Loops& find(const std::string& name, const char* who) {
  std::string known;
  for (const Candidate& candidate : candidates()) {
    const Loops& table = candidate.loops();
    if (name == table.name) {
      if (candidate.available) return table;
      throw std::invalid_argument(std::string(who) + ": this processor has no " + name);
    }
    known += known.empty() ? table.name : std::string(", ") + table.name;
  }
  throw std::invalid_argument(std::string(who) + ": instruction set must be one of " + known + ", got " + name);
}

const Loops& choose() {
  if (const char* name = std::getenv("NF4LORA_CPU"); name && *name) return find(name, "NF4LORA_CPU");
  const Loops* best = nullptr;
  for (const Candidate& candidate : candidates()) {
    if (candidate.available) best = &candidate.loops();
  }
  return *best;
}

std::atomic<const Loops*> forced{nullptr};

}  // namespace

const Loops& loops() {
  if (const Loops* table = forced.load(std::memory_order_relaxed)) return *table;
  static const Loops& chosen = choose();  // a throw leaves it unset, so that the next call says the same again
  return chosen;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.available) names.emplace_back(candidate.loops().name);
  }
  return names;
}

void force_instruction_set(const std::string& name) {
  forced.store(name.empty() ? nullptr : &find(name, "force_instruction_set"), std::memory_order_relaxed);
}

}  // namespace nf4lora
