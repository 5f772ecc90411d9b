"""Answer with this agent, on any machine that has what requirements.txt lists.

python run.py TEXT...     print one line of JSON for each text; without one, for each line of the standard input
python run.py --check     compare this machine's logits with those that were measured where the agent was made
"""

# B rows, T tokens of the longest row, L labels, V vocabulary.

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

_FORMAT = 1
_NEW_TOKENS = 64


class Model(Protocol):
    """What the module of an architecture loads.

    output: "classes", "tags", "language" or "actions". labels: of classes or slots. begin_token, end_token: of texts of
    a language model. Where numbers are read, it has `features`, their count; where it acts, `act(observation)`.
    """

    output: str
    labels: Sequence[str]
    begin_token: int
    end_token: int

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's tokens, and where in it each begins and ends."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""

    def __call__(self, tokens_BT: Tensor, valid_BT: Tensor, features_BF: Tensor | None = None) -> Tensor:
        """Return logits."""

    def comparable(self, tokens_BT: Tensor, valid_BT: Tensor, features_BF: Tensor | None = None) -> Tensor:
        """Return logits along a path without thresholds, which differ between machines by rounding alone."""


class Agent:
    """The agent of a package's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
        if self._package["format"] != _FORMAT:
            raise ValueError(f"{folder} is a package of format {self._package['format']}, this file runs {_FORMAT}")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._max_tokens = int(config.get("max_tokens", 0))  # none where it acts
        runtime = str((folder / "runtime").resolve())
        sys.path.insert(0, runtime)
        try:
            module = importlib.import_module(self._package["module"])
            self.model: Model = module.load(folder, config, self._package["output"])
            # Kinds of action that it was held to in training, and is held to here.
            self._kinds = sorted(self._package.get("allowed_actions", ()))
            self._masked = importlib.import_module("allowed_actions").masked_action if self._kinds else None
        finally:
            sys.path.remove(runtime)

    @torch.inference_mode()
    def answer(self, text: str, *, max_new_tokens: int | None = None) -> dict[str, Any]:
        """Return the answer to a text: its label, its spans, or what follows it; to an observation, the action.

        max_new_tokens: by default 64, or half of what the agent reads and writes together where that is less.
        Errors: ValueError, for what is no JSON, for numbers that the agent does not read, and for more new tokens than
        it can write.
        """
        if self.model.output == "actions":
            observation = _json(text)
            return {"observation": observation, "action": self.model.act(observation)}  # type: ignore[attr-defined]
        text, features_BF = self._read(text)
        tokens, offsets = self.model.encode(text)
        if self.model.output == "language":
            return {"text": text, "answer": self._continue(tokens, max_new_tokens)}
        tokens, offsets = tokens[: self._max_tokens], offsets[: self._max_tokens]
        logits = self.model(*collate([tokens]), features_BF)[0]
        if self.model.output == "tags":
            return {"text": text, "spans": list(spans(text, offsets, logits.argmax(-1).tolist(), self.model.labels))}
        best = logits.softmax(-1).max(-1)
        return {"text": text, "label": self.model.labels[int(best.indices)], "probability": float(best.values)}

    def _read(self, given: str) -> tuple[str, Tensor | None]:
        """Return a text and what comes beside it."""
        count = getattr(self.model, "features", 0)
        if not count:
            return given, None
        row = _json(given)
        if len(row["features"]) != count:
            raise ValueError(f"a row has {len(row['features'])} features, and the agent reads {count}")
        return str(row["text"]), torch.tensor([row["features"]], dtype=torch.float32)

    def _continue(self, tokens: Sequence[int], max_new_tokens: int | None) -> str:
        """Return the likeliest continuation, token by token, under the mask where there is one."""
        most = self._max_tokens - 2  # a token that begins, and one of the text, are read at least
        if max_new_tokens is None:
            max_new_tokens = max(1, min(_NEW_TOKENS, self._max_tokens // 2))
        elif not 1 <= max_new_tokens <= most:
            raise ValueError(f"--max-new-tokens must be from 1 to {most} for this agent, not {max_new_tokens}")
        writer = _Writer(self.model, context=self._max_tokens, max_new_tokens=max_new_tokens)
        prompt = [self.model.begin_token, *writer.clip(tokens)]
        text = writer.decode(writer.go_on(prompt))
        return text if self._masked is None else str(self._masked(writer, prompt, text, self._kinds))

    @torch.inference_mode()
    def check(self) -> dict[str, Any]:
        """Return how far this machine's logits are from those of the one where the agent was made.

        distance: the largest difference, relative to the largest logit (1 at least).
        """
        probe = safetensors.torch.load_file(self.folder / "probe.safetensors")
        found = compared(self.model, probe["tokens_BT"], probe["valid_BT"], probe.get("features_BF"))
        distance = apart(found, probe["logits"])
        # A NaN is on neither side of a bound: it fails both.
        equal = distance <= self._package["tolerance"]
        return {
            "distance": distance,
            "tolerance": self._package["tolerance"],
            "equal": equal and apart(found, probe["untrained_logits"]) > distance,
        }


class _Writer:
    """A language model that goes on with texts. context: most tokens of all it reads and writes."""

    def __init__(self, model: Model, *, context: int, max_new_tokens: int) -> None:
        self._model, self._max_new_tokens = model, max_new_tokens
        self._room = max(1, context - max_new_tokens - 1)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)[0]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._model.decode(tokens)

    def clip(self, tokens: Sequence[int]) -> list[int]:
        """Return the newest tokens that leave room: what was asked last stands at the end."""
        return list(tokens[-self._room :])

    def go_on(self, tokens: Sequence[int]) -> list[int]:
        """Return the likeliest continuation, without the token that ends it."""
        written = list(tokens)
        for _ in range(self._max_new_tokens):
            token = int(self._model(*collate([written]))[0, -1].argmax())
            if token == self._model.end_token:
                break
            written.append(token)
        return written[len(tokens) :]

    def next_logits(self, before: Sequence[int], choices: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return, for each choice after `before`, the logits of its tokens: [tokens of the choice, V]."""
        logits_BTV = self._model(*collate([[*before, *choice] for choice in choices]))
        start = len(before) - 1
        return [logits_BTV[i, start : start + len(choice)] for i, choice in enumerate(choices)]


def _json(given: str) -> Any:
    """Return what JSON says. Errors: ValueError; NaN is no JSON."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number of JSON")

    return json.loads(given, parse_constant=refuse)


def compared(model: Model, tokens_BT: Tensor, valid_BT: Tensor, features_BF: Tensor | None = None) -> Tensor:
    """Return the logits by which two models are compared: [B, L], those of every valid token, or of each last one."""
    return where_they_count(model.output, model.comparable(tokens_BT, valid_BT, features_BF), valid_BT)


def where_they_count(output: str, logits: Tensor, valid_BT: Tensor) -> Tensor:
    """Return the part of a model's logits that is compared."""
    if output == "tags":
        return logits[valid_BT]
    if output == "language":  # a vocabulary is long: one token of each row is enough
        return logits[torch.arange(len(logits)), valid_BT.sum(1) - 1]
    return logits


def apart(logits: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the second one's largest value (1 at least)."""
    return float((logits - other).abs().max() / other.abs().max().clamp(min=1))


def collate(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens_BT, padded on the right with zeros, and valid_BT. A row without tokens is all padding."""
    longest = max(1, *map(len, rows))
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    valid_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        valid_BT[i, : len(row)] = True
    return tokens_BT, valid_BT


def spans(
    text: str, offsets: Sequence[tuple[int, int]], tags: Sequence[int], labels: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the spans that tags tell of: 0 is outside, 1 + 2 k begins slot k, and 2 + 2 k goes on with it."""
    found: list[tuple[int, int, int]] = []
    inside = -1
    for (start, end), tag in zip(offsets, tags, strict=True):
        slot, begins = (tag - 1) // 2, tag % 2 == 1
        if tag and (begins or slot != inside):
            found.append((slot, start, end))
        elif tag:
            found[-1] = (slot, found[-1][1], end)
        inside = slot if tag else -1
    for slot, start, end in found:
        yield {"label": labels[slot], "start": start, "end": end, "text": text[start:end]}


def main(arguments: Sequence[str] | None = None, *, lines: Iterable[str] = sys.stdin) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Answers with this agent: a line of JSON for each text.")
    parser.add_argument("text", nargs="*", help="none: each line of the standard input is one")
    parser.add_argument("--max-new-tokens", type=int, help="of a continuation (default: 64, or half of its context)")
    parser.add_argument("--check", action="store_true", help="compare logits with those of where it was made")
    given = parser.parse_args(arguments)
    folder = Path(__file__).resolve().parent
    try:
        agent = Agent(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        return _refuse(f"{folder} is damaged, fetch the agent again", error)
    if given.check:
        checked = agent.check()
        print(json.dumps(checked))  # noqa: T201 - a command's output
        return 0 if checked["equal"] else 1
    for number, text in enumerate(given.text or (line.rstrip("\n") for line in lines), start=1):
        try:
            answer = agent.answer(text, max_new_tokens=given.max_new_tokens)
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError) as error:
            return _refuse(f"text {number} cannot be answered", error)
        print(json.dumps(answer, ensure_ascii=False), flush=True)  # noqa: T201 - a command's output
    return 0


def _refuse(what: str, error: Exception) -> int:
    """Tell what is wrong in one line; return the exit code."""
    why = str(error).partition("\n")[0]
    print(f"run.py: {what}: {why if isinstance(error, ValueError) else repr(error)}", file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    sys.exit(main())
