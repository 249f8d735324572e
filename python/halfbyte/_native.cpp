// The Python extension: the C++ API over addresses, shapes and strides. It knows nothing of PyTorch.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>

#include "halfbyte/halfbyte.hpp"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace halfbyte;

namespace {

using Address = uintptr_t;
using Strides = std::tuple<ptrdiff_t, ptrdiff_t, ptrdiff_t>;  // batch, head, token; in elements

void check(const Status& status) {
  switch (status.code()) {
    case Code::ok:
      return;
    case Code::out_of_memory:
      PyErr_SetString(PyExc_MemoryError, status.message().c_str());
      throw nb::python_error();
    case Code::unsupported:
      PyErr_SetString(PyExc_NotImplementedError, status.message().c_str());
      throw nb::python_error();
    default:
      throw nb::value_error(status.message().c_str());
  }
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

View view(Address address, const Strides& strides) {
  return {pointer<const void>(address), std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float16") return Dtype::float16;
  if (name == "bfloat16") return Dtype::bfloat16;
  throw nb::value_error(("dtype is '" + name + "'; it takes float32, float16 or bfloat16").c_str());
}

const char* const kRotations[] = {"identity", "srft", "srht", "dense"};

Rotation rotation_of(const std::string& name) {
  for (int i = 0; i < 4; i++)
    if (name == kRotations[i]) return (Rotation)i;
  throw nb::value_error(("rotation is '" + name + "'; it takes srft, srht, dense or identity").c_str());
}

Side side_of(const std::string& name) {
  if (name == "k") return Side::k;
  if (name == "v") return Side::v;
  throw nb::value_error(("which is '" + name + "'; it takes 'k' or 'v'").c_str());
}

void make_recipe(Recipe* self, const std::string& rotation, uint64_t seed, bool offset, int k_bits, int v_bits,
                 int k_group, int v_group, int scale_bits, bool search, bool signed_scale, bool lambda, int sink_tokens,
                 int raw_window, int offset_tokens, int offset_span) {
  Recipe recipe{rotation_of(rotation), seed,   offset,      {k_bits, k_group}, {v_bits, v_group}, scale_bits, search,
                signed_scale,          lambda, sink_tokens, raw_window,        offset_tokens,     offset_span};
  check(recipe.check(64));  // every field but the head size, which a recipe does not know
  new (self) Recipe(recipe);
}

Layer* make_layer(int kv_heads, int head_dim_k, int head_dim_v, const std::string& dtype, const Recipe& recipe,
                  int layer_index, int sliding_window) {
  Result<Layer> layer =
      Layer::create({kv_heads, head_dim_k, head_dim_v, dtype_of(dtype), recipe, layer_index, sliding_window});
  check(layer.status());
  return new Layer(std::move(layer.value()));
}

template <class T>
nb::object as_array(std::vector<T>&& values) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(kept->data(), {kept->size()}, owner));
}

template <class T>
std::vector<T> from_array(const nb::dict& parts, const char* name) {
  if (!parts.contains(name)) return {};
  auto array = nb::cast<nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(parts[name]);
  return {array.data(), array.data() + array.size()};
}

nb::dict save(const Layer& layer) {
  LayerParts p;
  check(layer.save(p));
  nb::dict parts;
  parts["batch"] = p.batch, parts["length"] = p.length, parts["first"] = p.first;
  parts["packed_end"] = p.packed_end, parts["pages_dropped"] = p.pages_dropped, parts["offset_ready"] = p.offset_ready;
  parts["page_table"] = as_array(std::move(p.page_table)), parts["pages"] = as_array(std::move(p.pages));
  parts["raw_k"] = as_array(std::move(p.raw_k)), parts["raw_v"] = as_array(std::move(p.raw_v));
  parts["offset_k"] = as_array(std::move(p.offset_k)), parts["offset_v"] = as_array(std::move(p.offset_v));
  parts["given_offset_k"] = as_array(std::move(p.given_offset_k));
  parts["given_offset_v"] = as_array(std::move(p.given_offset_v));
  parts["lambda_k"] = as_array(std::move(p.lambda_k)), parts["lambda_v"] = as_array(std::move(p.lambda_v));
  parts["rotation_k"] = as_array(std::move(p.rotation_k)), parts["rotation_v"] = as_array(std::move(p.rotation_v));
  parts["frequencies"] = as_array(std::move(p.frequencies)), parts["interleaved"] = p.interleaved;
  parts["counted"] = as_array(std::move(p.counted));
  return parts;
}

Layer* load(int kv_heads, int head_dim_k, int head_dim_v, const std::string& dtype, const Recipe& recipe,
            int layer_index, int sliding_window, const nb::dict& parts) {
  LayerParts p;
  p.batch = nb::cast<int>(parts["batch"]), p.length = nb::cast<uint64_t>(parts["length"]);
  p.first = nb::cast<uint64_t>(parts["first"]), p.packed_end = nb::cast<uint64_t>(parts["packed_end"]);
  p.pages_dropped = nb::cast<uint64_t>(parts["pages_dropped"]), p.offset_ready = nb::cast<bool>(parts["offset_ready"]);
  p.page_table = from_array<int32_t>(parts, "page_table"), p.pages = from_array<uint8_t>(parts, "pages");
  p.raw_k = from_array<uint8_t>(parts, "raw_k"), p.raw_v = from_array<uint8_t>(parts, "raw_v");
  p.offset_k = from_array<float>(parts, "offset_k"), p.offset_v = from_array<float>(parts, "offset_v");
  p.given_offset_k = from_array<float>(parts, "given_offset_k"),
  p.given_offset_v = from_array<float>(parts, "given_offset_v");
  p.lambda_k = from_array<float>(parts, "lambda_k"), p.lambda_v = from_array<float>(parts, "lambda_v");
  p.rotation_k = from_array<float>(parts, "rotation_k"), p.rotation_v = from_array<float>(parts, "rotation_v");
  p.frequencies = from_array<float>(parts, "frequencies"),
  p.interleaved = parts.contains("interleaved") && nb::cast<bool>(parts["interleaved"]);
  p.counted = from_array<uint8_t>(parts, "counted");
  Result<Layer> layer =
      Layer::load({kv_heads, head_dim_k, head_dim_v, dtype_of(dtype), recipe, layer_index, sliding_window}, p);
  check(layer.status());
  return new Layer(std::move(layer.value()));
}

AttendArgs attend_args(Address q, Address out, int heads, int queries, const Strides& q_strides,
                       const Strides& out_strides, float scale) {
  AttendArgs args;
  args.q = view(q, q_strides);
  args.out = {pointer<void>(out), std::get<0>(out_strides), std::get<1>(out_strides), std::get<2>(out_strides)};
  args.heads = heads, args.queries = queries, args.scale = scale;
  return args;
}

void attend(Layer& layer, Address q, Address out, int heads, int queries, const Strides& q_strides,
            const Strides& out_strides, float scale, Address chunk_k, Address chunk_v, const Strides& chunk_k_strides,
            const Strides& chunk_v_strides, Address mask, std::pair<ptrdiff_t, ptrdiff_t> mask_strides,
            size_t mask_tokens, float softcap, Address sinks, bool causal, bool exact) {
  AttendArgs args = attend_args(q, out, heads, queries, q_strides, out_strides, scale);
  args.chunk_k = view(chunk_k, chunk_k_strides), args.chunk_v = view(chunk_v, chunk_v_strides);
  args.mask = pointer<const uint8_t>(mask), args.mask_tokens = mask_tokens;
  args.mask_batch_stride = mask_strides.first, args.mask_query_stride = mask_strides.second;
  args.softcap = softcap, args.sinks = pointer<const float>(sinks), args.causal = causal, args.exact = exact;
  Status status;
  {
    nb::gil_scoped_release release;
    status = layer.attend(args);
  }
  check(status);
}

void append(Layer& layer, Address k, Address v, int batch, size_t tokens, const Strides& k_strides,
            const Strides& v_strides, Address counted, bool answered) {
  Status status;
  {
    nb::gil_scoped_release release;
    status =
        layer.append(view(k, k_strides), view(v, v_strides), batch, tokens, pointer<const uint8_t>(counted), answered);
  }
  check(status);
}

bool use_openmp_of(const std::string& path) {
  void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  auto parallel = library ? reinterpret_cast<OpenMpParallel>(dlsym(library, "GOMP_parallel")) : nullptr;
  use_openmp(parallel);
  return parallel != nullptr;
}

void bind_recipe(nb::module_& m) {
  nb::class_<Recipe>(m, "Recipe", "What a cache does to K and V; see docs/format.md for each field.")
      .def("__init__", &make_recipe, nb::kw_only(), "rotation"_a = "srft", "seed"_a = 0, "offset"_a = true,
           "k_bits"_a = 4, "v_bits"_a = 4, "k_group"_a = 32, "v_group"_a = 0, "scale_bits"_a = 16, "search"_a = true,
           "signed_scale"_a = true, "lambda_"_a = false, "sink_tokens"_a = 0, "raw_window"_a = 0, "offset_tokens"_a = 0,
           "offset_span"_a = Recipe().offset_span)
      .def_prop_ro("rotation", [](const Recipe& r) { return kRotations[(int)r.rotation]; })
      .def_ro("seed", &Recipe::seed)
      .def_ro("offset", &Recipe::offset)
      .def_prop_ro("k_bits", [](const Recipe& r) { return r.k.bits; })
      .def_prop_ro("v_bits", [](const Recipe& r) { return r.v.bits; })
      .def_prop_ro("k_group", [](const Recipe& r) { return r.k.group; })
      .def_prop_ro("v_group", [](const Recipe& r) { return r.v.group; })
      .def_ro("scale_bits", &Recipe::scale_bits)
      .def_ro("search", &Recipe::search)
      .def_ro("signed_scale", &Recipe::signed_scale)
      .def_ro("lambda_", &Recipe::lambda)
      .def_ro("sink_tokens", &Recipe::sink_tokens)
      .def_ro("raw_window", &Recipe::raw_window)
      .def_ro("offset_tokens", &Recipe::offset_tokens)
      .def_ro("offset_span", &Recipe::offset_span);
}

void bind_layer(nb::module_& m) {
  const Strides none{0, 0, 0};
  nb::class_<Layer>(m, "Layer", "The packed cache of one attention layer. Addresses are ints, strides are in elements.")
      .def(nb::new_(&make_layer), nb::kw_only(), "kv_heads"_a, "head_dim_k"_a, "head_dim_v"_a, "dtype"_a, "recipe"_a,
           "layer_index"_a = 0, "sliding_window"_a = 0)
      .def("append", &append, "k"_a, "v"_a, "batch"_a, "tokens"_a, "k_strides"_a, "v_strides"_a, "counted"_a = 0,
           "answered"_a = false)
      .def("attend", &attend, "q"_a, "out"_a, "heads"_a, "queries"_a, "q_strides"_a, "out_strides"_a, "scale"_a,
           nb::kw_only(), "chunk_k"_a = 0, "chunk_v"_a = 0, "chunk_k_strides"_a = none, "chunk_v_strides"_a = none,
           "mask"_a = 0, "mask_strides"_a = std::pair<ptrdiff_t, ptrdiff_t>{0, 0}, "mask_tokens"_a = 0,
           "softcap"_a = 0.0f, "sinks"_a = 0, "causal"_a = true, "exact"_a = false)
      .def(
          "dequantize",
          [](const Layer& l, Address k, Address v) { check(l.decode(pointer<float>(k), pointer<float>(v))); },
          "k_out"_a, "v_out"_a, "The newest `visible` tokens as float32 [batch, kv_heads, visible, head_dim].")
      .def(
          "crop", [](Layer& l, size_t length) { check(l.crop(length)); }, "length"_a)
      .def(
          "reserve", [](Layer& l, int batch, size_t tokens) { check(l.reserve(batch, tokens)); }, "batch"_a, "tokens"_a)
      .def(
          "select", [](Layer& l, const std::vector<size_t>& rows) { check(l.select(rows)); }, "rows"_a)
      .def("reset", &Layer::reset)
      .def(
          "copy",
          [](const Layer& l) {
            auto copy = std::make_unique<Layer>();
            check(copy->copy_from(l));
            return copy.release();
          },
          nb::rv_policy::take_ownership)
      .def("save", &save, "The content as a dict of ints and one-dimensional arrays: the fields of LayerParts.")
      .def_static("load", &load, nb::kw_only(), "kv_heads"_a, "head_dim_k"_a, "head_dim_v"_a, "dtype"_a, "recipe"_a,
                  "layer_index"_a, "sliding_window"_a, "parts"_a, nb::rv_policy::take_ownership)
      .def(
          "set_offset",
          [](Layer& l, Address k, Address v) { check(l.set_offset(pointer<float>(k), pointer<float>(v))); }, "k"_a,
          "v"_a)
      .def(
          "set_lambda",
          [](Layer& l, Address k, Address v) { check(l.set_lambda(pointer<float>(k), pointer<float>(v))); }, "k"_a,
          "v"_a)
      .def(
          "set_rotation",
          [](Layer& l, Address k, Address v) { check(l.set_rotation(pointer<float>(k), pointer<float>(v))); }, "k"_a,
          "v"_a, "R of a dense recipe: float32 [head_dim, head_dim] row-major, y = R (x - mu).")
      .def(
          "set_frequencies",
          [](Layer& l, Address frequencies, int pairs, bool interleaved) {
            check(l.set_frequencies(pointer<float>(frequencies), pairs, interleaved));
          },
          "frequencies"_a, "pairs"_a, "interleaved"_a = false,
          "RoPE's frequencies, float32 [pairs] in radians a token: mu of K is K as before RoPE, and turns from span to "
          "span. Pair i: channels i and i + pairs, or 2 i and 2 i + 1 when interleaved.")
      .def("record_past", &Layer::record_past, "on"_a)
      .def_prop_ro("length", &Layer::length)
      .def_prop_ro("first", &Layer::first)
      .def_prop_ro("visible", &Layer::visible)
      .def_prop_ro("batch", &Layer::batch)
      .def_prop_ro("packed_tokens", &Layer::packed_tokens)
      .def_prop_ro("has_offset", &Layer::has_offset)
      .def_prop_ro("nbytes", &Layer::bytes);
}

void bind_raw_cache(nb::module_& m) {
  nb::class_<RawCache>(m, "RawCache", "The tuned baseline: the same attention over K and V kept as given.")
      .def(
          "__init__",
          [](RawCache* self, int kv_heads, int head_dim, const std::string& dtype) {
            new (self) RawCache(kv_heads, head_dim, dtype_of(dtype));
          },
          "kv_heads"_a, "head_dim"_a, "dtype"_a)
      .def(
          "append",
          [](RawCache& c, Address k, Address v, int batch, size_t tokens, const Strides& k_strides,
             const Strides& v_strides) { check(c.append(view(k, k_strides), view(v, v_strides), batch, tokens)); },
          "k"_a, "v"_a, "batch"_a, "tokens"_a, "k_strides"_a, "v_strides"_a)
      .def(
          "attend",
          [](RawCache& c, Address q, Address out, int heads, int queries, const Strides& q_strides,
             const Strides& out_strides, float scale) {
            Status status;
            {
              nb::gil_scoped_release release;
              status = c.attend(attend_args(q, out, heads, queries, q_strides, out_strides, scale));
            }
            check(status);
          },
          "q"_a, "out"_a, "heads"_a, "queries"_a, "q_strides"_a, "out_strides"_a, "scale"_a)
      .def_prop_ro("length", &RawCache::length)
      .def_prop_ro("nbytes", &RawCache::bytes);
}

double encode_seconds(Address x, size_t vectors, int head_dim, const Recipe& recipe, int repeats, Address matrix) {
  const int threads = num_threads();
  set_num_threads(1);
  std::vector<double> seconds;
  Status status;
  for (int i = 0; i < repeats && status.ok(); i++) {
    auto start = std::chrono::steady_clock::now();
    status = encode_only(pointer<const float>(x), vectors, head_dim, recipe, Side::k, pointer<const float>(matrix));
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  set_num_threads(threads);
  check(status);
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

void bind_vectors(nb::module_& m) {
  m.def(
      "roundtrip",
      [](Address x, Address out, size_t vectors, int head_dim, const Recipe& recipe, const std::string& which,
         Address mu, Address lambda, int layer_index, Address matrix) {
        check(roundtrip(pointer<const float>(x), pointer<float>(out), vectors, head_dim, recipe, side_of(which),
                        pointer<const float>(mu), pointer<const float>(lambda), layer_index,
                        pointer<const float>(matrix)));
      },
      "x"_a, "out"_a, "vectors"_a, "head_dim"_a, "recipe"_a, "which"_a, "mu"_a = 0, "lambda_"_a = 0,
      "layer_index"_a = 0, "matrix"_a = 0,
      "Codes float32 [vectors, head_dim] and decodes them again. mu, lambda_: float32 [head_dim], or 0; matrix: R of a "
      "dense recipe, float32 [head_dim, head_dim].");
  m.def(
      "rotate",
      [](Address x, Address out, size_t vectors, int head_dim, const Recipe& recipe, int layer_index, bool inverse,
         Address matrix) {
        check(rotate(pointer<const float>(x), pointer<float>(out), vectors, head_dim, recipe, layer_index, inverse,
                     pointer<const float>(matrix)));
      },
      "x"_a, "out"_a, "vectors"_a, "head_dim"_a, "recipe"_a, "layer_index"_a = 0, "inverse"_a = false, "matrix"_a = 0);
  m.def("encode_bench", &encode_seconds, "x"_a, "vectors"_a, "head_dim"_a, "recipe"_a, "repeats"_a = 5, "matrix"_a = 0,
        "Median seconds of coding float32 [vectors, head_dim] once, on one thread.");
  m.def(
      "read_bandwidth",
      [](size_t bytes, int threads, int repeats) { return read_bandwidth(bytes, threads, repeats) * 1e-9; }, "bytes"_a,
      "threads"_a, "repeats"_a = 5, "Median read bandwidth in GB/s (1e9 bytes).");
  m.def(
      "dot_peak", [](int threads) { return dot_peak(threads) * 1e-9; }, "threads"_a,
      "The most the backend in use computes in bytes times 4-bit codes, in 1e9 operations a second; 0 for reference.");
  m.def(
      "fma_peak", [](int threads) { return fma_peak(threads) * 1e-9; }, "threads"_a,
      "The same in float32, in GFLOP/s.");
}

}  // namespace

NB_MODULE(_native, m) {
  // The named recipes live as long as the process; nanobind would report them as leaked at exit.
  nb::set_leak_warnings(false);
  m.attr("version") = version();
  m.attr("commit") = commit();
  m.def("backends", [] {
    std::vector<std::tuple<std::string, bool>> list;
    for (const BackendInfo& info : backends()) list.emplace_back(info.name, info.usable);
    return list;
  });
  m.def("backend", &backend);
  m.def("set_backend", [](const std::string& name) { check(set_backend(name)); }, "name"_a);
  m.def("cpu_features", &cpu_features);
  m.def("set_num_threads", &set_num_threads, "n"_a);
  m.def("num_threads", &num_threads);
  m.def("use_openmp", &use_openmp_of, "path"_a,
        "Runs on the threads of the OpenMP runtime at `path` if it is loaded and GNU-style; '' goes back to the own "
        "pool. "
        "Returns whether OpenMP is now in use.");
  bind_recipe(m);
  bind_layer(m);
  bind_raw_cache(m);
  bind_vectors(m);
  // A wrong HALFBYTE_BACKEND is an error when the module loads, not a silent fallback.
  if (const char* name = std::getenv("HALFBYTE_BACKEND")) check(set_backend(name));
}
