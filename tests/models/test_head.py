"""Token log-probabilities and entropies from the chunked head: values, gradients, memory."""

from __future__ import annotations

import math
import weakref
from typing import Any

import families
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from trimtab.data.collate import collate, in_each_layout
from trimtab.errors import InputError
from trimtab.kernels.logps import selected_logps
from trimtab.models.head import Head, chunked_logps
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import choose_layout, probe_groups
from trimtab.models.load import wrap

HEADS = ["llama", "gemma2", "granite", "cohere", "gpt2", "opt", "phi"]
ROWS, CHUNK = 13, 4
CHUNK_BYTES = CHUNK * 8 * families.VOCAB


def inputs(lm: LanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model: Any = lm.model
    width: int = model.get_input_embeddings().embedding_dim
    hidden = torch.randn(ROWS, width, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randint(0, families.VOCAB, (ROWS,))


def plainly(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    logp = F.log_softmax(logits / temperature, dim=-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", HEADS)
def test_chunks_are_the_whole(family: str, temperature: float, kept: int) -> None:
    """Values and gradients, with respect to the hidden states and to every weight, in fp64.

    Chunks that are computed again in the backward pass, and chunks that are kept for it.
    """
    lm = families.tiny(family, dtype=torch.float64)
    hidden, targets = inputs(lm)
    head_weights = [p for p in lm.model.parameters() if p.shape[0] == families.VOCAB]
    results = []
    for chunked in (True, False):
        if chunked:
            made = chunked_logps(
                lm.head,
                hidden,
                targets,
                families.VOCAB,
                temperature=temperature,
                entropy=True,
                chunk_bytes=CHUNK_BYTES,
                kept_bytes=kept,
            )
        else:
            made = plainly(lm.head(hidden), targets, temperature)  # type: ignore[assignment]
        loss = (made[0] * torch.linspace(-1, 2, ROWS)).sum() + (made[1] * torch.linspace(1, 0, ROWS)).sum()
        grads = torch.autograd.grad(loss, [hidden, *head_weights], allow_unused=True)
        results.append([*made, *(g for g in grads if g is not None)])
    assert len(results[0]) == len(results[1]) > 3
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("gradient", [True, False])
def test_no_chunk_exceeds_its_size(gradient: bool) -> None:
    lm = families.tiny("llama", dtype=torch.float64)
    hidden, targets = inputs(lm)
    seen: list[tuple[int, ...]] = []
    model: Any = lm.model
    model.lm_head.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    with torch.set_grad_enabled(gradient):
        logps, _ = chunked_logps(
            lm.head, hidden, targets, families.VOCAB, chunk_bytes=CHUNK_BYTES, kept_bytes=0
        )
        # 13 rows in chunks of 4: three whole ones and one of a single row.
        assert [shape[-2] for shape in seen] == [4, 4, 4, 1]
        if gradient:
            logps.sum().backward()
            # Computed again in the backward pass, last chunk first, never all at once.
            assert sorted(shape[-2] for shape in seen[4:]) == [1, 4, 4, 4]


def test_a_training_pass_keeps_no_logits() -> None:
    """What autograd holds between forward and backward is hidden states; of logits a chunk is made anew."""
    lm = families.tiny("llama", dtype=torch.float64)
    hidden, targets = inputs(lm)
    held: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.numel() if tensor.shape[-1:] == (families.VOCAB,) and tensor.dim() > 1 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_logps(lm.head, hidden, targets, families.VOCAB, chunk_bytes=CHUNK_BYTES, kept_bytes=0)
        assert sum(held) == 0
        plainly(lm.head(hidden), targets, 1.0)
        assert sum(held) >= ROWS * families.VOCAB


def test_logits_are_kept_up_to_a_size_and_computed_again_beyond_it() -> None:
    """13 rows of fp64 over 97 words: kept in a budget of exactly that, and again with one byte less."""
    lm = families.tiny("llama", dtype=torch.float64)
    hidden, targets = inputs(lm)
    whole = ROWS * families.VOCAB * 8
    model: Any = lm.model
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, given, out: rows.append(out.shape[-2]))
    grads = []
    for kept, again in ((whole, False), (whole - 1, True)):
        rows.clear()
        logps, entropy = chunked_logps(
            *(lm.head, hidden, targets, families.VOCAB),
            entropy=True,
            chunk_bytes=CHUNK_BYTES,
            kept_bytes=kept,
        )
        grads.append(torch.autograd.grad((logps + entropy).sum(), [hidden, *lm.model.lm_head.parameters()]))
        assert sum(rows) == (2 * ROWS if again else ROWS)
        assert max(rows) == (CHUNK_BYTES // (8 * families.VOCAB) if again else ROWS)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("each", [False, True])
def test_without_a_gradient_nothing_of_a_chunk_outlives_it(
    monkeypatch: pytest.MonkeyPatch, each: bool
) -> None:
    """The same bits as with one. A small tensor kept behind each chunk's logits made the heap grow."""
    lm = families.tiny("llama", dtype=torch.float64)
    hidden, targets = inputs(lm)
    temperature = torch.linspace(0.5, 2, ROWS).round(decimals=1) if each else 0.7
    given = (lm.head, hidden, targets, families.VOCAB)
    wanted = chunked_logps(
        *given, temperature=temperature, entropy=True, chunk_bytes=CHUNK_BYTES, kept_bytes=0
    )
    made: list[weakref.ref[torch.Tensor]] = []

    def watched(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert not any(ref() is not None for ref in made)
        found = selected_logps(*args, **kwargs)
        made.extend(weakref.ref(tensor) for tensor in found)
        return found

    monkeypatch.setattr("trimtab.models.head.selected_logps", watched)
    with torch.no_grad():
        found = chunked_logps(*given, temperature=temperature, entropy=True, chunk_bytes=CHUNK_BYTES)
    assert len(made) == 2 * 4
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other.detach())


def test_a_vocabulary_larger_than_a_chunk_goes_token_by_token() -> None:
    lm = families.tiny("llama", dtype=torch.float64)
    hidden, targets = inputs(lm)
    one = chunked_logps(lm.head, hidden, targets, families.VOCAB, chunk_bytes=1)[0]
    assert (one - plainly(lm.head(hidden), targets, 1.0)[0]).abs().max() < 1e-12


def test_log_probability_and_entropy_by_hand() -> None:
    # Logits ln 1, ln 2, ln 5: p = 1/8, 1/4, 5/8. log p(second) = ln 0.25 = −1.3863;
    # H = 0.125·2.0794 + 0.25·1.3863 + 0.625·0.4700 = 0.9003. At temperature 2 the weights are 1, √2, √5:
    # p = 0.3041 for the second, log −1.1904; dividing log p by 2 instead would give −0.6931.
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64))
    logps, entropy = selected_logps(logits, torch.tensor([1]), entropy=True)
    assert logps.item() == pytest.approx(-1.3863, abs=5e-5)
    assert entropy.item() == pytest.approx(0.9003, abs=5e-5)
    assert selected_logps(logits, torch.tensor([1]), 2.0)[0].item() == pytest.approx(-1.1904, abs=5e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_selected_logps_gradcheck(temperature: float) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(
        lambda values: selected_logps(values, targets, temperature, entropy=True), (logits,)
    )


def test_entropy_is_zeros_unless_asked_for() -> None:
    assert not selected_logps(torch.randn(2, 5), torch.tensor([0, 1]))[1].any()


def test_forbidden_tokens_carry_no_mass_and_no_nan() -> None:
    # Left: p = 1/3 and 2/3, H = 0.6365 nats.
    logits = torch.log(torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)).requires_grad_()
    logps, entropy = selected_logps(logits, torch.tensor([1]), entropy=True)
    assert logps.item() == pytest.approx(-0.4055, abs=5e-5)
    assert entropy.item() == pytest.approx(0.6365, abs=5e-5)
    (gradient,) = torch.autograd.grad((logps + entropy).sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[0, 2] == 0


def test_bf16_logits_are_normalised_in_fp32() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(64, 5000).bfloat16(), torch.randint(0, 5000, (64,))
    truth = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    ours = selected_logps(logits, targets)[0]
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() < 1e-5
    in_bf16 = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert (in_bf16 - truth).abs().max() > 0.01


def test_a_head_leaves_the_model_as_it_was_even_after_an_exception() -> None:
    lm = families.tiny("llama")
    trunk = lm.head.trunk
    with pytest.raises(RuntimeError):
        lm.head(torch.zeros(2, 5))
    assert lm.head.trunk is trunk
    lm.model(input_ids=torch.tensor([[1, 2]]))


class Mixing(LlamaForCausalLM):
    """A head that also looks at the tokens: it cannot be run on hidden states alone."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        out = super().forward(input_ids=input_ids, **kwargs)
        assert out.logits is not None
        out.logits = out.logits + 3 * F.one_hot(input_ids, families.VOCAB)
        return out


class Refusing(LlamaForCausalLM):
    """A head that asks its trunk for something that the stand-in does not have."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        self.model.embed_tokens  # noqa: B018 - the access is the point
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("made", [Mixing, Refusing])
def test_a_head_that_cannot_be_separated_is_found_out(made: type[LlamaForCausalLM]) -> None:
    torch.manual_seed(0)
    lm = wrap(made(families.CONFIGS["llama"]()), None)
    groups = families.groups()
    probes = probe_groups(lm.vocab_size)
    line = choose_layout(lm, in_each_layout(probes))
    assert lm.chunked_head is False
    assert line is not None
    assert "whole logits" in line
    with torch.no_grad():
        got, _ = lm.token_logprobs(collate(groups, layout=lm.layout))
        assert (got - families.direct_logprobs(lm, groups)).abs().max() < 1e-5
        if made is Mixing:
            lm.chunked_head = True
            wrong, _ = lm.token_logprobs(collate(groups, layout=lm.layout))
            assert (wrong - families.direct_logprobs(lm, groups)).abs().max() > 0.5


def test_a_trunk_under_another_name_is_found_and_none_is_refused() -> None:
    lm = families.tiny("llama")
    model: Any = lm.model
    model.base_model_prefix = "language_model"
    assert Head(model).trunk is lm.head.trunk
    with pytest.raises(InputError, match="no trunk"):
        Head(torch.nn.Linear(2, 2))


def test_a_config_with_vocabulary_padding_is_no_problem() -> None:
    """More rows of embedding than the tokenizer has words: the head's rows are what is normalised over."""
    torch.manual_seed(0)
    wide = LlamaConfig(
        **{**families.CONFIGS["llama"]().to_dict(), "vocab_size": 128, "tie_word_embeddings": True}
    )
    lm = wrap(LlamaForCausalLM(wide), None)
    groups = families.groups()
    with torch.no_grad():
        got, _ = lm.token_logprobs(collate(groups))
    assert (got - families.direct_logprobs(lm, groups)).abs().max() < 1e-5


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_a_temperature_for_each_token(kept: int) -> None:
    """Chunks computed again, and kept: against whole logits divided row by row, in fp64."""
    lm = families.tiny("cohere", dtype=torch.float64)
    hidden, targets = inputs(lm)
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).repeat(5)[:ROWS]
    sizes: dict[str, int] = {"chunk_bytes": CHUNK_BYTES, "kept_bytes": kept}
    ours = chunked_logps(
        lm.head, hidden, targets, families.VOCAB, temperature=temperature, entropy=True, **sizes
    )
    theirs = plainly(lm.head(hidden) / temperature[:, None], targets, 1.0)
    grads = []
    for made in (ours, theirs):
        loss = (made[0] * torch.linspace(-1, 2, ROWS)).sum() + (made[1] * torch.linspace(1, 0, ROWS)).sum()
        grads.append(torch.autograd.grad(loss, [hidden, *lm.model.get_input_embeddings().parameters()]))
    for a, b in zip((*ours, *grads[0]), (*theirs, *grads[1]), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_selected_logps_gradcheck_with_a_temperature_a_row() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets, temperature = torch.tensor([0, 3, 4, 1]), torch.tensor([0.5, 2.0, 0.5, 1.0])
    assert torch.autograd.gradcheck(
        lambda values: selected_logps(values, targets, temperature, entropy=True), (logits,)
    )
    # By hand: logits 0, ln 2 at temperature ½ are 0, 2 ln 2: 1/5 and 4/5. At 1 they would be 1/3 and 2/3.
    found = selected_logps(
        torch.tensor([[0.0, math.log(2)]] * 2), torch.tensor([1, 1]), torch.tensor([0.5, 1])
    )
    assert found[0].exp().tolist() == pytest.approx([0.8, 2 / 3], abs=1e-6)
