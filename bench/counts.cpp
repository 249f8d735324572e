// A fixed amount of work for each kernel, whose instructions tools/check_counts.py counts under callgrind.
#include <functional>

#include "inputs.h"

// What is counted: callgrind starts from zero here, and writes the count down on the way out.
extern "C" __attribute__((noinline)) void counted_part(const std::function<void()>& work) {
  work();
  asm volatile("" ::: "memory");  // no tail call: leaving this function is what callgrind waits for
}

namespace halfbyte::bench {
namespace {

constexpr int kHeadDim = 128, kQueryHeads = 6;
constexpr size_t kVectors = 64, kTokens = 256;

// Runs `work` once for what only a first call does, then counts it. Names come out in the order of the counts.
void count(const std::string& name, const std::function<void()>& work) {
  work();
  std::printf("%s\n", name.c_str());
  counted_part(work);
}

void count_encode(const std::string& name, const Recipe& recipe) {
  const std::vector<float> x = normals(kVectors * kHeadDim, 0);
  count(name, [&] { must(encode_only(x.data(), kVectors, kHeadDim, recipe, Side::k)); });
}

void count_attend(const std::string& name, const Recipe& recipe, int queries = 1) {
  const Tokens tokens(kHeadDim, kQueryHeads, kTokens + (queries > 1 ? queries : 0), queries);
  Layer layer = make_layer(kHeadDim, recipe);
  must(layer.append(tokens.view(tokens.k), tokens.view(tokens.v), 1, kTokens));
  if (queries > 1)
    must(layer.append(tokens.view(tokens.k, kTokens), tokens.view(tokens.v, kTokens), 1, (size_t)queries));
  Attention attention(tokens, queries);
  count(name, [&] { must(layer.attend(attention.args)); });
}

void count_raw(const std::string& name) {
  const Tokens tokens(kHeadDim, kQueryHeads, kTokens);
  RawCache cache(1, kHeadDim, Dtype::float16);
  must(cache.append(tokens.view(tokens.k), tokens.view(tokens.v), 1, kTokens));
  Attention attention(tokens);
  count(name, [&] { must(cache.attend(attention.args)); });
}

void count_decode(const std::string& name) {
  const Tokens tokens(kHeadDim, 1, kTokens);
  Layer layer = make_layer(kHeadDim, {});
  must(layer.append(tokens.view(tokens.k), tokens.view(tokens.v), 1, kTokens));
  std::vector<float> k(kTokens * kHeadDim), v(kTokens * kHeadDim);
  count(name, [&] { must(layer.decode(k.data(), v.data())); });
}

void count_backend(const std::string& backend) {
  must(set_backend(backend));
  Recipe no_search, groups_of_16, wide;
  no_search.search = false;
  groups_of_16.k.group = groups_of_16.v.group = 16;
  wide.k = {8, 32}, wide.v = {8, 0};
  count_encode(backend + ": encode", {});
  count_encode(backend + ": encode, no search", no_search);
  count_attend(backend + ": attend packed", {});
  count_attend(backend + ": attend packed, groups of 16", groups_of_16);
  count_attend(backend + ": attend packed, 8 bits", wide);
  count_attend(backend + ": attend packed, 16 queries", {}, 16);
  count_raw(backend + ": attend fp16");
  count_decode(backend + ": decode");
}

}  // namespace
}  // namespace halfbyte::bench

int main(int argc, char** argv) {
  halfbyte::set_num_threads(1);
  for (int i = 1; i < argc; i++) halfbyte::bench::count_backend(argv[i]);
}
