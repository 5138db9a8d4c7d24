"""A Hugging Face model folder, validated before the first weight is read, and read one tensor at a time.

What is checked when a reader is made, all of it from headers and small files, so in milliseconds:

* `config.json` is strict JSON, an object, and asks for no code of its own: remote code is never run. Its `auto_map` is
  dropped: models whose code transformers has taken over since still carry one, and an unknown type is refused anyway.
* The weights are safetensors. Pickles (`*.bin`, `*.pt`) can run code when loaded, so they are refused, not converted.
* The index names plain files of this folder. An index is a list of paths chosen by a stranger: `../../secret` in it, or
  a link with a harmless name, would copy another model's tensors, or any file, into a published output. So each file
  must lie in the folder itself. One exception: a snapshot of the hub cache is made of links into its own `blobs/`
  (and, in newer caches, from there into the cache's shared store of files named by their hash).
* Index and shards agree: each tensor is in the one shard that the index says, and no shard holds anything more.

Refused on purpose: guessing. A folder that holds both `model.safetensors` and an index to other files is an error,
since loaders disagree on which to read.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from infopt.errors import BadInput, OutOfResources, Unsupported, UsageError
from infopt.header import MIB, TensorInfo, look, parse_json, read_bytes, read_header, read_json, read_tensor, show

__all__ = ["CheckpointReader", "TensorInfo", "contained", "read_header", "read_json", "read_tensor", "resolve"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_CONFIG = 16 * MIB
MAX_SIDE_FILE = 512 * MIB
MAX_TENSORS = 1_000_000
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
COUNTS = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "n_layer", "n_embd", "n_head")

SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
SIDE_NAMES = re.compile(r"(licen[cs]e|copying|notice|use_policy|readme|merges|vocab)[^/]*", re.IGNORECASE)
TEMPLATES = "additional_chat_templates"
# Files with a harmless suffix that describe other weights than those that infopt writes, or another run.
NOT_SIDE = {
    CONFIG,
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "params.json",
    "trainer_state.json",
}
OURS = {"recipe.yaml", "infopt.json", "verification.json", "manifest.json"}
DOWNLOADS = ["*.safetensors", INDEX, *(f"*{suffix}" for suffix in SIDE_SUFFIXES), "LICENSE*", "LICENCE*", "NOTICE*"]
NO_DOWNLOADS = ["*/*.safetensors", "consolidated*.safetensors", "adapter_model*.safetensors"]


class CheckpointReader:
    """The tensors of a local model folder: `tensors` (sorted by name), `config`, and bytes on request.

    Raises BadInput, Unsupported or UsageError as the module describes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        _check_folder(self.folder)
        self._config_bytes = read_bytes(contained(self.folder, CONFIG), MAX_CONFIG)
        self.config: dict[str, Any] = _check_config(self._config_bytes, self.folder / CONFIG)
        self._files, self.tensors = _read_weights(self.folder)
        self.side_files()  # an unsafe tokenizer file is found now, not after an hour

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor in its storage dtype, in fresh memory; BadInput when there is no such tensor."""
        return read_tensor(self._info(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Only the leading rows `start:stop` of a tensor: shape [stop - start, ...]."""
        return read_tensor(self._info(name), start, stop)

    def fingerprint(self) -> str:
        """A sha256 that changes with the config, a header, or the size or time of a weight file.

        The weights' bytes are not read, and the folder's own place does not count.
        """
        digest = hashlib.sha256(self._config_bytes)
        for name in self._files:
            status = os.stat(self.folder / name)
            digest.update(f"\n{name!r} {status.st_size} {status.st_mtime_ns}".encode())
            for info in read_header(self.folder / name)[0].values():
                digest.update(f"\n{info.name!r} {info.dtype} {info.shape} {info.offset}".encode())
        return digest.hexdigest()

    def side_files(self) -> list[Path]:
        """Files to copy verbatim: tokenizer, chat templates, generation config, licence, readme.

        Each lies in the folder (a link out of it is BadInput). Left out: weights, indexes, config.json, code,
        other tools' quantization configs, and infopt's own reports.
        """
        found = [path for path in sorted(self.folder.iterdir()) if _is_side(path.name) and not path.is_dir()]
        templates = self.folder / TEMPLATES
        if templates.is_dir():
            found += [path for path in sorted(templates.iterdir()) if path.suffix == ".jinja"]
        for path in found:
            size = _regular_size(contained(self.folder, str(path.relative_to(self.folder))))
            if size > MAX_SIDE_FILE:
                raise BadInput(
                    f"{path} is too large",
                    f"It has {size:,} bytes, the limit is {MAX_SIDE_FILE:,}.",
                    f"rm {quote(str(path))}",
                )
        return found

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise BadInput(
                f"{self.folder} has no tensor {show(name)}", "config.json promises more than the weights hold."
            )
        return self.tensors[name]


def contained(folder: Path, name: str) -> Path:
    """`folder/name`, after a check that every link on the way ends inside the folder, or in its own hub cache.

    Raises BadInput. The file need not exist.
    """
    path = folder / name
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        why = "A model may only refer to files inside its own folder."
        raise BadInput(f"{folder} refers to {show(name)}", why, look(folder))
    try:
        home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    except OSError as err:
        raise BadInput(f"{folder} refers to {show(name)}", f"{err.strerror}.", look(folder)) from err
    if real.is_relative_to(home) or _in_hub_cache(home, path, real):
        return path
    raise BadInput(
        f"{path} is a link out of its folder",
        f"It leads to {real}; a model may only refer to files inside its own folder.",
        f"If that file is meant: cp --remove-destination {quote(str(real))} {quote(str(path))}",
    )


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of a model: the folder itself, or a snapshot of a hub id, downloaded where it is not cached.

    Only safetensors and side files are fetched, never code or pickles. `HF_HUB_OFFLINE=1` is respected.
    Raises UsageError (a file, GGUF), BadInput (no such model or revision, no access), OutOfResources (disk full).
    """
    path = Path(os.path.expanduser(model))
    if path.suffix.lower() == ".gguf":
        raise _gguf(path)
    if model and os.path.isdir(path):
        if revision is not None:
            raise UsageError(f"{path} is a local folder", "A revision belongs to a hub id.", "Leave --revision out.")
        return path
    if model and os.path.exists(path):
        raise UsageError(
            f"{path} is a file",
            "A model is a folder with config.json and safetensors.",
            f"Give its folder: {quote(str(path.parent))}",
        )
    if not model or model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model or "\0" in model:
        raise BadInput(f"There is no folder {show(model)}", "", look(path.parent))
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download  # costs 0.3 s; a local folder does not need it

    wanted = show(model) + (f" at revision {show(revision)}" if revision else "")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=DOWNLOADS, ignore_patterns=NO_DOWNLOADS))
    except errors.HFValidationError as err:
        raise UsageError(f"{wanted} is neither a folder nor a hub id", str(err)[:300], "ls") from err
    except errors.GatedRepoError as err:
        raise BadInput(f"{wanted} is gated", "Accept its terms on its page, then log in.", "hf auth login") from err
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as err:
        why = "It is no local folder, and the hub does not know it, or not this revision, or it is private."
        raise BadInput(f"{wanted} was not found", why, "hf auth login") from err
    except errors.LocalEntryNotFoundError as err:
        why = "It is no local folder, it is not complete in the hub cache, and the hub could not be reached."
        raise BadInput(f"{wanted} was not found", why, f"HF_HUB_OFFLINE=0 hf download {model}") from err
    except (OSError, errors.HTTPError) as err:
        kind = OutOfResources if getattr(err, "filename", None) else BadInput  # a local path: our disk, not the network
        raise kind(f"{wanted} could not be downloaded", str(err)[:300], f"hf download {model}") from err


def _check_folder(folder: Path) -> None:
    if not os.path.isdir(folder):
        if folder.suffix.lower() == ".gguf":
            raise _gguf(folder)
        raise BadInput(
            f"{folder} is not a folder", "A model is a folder with config.json and safetensors.", look(folder.parent)
        )
    if os.path.lexists(folder / CONFIG):
        return
    ggufs = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if ggufs:
        raise _gguf(ggufs[0])
    raise BadInput(f"{folder} has no {CONFIG}", "So it is not a Hugging Face model folder.", look(folder))


def _gguf(path: Path) -> UsageError:
    return UsageError(
        f"{path} is a GGUF file",
        "It must be converted first.",
        f"infopt convert {quote(str(path))} -o {quote(path.stem)}",
    )


def _check_config(data: bytes, path: Path) -> dict[str, Any]:
    config = parse_json(data, path)
    if not isinstance(config, dict):
        raise BadInput(f"{path} is not a JSON object", f"It is a {type(config).__name__}.", f"cat {quote(str(path))}")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise BadInput(f"{path} has no model_type", f"It is {show(model_type)}.", f"cat {quote(str(path))}")
    config.pop("auto_map", None)
    key = _asks_for_code(config)
    if key:
        why = "Code that comes with a model (remote code) is never run."
        fix = f"If transformers itself knows {show(model_type, 40)}, remove {key!r} from the config.json of a copy."
        raise Unsupported(f"{path} asks for code of its own ({key!r})", why, fix)
    for name in COUNTS:
        value = config.get(name)
        if value is not None and not isinstance(value, list) and (type(value) is not int or value < 1):
            raise BadInput(
                f"{path}: {name} is {show(value)}",
                "It must be a whole number above 0.",
                f"grep {name} {quote(str(path))}",
            )
    return config


def _asks_for_code(value: Any) -> str | None:
    """The first `auto_map` or true `trust_remote_code` at any depth; parse_json has bounded the depth."""
    if isinstance(value, list):
        return next(filter(None, map(_asks_for_code, value)), None)
    if not isinstance(value, dict):
        return None
    own = next((key for key in ("auto_map", "trust_remote_code") if value.get(key)), None)
    return own or next(filter(None, map(_asks_for_code, value.values())), None)


def _read_weights(folder: Path) -> tuple[list[str], dict[str, TensorInfo]]:
    weight_map = _read_index(folder) if os.path.lexists(folder / INDEX) else None
    single = os.path.lexists(folder / SINGLE)
    if weight_map is None and not single:
        raise _no_weights(folder)
    if weight_map is not None and single and set(weight_map.values()) != {SINGLE}:
        why = f"{INDEX} names other files, and loaders disagree on which to read."
        raise BadInput(
            f"{folder} has both {SINGLE} and {INDEX}", why, f"Remove the wrong one: rm {quote(str(folder / SINGLE))}"
        )
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    for name in names:  # all of them before the first is opened: a missing shard is found at once
        _regular_size(contained(folder, name))
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        for key, info in read_header(folder / name)[0].items():
            if key in tensors:
                where = f"{tensors[key].file.name} and {name}"
                raise BadInput(f"tensor {show(key)} is in two shards of {folder}", f"{where}.", look(folder))
            tensors[key] = info
        if len(tensors) > MAX_TENSORS:
            raise BadInput(f"{folder} has too many tensors", f"At most {MAX_TENSORS:,} are read.", look(folder))
    if not tensors:
        raise BadInput(f"{folder} holds no tensors", "Its weight files are empty.", look(folder))
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    return names, dict(sorted(tensors.items()))


def _read_index(folder: Path) -> dict[str, str]:
    path = contained(folder, INDEX)
    index = read_json(path, max_values=MAX_TENSORS)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(
            f"{path} has no weight_map",
            "It must map tensor names to file names.",
            f"python -m json.tool {quote(str(path))}",
        )
    metadata = index.get("metadata", {})
    total = metadata.get("total_size", 0) if isinstance(metadata, dict) else None
    if type(total) is not int or total < 0:  # its value is only informational: writers count tied tensors differently
        raise BadInput(
            f"{path}: metadata.total_size is {show(total)}",
            "It must be a whole number.",
            f"grep total_size {quote(str(path))}",
        )
    for key, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & {"/", "\\", "\0"}
        if not plain:
            why = "A shard must be the name of a .safetensors file in the same folder."
            raise BadInput(
                f"{path}: tensor {show(key)} is said to be in {show(name)}",
                why,
                f"grep safetensors {quote(str(path))} | sort -u",
            )
    return weight_map


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    fix = f"Fetch {INDEX} and the shards again, all from one revision."
    for key, name in weight_map.items():
        if key not in tensors:
            raise BadInput(f"tensor {show(key)} is not in {folder / name}", f"{INDEX} says that it is.", fix)
        if tensors[key].file.name != name:
            why = f"{INDEX} says {name}, but it is in {tensors[key].file.name}."
            raise BadInput(f"tensor {show(key)} of {folder} is in the wrong shard", why, fix)
    extra = next((key for key in tensors if key not in weight_map), None)
    if extra is not None:
        raise BadInput(
            f"tensor {show(extra)} of {tensors[extra].file} is not in {INDEX}", "It would be dropped silently.", fix
        )


def _no_weights(folder: Path) -> BadInput | Unsupported | UsageError:
    paths = sorted(folder.iterdir())
    ggufs = [path for path in paths if path.suffix.lower() == ".gguf"]
    if ggufs:
        return _gguf(ggufs[0])
    if any(path.name == "adapter_model.safetensors" for path in paths):
        return Unsupported(
            f"{folder} is an adapter", "It must be merged into its base model first.", "PeftModel.merge_and_unload()"
        )
    pickles = [path.name for path in paths if path.suffix.lower() in PICKLES and path.name != "training_args.bin"]
    if pickles:
        load = f"from transformers import AutoModelForCausalLM as M; m = M.from_pretrained({str(folder)!r})"
        code = f"{load}; m.save_pretrained({str(folder) + '-safetensors'!r})"
        why = f"It has only {show(pickles[0])}; loading a pickle can run code."
        fix = f'If you trust it, convert it to safetensors: python -c "{code}"'
        return BadInput(f"{folder} has no safetensors weights", why, fix)
    return BadInput(f"{folder} has no {SINGLE} and no {INDEX}", "So it holds no weights.", look(folder))


def _in_hub_cache(home: Path, path: Path, real: Path) -> bool:
    """Whether `path` is a link as the hub cache makes them: `models--x--y/snapshots/REV/name -> ../../blobs/HASH`."""
    caches = (p.parent for p in home.parents if p.name == "snapshots" and p.parent.name.startswith("models--"))
    repo = next(caches, None)
    if repo is None or not path.is_symlink():
        return False
    blobs = repo / "blobs"
    if real.parent == blobs:
        return True
    # Since 2026 a blob may itself be a link into the cache-wide store: CACHE/blobs/ab/ab... (64 hex digits).
    store = repo.parent / "blobs"
    link = Path(os.path.normpath(path.parent.resolve() / os.readlink(path)))
    in_store = real.parent.parent == store and real.name.startswith(real.parent.name)
    hashed = re.fullmatch(r"[0-9a-f]{64}", real.name) is not None
    return link.parent == blobs and in_store and hashed and (store / ".huggingface-shared-blobs").is_file()


def _is_side(name: str) -> bool:
    if name.startswith(".") or name in NOT_SIDE or name in OURS or name.endswith((".index.json", ".py")):
        return False
    path = Path(name)
    licence = SIDE_NAMES.fullmatch(name) is not None and path.suffix.lower() in ("", *SIDE_SUFFIXES)
    return licence or name.endswith(SIDE_SUFFIXES)


def _regular_size(path: Path) -> int:
    try:
        status = os.stat(path)
    except OSError as err:
        raise BadInput(f"{path} cannot be read", f"{err.strerror}.", look(path.parent)) from err
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{path} is not a regular file", "A folder, pipe, socket or device is never read.", look(path))
    return status.st_size
