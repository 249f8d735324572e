"""Named recipes: what each does to K and V before, while and after packing."""

from __future__ import annotations

from halfbyte._native import Recipe

# The paper's codec: symmetric codes within ±7, float32 scales, no offset, no search (arXiv 2605.05699).
_PAPER = {"offset": False, "search": False, "signed_scale": False, "scale_bits": 32}

# Models park attention on the first tokens, where an error costs most (docs/decisions/attention-sinks.md).
_SINKS = {"sink_tokens": 16}

RECIPES: dict[str, Recipe] = {
    "default": Recipe(**_SINKS),
    "no-sinks": Recipe(),
    "no-offset": Recipe(offset=False, **_SINKS),
    "fixed-offset": Recipe(offset_span=0, **_SINKS),
    "turning": Recipe(offset_span=16, **_SINKS),
    "turning-g32": Recipe(k_group=32, v_group=32, offset_span=16, **_SINKS),
    "turning-vector": Recipe(k_group=0, v_group=0, offset_span=16, **_SINKS),
    "paper-per-token": Recipe(k_group=0, v_group=0, **_PAPER),
    "paper-g32": Recipe(k_group=32, v_group=32, **_PAPER),
    "paper-g32-lambda": Recipe(k_group=32, v_group=32, lambda_=True, **_PAPER),
    "g32": Recipe(k_group=32, v_group=32, **_SINKS),
    "vector": Recipe(k_group=0, v_group=0, **_SINKS),
    "g16": Recipe(k_group=16, v_group=16, **_SINKS),
    "k8v4": Recipe(k_bits=8, v_bits=4, **_SINKS),
    # No code at all: what is wrong with it is bookkeeping, not rounding.
    "passthrough": Recipe(k_bits=32, v_bits=32, rotation="identity", offset=False),
}

FIELDS = (
    "rotation",
    "seed",
    "offset",
    "k_bits",
    "v_bits",
    "k_group",
    "v_group",
    "scale_bits",
    "search",
    "signed_scale",
    "lambda_",
    "sink_tokens",
    "raw_window",
    "offset_tokens",
    "offset_span",
)


def fields_of(recipe: Recipe) -> dict:
    """{field: value} of a recipe, as its constructor takes them."""
    return {field: getattr(recipe, field) for field in FIELDS}


def _from_fields(fields: dict) -> Recipe:
    return Recipe(**fields)


# A recipe is its fields: printed, compared, copied and pickled by them.
Recipe.__repr__ = lambda self: f"Recipe({', '.join(f'{name}={value!r}' for name, value in fields_of(self).items())})"
Recipe.__eq__ = lambda self, other: fields_of(self) == fields_of(other) if isinstance(other, Recipe) else NotImplemented
Recipe.__hash__ = lambda self: hash(tuple(fields_of(self).values()))
Recipe.__reduce__ = lambda self: (_from_fields, (fields_of(self),))


def get_recipe(recipe: str | Recipe, **overrides) -> Recipe:
    """A recipe by name, or one given, with some of its fields replaced.

    Args:
        recipe: a key of ``RECIPES``, or a ``Recipe``.
        overrides: fields of ``Recipe`` to set anew, e.g. ``sink_tokens=16``.

    Raises:
        ValueError: an unknown name or field (the text lists those there are), or a value out of range.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(
                f"recipe is {recipe!r}; it takes one that has kernels ({', '.join(RECIPES)}), or a halfbyte.Recipe; "
                "any other is simulated, by `halfbyte eval` alone"
            )
        recipe = RECIPES[recipe]
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe is a {type(recipe).__name__}; it takes a name or a halfbyte.Recipe")
    unknown = sorted(set(overrides) - set(FIELDS))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no field of a recipe; these are: {', '.join(FIELDS)}")
    if not overrides:
        return recipe
    try:
        return Recipe(**(fields_of(recipe) | overrides))
    except TypeError:
        got = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
        raise ValueError(f"recipe: got {got}; numbers are ints (seed from 0 on), switches True or False") from None


def needs_calibration(recipe: Recipe) -> str | None:
    """What of a recipe a cache can not find by itself, or None."""
    return "lambda" if recipe.lambda_ else "a dense rotation" if recipe.rotation == "dense" else None


def layer_recipes(base: Recipe, layers: dict | None, count: int) -> list[Recipe]:
    """The recipe of each of `count` layers.

    Args:
        base: of every layer that is not named.
        layers: {layer: a name, a ``Recipe``, or a dict of fields that replace the base's}; -1 is the last layer.

    Raises:
        ValueError: a layer that is not there, or what ``get_recipe`` raises for.
    """
    recipes = [base] * count
    if layers is not None and not isinstance(layers, dict):
        raise ValueError(f"layers: got a {type(layers).__name__}; takes a dict such as {{0: 'k8v4', -1: 'g32'}}")
    for layer, own in (layers or {}).items():
        if not isinstance(layer, int) or not -count <= layer < count:
            raise ValueError(f"layers: got layer {layer!r}; takes {-count} to {count - 1}")
        try:
            recipes[layer] = get_recipe(base, **own) if isinstance(own, dict) else get_recipe(own)
        except ValueError as error:
            raise ValueError(f"layers: layer {layer}: {error}") from None
    return recipes


def bits_per_value(recipe: Recipe, head_dim: int) -> float:
    """Bits a value of K and V takes, scales included: mean of both sides, for heads of `head_dim` channels."""

    def side(bits: int, group: int) -> float:
        return 32 if bits == 32 else bits + recipe.scale_bits / (group or head_dim)

    return (side(recipe.k_bits, recipe.k_group) + side(recipe.v_bits, recipe.v_group)) / 2
