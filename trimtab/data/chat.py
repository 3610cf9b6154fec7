"""Prompts and responses → token ids, for plain text and for conversations.

Prompt and response are tokenised apart, never as one string that is cut afterwards: a tokenizer may join
characters across the boundary, and then the prompt's ids in training would not be those that the sampler
starts from. A tokenizer that opens every text with a space ("▁" in Llama 2's) does not do so inside a text,
so a response is tokenised behind a character that is then taken away.

Special tokens. Plain text gets one BOS where the tokenizer's own convention adds one, and its response one
EOS. A conversation gets just what its template writes; only where the template writes no token after an
assistant message does the last one get EOS, since a model must learn where to end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.errors import InputError
from trimtab.groups import Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_SENTINEL = "Qxq7ProbeZ"
"""Content of a probing message: found again in a rendering, and changed by no template's trimming."""
_ANCHORS = ("\n", ".", "a")
"""Tried in turn in front of a continuation: one that does not merge with its first character will do."""


def render_prompt(tokenizer: Tokenizer, prompt: Text) -> list[int]:
    """Token ids of a prompt; at least one, since a response's first token is predicted from the last.

    Text: its tokens, behind one BOS where the tokenizer adds one by itself. Empty text: BOS, else EOS.
    Messages: the chat template with its opening of the assistant's turn.
    Raises InputError when there is no template, when it refuses the messages, or when no token comes out.
    """
    if isinstance(prompt, list):
        ids = _template_ids(tokenizer, prompt, opening=True)
    else:
        ids = _encode(tokenizer, prompt)
        bos = _own_bos(tokenizer)
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        if not ids:
            ids = [
                i for i in (_single(tokenizer.bos_token_id), _single(tokenizer.eos_token_id)) if i is not None
            ][:1]
    if not ids:
        raise InputError("an empty prompt needs a BOS or EOS token and the tokenizer has none: set bos_token")
    return ids


def render_response(tokenizer: Tokenizer, prompt: Text, response: Text) -> tuple[list[int], list[bool]]:
    """Token ids of a response, and its mask: True = said by the assistant, or the token that ends its turn.

    Text after a text prompt: its tokens and one EOS, all True. After a conversation, text is one assistant
    message and a list is what follows the prompt: the user's and tools' messages in between, and what the
    template writes around them, are False. The ids are the full rendering without the prompt's ids where
    the former begins with the latter. Where it does not (templates that rewrite earlier turns, such as those
    that strip thinking), they are put together from each message's content, the template's end of turn and
    its text between turns, so that ``render_prompt(…) + ids`` is always one sequence that can be sampled.

    Anything after the last assistant turn's end is left out. Raises InputError as `render_prompt` does.
    """
    if isinstance(prompt, str):
        if not isinstance(response, str):
            raise InputError(
                "a response of messages follows a prompt of text: write the prompt as messages too"
            )
        ids = _with_eos(tokenizer, _continue(tokenizer, response))
        return ids, [True] * len(ids)
    turns = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    if not turns or turns[0]["role"] != "assistant":
        raise InputError("a response that does not begin with an assistant message: add the reply")
    end = _end_of_turn(tokenizer)
    rendered = _from_full_rendering(tokenizer, prompt, turns, end)
    ids, mask = rendered if rendered is not None else _from_pieces(tokenizer, prompt, turns, end)
    if end is None:
        ids = _with_eos(tokenizer, ids)
        mask = mask + [True] * (len(ids) - len(mask))
    return ids, mask


def end_tokens(tokenizer: Tokenizer, model_generation_config_eos: int | list[int] | None = None) -> list[int]:
    """Ids that end an assistant's message: EOS, the template's end-of-turn token, the model's own list.

    Chat models often end a turn with another token than EOS (ChatML's ``<|im_end|>``); a sampler that waits
    for EOS alone runs on. Raises InputError when there is no such token at all.
    """
    listed = model_generation_config_eos
    candidates = [_single(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        end = _end_of_turn(tokenizer)
        candidates.append(end[1] if end else None)
    candidates += [listed] if isinstance(listed, int) else list(listed or [])
    ids = list(dict.fromkeys(token for token in candidates if token is not None))
    if not ids:
        raise InputError("no token ends a response: set the tokenizer's eos_token")
    return ids


# ---------------------------------------------------------------- plain text


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _continue(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that goes on from another: without the space that opens a text of its own."""
    ids = _encode(tokenizer, text)
    probe = tokenizer.convert_ids_to_tokens(_encode(tokenizer, "a"))
    if not probe or str(probe[0])[0] not in "▁Ġ":
        return ids
    for anchor in _ANCHORS:
        before, joined = _encode(tokenizer, anchor), _encode(tokenizer, anchor + text)
        if joined[: len(before)] == before:
            return joined[len(before) :]
    return ids


def _own_bos(tokenizer: Tokenizer) -> int | None:
    """The BOS id if the tokenizer puts it before every text by itself."""
    bos = _single(tokenizer.bos_token_id)
    return bos if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else None


def _with_eos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    eos = _single(tokenizer.eos_token_id)
    if eos is None:
        raise InputError("the tokenizer has no EOS token, so no response could end: set its eos_token")
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _single(token_id: int | list[int] | None) -> int | None:
    return token_id[0] if isinstance(token_id, list) else token_id


# ---------------------------------------------------------------- conversations


def _render(tokenizer: Tokenizer, messages: list[Message], *, opening: bool, tokenise: bool) -> Any:
    if not tokenizer.chat_template:
        raise InputError(
            "the rows are conversations and the tokenizer has no chat template: give a template file, "
            "or write prompts and responses as text"
        )
    if not messages:
        raise InputError("a conversation without messages: give at least one before the assistant's reply")
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=tokenise, add_generation_prompt=opening, return_dict=False
        )
    except Exception as error:  # a template is a program: it raises what it likes
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise InputError(
            f"the chat template refuses messages with roles {roles} ({error}): change the rows or template"
        ) from error


def _template_ids(tokenizer: Tokenizer, messages: list[Message], *, opening: bool) -> list[int]:
    ids = _render(tokenizer, messages, opening=opening, tokenise=True)
    if not isinstance(ids, list) or set(map(type, ids)) - {int}:
        raise InputError(f"the chat template gave {type(ids).__name__}, not token ids: update transformers")
    return ids


def _template_text(tokenizer: Tokenizer, messages: list[Message], *, opening: bool) -> str:
    return str(_render(tokenizer, messages, opening=opening, tokenise=False))


def _end_of_turn(tokenizer: Tokenizer) -> tuple[str, int] | None:
    """What the template writes after an assistant's content, up to and with its first special token.

    Returns that text and the token's id, or None where no special token follows.
    """
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SENTINEL}]
    text = _template_text(tokenizer, probe, opening=False)
    tail = text.rpartition(_SENTINEL)[2] if _SENTINEL in text else ""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    token = next((i for i in _encode(tokenizer, tail) if i in special), None)
    if token is None:
        return None
    written = str(tokenizer.convert_ids_to_tokens(token))
    before, _, _ = tail.partition(written)
    return before + written, token


def _from_full_rendering(
    tokenizer: Tokenizer, prompt: list[Message], turns: list[Message], end: tuple[str, int] | None
) -> tuple[list[int], list[bool]] | None:
    """Ids and mask cut from the rendering of the whole conversation.

    None unless the rendering of every beginning of the conversation is a beginning of the whole's.
    """
    messages = prompt + turns
    full = _template_ids(tokenizer, messages, opening=False)
    opened = _template_ids(tokenizer, prompt, opening=True)
    start = len(opened)
    mask = [False] * len(full)
    last = start
    for k in range(len(prompt), len(messages)):
        if messages[k]["role"] != "assistant":
            continue
        before = _template_ids(tokenizer, messages[:k], opening=True) if k > len(prompt) else opened
        whole = k + 1 == len(messages)
        after = full if whole else _template_ids(tokenizer, messages[: k + 1], opening=False)
        if full[: len(before)] != before or full[: len(after)] != after or len(after) <= len(before):
            return None
        last = len(after)
        if end is not None:
            if end[1] not in after[len(before) :]:
                return None
            last -= after[::-1].index(end[1])  # what follows the end token belongs to no one
        mask[len(before) : last] = [True] * (last - len(before))
    return full[start:last], mask[start:last]


def _from_pieces(
    tokenizer: Tokenizer, prompt: list[Message], turns: list[Message], end: tuple[str, int] | None
) -> tuple[list[int], list[bool]]:
    """Ids and mask put together turn by turn, each content as it was written."""
    ids: list[int] = []
    mask: list[bool] = []
    ending = end[0] if end else ""
    opening = _template_text(tokenizer, prompt, opening=True)
    replies = [k for k, message in enumerate(turns) if message["role"] == "assistant"]
    for k, following in zip(replies, [*replies[1:], None], strict=True):
        if turns[k].get("tool_calls"):
            raise InputError(
                "the chat template rewrites earlier turns, and a reply with tool calls cannot be rendered by "
                "itself: give each assistant turn a row of its own"
            )
        said = _continue(tokenizer, _unopened(tokenizer, opening, str(turns[k]["content"])) + ending)
        between: list[int] = []
        if following is not None:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SENTINEL}]
            text = _template_text(tokenizer, probe + turns[k + 1 : following], opening=True)
            opening = text.partition(_SENTINEL)[2].removeprefix(ending)
            between = _continue(tokenizer, opening)
        ids += said + between
        mask += [True] * len(said) + [False] * len(between)
    return ids, mask


def _unopened(tokenizer: Tokenizer, opening: str, content: str) -> str:
    """The content without what the turn's opening has written already, such as ``<think>`` and a newline.

    Only an overlap that starts with an added token counts: a common letter is chance.
    """
    starts = (opening.rfind(str(token)) for token in tokenizer.added_tokens_decoder.values())
    overlaps = (opening[at:] for at in starts if at >= 0)
    return next((content.removeprefix(o) for o in overlaps if content.startswith(o)), content)
