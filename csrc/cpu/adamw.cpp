// adamw_step_ on the CPU: which thread takes which values. The loop is in isa/adamw.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../ceil_div.h"
#include "../check/adamw.h"
#include "instruction_set.h"

namespace nf4lora {
namespace {

// Values that one thread takes at a time: it stays within the caches, and is a multiple of a block.
constexpr int64_t kPiece = 1 << 12;
constexpr int64_t kGrain = 4;  // pieces a thread should have before a second one is woken

void adamw_step_(const AdamWStep& step) {
  check_adamw_step(step);
  const AdamW numbers = step.numbers();
  const float factor = step.scale ? *static_cast<const float*>(step.scale->const_data_ptr()) : 1.0f;

  std::vector<AdamWValues> tensors;
  std::vector<int64_t> counts, first_piece{0};
  for (size_t i = 0; i < step.params.size(); ++i) {
    tensors.push_back({step.params[i].mutable_data_ptr(), step.grads[i].const_data_ptr(),
                       step.exp_avgs[i].mutable_data_ptr(), step.exp_avg_sqs[i].mutable_data_ptr(),
                       step.eight_bits() ? static_cast<float*>(step.absmaxs[i].mutable_data_ptr()) : nullptr,
                       dtype_of(step.params[i])});
    counts.push_back(step.params[i].numel());
    first_piece.push_back(first_piece.back() + ceil_div(counts.back(), kPiece));
  }
  const Loops& isa = loops();
  std::atomic<int64_t> refused{0};
  torch::stable::parallel_for(0, first_piece.back(), kGrain, [&](int64_t begin, int64_t end) {
    auto i =
        static_cast<size_t>(std::upper_bound(first_piece.begin(), first_piece.end(), begin) - first_piece.begin() - 1);
    int64_t mine = 0;
    for (int64_t piece = begin; piece < end; ++i) {
      const int64_t last = std::min(end, first_piece[i + 1]);
      if (last <= piece) continue;  // an empty tensor
      const int64_t from = (piece - first_piece[i]) * kPiece;
      mine += isa.adamw_step(tensors[i], from, std::min(counts[i], (last - first_piece[i]) * kPiece), numbers, factor);
      piece = last;
    }
    refused += mine;
  });
  *static_cast<int64_t*>(step.skipped.mutable_data_ptr()) += refused;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4lora, CPU, m) { m.impl("adamw_step_", TORCH_BOX(&AdamWStep::op<&adamw_step_>)); }

}  // namespace nf4lora
