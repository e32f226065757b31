"""The diffusion prior of DALL-E 2, which predicts a CLIP image embedding from a noisy one and a text.

Ramesh et al., 2022, arXiv 2204.06125, section 2.2; the network is the one of dalle2-pytorch 0.15.4,
whose checkpoints are read by their own keys. A causal transformer sees the tokens

    text encodings (one for each token of the prompt) | text embedding | time | noisy image | query

and the last one's output is the predicted embedding x0. The tokens of the text see nothing behind
them. So what they leave for the other three, a key and a value in each layer, is computed once for a
text (`context`), and not again for each image, timestep and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.errors import ModelError

HEAD = 64  # width of a head; the queries of all heads share one key and one value
ROTATED = 32  # of them, by the token's position
THETA = 1e4
BUCKETS, MAX_DISTANCE = 32, 128  # of the relative position bias (Raffel et al., JMLR 2020)
EXPANSION = 4  # of the feed-forward layers
EPS = 1e-5
COSINE_OFFSET, MAX_BETA = 0.008, 0.999  # of the noise schedule
SUFFIX = 3  # tokens behind the text: time, noisy image, query


@dataclass(frozen=True)
class Shape:
    """The sizes of a network."""

    dim: int  # of the embeddings, and of every token
    depth: int
    heads: int
    timesteps: int = 1000


class Context(NamedTuple):
    """What T texts of n tokens leave for the tokens behind them; T is 1 for one text for all."""

    memory: Tensor  # (depth, 2, T, n, HEAD): keys and values
    mask: Tensor  # (T, n) booleans: which of the tokens may be seen


class Norm(nn.Module):
    """Layer normalisation; as in dalle2-pytorch beta is not trained."""

    beta: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta, EPS)


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class Rotary(nn.Module):
    """Rotates pairs of neighbouring values by angles that grow with the position (arXiv 2104.09864)."""

    def __init__(self) -> None:
        super().__init__()
        exponents = torch.arange(0, ROTATED, 2, dtype=torch.float64) / ROTATED
        self.freqs = nn.Parameter((THETA**-exponents).float(), requires_grad=False)

    def forward(self, x: Tensor, first: int) -> Tensor:
        """x: (..., n, HEAD), of the tokens from position `first` on."""
        places = torch.arange(first, first + x.shape[-2], device=x.device)
        angles = places[:, None] * self.freqs
        cosine, sine = angles.cos(), angles.sin()
        turned, rest = x[..., :ROTATED], x[..., ROTATED:]
        even, odd = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
        return torch.cat([pairs.flatten(-2), rest], dim=-1)


class Attention(nn.Module):
    """Causal attention to one shared key and value per token, and to one that is always there."""

    def __init__(self, shape: Shape, rotary: Rotary) -> None:
        super().__init__()
        self.heads, inner = shape.heads, shape.heads * HEAD
        self.norm = Norm(shape.dim)
        self.null_kv = nn.Parameter(torch.randn(2, HEAD))
        self.to_q = nn.Linear(shape.dim, inner, bias=False)
        self.to_kv = nn.Linear(shape.dim, 2 * HEAD, bias=False)
        self.rotary_emb = rotary
        self.to_out = nn.Sequential(nn.Linear(inner, shape.dim, bias=False), Norm(shape.dim))

    def forward(
        self, x: Tensor, bias: Tensor, seen: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (B, n, D) with m tokens before it, whose memory is `before` (2, T, m, HEAD).

        bias (heads, n, 1 + m + n), seen (B or T, n, 1 + m + n). Returns what is added to x, and the
        memory (2, B, n, HEAD) of these n tokens.
        """
        first = 0 if before is None else before.shape[2]
        x = self.norm(x)
        count, length, _ = x.shape
        queries = self.to_q(x).view(count, length, self.heads, HEAD).transpose(1, 2) * HEAD**-0.5
        queries = self.rotary_emb(queries, first)
        keys, values = self.to_kv(x).chunk(2, dim=-1)
        memory = torch.stack([self.rotary_emb(keys, first), values])
        null = self.null_kv[:, None, None].expand(2, count, 1, HEAD)
        parts = [null, memory] if before is None else [
            null, before.expand(2, count, first, HEAD), memory
        ]  # fmt: skip
        keys, values = torch.cat(parts, dim=2)
        similarity = queries @ keys[:, None].transpose(-1, -2) + bias
        hidden = torch.finfo(similarity.dtype).min
        weights = similarity.masked_fill(~seen[:, None], hidden).softmax(-1)
        mixed = (
            (weights @ values[:, None]).transpose(1, 2).reshape(count, length, self.heads * HEAD)
        )
        return self.to_out(mixed), memory


class Transformer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.rel_pos_bias = nn.ModuleDict({
            "relative_attention_bias": nn.Embedding(BUCKETS, shape.heads)
        })  # fmt: skip
        inner, rotary = EXPANSION * shape.dim, Rotary()
        self.layers = nn.ModuleList(
            nn.ModuleList([
                Attention(shape, rotary),
                nn.Sequential(
                    Norm(shape.dim),
                    nn.Linear(shape.dim, 2 * inner, bias=False),
                    SwiGLU(),
                    Norm(inner),
                    nn.Identity(),  # where dalle2-pytorch has its dropout
                    nn.Linear(inner, shape.dim, bias=False),
                ),
            ])
            for _ in range(shape.depth)
        )  # fmt: skip
        self.norm = Norm(shape.dim)
        self.project_out = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(
        self, x: Tensor, allowed: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, n, D), behind the tokens of `context`; allowed (B, n) booleans: may be seen.

        Returns the tokens (B, n, D) before the last norm, and their memory (depth, 2, B, n, HEAD).
        """
        length, first = x.shape[1], 0
        if context is not None:
            first = context.mask.shape[1]
            allowed = torch.cat([context.mask.expand(x.shape[0], first), allowed], dim=1)
        bias = self._bias(first, length, x.device)
        always = torch.ones(x.shape[0], 1, dtype=torch.bool, device=x.device)  # the null key
        places = torch.arange(first + length, device=x.device)
        causal = places[None, :] <= places[first:, None]
        before = torch.cat([always[:, None].expand(-1, length, 1),
                            causal & allowed[:, None]], dim=2)  # fmt: skip
        memory = []
        for i, (attention, feed_forward) in enumerate(self.layers):
            change, own = attention(x, bias, before, None if context is None else context.memory[i])
            x = x + change
            x = x + feed_forward(x)
            memory.append(own)
        return x, torch.stack(memory)

    def _bias(self, first: int, length: int, device: torch.device) -> Tensor:
        """(heads, n, 1 + first + n): by the distance of a query to a key, the null key being first."""
        queries = torch.arange(first, first + length, device=device)
        keys = torch.arange(1 + first + length, device=device)
        distance = (queries[:, None] - keys[None, :]).clamp(min=0)
        exact = BUCKETS // 2
        scale = (BUCKETS - exact) / math.log(MAX_DISTANCE / exact)
        far = exact + (torch.log(distance.clamp(min=1) / exact) * scale).long()
        bucket = torch.where(distance < exact, distance, far.clamp(max=BUCKETS - 1))
        return self.rel_pos_bias["relative_attention_bias"](bucket).permute(2, 0, 1)


class Network(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.learned_query = nn.Parameter(torch.randn(shape.dim))
        self.to_time_embeds = nn.Sequential(nn.Embedding(shape.timesteps, shape.dim))
        self.causal_transformer = Transformer(shape)


class Schedule(nn.Module):
    """x_t = signal[t] x0 + noise[t] e: the cosine schedule (Nichol and Dhariwal, 2021)."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        times = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        left = torch.cos((times + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
        kept = (1 - (1 - left[1:] / left[:-1]).clamp(max=MAX_BETA)).cumprod(0)
        self.register_buffer("sqrt_alphas_cumprod", kept.sqrt().float())
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - kept).sqrt().float())

    def forward(self, x0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        signal = self.sqrt_alphas_cumprod[timesteps][:, None]
        return signal * x0 + self.sqrt_one_minus_alphas_cumprod[timesteps][:, None] * noise


class DiffusionPrior(nn.Module):
    """p(image embedding | text), by its denoising network. Embeddings are scaled to length sqrt(D)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.net = Network(shape)
        self.noise_scheduler = Schedule(shape.timesteps)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> DiffusionPrior:
        """A prior from the state dict of dalle2-pytorch's DiffusionPrior, or from a checkpoint that
        holds one as `ema_model` or `model`; every size is read from it.

        Raises ModelError that names keys which are missing, unknown or of another shape.
        """
        for key in ("ema_model", "model"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
                break
        state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        prior = cls(_shape(state))
        wanted = prior.state_dict()
        # Its CLIP, and what follows from the schedule.
        known = ("clip.", "noise_scheduler.")
        unknown = [k for k in state.keys() - wanted.keys() if not k.startswith(known)]
        missing = [k for k in wanted.keys() - state.keys() if not k.startswith(known[1])]
        misshapen = [
            f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in state and state[key].shape != value.shape
        ]
        told = [
            f"{what}: {', '.join(sorted(keys)[:3])}" + (", ..." if len(keys) > 3 else "")
            for what, keys in (
                ("missing", missing), ("unknown", unknown), ("of another shape", misshapen)
            )
            if keys
        ]  # fmt: skip
        if told:
            raise ModelError("not the weights of a diffusion prior; " + "; ".join(told))
        prior.load_state_dict({key: state.get(key, value) for key, value in wanted.items()})
        return prior.float().eval().requires_grad_(False)

    def context(
        self,
        text_embed: Tensor,
        text_encodings: Tensor,
        mask_text: bool = False,
        text_mask: Tensor | None = None,
    ) -> Context:
        """What texts leave for the network: see `Context`.

        text_embed: unit embeddings (T, D). text_encodings (T, n, D): the text tower's tokens after its
        last norm, zero behind the end of the prompt. text_mask: (T, n) booleans, which of them may be
        seen; None: all, the padding too, as CLIPure does. mask_text: none of them, nor the embedding
        (the prior without a text). Raises ValueError for other shapes.
        """
        count, length, dim = text_encodings.shape
        if dim != self.shape.dim or text_embed.shape != (count, dim):
            raise ValueError(
                f"expected text_embed (T, {self.shape.dim}) and text_encodings (T, n, "
                f"{self.shape.dim}), got {tuple(text_embed.shape)}, {tuple(text_encodings.shape)}"
            )
        if text_mask is not None and text_mask.shape != (count, length):
            raise ValueError(f"expected text_mask {(count, length)}, got {tuple(text_mask.shape)}")
        if text_mask is None:
            text_mask = torch.ones(count, length, dtype=torch.bool, device=text_embed.device)
        own = torch.ones_like(text_mask[:, :1])
        if mask_text:
            text_mask, own = torch.zeros_like(text_mask), torch.zeros_like(own)
        mask = torch.cat([text_mask, own], dim=1)
        tokens = torch.cat([text_encodings, text_embed[:, None]], dim=1)
        _, memory = self.net.causal_transformer(tokens, mask)
        return Context(memory, mask)

    def denoise(self, noisy: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """The embedding x0 (B, D) that is expected behind `noisy` (B, D) at `timesteps` (B,)."""
        net = self.net
        query = net.learned_query.expand(noisy.shape[0], -1)
        tokens = torch.stack([net.to_time_embeds(timesteps), noisy, query], dim=1)
        allowed = torch.ones(noisy.shape[0], SUFFIX, dtype=torch.bool, device=noisy.device)
        found, _ = net.causal_transformer(tokens, allowed, context)
        return net.causal_transformer.project_out(net.causal_transformer.norm(found[:, -1]))

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text_embed: Tensor,
        text_encodings: Tensor,
        mask_text: bool = False,
    ) -> Tensor:
        """x0 (B, D) for noisy embeddings (B, D) at timesteps (B,) given texts; see `context`."""
        return self.denoise(noisy, timesteps, self.context(text_embed, text_encodings, mask_text))

    def losses(self, x0: Tensor, timesteps: Tensor, noise: Tensor, context: Context) -> Tensor:
        """(B,): mean squared error of the prediction, the bound on -log p(x0) without its weight."""
        predicted = self.denoise(self.noise_scheduler(x0, timesteps, noise), timesteps, context)
        return (predicted - x0).square().mean(1)

    def score(
        self, z: Tensor, timesteps: Tensor, noise: Tensor, context: Context, *, exact: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The losses (B,) of unit embeddings z (B, D), and of each the gradient with respect to its z.

        exact: the gradient of the function; else the prediction in it is taken for a constant. Where z
        is part of a graph, both can be differentiated again.
        """
        length = self.shape.dim**0.5
        attached = torch.is_grad_enabled() and z.requires_grad
        if not exact:
            x0 = length * z
            with torch.set_grad_enabled(attached):
                noisy = self.noise_scheduler(x0, timesteps, noise)
                predicted = self.denoise(noisy, timesteps, context)
            return (predicted - x0).square().mean(1), 2 / length * (x0 - predicted)
        with torch.enable_grad():
            z = z if attached else z.detach().requires_grad_()
            losses = self.losses(length * z, timesteps, noise, context)
            (gradient,) = torch.autograd.grad(losses.sum(), z, create_graph=attached)
        return losses if attached else losses.detach(), gradient

    def loss_and_grad(
        self,
        x0: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        text_embed: Tensor,
        text_encodings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The mean loss of embeddings x0 (B, D) of length sqrt(D), and its gradient (B, D)."""
        context = self.context(text_embed, text_encodings)
        x0 = x0.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.losses(x0, timesteps, noise, context).mean()
            return loss.detach(), torch.autograd.grad(loss, x0)[0]


def _shape(state: Mapping[str, Tensor]) -> Shape:
    """Raises ModelError where the keys that tell the sizes are not there."""
    layer = "net.causal_transformer.layers.{}.0.to_q.weight"
    try:
        timesteps, dim = state["net.to_time_embeds.0.weight"].shape
        inner, _ = state[layer.format(0)].shape
    except KeyError as err:
        raise ModelError(f"not the weights of a diffusion prior: no {err}") from err
    except ValueError as err:
        raise ModelError("not the weights of a diffusion prior: a matrix is none") from err
    depth = 0
    while layer.format(depth) in state:
        depth += 1
    return Shape(dim, depth, inner // HEAD, timesteps)
