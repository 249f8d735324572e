// Attention of a few query rows over packed or raw tokens: the reference, and the merging of partial results.
#pragma once

#include "backend.h"

namespace halfbyte {

// The maximum of a row that has seen nothing: low enough that exp(kNothing − x) is 0 for any score x.
constexpr float kNothing = -1e30f;

void score_offsets_reference(const OffsetScoreArgs& args);
void attend_packed_reference(const AttendPackedArgs& args, Softmax& state);
void attend_raw_reference(const AttendRawArgs& args, Softmax& state);

// Folds one partial softmax (max, sum, acc [n]) into another, by log-sum-exp.
void merge_softmax(float& max, float& sum, float* acc, float other_max, float other_sum, const float* other_acc, int n);

// Working memory that the calling thread keeps for its tasks: bounded, whatever the prefix and the queries.
size_t attend_scratch_bytes();

}  // namespace halfbyte
