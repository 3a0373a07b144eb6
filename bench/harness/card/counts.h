// How often each function of the runtime was called and each kernel launched since the last reset.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace nf4lora::card {

// What is counted, for as long as the process lives: all counters hang in one list, which only grows.
class Counter {
 public:
  enum Kind { call, launch };
  Counter(Kind kind, const char* name);
  void add() { count_.fetch_add(1, std::memory_order_relaxed); }
  // A launch into a stream that is being captured: it becomes a node of a graph.
  void add_captured() { captured_.fetch_add(1, std::memory_order_relaxed); }

  const Kind kind;
  const char* const name;

 private:
  friend struct Counts;
  std::atomic<uint64_t> count_{0}, captured_{0};
  Counter* next_;
};

template <size_t N>
struct Name {
  char text[N];
  constexpr Name(const char (&literal)[N]) { std::copy_n(literal, N, text); }  // NOLINT: implicit on purpose
};

// Counts a call of the function of this name. (A name as template argument: so each has a counter of its own.)
template <Name name>
void called() {
  static Counter counter(Counter::call, name.text);
  counter.add();
}

// Ends the process with the name of a function that the card does not have: an answer would be a wrong one.
[[noreturn]] void absent(const char* name);

}  // namespace nf4lora::card
