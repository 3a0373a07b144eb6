#include "instruction_set.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace nf4lora {
namespace {

struct Candidate {
  const Loops& (*loops)();
  bool available;
};

std::vector<Candidate> candidates() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return {{loops_scalar, true},
          {loops_avx2, avx2},
          {loops_avx512, avx512},
          // VBMI is in all processors with BF16 but the first, Cooper Lake.
          {loops_avx512bf16, avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")}};
#else
  return {{loops_scalar, true}};
#endif
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
