"""Plans from options alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.planning import quick
from trimtab.planning.job import Job
from trimtab.planning.methods import CARDS
from trimtab.planning.models import find_model
from trimtab.planning.quick import QuickConfig, idle_in, quick_facts, quick_job
from trimtab.planning.roles import adapter_of

MODEL = "qwen3-0.6b"


def job(method: str, **options: Any) -> Job:
    return quick_job(load_config(QuickConfig, None, {"method": method, "model": MODEL, **options}))


@pytest.mark.parametrize("method", list(CARDS))
def test_defaults_are_the_methods_own(method: str) -> None:
    card, found = CARDS[method], job(method)
    own = [role.name for role in found.roles]
    assert own == (["reference"] if card.reference == "kept" else []) + ["critic"] * card.critic
    assert found.batch.groups == 16
    trained = 2 if method == "online-dpo" else card.responses
    assert found.batch.responses == 16 * trained
    assert (found.sampling is not None) == card.rollouts
    assert found.steps_per_rollout == card.epochs_per_rollout
    assert found.scalar == card.scalar
    config = QuickConfig(method=method, model=MODEL)
    assert quick_facts(config, found)["models_in_memory"] == card.models_in_memory


def test_a_job_by_hand() -> None:
    """16 prompts of 512 with 8 responses of 256: 512 + 2,048 tokens in a tree, one in 4,096."""
    found = job("grpo", reward_model=MODEL, overlap=True, rollout_groups=32, epochs_per_rollout=2, rows=1000)
    assert (found.batch.tokens, found.batch.widest, found.batch.micro_batches) == (16 * 2560, 2560, 16)
    assert [role.name for role in found.roles] == ["reference", "reward model", "snapshot"]
    # 32·2/16 steps of a rollout, 1,000·2/16 in all; of its second half the policy is read again.
    assert (found.steps_per_rollout, found.steps, found.old_pass, found.steps_of_rollout) == (4, 125, True, 2)
    assert found.sampling is not None
    assert (found.sampling.prompts, found.sampling.samples, found.sampling.max_rows) == (32, 8, 256)
    assert not job("grpo").old_pass
    assert job("rloo").old_pass  # its KL is in the reward
    assert not job("rloo", without_reference=True).old_pass


def test_a_whole_group_fits_unless_told_otherwise() -> None:
    """A pair of 4,000 + 2·3,000 tokens is over 4,096: by default the budget grows, as a run would ask."""
    assert job("dpo", prompt=4000, response=3000).batch.widest == 10_000
    with pytest.raises(InputError, match="one group needs 10000 tokens but micro_batch_tokens is 8000"):
        job("dpo", prompt=4000, response=3000, micro_batch_tokens=8000)
    # Samples of a group may stand apart: 4,000 + 3,000.
    assert job("grpo", prompt=4000, response=3000).micro_batch_tokens == 7000


def test_what_is_computed_once_is_counted_over_the_data() -> None:
    found = job("dpo", rows=3200, epochs=2.0)
    assert (found.steps, found.data_passes, found.reference_once) == (400, 2.0, True)
    half = job("dpo", rows=3200, steps=100)
    assert (half.steps, half.data_passes) == (100, 0.5)
    kto = job("kto")
    # The reference reads all of the data before the first step, and the baseline both models at every step.
    assert (kto.reference_pass, kto.reference_once, kto.reference_each, kto.old_pass) == (True,) * 4
    assert not half.reference_each


def test_adapters() -> None:
    model = find_model(MODEL)
    found = job("ppo", adapter="lora", rank=8)
    assert found.adapter.ends == model.linear_ends
    assert found.adapter.layers == 7 * model.layers
    assert [(r.shares_base, r.adapter) for r in found.roles] == [(True, False), (True, True)]
    some = adapter_of(model, "lora", 8, targets=["q_proj", "v_proj"])
    # 1,024 → 2,048 and 1,024 → 1,024 in each of 28 layers.
    assert (some.ends, some.layers) == (28 * (3072 + 2048), 56)
    with pytest.raises(InputError, match=r"no linear layer 'q_prj'; did you mean q_proj"):
        adapter_of(model, "lora", 8, targets=["q_prj"])


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = job("sft", devices=4, weights="shard")
    assert (found.devices, found.shard) == (4, True)
    assert not job("sft", devices=4, weights="replicate").shard
    assert not job("sft").shard
    monkeypatch.setattr(quick, "native_bf16", lambda: False)
    assert job("sft").compute == "float32"
    assert job("sft", engine="gpu").compute == "bfloat16"
    assert job("sft", dtype="bfloat16").compute == "bfloat16"
    assert job("sft", activation_mb=600).recompute == "some"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpoo", {}, "unknown method 'dpoo': did you mean dpo"),
        ("dpo", {"prompt": 0}, "prompt: Input should be greater than or equal to 1"),
        ("dpo", {"devices": -2}, "devices: Input should be greater than or equal to 1"),
        (
            "dpo",
            {"prompt": 40_000, "response": 2000},
            "42000 tokens, over the context of Qwen/Qwen3-0.6B, 40960",
        ),
        ("dpo", {"cache_mb": 100}, "cache_mb has no effect with dpo, which does not sample"),
        ("dpo", {"responses": 4}, "responses has no effect with dpo, whose groups have 2"),
        ("dpo", {"reward_model": MODEL}, "reward_model has no effect with dpo, which reads no reward"),
        ("sft", {"reference": MODEL}, "reference has no effect with sft, which has none"),
        ("grpo", {"reference": MODEL}, "reference has no effect with grpo, which starts from its reference"),
        ("kto", {"without_reference": True}, "without_reference has no effect with kto, which needs its own"),
        ("spin", {"overlap": True}, "overlap has no effect with spin"),
        ("grpo", {"critic": "trunk"}, "critic has no effect with grpo, which has none"),
        ("grpo", {"responses": 1}, "responses must be 2 or more: grpo compares them"),
        ("grpo", {"rollout_groups": 20}, r"rollout_groups must be a multiple of groups \(16\)"),
        ("sft", {"rank": 4}, "rank has no effect without an adapter"),
        ("sft", {"weights": "shard"}, "weights has no effect with one device"),
        ("sft", {"epochs": 2.0}, "epochs has no effect without rows"),
        ("sft", {"epochs": 2.0, "rows": 5, "steps": 9}, "epochs has no effect with steps"),
        ("sft", {"recompute": "all", "activation_mb": 9}, "activation_mb has no effect with recompute"),
        # 28 layers' inputs of 1,024 numbers, two more and a scale: 61,444 bytes for each of 4,096 tokens.
        ("sft", {"activation_mb": 100, "dtype": "bfloat16"}, "computed again it takes 241; .* to 1706"),
        ("ppo", {"reward_dtype": "bfloat16"}, "reward_dtype has no effect without reward_model"),
        ("dpo", {"reference": "openai-community/gpt2"}, "gpt2 has 50257 tokens, Qwen/Qwen3-0.6B 151936"),
        ("dpo", {"model": "./no-such"}, "model: "),
    ],
)
def test_bad_input_is_one_line(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        job(method, **options)


def test_a_model_is_required() -> None:
    with pytest.raises(InputError, match="model is required"):
        load_config(QuickConfig, None, {"method": "dpo"})


def test_every_option_has_an_effect_somewhere() -> None:
    assert all(any(not idle_in(method, option) for method in CARDS) for option in QuickConfig.model_fields)


def test_no_pytorch_is_imported() -> None:
    code = (
        "import sys; from trimtab.planning.quick import QuickConfig, quick_job; "
        f"quick_job(QuickConfig(method='ppo', model={MODEL!r})); "
        "print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
