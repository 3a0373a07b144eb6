// What the loops know of an instruction set.
//
// NF4LORA_ISA chooses it: `avx2` is the namespace avx2 of avx2.h. Every name below is defined there, or in the set that
// it builds upon. scalar.h, at the bottom, has them all.
#pragma once

#include "denormals.h"
#include "loops.h"

#define NF4LORA_TEXT(text) #text
#define NF4LORA_EXPANDED(text) NF4LORA_TEXT(text)
#include NF4LORA_EXPANDED(NF4LORA_ISA.h)

namespace nf4lora::NF4LORA_ISA {

namespace set = NF4LORA_ISA;

// Vectors of floats.
//
//   kLanes                        floats in a vector
//   kRegisters                    vectors that the processor holds
//   Float, Mask                   a vector; a truth for each lane
//   load, store, broadcast        at any address
//   store_streamed                past the caches, at a multiple of the vector's size
//   finish_streamed               orders that with the stores that tell another thread of it
//   add, multiply, divide, square_root, magnitude
//   fma                           a b + c, rounded once or twice: for sums whose last bits are not defined
//   fused                         a b + c, rounded once: for those whose bits are
//   larger, lesser                of a and b; b where either is NaN
//   below                         a < b; false where either is NaN
//   select, count                 of a mask: yes or no; lanes that are true
//   keep_bits                     a vector and bits in memory
//   largest_lane                  of floats none of which is NaN; of Int
//   sum_lanes                     out[i] = the sum of the lanes of v[i * stride], for i < count
//   load_part, store_part         the first lanes; what is loaded has zeros in the rest
//   ..._bf16, ..._f16             16 bits in memory, rounded to nearest even; store_bf16 may make zeros below 2^-126
using set::add, set::below, set::broadcast, set::count, set::divide, set::finish_streamed, set::Float, set::fma;
using set::fused, set::keep_bits, set::kLanes, set::kRegisters, set::larger, set::largest_lane, set::lesser;
using set::load, set::load_bf16, set::load_f16, set::load_part, set::magnitude, set::Mask, set::multiply;
using set::round_bf16, set::round_f16, set::select, set::square_root, set::store, set::store_bf16, set::store_f16;
using set::store_part, set::store_part_bf16, set::store_part_f16, set::store_streamed, set::sum_lanes;

// Vectors of 32-bit integers.
//
//   Int                           kLanes of them
//   load_bits, no_bits            all lanes, or the first and zeros in the rest; zeros
//   shift_right
//   transpose                     of kLanes vectors: v[i] = lane i of each
//   transpose_words, kTransposed  out[i * stride + r] = word i of row r, for eight rows, zeros from row `valid` on, and
//                                 for kTransposed i from `at` on, one after the other
//   pair_words                    out[i] = first[i], and above it second[i], or zeros where `second` is null
using set::Int, set::kTransposed, set::load_bits, set::no_bits, set::pair_words, set::shift_right, set::transpose;
using set::transpose_words;

// NF4. T is one of the tags of dtype.h.
//
//   larger_magnitudes<T>          lane by lane, of `largest` and of kEncoded weights, as bits: magnitudes compare as
//                                 integers, where NaN and infinity are the largest of all
//   encode_weights<T>             the codes nearest to kEncoded weights times `inverse`
//   WeightTable, weight_table<T>  the 16 weights that a block can hold, rounded to T. Looking them up is exact, and
//                                 costs 16 multiplies a block instead of one a weight
//   decode_weights                kLanes of them, from kLanes / 2 bytes
//   decode_lanes                  codes in the lowest four bits of lanes, each times its own absmax
//   WordTable<T>                  where kExists: the 16 weights in 16 bits, by which `decode` writes kWeights at a time
//   Chunk<T>                      64 columns of a row of W as vectors, in the order that suits best. column(i): that of
//                                 element i; decode<kSmall>(bytes, scales, each): each(part, vector), one scale for 64
//                                 columns or, kSmall, one for 32
using set::Chunk, set::decode_lanes, set::decode_weights, set::encode_weights, set::kEncoded, set::larger_magnitudes;
using set::weight_table, set::WeightTable, set::WordTable;

// Products of matrices.
//
//   kFewTileRows, kFewTiles       rows of W whose sums few_lanes.h holds in registers; tiles of so many rows that use a
//                                 span of x while it is near
//   PairProduct, PairRow          products of pairs of bfloat16 for gemm.h and for few.h, or void: then as of any dtype
using set::kFewTileRows, set::kFewTiles, set::PairProduct, set::PairRow;

// The maps of 8 bits.
//
//   look_up_nested                the map's values of kLookedUp codes of scales
//   decode_signed, ..._unsigned   of kMomentGroup codes, as kMomentGroup / kLanes vectors: exp_avg, exp_avg_sq
//   decode_drop                   the same codes of exp_avg in kMomentDrop
//   encode_signed, ..._unsigned   from values and their magnitudes over absmax
using set::decode_drop, set::decode_signed, set::decode_unsigned, set::encode_signed, set::encode_unsigned;
using set::kLookedUp, set::kMomentGroup, set::look_up_nested;

}  // namespace nf4lora::NF4LORA_ISA
