"""The diffusion prior's network in NumPy: the paper's equations, over the whole sequence."""

from __future__ import annotations

import math

import numpy as np

EPS = 1e-5


def norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    return scaled * weights[f"{name}.gamma"] + weights[f"{name}.beta"]


def rotate(x: np.ndarray, theta: float = 1e4, width: int = 32) -> np.ndarray:
    """Rotate pairs of neighbouring values of x (..., n, 64) as complex numbers."""
    positions = np.arange(x.shape[-2])[:, None]
    turns = np.exp(1j * positions * theta ** (-np.arange(0, width, 2) / width))
    pairs = (x[..., 0:width:2] + 1j * x[..., 1:width:2]) * turns
    out = x.copy()
    out[..., 0:width:2], out[..., 1:width:2] = pairs.real, pairs.imag
    return out


def bucket(distance: int) -> int:
    """Return T5's bucket for causal attention: 16 exact ones, then 16 up to a distance of 128."""
    if distance < 16:
        return max(distance, 0)
    return min(16 + int(math.log(distance / 16) / math.log(128 / 16) * 16), 31)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def transformer(
    weights: dict[str, np.ndarray],
    noisy: np.ndarray,
    timestep: int,
    text_embed: np.ndarray,
    text_encodings: np.ndarray,
    visible: np.ndarray,
) -> np.ndarray:
    """Predict x0 (D,) from one noisy embedding and one text.

    visible: booleans for the text's tokens and its embedding.
    """
    tokens = np.stack([
        *text_encodings, text_embed, weights["net.to_time_embeds.0.weight"][timestep], noisy,
        weights["net.learned_query"],
    ])  # fmt: skip
    count = len(tokens)
    table = weights["net.causal_transformer.rel_pos_bias.relative_attention_bias.weight"]
    bias = np.array([[table[bucket(i - j)] for j in range(count + 1)] for i in range(count)])
    visible_keys = np.concatenate([[True], visible, [True] * 3])  # the null key comes first
    causal = np.tril(np.ones((count, count + 1), bool), 1)
    hidden = ~(causal & visible_keys)
    depth = len({key.split(".")[3] for key in weights if ".layers." in key})
    for i in range(depth):
        name = f"net.causal_transformer.layers.{i}"
        x = norm(tokens, weights, f"{name}.0.norm")
        queries = (x @ weights[f"{name}.0.to_q.weight"].T).reshape(count, -1, 64).swapaxes(0, 1)
        keys, values = np.split(x @ weights[f"{name}.0.to_kv.weight"].T, 2, axis=-1)
        null_key, null_value = weights[f"{name}.0.null_kv"]
        keys = np.vstack([null_key, rotate(keys)])
        values = np.vstack([null_value, values])
        similarity = rotate(queries / 8) @ keys.T + bias.transpose(2, 0, 1)
        similarity[:, hidden] = -np.inf
        mixed = (softmax(similarity) @ values).swapaxes(0, 1).reshape(count, -1)
        tokens = tokens + norm(
            mixed @ weights[f"{name}.0.to_out.0.weight"].T, weights, f"{name}.0.to_out.1"
        )
        x = norm(tokens, weights, f"{name}.1.0") @ weights[f"{name}.1.1.weight"].T
        value, gate = np.split(x, 2, axis=-1)
        x = norm(value * gate / (1 + np.exp(-gate)), weights, f"{name}.1.3")
        tokens = tokens + x @ weights[f"{name}.1.5.weight"].T
    last = norm(tokens[-1], weights, "net.causal_transformer.norm")
    return last @ weights["net.causal_transformer.project_out.weight"].T
