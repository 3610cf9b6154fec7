"""The methods' cards, held against the methods."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from trimtab import methods
from trimtab.cli.main import METHODS
from trimtab.config import Section, fields
from trimtab.errors import InputError
from trimtab.methods.shared.setup import MethodConfig
from trimtab.models.adapters import AdapterConfig
from trimtab.planning import flows
from trimtab.planning.methods import CARDS, DEFAULTS, MOST_ROWS, find_card
from trimtab.planning.result import PHASES
from trimtab.rollouts import schedule
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.training.config import TrainConfig


def options(name: str) -> dict[str, Any]:
    """Every option of the method with its default."""
    return {key: default for key, _, _, default in fields(methods.find(name).Config)}


def test_there_is_a_card_for_every_method() -> None:
    assert list(CARDS) == list(METHODS)
    assert sorted(CARDS) == methods.names()


@pytest.mark.parametrize("name", list(METHODS))
def test_a_card_is_its_method(name: str) -> None:
    card, known, config = CARDS[name], options(name), methods.find(name).Config
    assert card.section in config.model_fields
    assert issubclass(config, MethodConfig)
    # What samples has a section that says how, and what reads a reward one that names it.
    assert card.rollouts == ("sampling" in config.model_fields)
    assert ("reward model" in card.roles) == ("reward" in config.model_fields)
    assert card.critic == ("critic" in config.model_fields) == ("critic" in card.roles)
    if card.responses_option:
        assert known[card.responses_option] == card.responses
    section: type[Section] = config.model_fields[card.section].annotation
    if "epochs_per_rollout" in section.model_fields:
        assert section.model_fields["epochs_per_rollout"].default == card.epochs_per_rollout
    # Without KL and without a log of it there would be no reference.
    if "log_kl" in section.model_fields:
        assert section.model_fields["log_kl"].default is True
    assert card.models_in_memory == 1 + (card.reference == "kept") + card.critic
    learned = "reward model" in card.roles
    assert card.models_usual == 1 + (card.reference != "none") + card.critic + learned


@pytest.mark.parametrize("name", list(METHODS))
def test_shared_defaults_are_the_live_ones(name: str) -> None:
    known = options(name)
    assert known["train.batch_groups"] == DEFAULTS["batch_groups"]
    assert known["train.micro_batch_tokens"] == DEFAULTS["micro_batch_tokens"]
    assert known["adapter.rank"] == DEFAULTS["rank"]
    if CARDS[name].rollouts:
        assert known["sampling.max_new_tokens"] == DEFAULTS["max_new_tokens"]
        assert known["sampling.cache_mb"] == DEFAULTS["cache_mb"]
        assert known["sampling.max_rows"] == 0
    assert MOST_ROWS == schedule.ROWS


def test_models_in_memory_are_those_of_the_documentation() -> None:
    """docs/methods.md: SFT, SimPO, ORPO 1; DPO 1; KTO 2; sampling 2; PPO 3, and a learned reward's."""
    found = {name: (card.models_in_memory, card.models_usual) for name, card in CARDS.items()}
    assert {found[name] for name in ("sft", "simpo", "orpo")} == {(1, 1)}
    assert found["dpo"] == (1, 2)
    assert found["kto"] == (2, 2)
    assert found["grpo"] == (2, 3)
    assert found["ppo"] == (3, 4)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_flow_can_be_drawn(name: str) -> None:
    card = CARDS[name]
    nodes = {node.id: node for node in card.flow.nodes}
    assert len(nodes) == len(card.flow.nodes)
    assert all(edge.source in nodes and edge.target in nodes and edge.label for edge in card.flow.edges)
    # Nothing stands alone, and what learns is reached from the loss.
    assert {end for edge in card.flow.edges for end in (edge.source, edge.target)} == set(nodes)
    taught = {edge.target for edge in card.flow.edges if edge.source == "loss"}
    assert taught == {node.id for node in nodes.values() if node.learns}
    drawn = {node.role for node in nodes.values() if node.kind == "model"}
    assert drawn == set(card.roles)
    assert all(node.kind in get_args(flows.Kind) for node in nodes.values())
    assert set(card.phases) <= set(PHASES)
    assert ("sampling" in card.phases) == card.rollouts
    assert ("scoring" in card.phases) == (card.reference != "none" or card.rollouts)


def test_names_are_found_in_other_writings() -> None:
    assert find_card("Dr_GRPO").name == "dr-grpo"
    with pytest.raises(InputError, match="unknown method 'gropo': did you mean grpo"):
        find_card("gropo")
    with pytest.raises(InputError, match="there are sft, reward, process-reward"):
        find_card("xyzzy")


def test_sections_of_the_defaults_are_where_they_are_said_to_be() -> None:
    assert {"batch_groups", "micro_batch_tokens"} <= TrainConfig.model_fields.keys()
    assert {"max_new_tokens", "cache_mb"} <= SamplingConfig.model_fields.keys()
    assert "rank" in AdapterConfig.model_fields
