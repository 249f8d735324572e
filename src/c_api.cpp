// The C API over halfbyte::Layer; the only place where exceptions become codes.
#include "halfbyte/halfbyte.h"

#include <exception>
#include <new>

#include "backend.h"

struct halfbyte_layer {
  halfbyte::Layer layer;
};

namespace {

using halfbyte::Status;

thread_local std::string last_error;

halfbyte_status fail(halfbyte_status code, const char* message) {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();  // the code alone must do
  }
  return code;
}

halfbyte_status code_of(const Status& status) {
  switch (status.code()) {
    case halfbyte::Code::ok:
      return HALFBYTE_OK;
    case halfbyte::Code::bad_argument:
      return fail(HALFBYTE_BAD_ARGUMENT, status.message().c_str());
    case halfbyte::Code::bad_value:
      return fail(HALFBYTE_BAD_VALUE, status.message().c_str());
    case halfbyte::Code::out_of_memory:
      return fail(HALFBYTE_OUT_OF_MEMORY, status.message().c_str());
    case halfbyte::Code::unsupported:
      return fail(HALFBYTE_UNSUPPORTED, status.message().c_str());
  }
  return fail(HALFBYTE_INTERNAL, "unknown status");
}

// Runs a call that gives a Status.
template <class Call>
halfbyte_status guarded(Call call) noexcept {
  try {
    return code_of(call());
  } catch (const std::bad_alloc&) {
    return fail(HALFBYTE_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(HALFBYTE_INTERNAL, error.what());
  } catch (...) {
    return fail(HALFBYTE_INTERNAL, "unknown exception");
  }
}

// The same for calls on a layer, which must not be null.
template <class Handle, class Call>
halfbyte_status on_layer(Handle* handle, Call call) noexcept {
  if (!handle) return fail(HALFBYTE_BAD_ARGUMENT, "layer is NULL");
  return guarded([&] { return call(handle->layer); });
}

Status null(const char* name) { return {halfbyte::Code::bad_argument, std::string(name) + " is NULL"}; }

// Any int can arrive where C says enum.
Status check_enum(const char* name, int value, int last) {
  if (value >= 0 && value <= last) return {};
  return {halfbyte::Code::bad_argument,
          std::string(name) + " is " + std::to_string(value) + "; it takes 0 to " + std::to_string(last)};
}

halfbyte::View view_of(const halfbyte_view& view) {
  return {view.data, view.batch_stride, view.head_stride, view.token_stride};
}

halfbyte::MutableView view_of(const halfbyte_mutable_view& view) {
  return {view.data, view.batch_stride, view.head_stride, view.token_stride};
}

halfbyte::LayerConfig config_of(const halfbyte_config& from) {
  halfbyte::LayerConfig config;
  config.kv_heads = from.kv_heads, config.head_dim_k = from.head_dim_k, config.head_dim_v = from.head_dim_v;
  config.dtype = static_cast<halfbyte::Dtype>(from.dtype);
  config.layer_index = from.layer_index, config.sliding_window = from.sliding_window;
  const halfbyte_recipe& r = from.recipe;
  config.recipe = {static_cast<halfbyte::Rotation>(r.rotation),
                   r.seed,
                   r.offset != 0,
                   {r.k_bits, r.k_group},
                   {r.v_bits, r.v_group},
                   r.scale_bits,
                   r.search != 0,
                   r.signed_scale != 0,
                   r.lambda != 0,
                   r.sink_tokens,
                   r.raw_window,
                   r.offset_tokens,
                   r.offset_span};
  return config;
}

halfbyte::AttendArgs args_of(const halfbyte_attend_args& from) {
  halfbyte::AttendArgs args;
  args.q = view_of(from.q), args.out = view_of(from.out);
  args.heads = from.heads, args.queries = from.queries, args.scale = from.scale;
  args.chunk_k = view_of(from.chunk_k), args.chunk_v = view_of(from.chunk_v);
  args.mask = from.mask, args.mask_tokens = from.mask_tokens;
  args.mask_batch_stride = from.mask_batch_stride, args.mask_query_stride = from.mask_query_stride;
  args.causal = from.causal != 0, args.exact = from.exact != 0, args.softcap = from.softcap, args.sinks = from.sinks;
  return args;
}

}  // namespace

const char* halfbyte_last_error(void) { return last_error.c_str(); }

halfbyte_recipe halfbyte_default_recipe(void) {
  const halfbyte::Recipe r;
  return {static_cast<int>(r.rotation),
          r.seed,
          r.offset,
          r.k.bits,
          r.k.group,
          r.v.bits,
          r.v.group,
          r.scale_bits,
          r.search,
          r.signed_scale,
          r.lambda,
          r.sink_tokens,
          r.raw_window,
          r.offset_tokens,
          r.offset_span};
}

halfbyte_config halfbyte_default_config(void) {
  halfbyte_config config = {};
  config.recipe = halfbyte_default_recipe();
  return config;
}

halfbyte_attend_args halfbyte_default_attend_args(void) {
  halfbyte_attend_args args = {};
  args.queries = 1, args.scale = 1.0f, args.causal = 1;
  return args;
}

halfbyte_status halfbyte_create(const halfbyte_config* config, halfbyte_layer** layer) {
  return guarded([&]() -> Status {
    if (!config) return null("config");
    if (!layer) return null("layer");
    *layer = nullptr;
    if (Status status = check_enum("dtype", config->dtype, HALFBYTE_BFLOAT16); !status.ok()) return status;
    if (Status status = check_enum("rotation", config->recipe.rotation, HALFBYTE_DENSE); !status.ok()) return status;
    halfbyte::Result<halfbyte::Layer> created = halfbyte::Layer::create(config_of(*config));
    if (created.ok()) *layer = new halfbyte_layer{std::move(created.value())};
    return created.status();
  });
}

void halfbyte_destroy(halfbyte_layer* layer) { delete layer; }

halfbyte_status halfbyte_append(halfbyte_layer* layer, const halfbyte_view* k, const halfbyte_view* v, int batch,
                                size_t tokens, const uint8_t* counted) {
  return on_layer(layer, [&](halfbyte::Layer& l) -> Status {
    if (!k) return null("k");
    if (!v) return null("v");
    return l.append(view_of(*k), view_of(*v), batch, tokens, counted);
  });
}

halfbyte_status halfbyte_attend(halfbyte_layer* layer, const halfbyte_attend_args* args) {
  return on_layer(layer, [&](halfbyte::Layer& l) { return args ? l.attend(args_of(*args)) : null("args"); });
}

halfbyte_status halfbyte_decode(const halfbyte_layer* layer, float* k_out, float* v_out) {
  return on_layer(layer, [&](const halfbyte::Layer& l) -> Status {
    if (!k_out) return null("k_out");
    if (!v_out) return null("v_out");
    return l.decode(k_out, v_out);
  });
}

halfbyte_status halfbyte_crop(halfbyte_layer* layer, size_t length) {
  return on_layer(layer, [&](halfbyte::Layer& l) { return l.crop(length); });
}

halfbyte_status halfbyte_select(halfbyte_layer* layer, const size_t* rows, size_t n) {
  return on_layer(layer, [&](halfbyte::Layer& l) -> Status {
    if (!rows) return null("rows");
    return l.select(std::vector<size_t>(rows, rows + n));
  });
}

halfbyte_status halfbyte_copy(const halfbyte_layer* layer, halfbyte_layer** copy) {
  return on_layer(layer, [&](const halfbyte::Layer& l) -> Status {
    if (!copy) return null("copy");
    *copy = nullptr;
    auto made = std::make_unique<halfbyte_layer>();
    Status status = made->layer.copy_from(l);
    if (status.ok()) *copy = made.release();
    return status;
  });
}

halfbyte_status halfbyte_reset(halfbyte_layer* layer) {
  return on_layer(layer, [](halfbyte::Layer& l) -> Status {
    l.reset();
    return {};
  });
}

halfbyte_status halfbyte_set_offset(halfbyte_layer* layer, const float* k, const float* v) {
  return on_layer(layer, [&](halfbyte::Layer& l) { return l.set_offset(k, v); });
}

halfbyte_status halfbyte_set_lambda(halfbyte_layer* layer, const float* k, const float* v) {
  return on_layer(layer, [&](halfbyte::Layer& l) { return l.set_lambda(k, v); });
}

halfbyte_status halfbyte_set_rotation(halfbyte_layer* layer, const float* k, const float* v) {
  return on_layer(layer, [&](halfbyte::Layer& l) { return l.set_rotation(k, v); });
}

halfbyte_status halfbyte_set_frequencies(halfbyte_layer* layer, const float* frequencies, int pairs, int interleaved) {
  return on_layer(layer, [&](halfbyte::Layer& l) -> Status {
    if (!frequencies && pairs) return null("frequencies");
    return l.set_frequencies(frequencies, pairs, interleaved != 0);
  });
}

halfbyte_status halfbyte_record_past(halfbyte_layer* layer, int on) {
  return on_layer(layer, [&](halfbyte::Layer& l) -> Status {
    l.record_past(on != 0);
    return {};
  });
}

int halfbyte_batch(const halfbyte_layer* layer) { return layer ? layer->layer.batch() : 0; }
size_t halfbyte_length(const halfbyte_layer* layer) { return layer ? layer->layer.length() : 0; }
size_t halfbyte_visible(const halfbyte_layer* layer) { return layer ? layer->layer.visible() : 0; }
size_t halfbyte_packed_tokens(const halfbyte_layer* layer) { return layer ? layer->layer.packed_tokens() : 0; }
size_t halfbyte_bytes(const halfbyte_layer* layer) { return layer ? layer->layer.bytes() : 0; }

const char* halfbyte_backend_name(int i, int* usable) {
  const halfbyte::Backend* found = halfbyte::backend_at(i);
  if (usable) *usable = found && found->supported();
  return found ? found->name : nullptr;
}

const char* halfbyte_backend(void) { return halfbyte::current_backend().name; }

halfbyte_status halfbyte_set_backend(const char* name) {
  return guarded([&] { return name ? halfbyte::set_backend(name) : null("name"); });
}

void halfbyte_set_num_threads(int n) { halfbyte::set_num_threads(n); }
int halfbyte_num_threads(void) { return halfbyte::num_threads(); }

const char* halfbyte_version(void) { return halfbyte::version(); }
const char* halfbyte_commit(void) { return halfbyte::commit(); }
