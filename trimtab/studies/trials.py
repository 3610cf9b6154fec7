"""The work that ``calibrate.py`` times: small models of Qwen2's build, trained and sampled from."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from trimtab.data.collate import collate, in_each_layout
from trimtab.groups import Group, Response
from trimtab.models.adapters import AdapterConfig, adapt, fresh
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import choose_layout, probe_groups
from trimtab.models.load import wrap
from trimtab.planning.counts import Amount, Tokens
from trimtab.planning.job import Adapter, Batch, Compute, Job, Model, Sampling
from trimtab.planning.models import model_of
from trimtab.planning.work import drawn, policy_of, updated
from trimtab.rollouts.engine import TreeSampler
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser

SEED = 0
ADAPTER = AdapterConfig(kind="lora", rank=16)


@dataclass
class Trial:
    """A piece of work that is timed."""

    name: str
    amount: Amount
    run: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def time(self) -> None:
        """Run it once."""
        began = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - began)


@dataclass(frozen=True)
class Shape:
    """A model of the trials."""

    width: int
    layers: int
    vocabulary: int = 512

    @property
    def config(self) -> Qwen2Config:
        """Heads of 64, half as many for keys, an MLP of 3 widths, tied embeddings."""
        return Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            num_key_value_heads=self.width // 128,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            use_sliding_window=False,
        )

    @property
    def model(self) -> Model:
        """The same for the planner."""
        return model_of(self.config.to_dict(), "a trial's model")


def make_trials(compute: Compute) -> list[Trial]:
    """Each kind of work weighs most in one of them. Models are made here, which takes a few seconds."""
    narrow, wide, words = (_ready(Shape(*sizes), compute) for sizes in ((256, 3), (768, 2), (384, 2, 16_384)))
    adapted = _ready(Shape(768, 2), compute, adapter=True)
    deep = _ready(Shape(768, 4), compute)
    broad = _ready(Shape(1024, 2), compute)
    return [
        _trained("narrow", narrow, groups=32, prompt=32, response=32),
        _trained("wide", wide, groups=16, prompt=32, response=32),
        _trained("broad", broad, groups=32, prompt=96, response=32),
        _trained("long", words, groups=2, prompt=960, response=8),
        _trained("words", words, groups=16, prompt=16, response=32),
        _trained("short", narrow, groups=1, prompt=16, response=16),
        _trained("update", wide, groups=1, prompt=16, response=16, update=True),
        _trained("adapter", adapted, groups=32, prompt=96, response=32),
        _read("read", wide, groups=32, prompt=32, response=32),
        _drawn("rows 8", deep, prompts=1, samples=8, response=16),
        _drawn("rows 128", deep, prompts=4, samples=32, response=8),
        _drawn("rows 8, narrow", narrow, prompts=1, samples=8, response=32),
        _drawn("rows 128, narrow", narrow, prompts=4, samples=32, response=16),
        _drawn("rows 8, words", words, prompts=1, samples=8, response=16),
        _drawn("rows 64, words", words, prompts=2, samples=32, response=8),
    ]


def float32_trial() -> Trial:
    """A pass without gradient in fp32, where runs compute in bf16 and a reward model does not."""
    return _read("float32", _ready(Shape(768, 2), "float32"), groups=32, prompt=32, response=32)


@dataclass(frozen=True)
class Ready:
    """A model that learns, for trials to share."""

    shape: Shape
    compute: Compute
    lm: LanguageModel
    optimiser: Optimiser
    adapter: bool

    def job(self, given: Tokens, sampling: Sampling | None = None) -> Job:
        """What the planner is told of a trial."""
        model, lm = self.shape.model, self.lm
        batch = Batch(
            groups=1,
            responses=1,
            tokens=given.tokens,
            targets=given.targets,
            scores=given.scores,
            micro_batches=1,
            widest=given.tokens,
            widest_targets=given.targets,
            rows=1,
            longest=2048,
        )
        made = Adapter()
        if self.adapter:
            made = Adapter("lora", ADAPTER.rank, ends=model.linear_ends, layers=7 * self.shape.layers)
        return Job(
            "sft", model, batch, sampling=sampling, adapter=made, compute=self.compute, layout=lm.layout
        )


def _ready(shape: Shape, compute: Compute, *, adapter: bool = False) -> Ready:
    torch.manual_seed(SEED)
    base: Any = Qwen2ForCausalLM(shape.config)
    model = adapt(base, fresh(ADAPTER, scores=False), seed=SEED) if adapter else base
    lm = wrap(model, None)
    choose_layout(lm, in_each_layout(probe_groups(lm.vocab_size)))
    return Ready(shape, compute, lm, Optimiser(lm.model, TrainConfig(), getattr(torch, compute)), adapter)


def _groups(count: int, prompt: int, response: int, vocabulary: int) -> list[Group]:
    rng = random.Random(SEED)

    def ids(length: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(length)]

    return [
        Group(
            id=str(i),
            prompt_tokens=ids(prompt),
            responses=[Response(tokens=ids(response))] if response else [],
        )
        for i in range(count)
    ]


def _tokens(groups: int, prompt: int, response: int) -> Tokens:
    length = prompt + response
    return Tokens(groups * length, groups * response, groups * length * (length + 1) / 2, 1)


def _trained(name: str, on: Ready, *, groups: int, prompt: int, response: int, update: bool = False) -> Trial:
    """Forward and backward of one micro-batch, and the optimiser's step."""
    given = _tokens(groups, prompt, response)
    job, lm, optimiser = on.job(given), on.lm, on.optimiser
    policy = policy_of(job)
    amount = policy.forward(given) + policy.backward(given, given.targets, 0)
    if update:
        amount = amount + updated(job, policy, policy.learned)
    rows = _groups(groups, prompt, response, on.shape.vocabulary)

    def run() -> None:
        batch = collate(rows, layout=lm.layout)
        logps_NT, _ = lm.token_logprobs(batch)
        optimiser.backward(-logps_NT.sum() / given.targets)
        if update:
            optimiser.step(1e-6)
        else:
            optimiser.clear()

    return Trial(name, amount, run)


def _read(name: str, on: Ready, *, groups: int, prompt: int, response: int) -> Trial:
    """Log-probabilities without a gradient."""
    given = _tokens(groups, prompt, response)
    rows = _groups(groups, prompt, response, on.shape.vocabulary)

    def run() -> None:
        with torch.no_grad():
            on.lm.token_logprobs(collate(rows, layout=on.lm.layout))

    return Trial(name, policy_of(on.job(given)).forward(given), run)


def _drawn(name: str, on: Ready, *, prompts: int, samples: int, response: int) -> Trial:
    """A rollout of responses of one length."""
    prompt = 16
    config = SamplingConfig(max_new_tokens=response, min_new_tokens=response)
    sampler, rows = TreeSampler(), _groups(prompts, prompt, 0, on.shape.vocabulary)
    given = Sampling(prompts, samples, prompt, response, longest_response=response, longest_prompt=prompt)
    job = on.job(_tokens(1, 1, 1), given)

    def run() -> None:
        sampler.sample(on.lm, rows, samples, config, seed=SEED, end_tokens=[])

    return Trial(name, drawn(job, policy_of(job)), run)
