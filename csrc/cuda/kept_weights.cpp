#include "kept_weights.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

namespace nf4lora::cuda {
namespace {

// Addresses tell two weights apart as long as both are in memory, which they are here: the packed tensors are kept too.
struct Entry {
  PackedTensors weight;
  ScalarType dtype;
  void* stream;
  KeptWeight kept;

  bool is_of(const PackedTensors& other, int64_t room, ScalarType wanted, void* on) const {
    return is_same(weight.qweight, other.qweight) && is_same(weight.absmax, other.absmax) &&
           weight.nested.has_value() == other.nested.has_value() &&
           (!weight.nested || is_same(*weight.nested, *other.nested)) && weight.blocksize == other.blocksize &&
           weight.qweight.size(0) == other.qweight.size(0) && dtype == wanted && stream == on && kept.room >= room;
  }
  static bool is_same(const Tensor& a, const Tensor& b) {
    return a.const_data_ptr() == b.const_data_ptr() && a.numel() == b.numel();
  }
};

struct Store {
  std::mutex lock;
  std::vector<Entry> entries;
  bool is_taken_from = false;  // since the last one was kept
};
Store& store() {
  static Store* const one = new Store;  // never freed: at the end of the process torch's memory goes first
  return *one;
}

std::atomic<int64_t> most{0};
thread_local bool next = false;

int64_t bytes_of(const KeptWeight& kept) { return kept.memory.numel() * nf4lora::bytes_of(dtype_of(kept.memory)); }

}  // namespace

void keep_next_weight() { next = true; }
bool keeps_next_weight() { return std::exchange(next, false); }

void keep_weight(const PackedTensors& weight, const KeptWeight& kept, void* stream) {
  Store& s = store();
  const std::lock_guard guard(s.lock);
  if (std::exchange(s.is_taken_from, false)) s.entries.clear();
  int64_t bytes = bytes_of(kept);
  for (const Entry& entry : s.entries) bytes += bytes_of(entry.kept);
  if (bytes > most_kept_bytes()) return;
  s.entries.push_back({weight, kept.memory.scalar_type(), stream, kept});
}

std::optional<KeptWeight> take_kept_weight(const PackedTensors& weight, int64_t room, ScalarType dtype, void* stream) {
  Store& s = store();
  const std::lock_guard guard(s.lock);
  const auto at = std::find_if(s.entries.rbegin(), s.entries.rend(),
                               [&](const Entry& entry) { return entry.is_of(weight, room, dtype, stream); });
  if (at == s.entries.rend()) return std::nullopt;
  s.is_taken_from = true;
  KeptWeight kept = std::move(at->kept);
  s.entries.erase(std::next(at).base());
  return kept;
}

void drop_kept_weights() {
  Store& s = store();
  const std::lock_guard guard(s.lock);
  s.entries.clear();
  s.is_taken_from = false;
}

int64_t most_kept_bytes() { return most.load(std::memory_order_relaxed); }
void set_most_kept_bytes(int64_t bytes) { most.store(bytes); }

}  // namespace nf4lora::cuda
