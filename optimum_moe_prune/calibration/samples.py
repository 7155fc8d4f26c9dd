# SPDX-License-Identifier: Apache-2.0
"""Texts, files, datasets or token tensors -> the token samples a model is calibrated or evaluated on.

Each text is one sample, tokenised with the tokenizer's own special tokens and cut to ``max_length``.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from ..checkpoints.source import Source
from ..compat import ModelConfig, text_config
from ..config import MoEPrunerConfig
from ..config_checks import SAMPLE_SELECTIONS, check_clusters
from ..errors import RequestError
from ..models.batches import Batch
from ..progress import progress
from ..statistics.passages import Passages
from ..statistics.samples import Sample, equal_shares, keep_tokens, samples_fingerprint
from ..storage.values import Json, Values
from .counts import Counts, Tally
from .drawing import Draw, Tokens
from .records import Origin, Reading
from .representatives import NumClusters, representatives
from .texts import (
    HubMixture,
    file_hashes,
    hub_parts,
    hub_remarks,
    hub_rows,
    needs_tokenizer,
    resolved,
    rows_of_source,
    source_names,
)
from .tokens import Encoder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


CalibrationInput = Union[
    str,
    PathLike,
    Sequence[str],
    Sequence[PathLike],
    Sequence[Values],
    Tensor,
    Sequence[Tensor],
    "Dataset",
    HubMixture,
    "CalibrationSet",
]
"""``list[str]`` is texts; ``str``, ``Path`` and ``list[Path]`` are files (``calibration.readers``), a ``str`` that
begins with ``hub:`` or ``preset:`` datasets on the Hub.

Records have text, a chat, or a question and its answer (``calibration.records``), and may have ``domain``; a list of
chats is one record each; tensors are token ids ``(tokens,)`` or ``(samples, tokens)``, used as they are.
"""


@dataclass(frozen=True)
class CalibrationSet:
    """Token samples with their domains, ordered by hash.

    Attributes:
        samples: Hash, domain and length of each sample.
        token_ids: Token ids of each sample, ``(tokens,)`` int64.
        truncated: How many samples were cut to ``max_length``.
        duplicates: How many samples were left out because the same tokens were there already.
        sources: Names of the files they were read from, or mixtures on the Hub.
        counts: What became of the records that were read.
        settings: What they follow from, as plain values: how they were chosen, and a hash of each file.
    """

    samples: tuple[Sample, ...]
    token_ids: tuple[Tensor, ...]
    truncated: int = 0
    duplicates: int = 0
    sources: tuple[str, ...] = ()
    counts: Counts = Counts()
    settings: Json = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def fingerprint(self) -> str:
        """A hash of the samples and their domains."""
        return samples_fingerprint(self.samples)

    @property
    def passages(self) -> Passages:
        """By what the samples are known again."""
        return Passages.of([sample.hash for sample in self.samples], self.token_ids)

    @classmethod
    def build(
        cls,
        source: CalibrationInput,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        num_samples: int | None = None,
        max_length: int = 2048,
        sample_selection: str = "first",
        num_clusters: NumClusters = None,
        pack: bool = False,
        seed: int = 0,
        text_column: str | None = None,
        template_args: Values | None = None,
        skip_bad: bool = False,
    ) -> CalibrationSet:
        """Read, select, tokenise and cut.

        Args:
            source: See ``CalibrationInput``. A ``CalibrationSet`` is returned as it is.
            tokenizer: Needed for anything but tensors.
            num_samples: The most samples to use, in equal shares of the domains; None uses all.
            max_length: Longer samples are cut to this many tokens.
            sample_selection: ``"first"`` takes the first samples of each domain, ``"random"`` a seeded choice,
                ``"kmeans"`` the representatives of clusters.
            num_clusters: For ``"kmeans"``: representatives of each domain; ``"auto"`` finds for each domain the
                number, of 2 to 20, whose clusters are most distinct (silhouette). With either ``num_samples`` is not
                looked at; by default it sets the number, in equal shares of the domains.
            pack: Join the samples of a domain and cut them into samples of exactly ``max_length`` tokens.
            seed: For ``"random"`` and ``"kmeans"``.
            text_column: The column that holds the text, where it is none of the usual ones.
            template_args: Further arguments of the chat template, such as ``{"enable_thinking": False}``.
            skip_bad: Leave out and count records that cannot be used; by default they are refused.

        Raises:
            RequestError: If there is nothing to read, a file or record is broken, or no record has two tokens. Blank
                records and those of less than two tokens are left out and counted.
        """
        if isinstance(source, CalibrationSet):
            return source
        if sample_selection not in SAMPLE_SELECTIONS:
            raise RequestError(f"sample_selection is {sample_selection!r}; known: {', '.join(SAMPLE_SELECTIONS)}.")
        if max_length < 2:
            raise RequestError(f"max_length is {max_length}; a sample needs at least 2 tokens.")
        if num_samples is not None and num_samples < 1:
            raise RequestError(f"num_samples is {num_samples}; at least 1 sample is needed.")
        check_clusters(sample_selection, num_clusters)
        encoder = Encoder(tokenizer, Reading(text_column, dict(template_args or {}), skip_bad))
        settings: Json = {
            "num_samples": num_samples,
            "max_length": max_length,
            "sample_selection": sample_selection,
            "num_clusters": num_clusters,
            "pack": pack,
            "seed": seed,
            "text_column": text_column,
            "template_args": dict(template_args or {}),
            "skip_bad": skip_bad,
            "files": file_hashes(resolved(source)),
        }
        kmeans = sample_selection == "kmeans"
        source, tally = resolved(source), Tally()
        names = source_names(source)
        if isinstance(source, HubMixture):
            usable = num_samples if sample_selection == "first" and not pack else None
            everything = num_samples is None and num_clusters is None
            parts = hub_parts(source.mixture)
            tally.remarks += hub_remarks(parts)
            pool = list(hub_rows(parts, usable, everything, encoder.reading))
            draw = Draw(lambda tally, is_enough: pool, encoder, tally, max_length)
        else:
            rows = functools.partial(rows_of_source, source, encoder.reading)
            draw = Draw(rows, encoder, tally, max_length)
        requested = None if num_clusters is not None else num_samples
        tokens: Iterable[Tokens] = (
            draw.packed(requested, sample_selection, seed)
            if pack
            else draw.single(None if kmeans else requested, sample_selection, seed)
        )

        def choose(ids: list[Tensor], domains: list[str]) -> list[int]:
            return representatives(ids, domains, num_samples, num_clusters, seed)

        tokens = progress(tokens, "tokenising", unit="text")
        found = cls._of_tokens(tokens, max_length, tally, choose if kmeans else None)
        tally.remarks += encoder.notes()
        found = replace(found, sources=names, settings=settings, counts=tally.counts(found, max_length, requested))
        for note in found.counts.warnings():
            logger.warning("%s", note)
        return found

    @classmethod
    def for_recipe(
        cls,
        source: CalibrationInput,
        recipe: MoEPrunerConfig,
        tokenizer: PreTrainedTokenizerBase | Source | None,
        model_config: ModelConfig,
        recovers: bool = False,
    ) -> CalibrationSet:
        """As :meth:`build`, by the settings of a recipe and for a model of this config.

        Args:
            source: As for :meth:`build`.
            recipe: The recipe.
            tokenizer: The tokenizer, or the model that it comes with.
            model_config: Of the model.
            recovers: Whether they are for the recipe's recovery, which takes all there are, or ``recovery_samples``.

        Raises:
            RequestError: As :meth:`build`, and if the model has no tokenizer where one is needed.
        """
        if isinstance(source, CalibrationSet):
            few = recovers and recipe.recovery_samples is not None
            return source.take(recipe.recovery_samples, "recovery_samples") if few else source  # type: ignore[arg-type]
        if isinstance(tokenizer, Source):
            tokenizer = tokenizer.require_tokenizer() if needs_tokenizer(source) else None
        by_clusters = recipe.sample_selection == "kmeans"  # which would be of all samples there are
        found = cls.build(
            source,
            tokenizer,
            num_samples=recipe.recovery_samples if recovers else recipe.num_samples,
            max_length=sample_length(recipe.max_length, model_config),
            sample_selection="first" if recovers and by_clusters else recipe.sample_selection,
            num_clusters=None if recovers else recipe.num_clusters,
            pack=recipe.pack,
            seed=recipe.seed,
            text_column=recipe.text_column,
            template_args=recipe.template_args,
            skip_bad=recipe.skip_bad,
        )
        if not recovers:
            return found
        settings = {name: value for name, value in found.settings.items() if name != "num_samples"}
        return replace(found, settings={**settings, "recovery_samples": recipe.recovery_samples})

    @classmethod
    def from_hub(cls, mixture: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> CalibrationSet:
        """Samples of datasets on the Hub: :meth:`build` of a :class:`HubMixture`.

        Args:
            mixture: Comma-separated ``name[config](split):samples``.
            tokenizer: The model's tokenizer.
            options: As for :meth:`build`.
        """
        return cls.build(HubMixture(mixture), tokenizer, **options)

    @classmethod
    def _of_tokens(
        cls,
        tokens: Iterable[Tokens],
        max_length: int,
        tally: Tally,
        choose: Callable[[list[Tensor], list[str]], list[int]] | None = None,
    ) -> CalibrationSet:
        """Cut samples, leave out what is there already and, with ``choose``, all but the chosen ones."""
        entries: dict[str, tuple[Sample, Tensor, bool]] = {}
        origins: dict[str, Origin] = {}
        duplicates, shared = 0, list[str]()
        for origin, ids, domain in tokens:
            was_cut = len(ids) > max_length
            ids = ids[:max_length].to(torch.int64).clone()
            digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
            if digest in entries:
                duplicates += 1
                first = entries[digest][0].domain
                if domain != first:
                    shared.append(f"{origins[digest].public}, of domain {first!r}, and {origin.public}, of {domain!r}")
                continue
            entries[digest], origins[digest] = (Sample(digest, domain, len(ids)), ids, was_cut), origin
        if not entries:
            raise tally.nothing_left()
        if shared:
            texts = "1 text is" if len(shared) == 1 else f"{len(shared)} texts are"
            tally.remarks.append(f"{texts} in two domains, and counted for the one read first: {shared[0]}.")
        ordered = [entries[digest] for digest in sorted(entries)]
        if choose is not None:
            ordered = [ordered[i] for i in choose([ids for _, ids, _ in ordered], [s.domain for s, _, _ in ordered])]
        truncated = sum(was_cut for _, _, was_cut in ordered)
        return cls(tuple(s for s, _, _ in ordered), tuple(ids for _, ids, _ in ordered), truncated, duplicates)

    def notes(self) -> tuple[str, ...]:
        """What a person must know of how the samples came about, as sentences."""
        return self.counts.notes()

    def take(self, num_samples: int, setting: str = "sensitivity_samples") -> CalibrationSet:
        """At most so many of the samples, in equal shares of the domains; their hashes decide which.

        Args:
            num_samples: How many.
            setting: The one that says so.
        """
        order = sorted(range(len(self)), key=lambda i: self.samples[i].domain)
        dealt = equal_shares([self.samples[i].domain for i in order], num_samples)
        return self.picked(sorted(order[i] for i in dealt), {setting: num_samples})

    def picked(self, numbers: Sequence[int], settings: Values | None = None) -> CalibrationSet:
        """The samples of these numbers, in rising order; ``settings`` say how they were chosen."""
        samples, token_ids = tuple(self.samples[i] for i in numbers), tuple(self.token_ids[i] for i in numbers)
        return CalibrationSet(samples, token_ids, sources=self.sources, settings={**self.settings, **(settings or {})})

    def kept_tokens(self, max_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Sample and position of the tokens for which statistics per token are kept; see ``keep_tokens``."""
        return keep_tokens(self.samples, max_tokens, seed)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise unless every token id is below ``vocab_size``.

        Raises:
            RequestError: Naming the id, with the most likely cause.
        """
        for ids in self.token_ids:
            if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
                wrong = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
                raise RequestError(
                    f"token id {wrong} is outside the model's vocabulary of {vocab_size}; the tokenizer belongs to "
                    "another model."
                )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches of samples of similar length, longest first, padded on the right.

        Longest first, so that a batch that does not fit in memory fails at once and not in the end.

        Args:
            batch_size: The most samples in a batch.
        """
        self.num_batches(batch_size)
        order = sorted(range(len(self)), key=lambda i: (-self.samples[i].num_tokens, i))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            length = self.samples[chosen[0]].num_tokens
            input_ids = torch.zeros(len(chosen), length, dtype=torch.int64)
            mask = torch.zeros_like(input_ids)
            for row, index in enumerate(chosen):
                ids = self.token_ids[index]
                input_ids[row, : len(ids)] = ids
                mask[row, : len(ids)] = 1
            yield Batch(input_ids, mask, torch.tensor(chosen))

    def num_batches(self, batch_size: int) -> int:
        """How many batches :meth:`batches` gives.

        Raises:
            RequestError: If ``batch_size`` is not at least 1.
        """
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; it must be at least 1.")
        return -(-len(self) // batch_size)


def sample_length(max_length: int, config: ModelConfig) -> int:
    """``max_length``, or what the model was made for (``max_position_embeddings``) where that is shorter."""
    longest = getattr(text_config(config), "max_position_embeddings", None)
    return min(max_length, longest) if isinstance(longest, int) and longest > 1 else max_length
