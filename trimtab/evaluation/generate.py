"""Text in, sampled text out: the sampler as a plain function."""

from __future__ import annotations

from pydantic import ValidationError

from trimtab.data.chat import end_tokens, render_prompt
from trimtab.errors import InputError
from trimtab.groups import Group, Text, prompt_text
from trimtab.models.layout import probe_groups
from trimtab.models.load import ModelConfig, load_model
from trimtab.rollouts.engine import choose_sampler
from trimtab.rollouts.sampling import SamplingConfig


def generate(
    model: str, prompts: list[str], *, n: int = 1, chat: bool = False, seed: int = 0, **sampling: float
) -> list[tuple[str, list[str]]]:
    """(prompt, n responses) for each prompt. Raises InputError for a bad model, prompt or option."""
    if not prompts:
        raise InputError("generate: no prompt was given")
    if n < 1:
        raise InputError(f"generate: --n is {n}; use 1 or more")
    try:
        config = SamplingConfig(**sampling)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"])) or "sampling"
        raise InputError(f"generate: {name}: {problem['msg'].removeprefix('Value error, ')}") from None
    lm = load_model(ModelConfig(path=model))
    groups = []
    for i, prompt in enumerate(prompts):
        text: Text = [{"role": "user", "content": prompt}] if chat else prompt
        tokens = render_prompt(lm.tokenizer, text)
        groups.append(Group(id=f"prompt:{i}", prompt=text, prompt_tokens=tokens))
    sampler, _ = choose_sampler(lm, config, probe_groups(lm.vocab_size))
    ends = end_tokens(lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None))
    answered = sampler.sample(lm, groups, n, config, seed=seed, end_tokens=ends)
    return [
        (prompt, [prompt_text(r.text) for r in group.responses])
        for prompt, group in zip(prompts, answered, strict=True)
    ]
