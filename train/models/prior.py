"""Diffusion prior of DALL-E 2: predicts a CLIP image embedding from a noisy one and a text.

Ramesh et al., 2022, arXiv 2204.06125, section 2.2. The network and the keys of its checkpoints are
those of dalle2-pytorch 0.15.4. A causal transformer reads the tokens

    text encodings (one per token of the prompt) | text embedding | time | noisy image | query

and the output at the query is the predicted embedding x0. Attention is causal, so the text tokens do
not depend on the three tokens after them. Their keys and values in each layer are computed once per
text (`context`) and reused for every image, timestep and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.errors import ModelError
from train.models.weight_files import describe_mismatch

HEAD = 64  # width of a head; all heads share one key and one value
ROTATED = 32  # values of a head with rotary position embedding
THETA = 1e4
BUCKETS, MAX_DISTANCE = 32, 128  # relative position bias (Raffel et al., JMLR 2020)
EXPANSION = 4  # hidden width of the feed-forward layers, in widths of a token
EPS = 1e-5
COSINE_OFFSET, MAX_BETA = 0.008, 0.999  # noise schedule
SUFFIX = 3  # tokens after the text: time, noisy image, query


@dataclass(frozen=True)
class Shape:
    """Sizes of a network."""

    dim: int  # width of the embeddings and of every token
    depth: int
    heads: int
    timesteps: int = 1000


class Context(NamedTuple):
    """Keys and values of T texts of n tokens; T is 1 where all images share a text."""

    memory: Tensor  # (depth, 2, T, n, HEAD): keys and values
    mask: Tensor  # (T, n) booleans: True for tokens that may be attended to


class Norm(nn.Module):
    """Layer normalisation with a fixed beta, as in dalle2-pytorch."""

    beta: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta, EPS)


class SwiGLU(nn.Module):
    """Gated activation (arXiv 2002.05202): (..., 2 D) -> (..., D)."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class Rotary(nn.Module):
    """Rotary position embedding (arXiv 2104.09864), on pairs of neighbouring values."""

    def __init__(self) -> None:
        super().__init__()
        exponents = torch.arange(0, ROTATED, 2, dtype=torch.float64) / ROTATED
        self.freqs = nn.Parameter((THETA**-exponents).float(), requires_grad=False)

    def forward(self, x: Tensor, first: int) -> Tensor:
        """Rotate x (..., n, HEAD), whose tokens start at position `first`."""
        positions = torch.arange(first, first + x.shape[-2], device=x.device)
        angles = positions[:, None] * self.freqs
        cosine, sine = angles.cos(), angles.sin()
        rotated, rest = x[..., :ROTATED], x[..., ROTATED:]
        even, odd = rotated[..., ::2], rotated[..., 1::2]
        pairs = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
        return torch.cat([pairs.flatten(-2), rest], dim=-1)


class Attention(nn.Module):
    """Multi-query attention: all heads share a key and a value per token, and a trained null pair."""

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
        self, x: Tensor, bias: Tensor, visible: Tensor, past: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attend with n tokens x (B, n, D) to the null pair, to m past tokens and to themselves.

        bias: (heads, n, 1 + m + n). visible: booleans (B or T, n, 1 + m + n). past: keys and values
        (2, T, m, HEAD) of the past tokens; None: m = 0. Returns the change of x, and the keys and
        values (2, B, n, HEAD) of its tokens.
        """
        first = 0 if past is None else past.shape[2]
        x = self.norm(x)
        count, length, _ = x.shape
        queries = self.to_q(x).view(count, length, self.heads, HEAD).transpose(1, 2) * HEAD**-0.5
        queries = self.rotary_emb(queries, first)
        keys, values = self.to_kv(x).chunk(2, dim=-1)
        memory = torch.stack([self.rotary_emb(keys, first), values])
        null = self.null_kv[:, None, None].expand(2, count, 1, HEAD)
        earlier = [null] if past is None else [null, past.expand(2, count, first, HEAD)]
        keys, values = torch.cat([*earlier, memory], dim=2)
        similarity = queries @ keys[:, None].transpose(-1, -2) + bias
        lowest = torch.finfo(similarity.dtype).min
        weights = similarity.masked_fill(~visible[:, None], lowest).softmax(-1)
        mixed = (
            (weights @ values[:, None]).transpose(1, 2).reshape(count, length, self.heads * HEAD)
        )
        return self.to_out(mixed), memory


class Transformer(nn.Module):
    """Causal transformer with a relative position bias that all layers share."""

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
                    nn.Identity(),  # dropout in dalle2-pytorch; keeps the keys' numbers
                    nn.Linear(inner, shape.dim, bias=False),
                ),
            ])
            for _ in range(shape.depth)
        )  # fmt: skip
        self.norm = Norm(shape.dim)
        self.project_out = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(
        self, x: Tensor, visible: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run n tokens x (B, n, D) that follow the tokens of `context`.

        visible: booleans (B, n), True for tokens that may be attended to. Returns the tokens
        (B, n, D) before the last norm, and their keys and values (depth, 2, B, n, HEAD).
        """
        length, first = x.shape[1], 0
        if context is not None:
            first = context.mask.shape[1]
            visible = torch.cat([context.mask.expand(x.shape[0], first), visible], dim=1)
        bias = self._bias(first, length, x.device)
        null = torch.ones(x.shape[0], 1, dtype=torch.bool, device=x.device)
        positions = torch.arange(first + length, device=x.device)
        causal = positions[None, :] <= positions[first:, None]
        mask = torch.cat([null[:, None].expand(-1, length, 1),
                          causal & visible[:, None]], dim=2)  # fmt: skip
        layers = cast("Iterable[tuple[Attention, nn.Sequential]]", self.layers)
        memory = []
        for i, (attention, feed_forward) in enumerate(layers):
            past = None if context is None else context.memory[i]
            change, layer_memory = attention(x, bias, mask, past)
            x = x + change
            x = x + feed_forward(x)
            memory.append(layer_memory)
        return x, torch.stack(memory)

    def _bias(self, first: int, length: int, device: torch.device) -> Tensor:
        """Return the bias (heads, n, 1 + first + n) by a query's distance to a key.

        The null key is at position 0, the key of token j at position j + 1.
        """
        queries = torch.arange(first, first + length, device=device)
        keys = torch.arange(1 + first + length, device=device)
        distance = (queries[:, None] - keys[None, :]).clamp(min=0)
        exact = BUCKETS // 2
        scale = (BUCKETS - exact) / math.log(MAX_DISTANCE / exact)
        far = exact + (torch.log(distance.clamp(min=1) / exact) * scale).long()
        bucket = torch.where(distance < exact, distance, far.clamp(max=BUCKETS - 1))
        bias: Tensor = self.rel_pos_bias["relative_attention_bias"](bucket)
        return bias.permute(2, 0, 1)


class Network(nn.Module):
    """Denoising network: the transformer, the query and the embeddings of timesteps."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.learned_query = nn.Parameter(torch.randn(shape.dim))
        self.to_time_embeds = nn.Sequential(nn.Embedding(shape.timesteps, shape.dim))
        self.causal_transformer = Transformer(shape)


class Schedule(nn.Module):
    """Cosine noise schedule (Nichol and Dhariwal, 2021): x_t = signal[t] x0 + noise[t] e."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        times = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        cumulative = torch.cos((times + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
        betas = (1 - cumulative[1:] / cumulative[:-1]).clamp(max=MAX_BETA)
        alphas_cumprod = (1 - betas).cumprod(0)
        self.register_buffer("sqrt_alphas_cumprod", alphas_cumprod.sqrt().float())
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt().float())

    def forward(self, x0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        signal = self.sqrt_alphas_cumprod[timesteps][:, None]
        return signal * x0 + self.sqrt_one_minus_alphas_cumprod[timesteps][:, None] * noise


class DiffusionPrior(nn.Module):
    """Diffusion model of p(image embedding | text). Embeddings x0 have length sqrt(D)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.net = Network(shape)
        self.noise_scheduler = Schedule(shape.timesteps)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> DiffusionPrior:
        """Load the state dict of dalle2-pytorch's DiffusionPrior, reading every size from it.

        A checkpoint may hold the state dict as `ema_model` (preferred) or `model`. Raises ModelError
        that names keys which are missing, unknown or of the wrong shape.
        """
        for key in ("ema_model", "model"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
                break
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        prior = cls(_read_shape(tensors))
        expected = prior.state_dict()
        schedule = {k: v for k, v in expected.items() if k.startswith("noise_scheduler.")}
        # Besides the network, checkpoints hold the CLIP and more arrays of the schedule.
        ignored = ("clip.", "noise_scheduler.")
        tensors = schedule | {
            k: v for k, v in tensors.items() if k in expected or not k.startswith(ignored)
        }
        mismatch = describe_mismatch(tensors, expected)
        if mismatch:
            raise ModelError(f"not the weights of a diffusion prior; {mismatch}")
        prior.load_state_dict(tensors)
        return prior.float().eval().requires_grad_(False)

    def context(
        self,
        text_embed: Tensor,
        text_encodings: Tensor,
        mask_text: bool = False,
        text_mask: Tensor | None = None,
    ) -> Context:
        """Return the keys and values of texts.

        text_embed: unit embeddings (T, D).
        text_encodings: (T, n, D), the text tower's tokens after its last norm, zero after the end of
        the prompt.
        mask_text: hide the tokens and the embedding, for the prior without a text.
        text_mask: booleans (T, n), True for tokens that may be attended to; None: all, with the
        padding, as in CLIPure.
        Raises ValueError for other shapes.
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
        embed_mask = torch.ones_like(text_mask[:, :1])
        if mask_text:
            text_mask, embed_mask = torch.zeros_like(text_mask), torch.zeros_like(embed_mask)
        mask = torch.cat([text_mask, embed_mask], dim=1)
        tokens = torch.cat([text_encodings, text_embed[:, None]], dim=1)
        _, memory = self.net.causal_transformer(tokens, mask)
        return Context(memory, mask)

    def denoise(self, noisy: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """Predict the embeddings x0 (B, D) from noisy ones (B, D) at timesteps (B,)."""
        net = self.net
        query = net.learned_query.expand(noisy.shape[0], -1)
        tokens = torch.stack([net.to_time_embeds(timesteps), noisy, query], dim=1)
        visible = torch.ones(noisy.shape[0], SUFFIX, dtype=torch.bool, device=noisy.device)
        outputs, _ = net.causal_transformer(tokens, visible, context)
        x0: Tensor = net.causal_transformer.project_out(net.causal_transformer.norm(outputs[:, -1]))
        return x0

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text_embed: Tensor,
        text_encodings: Tensor,
        mask_text: bool = False,
    ) -> Tensor:
        """Predict x0 (B, D) from noisy embeddings (B, D) at timesteps (B,), given texts.

        See `context` for the texts.
        """
        return self.denoise(noisy, timesteps, self.context(text_embed, text_encodings, mask_text))

    def losses(self, x0: Tensor, timesteps: Tensor, noise: Tensor, context: Context) -> Tensor:
        """Return the mean squared errors (B,) of the prediction.

        They are the variational bound on -log p(x0) without its weight.
        """
        predicted = self.denoise(self.noise_scheduler(x0, timesteps, noise), timesteps, context)
        return (predicted - x0).square().mean(1)

    def score(
        self, z: Tensor, timesteps: Tensor, noise: Tensor, context: Context, *, exact: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the losses (B,) of unit embeddings z (B, D), and their gradients (B, D) by z.

        exact: differentiate through the prediction; if False, it counts as a constant. Both outputs
        are differentiable where z requires a gradient.
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
        """Return the mean loss of embeddings x0 (B, D) of length sqrt(D), and its gradient (B, D)."""
        context = self.context(text_embed, text_encodings)
        x0 = x0.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.losses(x0, timesteps, noise, context).mean()
            return loss.detach(), torch.autograd.grad(loss, x0)[0]


def _read_shape(state: Mapping[str, Tensor]) -> Shape:
    """Read the sizes from the weights. Raises ModelError where their keys are missing."""
    layer = "net.causal_transformer.layers.{}.0.to_q.weight"
    try:
        timesteps, dim = state["net.to_time_embeds.0.weight"].shape
        inner, _ = state[layer.format(0)].shape
    except KeyError as err:
        raise ModelError(f"not the weights of a diffusion prior: no {err}") from err
    except ValueError as err:
        raise ModelError("not the weights of a diffusion prior: a matrix has another rank") from err
    depth = 0
    while layer.format(depth) in state:
        depth += 1
    return Shape(dim, depth, inner // HEAD, timesteps)
