"""A text that comes with Python, and a small transformer on its characters.

The text is the help on Python's keywords and topics, mostly the language reference: about 370,000
characters that come with every CPython, as `pydoc_data.topics`. Repeated sections are used once.
The last tenth is held out for validation. Losses are in nats per character.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _training import Loss, Task, batches

CONTEXT, BATCH, HEADS = 64, 32, 4
SPREAD = 0.3  # initial standard deviation of the embeddings
SAMPLE, TEMPERATURE = 160, 0.8


@dataclass(frozen=True)
class Text:
    """A text as numbers, one for each character.

    Attributes:
        characters: The characters by number.
        training: The first nine tenths, int64.
        validation: The last tenth, int64.
    """

    characters: str
    training: Tensor
    validation: Tensor


def load_text(device: torch.device, length: int | None = None) -> Text:
    """Reads Python's help topics, or their first `length` characters."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))[:length]
    characters = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(characters)}
    numbers = torch.tensor([number[character] for character in text], device=device)
    training = len(text) * 9 // 10
    return Text(characters, numbers[:training], numbers[training:])


def linear(inputs: int, outputs: int, shortcuts: int = 1) -> nn.Linear:
    """A linear layer. The `2 * layers` that add to a shortcut start smaller, as in GPT-2."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=(inputs * shortcuts) ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Causal self-attention and two linear layers, each with a norm and a shortcut."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        shortcuts = 2 * layers
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = linear(width, 3 * width), linear(width, width, shortcuts)
        self.layers = nn.Sequential(
            linear(width, 4 * width), nn.GELU(), linear(4 * width, width, shortcuts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps activations of shape `(batch, length, width)` to the same shape."""
        heads = self.inward(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outward(attended.transpose(1, 2).flatten(2))
        return x + self.layers(self.norm(x))


class Transformer(nn.Module):
    """A model of the next character, given up to `CONTEXT` characters before it.

    Args:
        characters: Number of distinct characters.
        width: Number of features of each character, a multiple of `HEADS`.
        layers: Number of blocks.
    """

    def __init__(self, characters: int, width: int, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.empty(CONTEXT, width))
        for p in (self.embedding.weight, self.position):
            nn.init.normal_(p, std=SPREAD)
        self.blocks = nn.Sequential(*(Block(width, layers) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), linear(width, characters))

    def forward(self, x: Tensor) -> Tensor:
        """Maps characters, shape `(batch, length)`, to logits `(batch, length, characters)`."""
        return self.head(self.blocks(self.embedding(x) + self.position[: x.shape[1]]))


def cross_entropy(model: nn.Module, windows: Tensor) -> Tensor:
    """Nats per character, in windows of `CONTEXT + 1` characters."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def make_task(text: Text, model: nn.Module, seed: int) -> Task:
    """The training problem: its losses, and measurements on the whole held-out text."""
    anywhere = text.training.unfold(0, CONTEXT + 1, 1)
    held_out = text.validation.unfold(0, CONTEXT + 1, CONTEXT)
    seen = anywhere[:: 4 * len(anywhere) // len(held_out)]

    def losses(batch_size: int | None) -> Iterator[Loss]:
        for (windows,) in batches((anywhere,), batch_size, seed):
            yield lambda model, windows=windows: cross_entropy(model, windows)

    def judge(model: nn.Module) -> tuple[float, float]:
        return cross_entropy(model, seen).item(), cross_entropy(model, held_out).item()

    def describe(training: float, validation: float) -> str:
        return f"training {training:.3f}, validation {validation:.3f}"

    return Task(model, losses, judge, describe)


@torch.no_grad()
def write(model: nn.Module, text: Text, seed: int) -> str:
    """Continues the training text, at a temperature below one."""
    generator = torch.Generator(text.training.device).manual_seed(seed)
    numbers = text.training[-CONTEXT:]
    for _ in range(SAMPLE):
        logits = model(numbers[None, -CONTEXT:])[0, -1]
        drawn = (logits / TEMPERATURE).softmax(dim=0).multinomial(1, generator=generator)
        numbers = torch.cat([numbers, drawn])
    return "".join(text.characters[number] for number in numbers[CONTEXT:])
