"""Responses of a model to prompts, batch by batch, and the random numbers that they are drawn with."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..divergence import drawing


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn.

    Attributes:
        max_tokens: the longest response, its end token included.
        temperature: 0 is greedy, which heeds none of the rest.
        top_p: only the likeliest tokens, up to this share of the probability; 1 is all.
        top_k: only so many of the likeliest tokens; 0 is all.
    """

    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`. What they leave open, a model's generation_config.json decides."""
        # A model's own penalty (several instruct models bring one) would be a policy that no training step has seen.
        options: dict[str, Any] = {"max_new_tokens": self.max_tokens, "repetition_penalty": 1.0, "do_sample": False}
        if self.temperature > 0:
            sampling = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            options |= {"do_sample": True, **sampling}
        return options


def by_length(prompts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Indices of prompts in batches, the short ones first, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: Sequence[list[int]], decoding: Decoding) -> list[list[int]]:
    """One response to each prompt of a batch, as tokens up to and with the end token, from torch's random state.

    Raises:
        DivergedError: where no token can be drawn, as the model's probabilities are not finite.
    """
    training, end = model.training, ends(model, tokenizer)
    model.eval()
    inputs = padded(tokenizer, prompts).to(model.device)
    with drawing():
        output = model.generate(**inputs, **decoding.options(), eos_token_id=sorted(end) or None)
    model.train(training)
    responses = []
    for tokens in output[:, inputs["input_ids"].shape[1] :].tolist():
        stop = next((at for at, token in enumerate(tokens) if token in end), len(tokens))
        responses.append(tokens[: stop + 1])
    return responses


def padded(tokenizer: Any, prompts: Sequence[list[int]]) -> Any:
    """`input_ids` and `attention_mask` of prompts, padded on the left.

    Raises:
        ValueError: where the tokenizer has no token to pad with.
    """
    given = {"input_ids": list(prompts)}
    return tokenizer.pad(given, padding_side="left", return_attention_mask=True, return_tensors="pt")


def ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a response, as TRL has it in training: the model's, and the tokenizer's."""
    end = model.generation_config.eos_token_id
    return {*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id} - {None}


@contextmanager
def random_stream(device: torch.device, start: int | dict[str, str]) -> Iterator[None]:
    """Random numbers from a seed, or from where `random_state` said they were; the caller's stay as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if isinstance(start, int):
            torch.manual_seed(start)
        else:
            torch.set_rng_state(_tensor(start["cpu"]))
            if device.type == "cuda":
                torch.cuda.set_rng_state(_tensor(start["cuda"]), device)
        yield


def random_state(device: torch.device) -> dict[str, str]:
    """Where the random numbers of the CPU, and of the GPU in use, are; ready for JSON."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(value.numpy().tobytes()).decode("ascii") for name, value in state.items()}


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
