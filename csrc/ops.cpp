// Every op of the library: its name, its signature, what it computes. M tokens, N out features, K in features, R rank.
#include <torch/csrc/stable/library.h>

namespace nf4lora {

STABLE_TORCH_LIBRARY(nf4lora, m) {
  // weight [..., K] -> qweight uint8 [..., K/2], absmax float32 [..., K/blocksize]
  m.def("nf4_quantize(Tensor weight, int blocksize) -> (Tensor qweight, Tensor absmax)");
  // weight = round_to_dtype(code[qweight] * absmax)  [..., K]
  m.def("nf4_dequantize(Tensor qweight, Tensor absmax, int blocksize, ScalarType dtype) -> Tensor");
  m.def("nf4_dequantize.out(Tensor qweight, Tensor absmax, int blocksize, *, Tensor(a!) out) -> ()");

  // absmax float32 -> absmax_q uint8 (same shape), nested float32 [ceil(n/256) + 1], the offset last
  m.def("absmax_quantize(Tensor absmax) -> (Tensor absmax_q, Tensor nested)");
  // absmax = RN(RN(map[absmax_q] * nested) + offset)
  m.def("absmax_dequantize(Tensor absmax_q, Tensor nested) -> Tensor");

  // y = x W^T + bias + scaling * S B^T  [..., N];  S = dropout(x) A^T  [M, R]. The arguments are those of lora.h.
  m.def(
      "lora_linear(Tensor x, Tensor qweight, Tensor absmax, Tensor? nested, Tensor? bias, Tensor? lora_A, "
      "Tensor? lora_B, float scaling, float dropout, Tensor? seed, int blocksize) -> (Tensor y, Tensor S)");
  // dx = dy W + dropout'(scaling * T A), dA = scaling * T^T dropout(x), dB = scaling * dy^T S;  T = dy B. Without x there
  // is no dA, without S no dB: both then come back empty, as dx does without need_dx.
  m.def(
      "lora_linear_backward(Tensor dy, Tensor? x, Tensor? S, Tensor qweight, Tensor absmax, Tensor? nested, "
      "Tensor? lora_A, Tensor? lora_B, float scaling, float dropout, Tensor? seed, int blocksize, bool need_dx) -> "
      "(Tensor dx, Tensor dA, Tensor dB)");

  // The same for layers of one x that are called together, up to 4: a list has an entry for each of them. There is no
  // dropout, and dx is the sum of all. S may be empty, where no dB is wanted.
  m.def(
      "lora_linear_group(Tensor x, Tensor[] qweight, Tensor[] absmax, Tensor?[] nested, Tensor?[] bias, "
      "Tensor[] lora_A, Tensor[] lora_B, float scaling, int blocksize) -> (Tensor[] y, Tensor[] S)");
  m.def(
      "lora_linear_group_backward(Tensor[] dy, Tensor? x, Tensor[] S, Tensor[] qweight, Tensor[] absmax, "
      "Tensor?[] nested, Tensor[] lora_A, Tensor[] lora_B, float scaling, int blocksize, bool need_dx) -> "
      "(Tensor dx, Tensor[] dA, Tensor[] dB)");

  // One step of AdamW on every tensor of the lists, in place (adamw.h has the arithmetic). exp_avgs and exp_avg_sqs are
  // float32, or uint8 with absmaxs float32 [ceil(n / 256), 2]. scale [1] multiplies every gradient; values whose gradient
  // is not finite stay as they are and are added to skipped, int64 [1].
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] absmaxs, Tensor(e!) skipped, Tensor? scale, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, int step) -> ()");
}

}  // namespace nf4lora
