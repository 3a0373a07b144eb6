#include "counts.h"

#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace nf4lora::card {
namespace {

std::atomic<Counter*> counters{nullptr};

std::string readable(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

}  // namespace

Counter::Counter(Kind kind, const char* name) : kind(kind), name(name), next_(counters.load()) {
  while (!counters.compare_exchange_weak(next_, this)) {
  }
}

struct Counts {
  static void reset() {
    for (Counter* counter = counters.load(); counter; counter = counter->next_) {
      counter->count_ = 0;
      counter->captured_ = 0;
    }
  }

  // Kernels of one name, such as those that several translation units register, are one entry.
  static std::string json() {
    std::map<std::string, uint64_t> calls, launches, captured;
    for (Counter* counter = counters.load(); counter; counter = counter->next_) {
      const uint64_t count = counter->count_, of_graph = counter->captured_;
      if (count + of_graph == 0) continue;
      const std::string name = readable(counter->name);
      if (count) (counter->kind == Counter::call ? calls : launches)[name] += count;
      if (of_graph) captured[name] += of_graph;
    }
    return "{\"calls\": " + object(calls) + ", \"launches\": " + object(launches) +
           ", \"captured\": " + object(captured) + "}";
  }

 private:
  static std::string object(const std::map<std::string, uint64_t>& counts) {
    std::string text;
    for (const auto& [name, count] : counts) {
      text += (text.empty() ? "\"" : ", \"") + name + "\": " + std::to_string(count);
    }
    return "{" + text + "}";
  }
};

void absent(const char* name) {
  std::fprintf(stderr, "card: %s is not implemented by the card that computes nothing\n", name);
  std::abort();
}

}  // namespace nf4lora::card

extern "C" {

void nf4lora_card_reset() { nf4lora::card::Counts::reset(); }
// JSON, valid until this thread asks again.
const char* nf4lora_card_counts() {
  thread_local std::string text;
  return (text = nf4lora::card::Counts::json()).c_str();
}
void nf4lora_card_absent(const char* name) { nf4lora::card::absent(name); }

}  // extern "C"
