"""A folder of a model or an agent as other libraries expect it, with weights of safetensors alone.

An agent on a model folder of `transformers` becomes such a folder again: a language model opens with
AutoModelForCausalLM. A classifier's head is a linear map of one token's or of the mean token's hidden state, and no
AutoModelForSequenceClassification has just that; AutoModelForTokenClassification does. A linear map of a mean is the
mean of the map, so the mean of the tokens' logits is the text's, and the first's or the last's are where those stand
for a text. Everything else is copied: its weights open with safetensors, its tokenizer with tokenizers, and what runs
it lies beside them.
"""

from __future__ import annotations

import array
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognateforge.exceptions import ArtifactCorruptError, NotImplementedByServerError
from cognateforge.export.artifact import Artifact, Exported, whole
from cognateforge.export.tensors import Matrix, TensorFile

_BASE = "base/"
_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
# Of the package, and of no use without its runtime.
_PACKAGE_ONLY = ("runtime/", "run.py", "package.json", "probe.safetensors", "requirements.txt", _WEIGHTS, _CONFIG)


@dataclass(frozen=True)
class TokenHead:
    """How transformers names the parts of a token classifier: its class, its encoder's prefix, and its linear head."""

    kind: str
    prefix: str
    head: str


# By model_type: those whose token classifier is the encoder and one linear map, which the tests show of each.
TOKEN_HEADS: Mapping[str, TokenHead] = {
    "albert": TokenHead("AlbertForTokenClassification", "albert", "classifier"),
    "bert": TokenHead("BertForTokenClassification", "bert", "classifier"),
    "camembert": TokenHead("CamembertForTokenClassification", "roberta", "classifier"),
    "deberta-v2": TokenHead("DebertaV2ForTokenClassification", "deberta", "classifier"),
    "distilbert": TokenHead("DistilBertForTokenClassification", "distilbert", "classifier"),
    "electra": TokenHead("ElectraForTokenClassification", "electra", "classifier"),
    "gemma": TokenHead("GemmaForTokenClassification", "model", "score"),
    "gpt2": TokenHead("GPT2ForTokenClassification", "transformer", "classifier"),
    "gpt_neox": TokenHead("GPTNeoXForTokenClassification", "gpt_neox", "classifier"),
    "llama": TokenHead("LlamaForTokenClassification", "model", "score"),
    "mistral": TokenHead("MistralForTokenClassification", "model", "score"),
    "mpnet": TokenHead("MPNetForTokenClassification", "mpnet", "classifier"),
    "qwen2": TokenHead("Qwen2ForTokenClassification", "model", "score"),
    "qwen3": TokenHead("Qwen3ForTokenClassification", "model", "score"),
    "roberta": TokenHead("RobertaForTokenClassification", "roberta", "classifier"),
    "xlm-roberta": TokenHead("XLMRobertaForTokenClassification", "roberta", "classifier"),
}


def write_folder(artifact: Artifact, out: Path) -> Exported:
    """Write the folder.

    Errors: NotImplementedByServerError, for an agent that transformers has no form for; ArtifactCorruptError,
    LocalStorageError.
    """
    architecture = artifact.document.get("architecture")
    with whole(out) as scratch:
        scratch.mkdir()
        if architecture == "causal_lm":
            _writer(artifact, scratch)
        elif architecture == "sequence_classifier":
            _classifier(artifact, scratch)
        else:
            _copy(scratch, {**artifact.files, **artifact.proofs})
        size_bytes = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    return Exported(path=out, format="folder", name=artifact.name, digest=artifact.digest, size_bytes=size_bytes)


def _writer(artifact: Artifact, out: Path) -> None:
    """Write a causal language model."""
    _require_whole(artifact, read=())
    _copy_base(artifact, out)
    _tell(out, "AutoModelForCausalLM", "The logits of each next token are the agent's.")


def _classifier(artifact: Artifact, out: Path) -> None:
    """Write an encoder and its head as a token classifier."""
    ours, config = _json(artifact, _CONFIG), _json(artifact, f"{_BASE}{_CONFIG}")
    output = _json(artifact, "package.json").get("output")
    model_type = str(config.get("model_type"))
    head = TOKEN_HEADS.get(model_type)
    if head is None:
        raise _refused(artifact, f"transformers has no classifier of {model_type} that is a linear map of its tokens")
    if ours.get("sizes", {}).get("features"):
        raise _refused(artifact, "it reads numbers beside its texts")
    scale = ("text_scale.mean_F", "text_scale.scale_F") if output == "classes" else ()
    weights = _require_whole(artifact, read=("head.weight", "head.bias", *scale))
    linear, bias = weights.read("head.weight"), weights.read("head.bias")
    if scale:
        linear, bias = _folded(linear, bias, mean=weights.read(scale[0]), scale=weights.read(scale[1]))
    labels = _tags(ours["labels"]) if output == "tags" else list(ours["labels"])
    if len(labels) != linear.shape[0]:
        raise ArtifactCorruptError(f"{artifact.name} has {len(labels)} labels and a head for {linear.shape[0]}")
    _copy_base(artifact, out, without=(_WEIGHTS, _CONFIG))
    base = artifact.files.get(f"{_BASE}{_WEIGHTS}")
    if base is None:
        raise _refused(artifact, f"its base is in several files, and this release joins only one {_WEIGHTS}")
    TensorFile(base).copy(
        out / _WEIGHTS,
        rename=lambda name: f"{head.prefix}.{name}",
        more={f"{head.head}.weight": linear, f"{head.head}.bias": bias},
    )
    named = {
        **config,
        "architectures": [head.kind],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    (out / _CONFIG).write_text(json.dumps(named, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    _tell(out, "AutoModelForTokenClassification", _reading(output, _pooling(ours, config)))


def _folded(linear: Matrix, bias: Matrix, *, mean: Matrix, scale: Matrix) -> tuple[Matrix, Matrix]:
    """Return the map of x that is `linear` and `bias` of (x - mean) * scale."""
    width = linear.shape[1]
    weights, offsets = array.array("f"), array.array("f")
    for row, offset in enumerate(bias.values):
        scaled = [w * s for w, s in zip(linear.values[row * width : (row + 1) * width], scale.values, strict=True)]
        weights.extend(scaled)
        offsets.append(offset - sum(w * m for w, m in zip(scaled, mean.values, strict=True)))
    return Matrix(linear.shape, weights), Matrix(bias.shape, offsets)


def _tags(slots: Sequence[str]) -> list[str]:
    return ["O", *(f"{place}-{slot}" for slot in slots for place in ("B", "I"))]


def _pooling(ours: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return which of a text's tokens stand for it: "first", "last" or "mean"."""
    asked = str(ours.get("encoder", {}).get("pooling", "auto"))
    if asked != "auto":
        return asked
    causal = config["model_type"] in _CAUSAL or bool(config.get("is_decoder"))
    return "last" if causal else "mean"


# Of TOKEN_HEADS, those whose tokens see only what is before them.
_CAUSAL = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
_OF_A_TEXT = {
    "first": "A text's logits are those of its first token: `logits[:, 0]`.",
    "last": "A text's logits are those of its last token that is not padding, with padding on the right: "
    "`logits[range(len(logits)), mask.sum(1) - 1]`.",
    "mean": "A text's logits are the mean over its tokens that are not padding: "
    "`(logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)`.",
}


def _reading(output: object, pooling: str) -> str:
    if output == "tags":
        return "Each token's logits are over the tags of config.json: outside, and beginning and inside of each slot."
    return f"{_OF_A_TEXT[pooling]} Here `mask` is the tokenizer's attention_mask, special tokens included."


def _require_whole(artifact: Artifact, *, read: Sequence[str]) -> TensorFile:
    """Return the weights beside the base, where all of them have a place in the export."""
    if _WEIGHTS not in artifact.files:
        raise ArtifactCorruptError(f"{artifact.name} has no {_WEIGHTS}")
    weights = TensorFile(artifact.files[_WEIGHTS])
    if left := sorted(set(weights.entries) - set(read)):
        raise _refused(artifact, f"transformers knows no layer for what was trained beside its base, such as {left[0]}")
    return weights


def _copy_base(artifact: Artifact, out: Path, *, without: Sequence[str] = ()) -> None:
    """Copy what belongs to the base to the folder itself, and beside it what tells of the agent."""
    files = {name: path for name, path in artifact.files.items() if not name.startswith((*_PACKAGE_ONLY, _BASE))}
    base = {name.removeprefix(_BASE): path for name, path in artifact.files.items() if name.startswith(_BASE)}
    _copy(out, {**files, **{name: path for name, path in base.items() if name not in without}})
    if "tokenizer.json" in base and "tokenizer_config.json" not in base:
        # Without it transformers takes the tokenizer class of the model's own kind, whose tokens may be others.
        (out / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n', encoding="utf-8")


def _copy(out: Path, files: Mapping[str, Path]) -> None:
    for name, path in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)


def _tell(out: Path, loader: str, reading: str) -> None:
    """Put behind the card how the folder is opened; the section on the package's own program is not true here."""
    card = out / _CARD
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    before, found, after = text.partition("\n## Running it\n")
    kept = before + ("\n## " + after.split("\n## ", 1)[1] if found and "\n## " in after else "")
    card.write_text(
        f"""{kept.rstrip()}

## Opening it

    from transformers import AutoTokenizer, {loader}

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = {loader}.from_pretrained(FOLDER).eval()

{reading}
""".lstrip(),
        encoding="utf-8",
    )


def _json(artifact: Artifact, name: str) -> dict[str, Any]:
    try:
        found = json.loads(artifact.files[name].read_text(encoding="utf-8"))
    except (KeyError, OSError, ValueError) as error:
        raise ArtifactCorruptError(f"{artifact.name} has no {name} that can be read") from error
    if not isinstance(found, dict):
        raise ArtifactCorruptError(f"{name} of {artifact.name} holds no fields")
    return found


def _refused(artifact: Artifact, why: str) -> NotImplementedByServerError:
    return NotImplementedByServerError(
        f"{artifact.name} has no form for transformers: {why}; the fetched folder's run.py answers for it"
    )
