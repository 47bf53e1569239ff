"""LiteLLM's SDK as a client of the API: a script for an environment that has ``litellm`` and
nothing of ours.

``python litellm_client.py BASE_URL KEY FILE MODEL RESULT QUESTION`` sends the file, makes a job of
it, follows, lists and cancels, and asks RESULT, a fine-tuned model, the question, all of it
blocking and in asyncio; it prints what came of it as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm


def blocking(place: dict[str, Any], path: str, model: str) -> dict[str, Any]:
    with open(path, "rb") as opened:
        file = litellm.create_file(file=opened, purpose="fine-tune", **place)
    job = litellm.create_fine_tuning_job(
        model=model,
        training_file=file.id,
        hyperparameters={"n_epochs": 2, "batch_size": 4},
        suffix="lite",
        seed=7,
        **place,
    )
    found = litellm.retrieve_fine_tuning_job(job.id, **place)
    listed = litellm.list_fine_tuning_jobs(limit=1, **place)
    cancelled = litellm.cancel_fine_tuning_job(job.id, **place)
    content = litellm.file_content(file.id, **place)
    return {
        "file": litellm.file_retrieve(file.id, **place).model_dump(),
        "files": [one.id for one in litellm.file_list(**place)],
        "content": content.content.decode(),
        "created": job.model_dump(),
        "retrieved": found.model_dump(),
        "listed": [one.id for one in listed.data],
        "cancelled": cancelled.model_dump(),
        "deleted": litellm.file_delete(file.id, **place).deleted,
    }


async def in_asyncio(place: dict[str, Any], path: str, model: str) -> dict[str, Any]:
    with open(path, "rb") as opened:
        file = await litellm.acreate_file(file=opened, purpose="fine-tune", **place)
    job = await litellm.acreate_fine_tuning_job(model=model, training_file=file.id, **place)
    found = await litellm.aretrieve_fine_tuning_job(job.id, **place)
    listed = await litellm.alist_fine_tuning_jobs(limit=1, **place)
    cancelled = await litellm.acancel_fine_tuning_job(job.id, **place)
    return {
        "file": file.model_dump(),
        "created": job.model_dump(),
        "retrieved": found.model_dump(),
        "listed": [one.id for one in listed.data],
        "cancelled": cancelled.model_dump(),
    }


def chat(place: dict[str, Any], result: str, question: str) -> dict[str, str]:
    """The answers: whole, whole in asyncio, and in pieces."""
    asked: dict[str, Any] = {
        "model": f"openai/{result}",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 32,
        "api_base": place["api_base"],
        "api_key": place["api_key"],
    }
    pieces = [piece.choices[0].delta.content or "" for piece in litellm.completion(**asked, stream=True)]
    return {
        "blocking": litellm.completion(**asked).choices[0].message.content,
        "asyncio": asyncio.run(litellm.acompletion(**asked)).choices[0].message.content,
        "stream": "".join(pieces),
    }


def refused(place: dict[str, Any], model: str) -> dict[str, Any]:
    """A file that is not there: the type of the error, its status and what it says."""
    try:
        litellm.create_fine_tuning_job(model=model, training_file="file-none", **place)
    except Exception as error:  # what LiteLLM makes of it is printed
        return {
            "type": type(error).__name__,
            "status": getattr(error, "status_code", None),
            "text": str(error),
        }
    return {}


def main() -> None:
    base_url, key, path, model, result, question = sys.argv[1:]
    place = {"custom_llm_provider": "openai", "api_base": base_url, "api_key": key}
    print(
        json.dumps(
            {
                "blocking": blocking(place, path, model),
                "asyncio": asyncio.run(in_asyncio(place, path, model)),
                "chat": chat(place, result, question),
                "refused": refused(place, model),
            }
        )
    )


if __name__ == "__main__":
    main()
