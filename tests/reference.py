"""The decoder once more, in plain NumPy and loops where the model has einsums: what tests compare it with."""

import numpy as np


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def frequency(i, dim, theta, scaling):
    """Of pair i; scaled as Llama 3.1 does it: by wavelength, in positions."""
    plain = theta ** (-2 * i / dim)
    if scaling is None:
        return plain
    wavelength = 2 * np.pi / plain
    shortest_slow = scaling.original_context / scaling.low_freq_factor
    longest_fast = scaling.original_context / scaling.high_freq_factor
    if wavelength > shortest_slow:
        return plain / scaling.factor
    if wavelength < longest_fast:
        return plain
    smooth = scaling.original_context / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def rope(x, cfg):
    """x: (time, head_dim), half-split pairs (i, i + H/2), one position at a time."""
    time, dim = x.shape
    out = np.empty_like(x)
    for t in range(time):
        for i in range(dim // 2):
            angle = t * frequency(i, dim, cfg.rope_theta, cfg.rope_scaling)
            a, b = x[t, i], x[t, i + dim // 2]
            out[t, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, i + dim // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def forward(cfg, params, tokens, segments=None):
    """Logits (time, vocab) of one row of token ids, in float64."""
    p = {k: np.asarray(v, np.float64) for k, v in _flat(params).items()}
    segments = np.zeros(len(tokens), int) if segments is None else segments
    x = p["embedding"][tokens] * cfg.input_mult
    group = cfg.heads // cfg.kv_heads
    residual = cfg.residual_mult * (cfg.base_layers / cfg.layers if cfg.base_layers and cfg.layers else 1)
    for layer in range(cfg.layers):
        w = {k.removeprefix("blocks/"): v[layer] for k, v in p.items() if k.startswith("blocks/")}
        y = rms_norm(x, w["attention_norm/scale"], cfg.norm_eps)
        attended = np.zeros_like(x)
        for head in range(cfg.heads):
            q, k, v = (
                y @ w[f"attention/{name}"][:, which] + (w[f"attention/{name}_bias"][which] if cfg.qkv_bias else 0)
                for name, which in (("query", head), ("key", head // group), ("value", head // group))
            )
            if cfg.qk_norm:
                q = rms_norm(q, w["attention/query_norm/scale"], cfg.norm_eps)
                k = rms_norm(k, w["attention/key_norm/scale"], cfg.norm_eps)
            q, k = rope(q, cfg), rope(k, cfg)
            for t in range(len(tokens)):
                first = 0 if cfg.sliding_window is None else max(t - cfg.sliding_window + 1, 0)
                seen = [s for s in range(first, t + 1) if segments[s] == segments[t]]
                weights = softmax(np.array([q[t] @ k[s] for s in seen]) * cfg.attention_mult / np.sqrt(cfg.head_dim))
                attended[t] += sum(a * v[s] for a, s in zip(weights, seen, strict=True)) @ w["attention/out"][head]
        x = x + attended * residual
        y = rms_norm(x, w["mlp_norm/scale"], cfg.norm_eps)
        gate = y @ w["mlp/gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp/up"])) @ w["mlp/down"] * residual
    x = rms_norm(x, p["final_norm/scale"], cfg.norm_eps)
    head = p["embedding"].T if cfg.tied else p["head"]
    return x @ head * cfg.output_mult * cfg.base_width / cfg.embed


def _flat(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}/") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return flat
