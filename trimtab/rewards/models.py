"""A reward model as a reward term: Trimtab's own, or any sequence classification model of transformers.

Responses are read as text, through the reward model's own tokenizer and chat template: whatever policy wrote
them, they are scored as the reward model was trained. A decoder's scores of a whole group are computed as one
tree; a model whose own forward pass reads elsewhere (a padding token that is also the end token) is run as it
is, one response at a time. Encoders (toxicity, factuality) get their tokenizer's usual form.

A reward model that is an adapter on the policy's own base shares that base, if the policy learns by an
adapter too; any other is a model of its own. Where the policy's weights are spread over processes a decoder's
are too, unless a thread scores: then every process calls ``score``, with groups of its own or none.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from trimtab.config import Section, load_config
from trimtab.data.collate import collate, group_tokens, in_each_layout, microbatches
from trimtab.data.render import tokenise
from trimtab.errors import InputError
from trimtab.groups import Group, Response, prompt_text
from trimtab.models.layout import choose_scalar_layout, probe_groups, tolerance
from trimtab.models.load import ModelConfig, device_of, load_classifier, load_tokenizer, resolve
from trimtab.models.roles import same_base, scalar_on
from trimtab.models.scalar_model import ScalarModel, read_about
from trimtab.models.tree_model import Holder, TreeModel
from trimtab.rewards.base import response_text
from trimtab.spread.shard import local_passes


class RewardModelArgs(Section):
    """``args`` of the reward term "reward_model"."""

    path: str = Field("", description="folder or hub name of a sequence classification model, or its adapter")
    revision: str = Field("main", description="hub revision")
    tokenizer: str = Field("", description="folder or hub name of the tokenizer; empty takes the model's")
    outputs: dict[str, float] = Field(
        {}, description="weight of each output by its label; empty takes a single output as it is"
    )
    activation: Literal["none", "sigmoid", "softmax"] = Field(
        "none", description="what is applied to the outputs: none for rewards, sigmoid or softmax for classes"
    )
    input: Literal["auto", "conversation", "pair", "response"] = Field(
        "auto", description="what the model reads; auto: a decoder the conversation, an encoder must be told"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="what the forward pass computes in")
    device: str = Field("auto", description="cpu, cuda, …; auto takes a GPU where there is one")
    batch_tokens: int = Field(8192, ge=1, description="tokens computed at once; changes memory, no score")
    temperature: float = Field(1.0, gt=0, description="what the score is divided by")
    calibrated: bool = Field(False, description="divide by the temperature that the model was saved with")
    trust_remote_code: bool = Field(False, description="run code that comes with the model: your own risk")

    @model_validator(mode="after")
    def _path(self) -> RewardModelArgs:
        if not self.path:
            raise ValueError("path is required: the reward model's folder or hub name")
        if self.calibrated and self.temperature != 1.0:
            raise ValueError("temperature has no effect with calibrated = true; remove one")
        if self.activation != "none" and (self.calibrated or self.temperature != 1.0):
            raise ValueError('a temperature is of scores that are compared: activation = "none"')
        return self


def shared_scalar(
    config: ModelConfig, base: TreeModel | None, asked: str | None, notes: list[str]
) -> tuple[ScalarModel, Any] | None:
    """A model of scores on the policy's own base, frozen, and its tokenizer; None where it needs its own.

    ``asked`` is the dtype that the user has asked for; ``notes`` takes what there is to say.
    """
    if base is None or base.adapter is None:
        return None
    saved, own = resolve(config)
    if saved is None or not same_base(base.adapter, own.path, own.revision):
        return None
    dtype = str(base.dtype).removeprefix("torch.")
    if asked is not None and asked != dtype:
        notes.append(
            f"reward model {config.path} has a base of its own, since its dtype is {asked} and the policy's "
            f"{dtype}"
        )
        return None
    scalar = scalar_on(base, saved)
    for parameter in scalar.model.parameters():
        parameter.requires_grad_(False)
    scalar.cast(base.dtype)
    notes.append(f"reward model {config.path} is an adapter on the policy's base, in {dtype}")
    return scalar, load_tokenizer(own)


def holder_in(holder: Holder, dtype: torch.dtype) -> Holder:
    """What spreads a model that computes in a dtype of its own."""
    own = copy.copy(holder)
    own.dtype = dtype
    return own


def spread_frozen(scalar: ScalarModel, holder: Holder) -> None:
    """Have each process keep its part of a model that does not learn."""
    for parameter in scalar.model.parameters():
        parameter.requires_grad_(False)
    holder.spread(scalar)


def on_cpu(config: ModelConfig) -> ModelConfig:
    """To be read there whole: what is spread comes to its device a layer at a time."""
    return config.model_copy(update={"device": "cpu"})


def build_reward_model(
    args: dict[str, Any], base: TreeModel | None = None, *, spread: bool = False
) -> RewardModel:
    """The scorer that ``args`` describe, on the base of ``base`` where that is its own too.

    ``spread``: over processes, where ``base`` is. Raises InputError for what cannot be loaded or makes no
    sense.
    """
    try:
        options = load_config(RewardModelArgs, None, args)
        return RewardModel(options, base, base.holder if spread and base is not None else None)
    except InputError as error:
        # What is loaded is called model.… where a run's own model is meant; here it stands in args.
        message = re.sub(r"^model\.", "args.", str(error))
        raise InputError(f"reward 'reward_model': {message}") from None


def saved_temperature(about: dict[str, Any]) -> float | None:
    """The temperature in what reward.json says; None where there is none."""
    found = about.get("calibration")
    value = found.get("temperature") if isinstance(found, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        return None
    return float(value)


class RewardModel:
    """Scores groups of text; see :class:`trimtab.rewards.base.Scorer`."""

    models = 1
    """Models that it holds in memory; none where it shares another's base."""

    def __init__(
        self, args: RewardModelArgs, base: TreeModel | None = None, holder: Holder | None = None
    ) -> None:
        """``holder`` spreads the weights of a decoder with a base of its own; then this is collective."""
        self.args = args
        self.notes: list[str] = []
        config = ModelConfig(
            path=args.path,
            revision=args.revision,
            tokenizer=args.tokenizer,
            dtype=args.dtype,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
        shared = self._share(config, base)
        decoder: ScalarModel | None
        if shared is not None:
            decoder, self.tokenizer = shared
            model: Any = decoder.model
        else:
            model, self.tokenizer, decoder = self._load(config, holder)
        self.model = model
        self.decoder = decoder
        """What it is where it is spread or shares a base, also one that is run as it is."""
        about = read_about(args.path)
        if about.get("kind") == "steps":
            raise InputError(f'{args.path} judges steps: use the term "process_reward_model"')
        self.labels = [self.model.config.id2label.get(i, str(i)) for i in range(self.model.config.num_labels)]
        # An adapter's folder has no configuration of a model, so that its names stand in reward.json alone.
        named = about.get("outputs")
        if isinstance(named, list) and len(named) == len(self.labels):
            self.labels = [str(name) for name in named]
        self.calibration = saved_temperature(about)
        self.temperature = self._temperature()
        self.outputs = self._weights()
        if args.activation == "softmax" and len(self.labels) == 1:
            raise InputError(f'{args.path} has one output, and its softmax is always 1: use "sigmoid"')
        self.scalar: ScalarModel | None = None
        self.reads = args.input
        self._counts = {"reward_model_truncated": 0.0}
        if self._reads_trees(self.model):
            self.reads = "conversation"
            self._settle(decoder or ScalarModel(self.model, self.tokenizer))
        elif args.input == "auto":
            raise InputError(
                f'{args.path} is an encoder: say what it reads with input = "response", "pair" (prompt and '
                'response) or "conversation"'
            )

    def _share(self, config: ModelConfig, base: TreeModel | None) -> tuple[ScalarModel, Any] | None:
        """The model on the policy's own base, and its tokenizer; None where it needs a base of its own."""
        asked = self.args.dtype if "dtype" in self.args.model_fields_set else None
        shared = shared_scalar(config, base, asked, self.notes)
        if shared is None:
            return None
        self.models = 0
        return shared

    def _reads_trees(self, model: Any) -> bool:
        """A decoder that is given conversations."""
        head = getattr(model, "score", None)
        return isinstance(head, nn.Linear) and self.args.input in ("auto", "conversation")

    def _load(self, config: ModelConfig, holder: Holder | None) -> tuple[Any, Any, ScalarModel | None]:
        """Module and tokenizer of a model with a base of its own, and what was spread, if anything was.

        Of several processes on a machine each reads it in its turn, so that its memory holds one whole model.
        """
        # In fp32 as usual: then nothing has to be rounded.
        dtype = torch.bfloat16 if self.args.dtype == "bfloat16" else None
        if holder is None:
            return *load_classifier(config, dtype=dtype), None
        own, decoder = holder_in(holder, dtype or torch.float32), None
        with holder.turn():
            model, tokenizer = load_classifier(on_cpu(config), dtype=dtype)
            if self._reads_trees(model):
                decoder = ScalarModel(model, tokenizer)
                spread_frozen(decoder, own)
            else:
                model.to(device_of(config))
        if decoder is not None:
            own.begin(decoder)
        return model, tokenizer, decoder

    def _weights(self) -> dict[str, float]:
        given = self.args.outputs
        if not given:
            if len(self.labels) > 1:
                raise InputError(
                    f"{self.args.path} has {len(self.labels)} outputs ({', '.join(self.labels)}): give each "
                    'that counts a weight, outputs = { "LABEL" = 1.0 }'
                )
            return {"": 1.0}
        for name in given:
            if name not in self.labels:
                raise InputError(f"outputs: {name!r} is none of {', '.join(self.labels)}")
        return dict(given)

    def _temperature(self) -> float:
        if not self.args.calibrated:
            return self.args.temperature
        if self.calibration is None:
            raise InputError(
                f"calibrated: {self.args.path} was saved without a temperature: train it with "
                "reward_model.calibrate = true, or give temperature"
            )
        return self.calibration

    @property
    def spread(self) -> bool:
        """Each process holds a part of the weights."""
        return self.decoder is not None and self.decoder.spread

    def _settle(self, scalar: ScalarModel) -> None:
        """Choose the layout, and whether scores may be read here, by comparison with the own forward pass."""
        probes = probe_groups(scalar.vocab_size)
        end = self.tokenizer.eos_token_id
        for response in (r for g in probes for r in g.responses):
            response.tokens = [*(response.tokens or []), *([] if end is None else [end])]
        line = choose_scalar_layout(scalar, in_each_layout(probes, scalar.device))
        if line:
            self.notes.append(line)
        with torch.no_grad():
            ours = scalar.scores(collate(probes, layout=scalar.layout, device=scalar.device))
            theirs = torch.cat(
                [
                    self._own_forward([*(g.prompt_tokens or []), *(r.tokens or [])])
                    for g in probes
                    for r in g.responses
                ]
            )
        # In bf16 scores near 0 would agree wherever they were read, were they not held against themselves.
        scale = (
            float(theirs.abs().max())
            if scalar.dtype == torch.bfloat16
            else max(1.0, float(theirs.abs().max()))
        )
        if float((ours - theirs).abs().max()) <= tolerance(scalar) * scale:
            self.scalar = scalar
        else:
            self.notes.append(
                f"{self.args.path}: its own forward pass does not read at the last token (padding = end "
                "token?); it is run as it is, one response at a time"
            )

    def _own_forward(self, ids: list[int]) -> torch.Tensor:
        device = next(self.model.parameters()).device
        return self.model(input_ids=torch.tensor([ids], device=device)).logits.float()

    def differs_from(self, tokenizer: Any) -> str | None:
        """A line for a policy of another vocabulary or template; None if both are the same."""
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            what = "another tokenizer"
        elif tokenizer.chat_template != self.tokenizer.chat_template:
            what = "another chat template"
        else:
            return None
        return f"reward model {self.args.path} has {what} than the policy: responses reach it as text"

    def facts(self) -> dict[str, float]:
        """Running counts: responses whose conversation had to be cut to the reward model's context."""
        return dict(self._counts)

    @torch.no_grad()
    def score(self, groups: list[Group]) -> list[list[dict[str, float] | str]]:
        """Every response's outputs, by name."""
        if self.decoder is not None and self.decoder.spread:
            with local_passes(self.decoder):
                return self._score(groups) if groups else []
        return self._score(groups)

    def _score(self, groups: list[Group]) -> list[list[dict[str, float] | str]]:
        if self.reads == "conversation" and isinstance(getattr(self.model, "score", None), nn.Linear):
            rows = self._score_trees(groups)
        else:
            rows = self._score_texts(groups)
        if self.args.activation == "sigmoid":
            rows = rows.sigmoid()
        elif self.args.activation == "softmax":
            rows = rows.softmax(-1)
        values = iter((rows / self.temperature).tolist())
        out: list[list[dict[str, float] | str]] = []
        for group in groups:
            out.append([self._named(next(values)) for _ in group.responses])
        return out

    def _named(self, row: list[float]) -> dict[str, float]:
        if list(self.outputs) == [""]:
            return {"": row[0]}
        return {name: row[self.labels.index(name)] for name in self.outputs}

    def _score_trees(self, groups: list[Group]) -> torch.Tensor:
        """Outputs ``[N, outputs]`` of a decoder, in the order of the groups' responses."""
        bare = [
            Group(id=g.id, prompt=g.prompt, responses=[Response(text=r.text) for r in g.responses])
            for g in groups
        ]
        try:
            ready, _ = tokenise(bare, self.tokenizer)
        except InputError as error:
            raise InputError(f"reward model {self.args.path}: {error}") from None
        order = [response for group in ready for response in group.responses]
        trees = [tree for group in ready for tree in self._fit(group)]
        # By identity: two groups of a rollout may have one id.
        found: dict[int, torch.Tensor] = {}
        if self.scalar is None:
            for tree in trees:
                for response in tree.responses:
                    ids = [*(tree.prompt_tokens or []), *(response.tokens or [])]
                    found[id(response)] = self._own_forward(ids)[0].cpu()
        else:
            layout = self.scalar.layout
            budget = max(self.args.batch_tokens, *(group_tokens(tree, layout) for tree in trees))
            for part in microbatches(trees, budget, layout=layout):
                batch = collate(part, layout=layout, device=self.scalar.device)
                rows = iter(self.scalar.scores(batch).float().cpu())
                found |= {id(response): next(rows) for tree in part for response in tree.responses}
        return torch.stack([found[id(response)] for response in order])

    def _fit(self, group: Group) -> list[Group]:
        """The group; where it exceeds the model's context one tree a response, each cut on its own.

        So that no response's score depends on its siblings. What goes is the prompt's oldest text behind
        its BOS, then the response's last words; the end token stays, since it is where the score is read.
        """
        context = int(getattr(self.model.config, "max_position_embeddings", None) or 1 << 30)
        prompt = group.prompt_tokens or []
        if all(len(prompt) + len(r.tokens or ()) <= context for r in group.responses):
            return [group]
        trees = []
        for response in group.responses:
            tokens, kept = response.tokens or [], prompt
            if len(prompt) + len(tokens) > context:
                self._counts["reward_model_truncated"] += 1
                head = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
                room = max(context - len(tokens) - len(head), 1)
                kept = [*head, *prompt[len(head) :][-room:]]
                room = context - len(kept)
                if len(tokens) > room:
                    response.tokens = [*tokens[: room - 1], tokens[-1]]
                    response.mask = None
            trees.append(Group(id=group.id, prompt_tokens=kept, responses=[response]))
        return trees

    def _score_texts(self, groups: list[Group]) -> torch.Tensor:
        """Outputs ``[N, outputs]`` of any classifier, in its tokenizer's form for texts and pairs."""
        texts: list[Any] = []
        # Of an empty response nothing would be left to read where the tokenizer adds no token of its own.
        blank = "" if self.tokenizer("")["input_ids"] else self.tokenizer.eos_token or " "
        for group in groups:
            prompt = prompt_text(group.prompt)
            between = "" if isinstance(group.prompt, str) else "\nassistant: "
            for response in group.responses:
                answer = response_text(response.text)
                if self.reads == "pair":
                    texts.append((prompt, answer))
                else:
                    texts.append((answer or blank) if self.reads == "response" else prompt + between + answer)
        positions = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        context = min(self.tokenizer.model_max_length, positions)
        order = sorted(range(len(texts)), key=lambda i: len("".join(texts[i])))
        rows: dict[int, torch.Tensor] = {}
        device = next(self.model.parameters()).device
        size = max(1, self.args.batch_tokens // min(context, 512))
        padding = self.tokenizer.pad_token_id
        decoder = isinstance(getattr(self.model, "score", None), nn.Linear)
        if padding is None or (decoder and padding != self.model.config.pad_token_id):
            # Nothing to pad with; or a decoder, which reads at the last token that is not its own padding.
            size = 1
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            part = [texts[i] for i in chosen]
            given = self.tokenizer(
                part, truncation=True, max_length=context, padding=size > 1, return_tensors="pt"
            )
            whole = self.tokenizer(part, truncation=False)["input_ids"]
            self._counts["reward_model_truncated"] += sum(len(ids) > context for ids in whole)
            logits = self.model(**{k: v.to(device) for k, v in given.items()}).logits.float().cpu()
            rows |= dict(zip(chosen, logits, strict=True))
        return torch.stack([rows[i] for i in range(len(texts))])
