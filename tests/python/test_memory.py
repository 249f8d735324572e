"""What a cache costs: bytes held, and the peak of a whole process that prefills and decodes."""

import os
import subprocess
import sys

import pytest

from conftest import MODELS, load

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList  # noqa: E402

from halfbyte import Int4Cache  # noqa: E402

# VmHWM rather than ru_maxrss: the latter starts at what the parent process held.
CHILD = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, DynamicCache
from halfbyte import Int4Cache

torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16).eval()
packed = sys.argv[1] == "int4"
model.set_attn_implementation("halfbyte" if packed else "sdpa")
cache = Int4Cache(model.config) if packed else DynamicCache(config=model.config)
ids = torch.randint(5, 4000, (2, 8192), generator=torch.Generator().manual_seed(0))
model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
assert cache.get_seq_length() == 8195
status = Path("/proc/self/status")
if status.exists():
    print(int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024)
else:
    import resource
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_bytes(kind):
    """Peak resident bytes of a process that runs CHILD, which says what; an assertion carries its errors."""
    command = [sys.executable, "-c", CHILD, kind, str(MODELS / "tiny-qwen")]
    # glibc otherwise moves the size above which freed memory goes back to the system as it sees fit, and the peaks of
    # both kinds scatter by some 50 MiB from run to run: more than the caches differ by.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr
    return int(child.stdout.split()[-1])


@pytest.mark.memory
@pytest.mark.slow
def test_peak_of_8k_prefill_and_decode_is_below_dynamic_cache():
    packed, dense = peak_bytes("int4"), peak_bytes("dynamic")
    assert packed < dense, f"{packed / 2**20:.0f} MiB against {dense / 2**20:.0f} MiB"


@pytest.mark.parametrize("name", ["tiny-qwen", "tiny-gemma"])
def test_cache_bytes_at_4096(name):
    model = load(name, "bfloat16")
    ids = torch.randint(5, 4000, (1, 4096), generator=torch.Generator().manual_seed(0))
    dense, packed = DynamicCache(config=model.config), Int4Cache(model.config)
    with torch.no_grad():
        for step in (ids, ids[:, :1]):  # right after the prefill, and when the next token has come
            for attention, cache in (("sdpa", dense), ("halfbyte", packed)):
                model.set_attn_implementation(attention)
                model(step, past_key_values=cache, logits_to_keep=1)
            held = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in dense.layers)
            assert held / packed.nbytes >= 3.4


class MostBytes(LogitsProcessor):
    """Remembers the most bytes that a cache held at any step."""

    def __init__(self, cache):
        self.cache, self.most = cache, 0

    def __call__(self, input_ids, scores):
        self.most = max(self.most, self.cache.nbytes)
        return scores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "options"),
    [(4096, {"num_beams": 8}), (1024, {"do_sample": True, "num_return_sequences": 8})],
    ids=["beams", "return_sequences"],
)
def test_sequences_share_the_pages_of_their_prompt(prefix, options):
    model, sequences, new = load("tiny-qwen", "bfloat16"), 8, 32
    torch.set_num_threads(2)
    model.set_attn_implementation("halfbyte")
    ids = torch.randint(5, 4000, (1, prefix), generator=torch.Generator().manual_seed(0))
    one = Int4Cache(model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=one, logits_to_keep=1)
        model(ids[:, -1:], past_key_values=one)
    many = Int4Cache(model.config)
    counter = LogitsProcessorList([MostBytes(many)])
    options = {"do_sample": False, **options}
    model.generate(ids, past_key_values=many, max_new_tokens=new, logits_processor=counter, **options)
    assert many.layers[0].batch == sequences
    # What each sequence has of its own: its newest block and the one before, raw, and at most two pages.
    elements = sum(2 * layer.kv_heads * layer.head_dim_k for layer in one.layers)
    own = sequences * elements * (32 * 2 + 2 * 64 * 4.31 / 8)
    limit = 1.3 * one.nbytes + sequences * new * elements * 4.31 / 8 if prefix == 4096 else one.nbytes + own
    assert counter[0].most < limit, f"{counter[0].most} bytes against {one.nbytes} of one sequence"


def test_nbytes_counts_what_is_staged_and_what_the_library_holds():
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        hidden_size=64,
    )
    cache = Int4Cache(config)
    assert cache.nbytes == 0
    cache.layers[0].update_conv_state(torch.zeros(1, 8, 4))
    assert cache.nbytes >= 8 * 4 * 4
    before = cache.nbytes
    config._attn_implementation = "halfbyte"
    k = torch.randn(1, 1, 20, 32)
    cache.update(k, k, 1)
    assert cache.nbytes >= before + 2 * k.numel() * 4
