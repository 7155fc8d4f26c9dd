# SPDX-License-Identifier: Apache-2.0
"""Which files beside a model's weights come along: all but other weights, training's leftovers, and private ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE
from ..checkpoints.source import Source

_ANOTHER_FORMAT = "unpruned weights in another format"
_OUT = {
    "adapter_config.json": "an adapter for the unpruned model",
    "adapter_model.*": "an adapter for the unpruned model",
    "adapters.*": "an adapter for the unpruned model",
    "*imatrix*": "statistics of the unpruned experts",
    "optimizer*.pt": "of the training before pruning",
    "scheduler*.pt": "of the training before pruning",
    "rng_state*.pth": "of the training before pruning",
    "training_args.bin": "of the training before pruning",
    **dict.fromkeys(
        "*.bin *.bin.* *.pt *.pt2 *.pth *.ckpt *.h5 *.keras *.msgpack *.gguf *.ggml *.llamafile *.onnx* *.tflite "
        "*.ot *.npz *.mlmodel *.pte *.litertlm *.uqff *.nemo *.index.json consolidated* tf_model* flax_model* "
        "openvino_*.xml *.safetensors".split(),
        _ANOTHER_FORMAT,
    ),
    **dict.fromkeys("*.engine *.plan *.rknn *.axmodel *.hef".split(), "compiled from the unpruned model"),
}
_OUT_FOLDERS = (".mlpackage", ".mlmodelc")
_TRAINING = "of the training before pruning"
_TRAINING_FILES = (
    "optimizer* scheduler* rng_state* trainer_state* training_args* scaler.pt zero_to_fp32.py latest events.out.* "
    "train_results.* all_results.* trainer_log.* *.log nohup.out"
).split()
_TRAINING_FOLDERS = (
    "checkpoint-*",
    "global_step*",
    "runs",
    "wandb",
    "logs",
    "mlruns",
    "lightning_logs",
    "tensorboard",
)
_PRIVATE = "it may hold what is private"
_PRIVATE_FILES = (
    "*credential* *secret* *password* *passwd* *service?account* *private* *apikey* *api_key* *.env env.* auth.json "
    "token.json tokens.json token.txt *access?token* *_key.* *.key.* *kubeconfig* *.netrc *.pem *.key *.p12 *.pfx "
    "*.jks *.kdbx *.gpg *.asc id_rsa* id_dsa* id_ecdsa* id_ed25519* known_hosts authorized_keys *history *.sqlite*"
).split()
_DATA_FILES = "*.jsonl *.jsonl.* *.ndjson *.parquet *.arrow *.csv *.tsv *.zip *.tar *.tar.* *.tgz *.7z *.npy".split()
_CACHES = ("__pycache__", "node_modules", "venv", "site-packages")


def carried(names: Sequence[str], find: Callable[[str], Path | None]) -> tuple[list[str], dict[str, str]]:
    """Which of a model's files belong beside pruned weights.

    The model's own weights, which are written anew, are in neither answer. Nothing is carried that a training left, or
    that looks like a person's own: keys, passwords, histories.

    Args:
        names: All files of the model.
        find: Gives the path of one.

    Returns:
        The files to carry; and those that stay out, and why.
    """
    own = {SINGLE_FILE} if SINGLE_FILE in names else set()
    if INDEX_FILE in names:
        found = None if own else find(INDEX_FILE)
        with contextlib.suppress(ValueError, AttributeError):
            own |= set((json.loads(found.read_bytes()) if found else {}).get("weight_map", {}).values())
        own.add(INDEX_FILE)
    out: dict[str, str] = {}
    for name in names:
        folder, _, base = name.lower().rpartition("/")
        if name in own:
            continue
        if any(part.endswith(_OUT_FOLDERS) for part in folder.split("/")):
            out[name] = _ANOTHER_FORMAT
        elif reason := next((why for pattern, why in _OUT.items() if fnmatchcase(base, pattern)), None):
            if base.endswith(".safetensors") and reason is _ANOTHER_FORMAT and not base.startswith("consolidated"):
                reason = "weights in a sub-folder" if folder else "weights that are not the model's"
            out[name] = reason
        elif reason := _not_the_models(folder, base):
            out[name] = reason
    emptied = {name.rpartition("/")[0] for name in out} - {""}
    out |= {name: "of weights that stay out" for f in emptied if (name := f"{f}/config.json") in names}
    return [name for name in names if name not in own and name not in out], out


def carried_from(source: Source) -> tuple[list[str], dict[str, str]]:
    """As :func:`carried`, of a model's folder or repository, without what links lead out of the folder."""
    names, out = carried(source.files(), source.find)
    links = {name: where for name in names if (where := source.leads_out(name)) is not None}
    out |= {name: f"a link that leads out of the folder, to {where}" for name, where in links.items()}
    if source.is_local:
        out |= {name: "a link to a folder" for name in source.linked_folders()}
    others = set(source.other_files())
    return [name for name in names if name not in out and name in others], out


def _not_the_models(folder: str, base: str) -> str | None:
    """Why a file, by the lower-case names of its folder and its own, belongs to no model; None where it may."""
    folders = folder.split("/")
    if any(fnmatchcase(base, p) for p in _TRAINING_FILES) or any(
        fnmatchcase(part, p) for part in folders for p in _TRAINING_FOLDERS
    ):
        return _TRAINING
    if any(part in _CACHES for part in folders):
        return "a program's own, and not the model's"
    if any(fnmatchcase(base, pattern) for pattern in _DATA_FILES):
        return "data, and not the model's"
    return _PRIVATE if any(fnmatchcase(base, pattern) for pattern in _PRIVATE_FILES) else None
