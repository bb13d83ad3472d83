"""The format of a prompt: its parts as text, in the model's chat template where it has one."""

from transformers import PreTrainedTokenizerBase

_CUT = "\ue000\ue001"  # private use characters: no text has them


def format_prompt(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    question: str,
    answer_prefix: str = "",
    system: str = "",
    chat: bool = True,
) -> tuple[str, str, str]:
    """The three parts of a prompt as text to be tokenised part by part, without adding special tokens.

    With a chat template, context and question are one user message, cut where the question begins: the template's head
    goes before the context, its tail after the question, and the answer prefix begins the model's reply. Without one,
    the context gets the BOS token that the tokenizer would give it.

    Args:
        system: system message; it stands before the context where there is no template, or the template knows none.
        chat: whether a chat template is used where the tokenizer has one.
    """
    if chat and tokenizer.chat_template is not None:
        rendered = _rendered_chat(tokenizer, f"{context}{_CUT}{question}", system)
        if system and system not in rendered:
            rendered = _rendered_chat(tokenizer, f"{system}\n\n{context}{_CUT}{question}")
        head, _, tail = rendered.partition(_CUT)
        return head, tail, answer_prefix
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    first = f"{system}\n\n{context}" if system else context
    return f"{tokenizer.bos_token if begins else ''}{first}", question, answer_prefix


def _rendered_chat(tokenizer: PreTrainedTokenizerBase, message: str, system: str = "") -> str:
    """A chat of one user message, up to where the model replies; "" where the template refuses system messages."""
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": message}]
    try:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False)
        )
    except Exception as error:  # jinja2's, raised by the template itself
        if system and type(error).__name__ == "TemplateError":
            return ""
        raise
