// Reference decode: unpack, scale, divide λ out, rotate back, add the offset.
#include "decode.h"

#include "numbers.h"

namespace halfbyte {

float decode_code(const SideFormat& format, Side side, const uint8_t* codes, const uint8_t* scales, int token,
                  int channel) {
  CodePlace place =
      side == Side::k ? k_code_place(format.bits, token, channel) : v_code_place(format.bits, token, channel);
  int code = codes[place.byte] >> place.shift & (format.bits == 4 ? 15 : 255);
  Dtype dtype = format.scale_bytes == 4 ? Dtype::float32 : Dtype::float16;
  float scale = load_element(scales, dtype, (size_t)(channel / format.group) * kBlockTokens + token);
  return (float)(code - zero_code(format.bits)) * scale;
}

void decode_block(const DecodeArgs& args) {
  const SideFormat& format = *args.format;
  if (format.bits == kPlainBits)
    memcpy(args.out, args.codes, code_bytes(format));
  else
    current_backend().decode(args);
}

void decode_reference(const DecodeArgs& args) {
  int d = args.format->head_dim;
  std::vector<double> y(d), x(d);
  for (int t = 0; t < kBlockTokens; t++) {
    for (int c = 0; c < d; c++) {
      y[c] = decode_code(*args.format, args.side, args.codes, args.scales, t, c);
      if (args.inverse_lambda) y[c] *= args.inverse_lambda[c];
    }
    rotate_reference(*args.rotation, true, y.data(), x.data());
    for (int c = 0; c < d; c++) args.out[(size_t)t * d + c] = (float)(x[c] + (args.offset ? args.offset[c] : 0.0f));
  }
}

}  // namespace halfbyte
