"""Tiny models of many architectures with random weights, for the tests that run each operation on each of them."""

from dataclasses import dataclass
from functools import cache

import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

from halfbyte import Int4Cache

WINDOW = 24  # of sliding layers: shorter than the prompts, so that every test crosses it
SEED = 3

# Head size 16 is the smallest that the cache packs; 128 tokens of text are enough to tell distributions apart.
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = {**SMALL, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}
LATENT = {
    **SMALL,
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SEQ2SEQ = {"vocab_size": 128, "d_model": 64, "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 1}
BART = {
    **SEQ2SEQ,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 512,
    "forced_eos_token_id": None,
}
T5 = {
    **SEQ2SEQ,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "tie_word_embeddings": False,
}  # False: no scaling of outputs

# Of weights whose name holds the key, over one that keeps the variance.
GAINS = {"lm_head": 3.0} | dict.fromkeys(("q_proj", "k_proj", "q_b_proj", "qkv_proj", "query_key", ".q.", ".k."), 1.5)


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model, and what the tests expect of it."""

    model: str  # a class of transformers, whose config class it names
    options: dict  # of the config
    layers: str  # of the cache: one letter each, p packed, l the library's, - none
    note: str  # what it brings that others do not
    reference: str = "sdpa"  # attention of the runs with DynamicCache
    attention: str = "halfbyte"  # and of those with Int4Cache
    cross: bool = False  # an encoder-decoder whose cross-attention cache is packed as well
    unpacks: bool = False  # attention gets K and V unpacked, instead of reading the codes

    def build(self):
        """The model in float32 and evaluation mode; the same weights each time."""
        torch.manual_seed(SEED)
        model_class = getattr(transformers, self.model)
        model = model_class(model_class.config_class(**self.options)).eval()
        # A head tied to the embeddings repeats the last token, whatever attention says.
        model.get_output_embeddings().weight = torch.nn.Parameter(torch.empty(128, 64))
        _spread_weights(model)
        model.generation_config.eos_token_id = None  # every run is as long as it says
        model.generation_config.pad_token_id = 0
        return model

    def cache(self, model, recipe=None, **overrides):
        """A cache for the model: DynamicCache without a recipe, else Int4Cache."""

        def one(packed):
            if recipe is None or not packed:
                return DynamicCache(config=model.config)
            return Int4Cache(model.config, recipe, **overrides)

        return EncoderDecoderCache(one(True), one(self.cross)) if model.config.is_encoder_decoder else one(True)


@torch.no_grad()
def _spread_weights(model):
    """Random weights that make attention choose and logits differ; the usual ones, at this size, do neither."""
    embeddings = {id(module.weight): module for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, weight in model.named_parameters():
        if id(weight) in embeddings:
            # So that the residual stream starts at 1 and what attention adds to it counts.
            weight.normal_(0.0, 1.0 / float(getattr(embeddings[id(weight)], "embed_scale", 1.0)))
        elif weight.dim() > 1:
            inputs = weight.shape[-2] if "experts" in name else weight[0].numel()
            weight.normal_(0.0, next((gain for part, gain in GAINS.items() if part in name), 1.0) * inputs**-0.5)
        elif name.endswith(("bias", "sinks")) and "norm" not in name:
            weight.normal_(0.0, 0.5)


ALTERNATING = {**MIXED, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
SHARED = {**ALTERNATING, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
GEMMA = {**MIXED, "query_pre_attn_scalar": 40}
LATENT_NOTE = "latent attention: the cache holds the latents, and attention unpacks them"

ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", SMALL, "pp", "grouped queries"),
    "llama-mha": Architecture("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 4}, "pp", "a KV head for each head"),
    "llama-mqa": Architecture(
        "LlamaForCausalLM", {**SMALL, "num_key_value_heads": 1, "head_dim": 32}, "pp", "one KV head"
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", SMALL, "pp", "key bias"),
    "qwen3": Architecture("Qwen3ForCausalLM", SMALL, "pp", "norms of queries and keys"),
    "mistral": Architecture("MistralForCausalLM", {**SMALL, "sliding_window": WINDOW}, "pp", "every layer slides"),
    "phi3": Architecture("Phi3ForCausalLM", SMALL, "pp", "fused projections"),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM", {**SMALL, "no_rope_layers": [1, 0]}, "pp", "layers without positions"
    ),
    "cohere2": Architecture("Cohere2ForCausalLM", {**MIXED, "logit_scale": 1.0}, "pp", "RoPE in sliding layers alone"),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", GEMMA, "pp", "soft-capping; sliding and full layers", reference="eager"
    ),
    "gemma3": Architecture("Gemma3ForCausalLM", GEMMA, "pp", "sliding and full layers of different RoPE"),
    "gemma3n": Architecture(
        "Gemma3nForCausalLM",
        {**SHARED, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
        "pp--",
        "layers that share the K and V of others",
    ),
    "gemma4": Architecture(
        "Gemma4ForCausalLM", {**SHARED, "global_head_dim": 32}, "pp--", "shared K and V; two head sizes in one model"
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "pp",
        "attention sinks; sliding and full layers",
        reference="eager",
    ),
    "mimo-v2": Architecture(
        "MiMoV2FlashForCausalLM",
        {**MIXED, **EXPERTS, "head_dim": 32, "v_head_dim": 16, "n_routed_experts": 4},
        "pp",
        "K and V heads of different sizes; sinks",
        reference="eager",
    ),
    "deepseek-v3": Architecture("DeepseekV3ForCausalLM", LATENT, "pp", LATENT_NOTE, unpacks=True),
    "deepseek-v32": Architecture(
        "DeepseekV32ForCausalLM",
        {**LATENT, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2},
        "ll",
        "sparse attention through an indexer: nothing is packed, and attention is the library's",
        attention="sdpa",
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": None},
        "pp",
        "attention code of its own, with ALiBi: it gets K and V unpacked",
        reference="eager",
        unpacks=True,
    ),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        {
            **SMALL,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "lp",
        "chunked attention, which is the library's",
    ),
    "lfm2": Architecture(
        "Lfm2ForCausalLM",
        {**SMALL, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"]},
        "lpp",
        "convolution layers",
    ),
    "qwen3-next": Architecture(
        "Qwen3NextForCausalLM",
        {
            **SMALL,
            **EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 48,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "lp",
        "linear attention layers",
    ),
    "falcon-h1": Architecture(
        "FalconH1ForCausalLM",
        {
            **SMALL,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
        "ll",
        "attention and Mamba in one layer: nothing is packed",
    ),
    "bart": Architecture(
        "BartForConditionalGeneration", BART, "pp", "encoder-decoder; cross-attention in DynamicCache"
    ),
    "bart-cross": Architecture(
        "BartForConditionalGeneration",
        BART,
        "pp",
        "encoder-decoder; cross-attention packed as well, and unpacked to be read",
        cross=True,
        unpacks=True,
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        T5,
        "pp",
        "encoder-decoder with position biases, so K and V unpacked",
        unpacks=True,
    ),
    "t5-cross": Architecture(
        "T5ForConditionalGeneration", T5, "pp", "the same with cross-attention packed as well", cross=True, unpacks=True
    ),
}


WHISPER = Architecture(
    "WhisperForConditionalGeneration",
    {
        **BART,
        "num_mel_bins": 8,
        "max_source_positions": 32,
        "max_target_positions": 256,
        "bos_token_id": 1,
        "begin_suppress_tokens": None,
    },
    "pp",
    "an encoder-decoder for speech with a generate() of its own",
)


@cache
def built(name):
    """The architecture's model, built once a process; generate() and set_attn_implementation() leave it as it was."""
    torch.set_num_threads(1)  # models this small gain nothing from two, and lose much on a busy machine
    return ARCHITECTURES[name].build()
