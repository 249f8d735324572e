// Codes become vectors again: the reference.
#pragma once

#include "backend.h"

namespace halfbyte {

// Value of one code in code domain: (code − zero) · scale.
float decode_code(const SideFormat& format, Side side, const uint8_t* codes, const uint8_t* scales, int token,
                  int channel);

// Decodes a block with the backend in use; a plain block is copied.
void decode_block(const DecodeArgs& args);

void decode_reference(const DecodeArgs& args);

}  // namespace halfbyte
