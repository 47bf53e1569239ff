"""Whether a chat template takes a message's content as a text or as a list of parts.

As SGLang's ``jinja_template_utils.detect_jinja_template_content_format``, not imported.
"""

from __future__ import annotations

import jinja2
from jinja2 import nodes

STRING, OPENAI = "string", "openai"
_MEDIA = ("image", "audio", "video", "vision")
_MESSAGE_NAMES = ("message", "msg", "m")


def detect(source: str) -> str:
    """``openai`` where the template loops over a content or mentions media; else ``string``."""
    if any(word in source for word in _MEDIA):
        return OPENAI
    try:
        tree = _environment(source).parse(source)
    except jinja2.TemplateError:
        return STRING
    loops = tree.find_all(nodes.For)
    return OPENAI if any(_is_content(loop.iter) for loop in loops) else STRING


def _environment(source: str) -> jinja2.Environment:
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template(source).environment


def _is_content(node: nodes.Node | None) -> bool:
    """Whether it is ``message.content`` or ``message['content']``, also filtered or sliced."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return _is_content(node.node)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_content(node.node)
    if isinstance(node, nodes.Getitem):
        return _is_message(node.node) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return _is_message(node.node) and node.attr == "content"
    return False


def _is_message(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name in _MESSAGE_NAMES
