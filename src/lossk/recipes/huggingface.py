"""A causal language model of Hugging Face's `transformers`, by local path or by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lossk.optional import check_installed
from lossk.recipes import RecipeError
from lossk.recipes.defaults import usual_defaults


@dataclass(frozen=True)
class HuggingFace:
    """A model in eval mode, and its tokenizer's two directions."""

    model: nn.Module  # token numbers [B, T] -> an object with .logits [B, T, vocabulary]
    encode: Callable[[str], list[int]]
    decode: Callable[[Tensor], Sequence[str]]  # [n] int64 -> the text of each token
    vocabulary: int
    context: int | None  # the longest sequence it takes, where it says


@usual_defaults()
def load(name: str | Path) -> HuggingFace:
    """Load `AutoModelForCausalLM` and `AutoTokenizer`; nothing remote is executed.

    Sequences are padded at the end and no attention mask is passed: a causal model never sees what comes later, so
    the losses of the real tokens are those of the unpadded sequence.

    Raises LosskError naming the extra to install, and RecipeError when there is no such model or it is not causal.
    """
    check_installed("transformers", "text", "a Hugging Face model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(str(name), trust_remote_code=False, use_cache=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model {str(name)!r} cannot be loaded: {error}") from error
    model.eval()

    def encode(text: str) -> list[int]:
        # verbose: a document longer than the model's context is cut afterwards
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(numbers: Tensor) -> list[str]:
        return [str(tokenizer.decode([number])) for number in numbers.tolist()]

    longest = getattr(model.config, "max_position_embeddings", None)
    return HuggingFace(model, encode, decode, int(model.config.vocab_size), longest)
