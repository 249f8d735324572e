// One encoding on the device against the CPU's.
#pragma once

#include "device.h"

namespace halfbyte {

// Codes that differ from the reference's, as a share of all, after checking that none differs by more than one unit
// where the scales agree.
struct Difference {
  double codes, scales;
};

inline Difference encode_difference(const Case& c, unsigned seed, bool portable) {
  Random random(seed);
  const size_t tokens = c.prefix;
  const auto k = random.tensor(c, c.kv_heads, tokens, true), v = random.tensor(c, c.kv_heads, tokens, false);
  Case whole = c;
  whole.prefix = tokens;
  Layer layer = make_layer(whole);
  const size_t packed = tokens / 16 * 16;  // one more token than whole blocks makes the layer pack them all
  EXPECT_TRUE(layer.append(view_of(k, c, c.kv_heads, tokens), view_of(v, c, c.kv_heads, tokens), c.batch, tokens).ok());
  LayerParts parts;
  EXPECT_TRUE(layer.save(parts).ok());
  EXPECT_EQ(parts.packed_end, packed);

  const HalfbyteCudaLayer described = layer_of(c);
  const size_t page_bytes = c.kv_heads * halfbyte_cuda_page_bytes(&described);
  const OnDevice<uint8_t> pages(std::vector<uint8_t>(parts.pages.size(), 0)), d_k(k), d_v(v);
  const OnDevice<int64_t> table(page_addresses(parts, pages.get(), page_bytes));
  const OnDevice<int32_t> bad(std::vector<int32_t>(1, 0));
  const Tables k_tables(described, c.head_dim, false, parts.offset_k, some_lambda(c, 1));
  const Tables v_tables(described, c.head_dim, true, parts.offset_v, some_lambda(c, 2));
  const bool identity = c.recipe.rotation == Rotation::identity;
  HalfbyteCudaEncode e{};
  e.layer = described, e.k_tables = k_tables.get(identity), e.v_tables = v_tables.get(identity);
  e.pages = {table.get(), (int64_t)(parts.page_table.size() / c.batch), 0, nullptr};
  e.batch = c.batch, e.k = device_view(d_k.get(), c, c.kv_heads, tokens),
  e.v = device_view(d_v.get(), c, c.kv_heads, tokens);
  e.limit = 1e4, e.bad = bad.get(), e.portable = portable;
  // In two parts that meet inside a block, as tokens arrive after a crop.
  const int64_t cut = (int64_t)packed / 2 - 3;
  e.first_token = 0, e.tokens = cut;
  expect_launched(halfbyte_cuda_encode(&e));
  e.first_token = cut, e.tokens = (int64_t)packed - cut;
  expect_launched(halfbyte_cuda_encode(&e));
  EXPECT_EQ(bad.values()[0], 0);

  const std::vector<uint8_t> got = pages.values();
  const PageFormat f = make_page_format(c.recipe, c.head_dim, c.head_dim);
  size_t codes = 0, wrong = 0, scales = 0, wrong_scales = 0;
  for (size_t page = 0; page < got.size(); page += page_head_bytes(f))
    for (int block = 0; block < kPageBlocks; block++) {
      const size_t from = page + k_codes_at(f, block), scales_from = page + k_scales_at(f, block);
      for (size_t i = 0; i < block_code_bytes(f); i++) codes++, wrong += got[from + i] != parts.pages[from + i];
      for (size_t i = 0; i < block_scale_bytes(f); i += 2)
        scales++, wrong_scales += memcmp(&got[scales_from + i], &parts.pages[scales_from + i], 2) != 0;
    }
  return {(double)wrong / codes, (double)wrong_scales / scales};
}

}  // namespace halfbyte
