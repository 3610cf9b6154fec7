"""A language model behind an OpenAI-compatible endpoint as judge, with a rubric.

- pairwise: each pair is asked in both orders; answers that do not agree are a tie, counted.
- listwise: the group is shown once, in an order that a hash of the row's id decides.
- score: each response is asked about alone.

Responses of a group with the same text are the same response: a tie, asked about once. An answer that
cannot be read, and a refusal, is asked for again with a word about the form, up to ``retries`` times; then
the judge abstains. Everything answered is in the cache, so a second run makes no call and gives the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.groups import Group, prompt_text, stable_hash
from trimtab.parallel.limits import own_part
from trimtab.rewards.answer_cache import Answer, AnswerCache, request_key
from trimtab.rewards.base import response_text
from trimtab.rewards.chat_client import ChatClient, NoAnswer, Stopped
from trimtab.rewards.judge_config import JudgeConfig
from trimtab.rewards.judges import (
    ALONE,
    Comparison,
    Judge,
    Judgement,
    abstention,
    from_comparisons,
    from_ranks,
    from_scores,
)
from trimtab.rewards.questions import (
    DEFAULT_RUBRIC,
    Abstained,
    Question,
    list_question,
    pair_question,
    score_question,
)

ECHO = 2000
"""Characters of an unreadable answer that are shown to the judge again."""


class EndpointJudge(Judge):
    """Asks a model at an address; see the module's words."""

    def __init__(
        self,
        config: JudgeConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        """Raises InputError for a key that is not set and a rubric or cache that cannot be read."""
        super().__init__(config.mode)
        self.config = config
        self.rubric = _rubric(config)
        self.cache = AnswerCache(config.cache)
        self.client = ChatClient(config, self.costs, clock=clock, sleep=sleep)
        if config.prompt_price or config.completion_price:
            self.costs.cost = 0.0
        self._count_lock = threading.Lock()
        orders = ", both orders" if config.mode == "pairwise" else ""
        self.notes = [f"judge: {config.model} at {self.client.url}, {config.mode}{orders}"]
        if len(self.cache):
            self.notes[0] += f"; {len(self.cache):,} answers in {config.cache}"
        if self.cache.damaged:
            self.notes.append(f"judge: {self.cache.damaged} damaged lines of {config.cache} are asked again")
        self.notes += self.client.notes

    def _judge(self, groups: list[Group]) -> list[Judgement]:
        plans = {"pairwise": self._pairwise, "listwise": self._listwise, "score": self._score}
        try:
            return plans[self.mode](groups)
        finally:
            self.count_cost()

    def count_cost(self) -> None:
        """Bring the cost up to date; for callers of :meth:`ask`."""
        if self.costs.cost is not None:
            prompt = self.costs.prompt_tokens * self.config.prompt_price
            completion = self.costs.completion_tokens * self.config.completion_price
            self.costs.cost = (prompt + completion) / 1e6

    def again(self, groups: list[Group], number: int) -> list[Judgement]:
        """The same questions with the seed raised by ``number``, past the cache: nothing is reused."""
        config, cache = self.config, self.cache
        self.config = config.model_copy(update={"seed": config.seed + number})
        self.cache = AnswerCache("")
        try:
            return self.judge(groups)
        finally:
            self.config, self.cache = config, cache

    def _pairwise(self, groups: list[Group]) -> list[Judgement]:
        questions: list[Question] = []
        for group in groups:
            prompt, texts = _texts(group)
            for i, j in _different(texts):
                questions.append(pair_question(self.rubric, prompt, texts[i], texts[j]))
                questions.append(pair_question(self.rubric, prompt, texts[j], texts[i]))
        answers = iter(self.ask(questions))
        out = []
        for group in groups:
            _, texts = _texts(group)
            asked = {pair: (next(answers), next(answers)) for pair in _different(texts)}
            n = len(texts)
            pairs = [
                _settle(i, j, *asked[i, j]) if (i, j) in asked else Comparison(i, j, 0.5)
                for i, j in combinations(range(n), 2)
            ]
            out.append(from_comparisons(n, pairs))
        return out

    def _listwise(self, groups: list[Group]) -> list[Judgement]:
        questions: list[Question] = []
        orders: list[list[str]] = []
        for group in groups:
            prompt, texts = _texts(group)
            unique = list(dict.fromkeys(texts))
            places = sorted(range(len(unique)), key=lambda i: stable_hash("shown", group.id, i))
            orders.append([unique[i] for i in places])
            if len(unique) > 1:
                questions.append(list_question(self.rubric, prompt, orders[-1]))
        answers = iter(self.ask(questions))
        out = []
        for group, order in zip(groups, orders, strict=True):
            _, texts = _texts(group)
            answer: Any = next(answers) if len(order) > 1 else [1.0]
            if len(texts) < 2:
                out.append(abstention(len(texts), ALONE))
            elif isinstance(answer, Abstained):
                out.append(abstention(len(texts), answer.reason))
            else:
                rank = dict(zip(order, answer, strict=True))
                out.append(from_ranks([rank[text] for text in texts]))
        return out

    def _score(self, groups: list[Group]) -> list[Judgement]:
        low, high = self.config.score_min, self.config.score_max
        questions = []
        for group in groups:
            prompt, texts = _texts(group)
            questions += [score_question(self.rubric, prompt, text, low, high) for text in texts]
        answers = iter(self.ask(questions))
        out = []
        for group in groups:
            row = [next(answers) for _ in group.responses]
            out.append(from_scores([a.reason if isinstance(a, Abstained) else a for a in row], "score"))
        return out

    # ---------------------------------------------------------------- asking

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """The verdict of every question, or ``Abstained``; equal questions are asked once.

        ``concurrency`` threads, which the processes of a run share; the first InputError ends all of them, as
        does an interrupt.
        """
        places: dict[str, list[int]] = {}
        for place, question in enumerate(questions):
            places.setdefault(request_key(self.mode, self._body(question.messages)), []).append(place)
        results: list[Any] = [None] * len(questions)
        errors: list[BaseException] = []
        waiting, lock, stop = iter(places.values()), threading.Lock(), self.client.stop
        stop.clear()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    same = next(waiting, None)
                if same is None:
                    return
                try:
                    verdict = self._one(questions[same[0]])
                except Stopped:
                    return
                except BaseException as error:
                    errors.append(error)
                    stop.set()
                    return
                for place in same:
                    results[place] = verdict

        # Daemons, so that an interrupt need not wait for answers that may take a minute.
        count = min(own_part(self.config.concurrency), len(places))
        threads = [threading.Thread(target=work, name="judge", daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            stop.set()
            raise
        if errors:
            raise errors[0]
        return results

    def _one(self, question: Question) -> Any:
        messages = question.messages
        reason = ""
        for attempt in range(self.config.retries + 1):
            try:
                answer = self._answer(messages, again=attempt > 0)
            except NoAnswer as error:
                return Abstained(f"no answer: {error}")
            if not answer.refusal:
                verdict = question.read(answer.content)
                if verdict is not None:
                    return verdict
            reason = _why(answer)
            said = (answer.content or answer.refusal)[:ECHO] or "(no answer)"
            word = f"That could not be read. Answer with one JSON object and nothing else: {question.form}."
            messages = (*messages, {"role": "assistant", "content": said}, {"role": "user", "content": word})
        return Abstained(reason)

    def _answer(self, messages: tuple[dict[str, Any], ...], *, again: bool) -> Answer:
        body = self._body(messages)
        key = request_key(self.mode, body)
        answer = self.cache.get(key)
        if answer is not None:
            with self._count_lock:
                self.costs.cached += 1
            return answer
        if again:
            with self._count_lock:
                self.costs.retries += 1
        answer = self.client.post(body)
        self.cache.put(key, answer)
        return answer

    def _body(self, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.config.model, "messages": list(messages)}
        body |= {"temperature": 0, "seed": self.config.seed}
        if self.config.max_tokens:
            body["max_tokens"] = self.config.max_tokens
        return body | self.config.extra


def _rubric(config: JudgeConfig) -> str:
    if not config.rubric_file:
        return config.rubric or DEFAULT_RUBRIC
    try:
        text = Path(config.rubric_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"judge: cannot read rubric_file {config.rubric_file}: {error}") from None
    if not text.strip():
        raise InputError(f"judge: rubric_file {config.rubric_file} is empty")
    return text


def _texts(group: Group) -> tuple[str, list[str]]:
    return prompt_text(group.prompt), [response_text(response.text) for response in group.responses]


def _different(texts: list[str]) -> list[tuple[int, int]]:
    return [(i, j) for i, j in combinations(range(len(texts)), 2) if texts[i] != texts[j]]


def _settle(i: int, j: int, straight: Any, swapped: Any) -> Comparison:
    """One comparison from the answers in both orders."""
    for answer in (straight, swapped):
        if isinstance(answer, Abstained):
            return Comparison(i, j, None, answer.reason)
    first_shown = (straight + swapped) / 2
    if straight == 1 - swapped:
        return Comparison(i, j, straight, first_shown=first_shown)
    return Comparison(i, j, 0.5, inconsistent=True, first_shown=first_shown)


def _why(answer: Answer) -> str:
    shown = " ".join((answer.refusal or answer.content).split())
    shown = shown if len(shown) <= 80 else shown[:79] + "…"
    if answer.refusal:
        return f"the judge refused: {shown}"
    if answer.finish == "length":
        return f"the answer was cut off at max_tokens: {shown!r}"
    return f"the answer could not be read: {shown!r}"
