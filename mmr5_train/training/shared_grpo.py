"""TRL's GRPOTrainer with shared prompts: each prompt is read once for its completions on a rank.

`SharedPrefixGRPOTrainer` computes the same numbers as TRL's trainer with less work:

- A prompt is tokenized, and its images are processed, once for the completions that a rank samples of it.
- These completions are sampled after one prefill of their prompt.
- Old, reference and policy log-probabilities come from one packed row (`models.shared_prefix`). Micro-batches of
  an optimizer step that hold completions of the same prompt are computed together (`training.sharing`).
- With a frozen vision tower, page features are computed once per rollout batch and used in all its forward passes.
  They replace the pixels in the buffered batch and are smaller: a visual token takes 4 × 1,176 float32 values as
  pixels, and `hidden_size` values of the model's dtype as features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import gcd
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import split_tensor_dict, strip_images_from_messages

from mmr5_train.models.shared_decoding import generate
from mmr5_train.models.shared_prefix import (
    SharedPrompt,
    pack,
    share_prefixes,
    shared_prompts,
    unsupported_reason,
)
from mmr5_train.training.adapters import without_adapter
from mmr5_train.training.sharing import sharing_of

PIXEL_FIELDS = ("pixel_values", "image_grid_thw")


def unsupported(model: Any, args: Any) -> str | None:
    """The reason why a run with these settings (`args` is a GRPOConfig) can't share prompts, or None."""
    if is_deepspeed_zero3_enabled() and not args.ds3_gather_for_generation:
        return (
            "trainer.ds3_gather_for_generation=false: every forward pass of sampling is collective under ZeRO-3, "
            "but the groups of different ranks end after different numbers of passes"
        )
    if getattr(args, "use_transformers_continuous_batching", False):
        return "transformers' continuous batching samples the rollouts"
    return sharing_of(args).nothing_to_share or unsupported_reason(model)


@dataclass(frozen=True)
class _Scores:
    """Log-probabilities and entropies, (N, C), of a micro-batch. TRL's loss receives them instead of the model."""

    log_probs: Tensor
    entropies: Tensor


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """Takes the arguments of GRPOTrainer. Raises `ValueError` for settings that `unsupported` rejects.

    A batch contains its prompts: in the multimodal fields from tokenization to sampling, and under
    "shared_prompts" from the rollout to the loss. TRL's `_get_per_token_logps_and_entropies` receives token ids
    but not the batch, so `_bind_prompts` stores the prompts during the call that scores them.
    """

    args: Any  # GRPOConfig; the base class declares TrainingArguments
    model: Any
    num_generations: Any
    num_generations_eval: Any
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base = without_adapter(self.accelerator.unwrap_model(self.model))
        reason = unsupported(base, self.args)
        if reason is not None:
            raise ValueError(f"prompts can't be shared: {reason}")
        for model in (base, self.ref_model):
            if model is not None:
                share_prefixes(self.accelerator.unwrap_model(model))
        self.sharing = sharing_of(self.args)
        tower = getattr(base.base_model, "visual", None)
        self._tower_is_frozen = tower is not None and not any(p.requires_grad for p in tower.parameters())
        self._bound_prompts: list[SharedPrompt] | None = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Computes all micro-batches of a pass in its last micro-step. The micro-steps before it do nothing.

        The last one can be that in which the gradients of all ranks are summed.
        """
        if (self._step + 1) % self.sharing.micro_batches:
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """In training, the list of micro-batches of the pass that ends with this micro-step. Samples a new rollout
        batch if the pass is its first. In evaluation, TRL's batch.
        """
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        count = self.sharing.micro_batches
        first = self._step + 1 - count
        if first % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            batch = _shuffle_blocks(batch, self.sharing.block)
            self._buffered_inputs = split_tensor_dict(batch, self.args.steps_per_generation)
        first %= self.args.steps_per_generation
        return self._buffered_inputs[first : first + count]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL would run the image processor on every copy of a prompt that has an "images" column.
        examples = [_move_images_into_prompt(example) for example in inputs]
        with self._bind_prompts([]) as prompts:  # `_generate_single_turn` fills the list
            output: dict[str, Any] = super()._generate_and_score_completions(examples)
        output["shared_prompts"] = prompts
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        """The sum of TRL's losses of the micro-batches `inputs`, from one pass of the model."""
        micro_batches = inputs if isinstance(inputs, list) else [inputs]
        ids, mask = (torch.cat([_rows(batch, name) for batch in micro_batches]) for name in ("ids", "mask"))
        with self._bind_prompts([prompt for batch in micro_batches for prompt in batch["shared_prompts"]]):
            log_probs, entropies, _ = self._get_per_token_logps_and_entropies(
                model, ids, mask, micro_batches[0]["completion_ids"].shape[1], compute_entropy=True
            )
        assert entropies is not None, "compute_entropy asks for them"
        size = len(micro_batches[0]["completion_ids"])
        losses = [
            super(SharedPrefixGRPOTrainer, self)._compute_loss(_Scores(*scores), batch)
            for *scores, batch in zip(log_probs.split(size), entropies.split(size), micro_batches, strict=True)
        ]
        return torch.stack(losses).sum()

    @contextmanager
    def _bind_prompts(self, prompts: list[SharedPrompt]) -> Iterator[list[SharedPrompt]]:
        """Stores the prompts, one per row of a batch, for the log-probability calls inside the block."""
        if self._bound_prompts is not None:
            raise RuntimeError("the prompts of another batch are bound")
        self._bound_prompts = prompts
        try:
            yield prompts
        finally:
            self._bound_prompts = None

    def _calculate_rewards(self, inputs: list[dict[str, Any]], prompts: list[Any], *rest: Any) -> Any:
        """Restores the "images" column, which reward functions may read, and calls TRL's method."""
        examples = [
            example if (images := _images_of(messages)) is None else {**example, "images": images}
            for example, messages in zip(inputs, prompts, strict=True)
        ]
        return super()._calculate_rewards(examples, prompts, *rest)

    def _copies(self, rows: int) -> int:
        """The number of consecutive rows of the same prompt, in a batch of `rows` rows on this rank.

        TRL's sampler puts the G rows of a prompt next to each other and deals the rows to the ranks in order. So
        the blocks of gcd(rows, G) rows from a rank's first row on have one prompt each.
        """
        return gcd(rows, int(self.num_generations if self.model.training else self.num_generations_eval))

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Tokenizes each prompt once. TRL passes the third value to `_generate_single_turn` unchanged.

        `prompts` holds each prompt `_copies(len(prompts))` times in a row. The second value, TRL's images, stays
        empty so that TRL does not process the images of every copy.
        """
        size = self._copies(len(prompts))
        _check_copies(prompts, size)
        ids, images, fields = super()._tokenize_prompts(prompts[::size])
        return _repeat(ids, size), None, {**fields, "images": images}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: None, multimodal_fields: Any, num_generations: int, *rest: Any
    ) -> Any:
        """Samples the completions of each prompt after one prefill. Adds the batch's prompts to the bound list."""
        size = self._copies(len(prompt_ids))
        fields = dict(multimodal_fields)
        group_images = fields.pop("images")
        assert self._bound_prompts is not None, "sampling happens inside _generate_and_score_completions"
        if self.use_vllm:  # vLLM's prefix cache shares the prefill
            base = without_adapter(self.accelerator.unwrap_model(self.model))
            self._bound_prompts += _repeat(
                self._shared_prompts(base, prompt_ids[::size], group_images, fields), size
            )
            row_images = group_images and _repeat(group_images, size)
            return super()._generate_single_turn(prompt_ids, row_images, {}, num_generations, *rest)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
        ):
            base = without_adapter(model)
            prompts = self._shared_prompts(base, prompt_ids[::size], group_images, fields)
            self._bound_prompts += _repeat(prompts, size)
            tokens = generate(base, prompts, size, self.generation_config)
        return [_until_end(ids, self.eos_token_ids) for ids in tokens.tolist()], None

    def _shared_prompts(
        self, base: Any, prompt_ids: list[list[int]], images: list[Any] | None, fields: dict[str, Any]
    ) -> list[SharedPrompt]:
        """The distinct prompts of a batch, with page features instead of pixels if the tower is frozen."""
        device = self.accelerator.device
        pixels = {key: torch.as_tensor(fields[key]).to(device) for key in PIXEL_FIELDS if images}
        types = fields.get("mm_token_type_ids")
        return shared_prompts(
            base,
            [torch.tensor(ids, device=device) for ids in prompt_ids],
            None if types is None else [torch.tensor(prompt_types, device=device) for prompt_types in types],
            pixels or None,
            [len(prompt_images or []) for prompt_images in images or []],
            keep_features=self._tower_is_frozen,
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """(N, C) log-probabilities and entropies of the completions, or those of `model` if it holds them.

        One packed row holds all completions, or `sharing.scored` where TRL gives a `batch_size` in training: there
        no gradients are computed. Raises `RuntimeError` if the bound prompts are not those of `input_ids`.
        """
        if isinstance(model, _Scores):
            return model.log_probs, model.entropies, None
        row_prompts = self._bound_prompts
        _check_prompts(row_prompts, input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep])
        completions = input_ids[:, -logits_to_keep:]
        mask = attention_mask[:, -logits_to_keep:]
        if batch_size is None:
            batch_size = len(input_ids)
        elif self.model.training:
            batch_size = self.sharing.scored
        log_probs, entropies = [], []
        for start in range(0, len(input_ids), batch_size):
            rows = slice(start, start + batch_size)
            prompts, counts = _runs(row_prompts[rows])  # type: ignore[index]
            packed = pack(prompts, completions[rows].split(counts), mask[rows])
            with self.accelerator.autocast():
                outputs = model(**packed.inputs, labels=packed.labels, fused_lm_head=True)
            log_probs.append(packed.unpack(outputs.log_probs))
            if compute_entropy:
                entropies.append(packed.unpack(outputs.entropy))
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None


def _rows(batch: dict[str, Any], name: str) -> Tensor:
    """The prompts followed by the completions of a batch, (N, P + C): their "ids" or their "mask"."""
    return torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], dim=1)


def _check_prompts(row_prompts: Sequence[SharedPrompt] | None, ids: Tensor, mask: Tensor) -> None:
    """Raises `RuntimeError` unless row i of the left-padded (N, P) `ids` is `row_prompts[i]`."""
    if row_prompts is None or len(row_prompts) != len(ids):
        raise RuntimeError(f"expected {len(ids)} bound prompts, one per row, found {len(row_prompts or [])}")
    lengths = mask.sum(1).tolist()
    for i, prompt in enumerate(row_prompts):
        if not torch.equal(ids[i, ids.shape[1] - int(lengths[i]) :], prompt.ids):
            raise RuntimeError(f"row {i}: its prompt differs from the bound prompt")


def _check_copies(prompts: Sequence[Any], size: int) -> None:
    """Raises `RuntimeError` unless the prompts of each block of `size` rows have the same text."""
    for start in range(0, len(prompts), size):
        first, *others = map(strip_images_from_messages, prompts[start : start + size])
        if any(text != first for text in others):
            raise RuntimeError(f"rows {start} to {start + size - 1}: expected {size} copies of one prompt")


def _repeat(values: Sequence[Any], times: int) -> list[Any]:
    """Each value `times` times in a row."""
    return [value for value in values for _ in range(times)]


def _runs(prompts: Sequence[SharedPrompt]) -> tuple[list[SharedPrompt], list[int]]:
    """Each prompt once, and its number of consecutive rows."""
    groups = [list(group) for _, group in groupby(prompts, key=id)]
    return [group[0] for group in groups], [len(group) for group in groups]


def _move_images_into_prompt(example: dict[str, Any]) -> dict[str, Any]:
    if example.get("images") is None:
        return example
    prompt = prepare_multimodal_messages(example["prompt"], images=example["images"])
    return {**{key: value for key, value in example.items() if key != "images"}, "prompt": prompt}


def _images_of(messages: Any) -> list[Any] | None:
    """The images in a prompt's messages, in order; None if the messages contain no images."""
    contents = [message["content"] for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image"] for part in parts if part["type"] == "image"] or None


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens of a completion up to its first end token, which is included."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids) - 1)
    return ids[: end + 1]


def _shuffle_blocks(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Shuffles the blocks of `size` rows of a rollout batch. Draws as many random numbers as TRL's shuffle."""
    rows = len(batch["shared_prompts"])
    blocks = dict.fromkeys((torch.randperm(rows) // size).tolist())  # in order of first appearance
    order = torch.tensor([block * size + i for block in blocks for i in range(size)])

    def reorder(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[order.to(value.device)] if value.ndim else value
        return None if value is None else [value[i] for i in order.tolist()]

    return {key: reorder(value) for key, value in batch.items()}
