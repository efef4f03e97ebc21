"""Model families and their config.json: Llama and the architectures that `ModelConfig` can express.

A setting in a config.json that no field of `ModelConfig` expresses is an error that names it, because the model that is
read must compute the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flm_jax.config import ModelConfig, RopeScaling
from flm_jax.convert import companions, multipliers
from flm_jax.convert.fold import MULTIPLIERS
from flm_jax.records import meant
from flm_jax.records.foreign_json import JsonError, check, parse_json

CONFIG = "config.json"
# Fields of `ModelConfig` that only some families have.
SPECIAL = ("qkv_bias", "qk_norm", "sliding_window", *MULTIPLIERS)


@dataclass(frozen=True)
class Family:
    """One architecture of a config.json.

    Attributes:
      architecture: the name of its model class, as in `architectures`.
      model_type: its `model_type`.
      allows: the fields of `SPECIAL` that its models may have.
      always: the fields of `SPECIAL` that all of its models have.
      divides: whether the width must be a multiple of the number of heads, even if `head_dim` is given.
      defaults: values of settings that a config.json leaves out.
    """

    architecture: str
    model_type: str
    allows: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()
    divides: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()

    @property
    def multipliers(self) -> frozenset[str]:
        """The multipliers that a config.json of this family has, so that they need not be folded into weights."""
        return self.allows & frozenset(MULTIPLIERS)

    def against(self, cfg: ModelConfig) -> list[str]:
        """The reasons, as text, why this family cannot express a model; empty if it can."""
        special = [name for name in SPECIAL if getattr(cfg, name) != _PLAIN[name] and name not in self.allows]
        lacking = [name for name in sorted(self.always) if not getattr(cfg, name)]
        found = [f"{name}={getattr(cfg, name)!r}" for name in (*special, *lacking)]
        if self.divides and cfg.embed % cfg.heads:
            found.append(f"a width of {cfg.embed} that is not a multiple of its {cfg.heads} heads")
        return found


_PLAIN = {field.name: field.default for field in fields(ModelConfig)}
_WINDOW = frozenset({"sliding_window"})
_QWEN = (("sliding_window", 4096),)
FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", divides=True),
        Family("MistralForCausalLM", "mistral", _WINDOW, defaults=(("sliding_window", 4096),)),
        Family("Qwen2ForCausalLM", "qwen2", _WINDOW | {"qkv_bias"}, frozenset({"qkv_bias"}), defaults=_QWEN),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            _WINDOW | {"qk_norm"},
            frozenset({"qk_norm"}),
            defaults=(("head_dim", 128), *_QWEN),
        ),
        Family("GraniteForCausalLM", "granite", frozenset(MULTIPLIERS)),
        Family("TeleFLMForCausalLM", "TeleFLM", frozenset({"input_mult", "output_mult"})),
    )
}
TELE_FLM = FAMILIES["TeleFLMForCausalLM"]
GRANITE = FAMILIES["GraniteForCausalLM"]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: the file does not exist, cannot be read, or holds another JSON value; or it is a link that leads out
        of its directory.
    """
    try:
        return dict(parse_json(companions.read(path), "it"))
    except FileNotFoundError:
        raise ValueError(f"There is no {path.name} in {path.parent}: it must be beside the weights.") from None
    except (JsonError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def architectures(config: Mapping[str, Any], where: str) -> list[str]:
    """The names of model classes in a config.json.

    Raises:
      ValueError: they are not a list of names.
    """
    named = config.get("architectures") or []
    named = [named] if isinstance(named, str) else check(named, list, f"{where}: architectures")
    return [check(name, str, f"{where}: an entry of architectures") for name in named]


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
      ValueError: its architecture is not in `FAMILIES`.
    """
    named = architectures(config, where)
    for name in named:
        if name in FAMILIES:
            return FAMILIES[name]
    code = " Code that comes with a model (auto_map) is never run." if "auto_map" in config else ""
    raise ValueError(
        f"{where} names {', '.join(named) or 'nothing'} as its architecture; supported are {', '.join(FAMILIES)}.{code}"
    )


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The configuration of the model that a config.json describes; `param_dtype` is left at its default.

    The base width is the model's own width, so its muP multipliers are 1, and a later growth scales initialisation and
    learning rates from this width. Tele-FLM's models keep the base width and the multipliers of their config.json,
    Granite's the multipliers.

    Args:
      config: the object in the file.
      where: the name of the file, for error messages.

    Raises:
      ValueError: a setting is missing, unknown or not supported; the message names it.
    """
    family = family_of(config, where)
    given = {**dict(family.defaults), **config}

    def size(name: str, default: int | None = None) -> int:
        value = given.get(name)
        value = default if value is None else value
        # The tensors are counted in 32 bits along each axis.
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise ValueError(f"{where}: {name} is {value!r:.80}; it must be a positive integer.")
        return value

    def number(name: str, default: float, within: Mapping[str, Any] = given) -> float:
        value = within.get(name)
        return _number(default if value is None else value, name, where)

    def flag(name: str) -> bool:
        return bool(check(given.get(name) or False, bool, f"{where}: {name}"))

    _refuse(given, where)
    size("max_position_embeddings", 1)
    rope = _rope(given, where)
    embed, heads, layers = size("hidden_size"), size("num_attention_heads"), size("num_hidden_layers")
    std = number("initializer_range", 0.02)
    head_dim = size("head_dim", embed // heads)
    mults: dict[str, Any] = dict(base_width=embed)
    if family is TELE_FLM and flag("use_mup"):
        mults = multipliers.of_tele_flm(embed, number)
    if family is GRANITE:
        mults = multipliers.of_granite(embed, head_dim, number)
    try:
        return ModelConfig(
            embed=embed,
            layers=layers,
            heads=heads,
            mlp=size("intermediate_size"),
            vocab=size("vocab_size"),
            kv_heads=size("num_key_value_heads", heads),
            head_dim=head_dim,
            tied=flag("tie_word_embeddings"),
            norm_eps=number("rms_norm_eps", 1e-6),
            rope_theta=number("rope_theta", number("rope_theta", 10_000.0), rope),
            qkv_bias="qkv_bias" in family.always,
            qk_norm="qk_norm" in family.always,
            sliding_window=size("sliding_window") if _slides(given, family, layers, where) else None,
            rope_scaling=_rope_scaling(rope, where),
            init_std=std,
            init_std_vector=std,
            **mults,
        )
    except ValueError as error:
        raise ValueError(error if str(error).startswith(where) else f"{where}: {error}") from error


def _number(value: Any, name: str, where: str) -> float:
    """A positive number of a config.json, which is neither infinite nor an integer too large for a float."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
        raise ValueError(f"{where}: {name} is {value!r:.80}; it must be a positive number.")
    return float(value)


def _refuse(config: Mapping[str, Any], where: str) -> None:
    """Refuses settings that change the function and that `ModelConfig` does not have.

    Raises:
      ValueError: one is given; the message names it.
    """
    for name, plain in (
        ("attention_bias", (False, None)),
        ("mlp_bias", (False, None)),
        ("hidden_act", ("silu", None)),
        ("partial_rotary_factor", (1.0, 1, None)),
        ("quantization_config", (None,)),
        ("clip_qkv", (None,)),
        ("use_mrope", (False, None)),
    ):
        if config.get(name) not in plain:
            found = config[name].get("quant_method") if isinstance(config[name], dict) else config[name]
            right = "absent" if plain[0] is None else f"{plain[0]!r} or absent"
            raise ValueError(f"{where}: {name} is {found!r}, which is not supported; it must be {right}.")


def _rope(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The settings of the rotary frequencies, under the older or the newer name; empty if there are none.

    Raises:
      ValueError: they are not one object of numbers, or the two names disagree.
    """
    given = [config[name] for name in ("rope_scaling", "rope_parameters") if config.get(name) is not None]
    for found in given:
        if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
            raise ValueError(
                f"{where}: rotary frequencies are given as {found!r:.80}; they must be one object of numbers."
            )
        if found.get("partial_rotary_factor", 1.0) != 1:
            raise ValueError(f"{where}: partial_rotary_factor is {found['partial_rotary_factor']!r}; it must be 1.")
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(f"{where}: rope_scaling and rope_parameters differ; keep one of them.")
    return given[0] if given else {}


def _rope_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{where}: rotary frequencies are scaled by {kind!r}; only 'llama3' is supported.")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [name for name in names if rope.get(name) is None]:
        raise ValueError(f"{where}: the scaling of rotary frequencies lacks {', '.join(missing)}.")
    factor, low, high, original = (_number(rope[name], name, where) for name in names)
    return RopeScaling(factor, low, high, int(original))


def _slides(config: Mapping[str, Any], family: Family, layers: int, where: str) -> bool:
    """Whether all layers have a sliding window; False: none has.

    Raises:
      ValueError: some have.
    """
    if "sliding_window" not in family.allows or config.get("sliding_window") is None:
        return False
    kinds = check(config.get("layer_types") or [], list, f"{where}: layer_types")
    found = {check(kind, str, f"{where}: an entry of layer_types") for kind in kinds}
    if family.model_type != "mistral":
        if not check(config.get("use_sliding_window") or False, bool, f"{where}: use_sliding_window"):
            return False
        first = config.get("max_window_layers")
        first = check(28 if first is None else first, int, f"{where}: max_window_layers")
        if not found:
            found = {"full_attention"} if first > 0 else set()
            found |= {"sliding_attention"} if first < layers else set()
    found = found or {"sliding_attention"}
    if found == {"full_attention"}:
        return False
    if found != {"sliding_attention"}:
        raise ValueError(
            f"{where}: layers have different kinds of attention ({', '.join(sorted(found))}); only one sliding window "
            "for all layers, or none, is supported."
        )
    return True


def choose(cfg: ModelConfig, asked: str | None, before: Mapping[str, Any]) -> Family:
    """The family to write a model as: the one asked for, else the one it was read as, else the first that fits.

    Args:
      cfg: the model, with kept widths folded, and multipliers too unless they are written as Tele-FLM's.
      asked: an architecture; None: any.
      before: the config.json that the model was read with; empty: none.

    Raises:
      ValueError: no family can express the model; the message says why.
    """
    came = [name for name in architectures(before, "its config.json") if name in FAMILIES]
    plain = [family.architecture for family in FAMILIES.values() if family is not TELE_FLM]
    reasons = []
    for name in [asked] if asked else [*came, *plain]:
        if name not in FAMILIES:
            near = meant(name, FAMILIES) or "."
            raise ValueError(f"The architecture {name!r} is not known; use one of {', '.join(FAMILIES)}{near}")
        if not (against := FAMILIES[name].against(cfg)):
            return FAMILIES[name]
        reasons.append(f"{name} cannot hold a model with {', '.join(against)}")
    raise ValueError("; ".join(reasons) + ".")


def config_json(
    cfg: ModelConfig, family: Family, dtype: str, context: int | None, before: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of a model.

    Args:
      cfg: the model, folded.
      family: the family to write it as.
      dtype: of the weights.
      context: the context that it was trained on, if known; the larger of this and that of `before` is written.
      before: the config.json that the model was read with; settings that do not change the function are taken over, for
        example token ids.
    """
    stale: tuple[str, ...] = ("rope_parameters", "rope_scaling", "layer_types", "dtype", "auto_map")
    stale += (*multipliers.SETTINGS, "max_window_layers", "use_sliding_window", "sliding_window")
    config = {name: value for name, value in before.items() if name not in stale}
    said = check(config.get("max_position_embeddings") or 0, int, "its config.json: max_position_embeddings")
    config["max_position_embeddings"] = max(said, context or 0) or 4096
    config |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": cfg.embed,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.k_heads,
        "head_dim": cfg.h_dim,
        "intermediate_size": cfg.mlp,
        "vocab_size": cfg.vocab,
        "tie_word_embeddings": cfg.tied,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "torch_dtype": dtype,
    }
    if cfg.rope_scaling is not None:
        s = cfg.rope_scaling
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_context,
        }
    if "sliding_window" in family.allows:
        config["sliding_window"] = cfg.sliding_window
        if family.model_type != "mistral":
            config |= {"use_sliding_window": cfg.sliding_window is not None, "max_window_layers": 0}
    if family is TELE_FLM:
        config |= multipliers.to_tele_flm(cfg)
    if family is GRANITE:
        config |= multipliers.to_granite(cfg, before)
    return config
