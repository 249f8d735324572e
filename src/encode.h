// Vectors become codes: the reference that every kernel is tested against.
#pragma once

#include "backend.h"

namespace halfbyte {

SideFormat make_side_format(const Recipe& recipe, Side side, int head_dim);
PageFormat make_page_format(const Recipe& recipe, int head_dim_k, int head_dim_v);

// The scale of one group, as stored: signed or not, searched or not, rounded to fp16 or fp32. y: the group's channels.
float choose_scale(const SideFormat& format, const double* y, int channels);

// Codes a block with the backend in use, or keeps it plain if its format says so.
void encode_block(const EncodeArgs& args);

void encode_reference(const EncodeArgs& args);

}  // namespace halfbyte
