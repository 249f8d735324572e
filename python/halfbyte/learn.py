"""Learns rotations and lambda on a model's keys and values: Adam through the quantiser, a layer and side at a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from .calibrate import RECIPE_FIELDS, Calibration, fingerprint, hash_ids, turning_offset
from .codecs import extreme, join_groups, rotate, split_groups
from .files import read_safetensors
from .recipes import Recipe, fields_of, get_recipe
from .watch import watch_attention

KINDS = ("lambda", "cayley", "householder")
LOSSES = ("mse", "attention")
BASES = ("srft", "identity")
VECTORS = 4096  # kept of each layer, side and head
BATCH = 256  # of them a step, for each head


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is learned: y = diag(lambda) R B (x - mu), with the base rotation B fixed and R starting from the identity.

    kind: "lambda" alone, or R as "cayley" (expm of a skew matrix) or "householder" (`reflectors` of them, 0: half the
    head), with lambda. loss: "mse" of K and V, as in arXiv 2605.05699, or "attention": the squared error of scores over
    the model's own queries for K, of the layer's output for V.
    """

    kind: str = "cayley"
    loss: str = "attention"
    base: str = "srft"
    reflectors: int = 0
    steps: int = 200
    seed: int = 0

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("loss", LOSSES), ("base", BASES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; takes one of {', '.join(known)}")
        for name, least in (("steps", 1), ("reflectors", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; takes at least {least}")


class _Samples:
    """Of one layer: K and V [heads, vectors, head_dim], and the second moments of the queries that read K."""

    def __init__(self):
        self.parts = {"k": [], "v": []}
        self.query_moment = 0.0

    def add(self, query, key, value):
        for which, x in (("k", key), ("v", value)):
            self.parts[which].append(x[0].float())
        groups = query[0].float().reshape(key.shape[1], -1, key.shape[-1])
        self.query_moment = self.query_moment + groups.mT @ groups

    def mean(self, which, offset, layer):
        """[heads, head_dim]; with a Turning `offset`, of vectors turned back."""
        parts = self.parts[which] if offset is None else [offset.back(x, layer) for x in self.parts[which]]
        return torch.cat(parts, 1).mean(1)

    def less(self, mean, which, offset, layer):
        """All vectors less their offset, [heads, vectors, head_dim]."""
        parts = self.parts[which]
        if offset is None:
            return torch.cat(parts, 1) - mean[:, None]
        return torch.cat([x - offset.forth(mean, layer, x.shape[1]) for x in parts], 1)


def collect(model, ids, window: int, progress: bool) -> dict[int, _Samples]:
    """What every layer's attention is given on `ids` [tokens], `window` at a time."""
    from tqdm import tqdm

    samples: dict[int, _Samples] = {}

    def observe(layer, query, key, value):
        samples.setdefault(layer, _Samples()).add(query, key, value)
        return key, value

    with torch.no_grad(), watch_attention(model, observe):
        starts = range(0, ids.numel(), window)
        for start in tqdm(starts, desc="collect", unit="window", disable=not progress, leave=False):
            model(ids[None, start : start + window], use_cache=False, logits_to_keep=1)
    return samples


def output_moments(model, layer: int, heads: int) -> torch.Tensor:
    """W^T W of the output projection's columns for each KV head, summed over the query heads that share it."""
    attention = next(m for m in model.modules() if hasattr(m, "o_proj") and getattr(m, "layer_idx", None) == layer)
    weight = attention.o_proj.weight.detach().float()
    by_head = weight.unflatten(1, (heads, -1, attention.head_dim))  # [hidden, heads, queries, head_dim]
    return torch.einsum("ohqc,ohqd->hcd", by_head, by_head)


def rounded(y: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """y with its groups on codes of signed scales; gradients pass the rounding as if it were not there."""
    groups = split_groups(y, group)
    half = 2 ** (bits - 1)
    scale = -extreme(groups) / half
    scale = torch.where(scale.abs() < 1e-9, 1e-9, scale)
    code = (groups / scale).clamp(-half, half - 1)
    return join_groups((code + (code.round() - code).detach()) * scale, y.shape[-1])


class _Learner(torch.nn.Module):
    def __init__(self, plan: Plan, heads: int, head_dim: int):
        super().__init__()
        self.plan = plan
        generator = torch.Generator().manual_seed(plan.seed)
        self.log_lambda = torch.nn.Parameter(torch.zeros(heads, head_dim))
        if plan.kind == "cayley":
            self.free = torch.nn.Parameter(1e-3 * torch.randn(head_dim, head_dim, generator=generator))
        elif plan.kind == "householder":
            count = plan.reflectors or head_dim // 2
            # In pairs of equal vectors, whose reflections undo each other: the product starts near the identity.
            pairs = torch.randn(-(-count // 2), head_dim, generator=generator).repeat_interleave(2, 0)[: count // 2 * 2]
            self.free = torch.nn.Parameter(pairs + 1e-3 * torch.randn(pairs.shape, generator=generator))

    def groups(self) -> list[dict]:
        """For Adam. A reflector's entries are of size 1, those of a skew matrix start at 0 and turn as they grow."""
        groups = [{"params": [self.log_lambda], "lr": 1e-2}]
        if self.plan.kind != "lambda":
            groups.append({"params": [self.free], "lr": 5e-3 if self.plan.kind == "cayley" else 5e-2})
        return groups

    def rotation(self) -> torch.Tensor | None:
        if self.plan.kind == "lambda":
            return None
        if self.plan.kind == "cayley":
            return torch.linalg.matrix_exp(self.free - self.free.mT)
        product = torch.eye(self.free.shape[1])
        for vector in torch.nn.functional.normalize(self.free, dim=1):
            product = product - 2 * torch.outer(vector, vector @ product)
        return product

    def forward(self, z, bits: int, group: int):
        """z [heads, vectors, head_dim] in the base's domain, coded and decoded."""
        matrix, factors = self.rotation(), self.log_lambda.exp()[:, None]
        y = z if matrix is None else z @ matrix.mT
        y = rounded(y * factors, bits, group) / factors
        return y if matrix is None else y @ matrix


def fit(plan: Plan, z, moment, bits: int, group: int, tick) -> tuple[torch.Tensor | None, torch.Tensor, list[float]]:
    """(R or None, lambda [heads, head_dim], loss before and after).

    z: [heads, vectors, head_dim] in the base's domain; moment: [heads, head_dim, head_dim], how much an error in each
    direction matters, or None for all alike; tick() is called once a step.
    """
    heads, vectors, head_dim = z.shape
    learner = _Learner(plan, heads, head_dim)
    generator = torch.Generator().manual_seed(plan.seed)
    z = z[:, torch.randperm(vectors, generator=generator)[:VECTORS]]
    held, train = z[:, : z.shape[1] // 4], z[:, z.shape[1] // 4 :]

    def loss_of(batch):
        error = learner(batch, bits, group) - batch
        weighed = error if moment is None else error @ moment
        return (weighed * error).mean() / scale

    scale = 1.0
    with torch.no_grad():
        weighed = held if moment is None else held @ moment
        scale = (weighed * held).mean().clamp_min(1e-12)
        before = loss_of(held).item()
    optimiser = torch.optim.Adam(learner.groups())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, plan.steps)
    for _ in range(plan.steps):
        rows = torch.randint(train.shape[1], (BATCH,), generator=generator)
        loss = loss_of(train[:, rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        tick()
    with torch.no_grad():
        after = loss_of(held).item()
        matrix, factors = learner.rotation(), learner.log_lambda.exp()
    if after >= before:  # nothing gained: leave things as they were
        matrix = None if matrix is None else torch.eye(head_dim)
        return matrix, torch.ones_like(factors), [before, before]
    return matrix, factors, [before, after]


def learned_recipe(recipe: str | Recipe, plan: Plan) -> Recipe:
    """The recipe that runs what `plan` learns on top of `recipe`."""
    if plan.kind == "lambda":
        return get_recipe(recipe, lambda_=True, rotation=plan.base)
    return get_recipe(recipe, lambda_=True, rotation="dense")


def learn(
    model,
    ids,
    recipe="default",
    plan: Plan | None = None,
    window: int = 2048,
    progress=True,
    resume=None,
    offsets: bool = False,
):
    """A Calibration for learned_recipe(recipe, plan): lambda, and R for both sides of every layer.

    ids: token ids [tokens]. resume: a file that finished layers are kept in and found again; it is deleted at the end.
    offsets: whether it gives offsets too, for what was learned; caches lose less with the mean of their own prompt.
    The same plan, text, dtype and thread count give the same result, interrupted or not.
    """
    from tqdm import tqdm

    plan = plan or Plan()
    recipe = get_recipe(recipe)
    ids = torch.as_tensor(ids).reshape(-1)
    if ids.numel() < 512:
        raise ValueError(f"input_ids: got {ids.numel()} tokens; learning takes at least 512")
    facts = {"plan": dataclasses.asdict(plan), "model": fingerprint(model), "text": hash_ids(ids)}
    done = _Progress(resume, facts)
    samples = collect(model, ids, window, progress)
    bar = tqdm(total=2 * len(samples) * plan.steps, desc="learn", unit="step", disable=not progress, leave=False)
    for layer, seen in sorted(samples.items()):
        for which in ("k", "v"):
            if (layer, which) not in done:
                done.add(layer, which, _learn_side(model, recipe, plan, layer, which, seen, bar.update))
            else:
                bar.update(plan.steps)
    bar.close()
    final = learned_recipe(recipe, plan)
    names = ["lambda", *["offset"] * offsets, *["rotation"] * (final.rotation == "dense")]
    parts = done.parts(sorted(samples), names)
    calibration = Calibration(
        **parts,
        recipe={name: getattr(final, name) for name in RECIPE_FIELDS},
        model=facts["model"],
        text_sha256=facts["text"],
        tokens=ids.numel(),
        learned=facts["plan"] | {"losses": done.losses, "recipe": fields_of(final)},
    )
    done.close()
    return calibration


def _learn_side(model, recipe, plan, layer, which, seen, tick):
    offset = turning_offset(model, recipe) if which == "k" else None
    mean = seen.mean(which, offset, layer)
    heads, head_dim = mean.shape
    base = Recipe(rotation=plan.base, seed=recipe.seed)
    matrix = rotate(torch.eye(head_dim), base, layer).mT  # B: rotate() turned the rows of the identity
    z = seen.less(mean if recipe.offset else torch.zeros_like(mean), which, offset, layer) @ matrix.mT
    moment = None
    if plan.loss == "attention":
        moment = seen.query_moment if which == "k" else output_moments(model, layer, heads)
        moment = matrix @ moment @ matrix.mT
    bits, group = (recipe.k_bits, recipe.k_group) if which == "k" else (recipe.v_bits, recipe.v_group)
    learned, factors, losses = fit(plan, z, moment, bits, group, tick)
    tensors = {"offset": mean, "lambda": factors}
    if learned is not None:
        tensors["rotation"] = learned @ matrix
    return tensors, losses


class _Progress:
    """Finished layers and sides, kept in a file between runs if there is one."""

    def __init__(self, path, facts):
        self.path, self.facts = None if path is None else Path(path), facts
        self.tensors, self.losses = {}, {}
        if self.path is not None and self.path.is_file():
            tensors, metadata = read_safetensors(self.path, "progress")
            kept = json.loads(metadata.get("halfbyte-learning", "{}"))
            if kept.get("facts") == facts:
                self.tensors, self.losses = tensors, kept["losses"]

    def __contains__(self, place):
        return f"{place[0]}.{place[1]}" in self.losses

    def add(self, layer, which, found):
        from safetensors.torch import save_file

        tensors, self.losses[f"{layer}.{which}"] = found
        self.tensors |= {f"{layer}.{which}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        if self.path is not None:
            partial = self.path.with_name(self.path.name + ".partial")
            kept = json.dumps({"facts": self.facts, "losses": self.losses})
            save_file(self.tensors, str(partial), {"halfbyte-learning": kept})
            partial.replace(self.path)

    def parts(self, layers, names):
        return {
            f"{name}_{which}": [self.tensors[f"{layer}.{which}.{name}"].clone() for layer in layers]
            for name in names
            for which in ("k", "v")
        }

    def close(self):
        if self.path is not None:
            self.path.unlink(missing_ok=True)
