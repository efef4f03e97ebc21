"""The decoder once more, in plain NumPy and loops where the model has einsums: what tests compare it with."""

import numpy as np


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rope(x, theta):
    """x: (time, head_dim), half-split pairs (i, i + H/2), one position at a time."""
    time, dim = x.shape
    out = np.empty_like(x)
    for t in range(time):
        for i in range(dim // 2):
            angle = t * theta ** (-2 * i / dim)
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
    for layer in range(cfg.layers):
        w = {k.removeprefix("blocks/"): v[layer] for k, v in p.items() if k.startswith("blocks/")}
        y = rms_norm(x, w["attention_norm/scale"], cfg.norm_eps)
        attended = np.zeros_like(x)
        for head in range(cfg.heads):
            q = rope(y @ w["attention/query"][:, head], cfg.rope_theta)
            k = rope(y @ w["attention/key"][:, head // group], cfg.rope_theta)
            v = y @ w["attention/value"][:, head // group]
            for t in range(len(tokens)):
                seen = [s for s in range(t + 1) if segments[s] == segments[t]]
                weights = softmax(np.array([q[t] @ k[s] for s in seen]) / np.sqrt(cfg.head_dim))
                attended[t] += sum(a * v[s] for a, s in zip(weights, seen, strict=True)) @ w["attention/out"][head]
        x = x + attended
        y = rms_norm(x, w["mlp_norm/scale"], cfg.norm_eps)
        gate = y @ w["mlp/gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp/up"])) @ w["mlp/down"]
    x = rms_norm(x, p["final_norm/scale"], cfg.norm_eps)
    head = p["embedding"].T if cfg.tied else p["head"]
    return x @ head * cfg.output_mult * cfg.base_width / cfg.embed


def _flat(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}/") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return flat
