"""Finetune by the unmodified ``openai`` client, on the port at which the model is served.

    python examples/openai_finetune.py --file pairs.jsonl --ask "What is the harbour code?"

It uploads a file, makes a job of it, follows the job's events to its end, lists its checkpoints
and asks the new model.  With ``--delete`` it removes the new model and the file again.  The
server's ``--api-key`` is taken from the environment, OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI, OpenAIError
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

ENDED = ("succeeded", "failed", "cancelled")
POLL_S = 1.0


def once() -> dict[str, str]:
    """The header of one POST: the client tries again by itself where an answer is lost, and the
    server knows the repetition by this key."""
    return {"Idempotency-Key": str(uuid.uuid4())}


def follow(client: OpenAI, job: str) -> Iterator[FineTuningJobEvent]:
    """The job's events, oldest first, until the job is over."""
    seen: set[str] = set()
    while True:
        over = client.fine_tuning.jobs.retrieve(job).status in ENDED  # asked before the events
        new = []
        for event in client.fine_tuning.jobs.list_events(job, limit=100):  # newest first, page by page
            if event.id in seen:
                break
            new.append(event)
        seen.update(event.id for event in new)
        yield from reversed(new)
        if over:
            return
        time.sleep(POLL_S)


def train(client: OpenAI, model: str, file: str, epochs: int, multiplier: float) -> FineTuningJob:
    """A job on an uploaded file, when it is over; SystemExit: it did not succeed."""
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file,
        suffix="example",
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": epochs, "learning_rate_multiplier": multiplier},
            },
        },
        extra_headers=once(),
    )
    print(f"job {job.id}")
    for event in follow(client, job.id):
        print(f"  {event.level}: {event.message}")
    job = client.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded":
        why = job.error.message if job.error else "no reason was given"
        raise SystemExit(f"the job is {job.status}: {why}")
    return job


def ask(client: OpenAI, model: str, question: str) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=64,
        extra_headers=once(),
    )
    return answer.choices[0].message.content or ""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finetune by the openai client.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1", help="the server's port")
    parser.add_argument("--model", help="the served model (default: the first that the server lists)")
    parser.add_argument("--file", type=Path, required=True, help="JSON lines with messages")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate-multiplier", type=float, default=1.0, help="times 2e-4")
    parser.add_argument("--ask", default="Hello!", help="what the base and the new model are asked")
    parser.add_argument("--delete", action="store_true", help="remove the new model and the file again")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    # A server without --api-key takes any; the client wants one.
    client = OpenAI(base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = args.model or client.models.list().data[0].id

    with args.file.open("rb") as data:
        file = client.files.create(file=data, purpose="fine-tune", extra_headers=once())
    print(f"file {file.id}: {file.filename}, {file.bytes} bytes")

    job = train(client, model, file.id, args.epochs, args.learning_rate_multiplier)
    assert job.fine_tuned_model is not None  # of a job that has succeeded
    for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id):
        loss = checkpoint.metrics.train_loss
        print(f"checkpoint {checkpoint.id}: step {checkpoint.step_number}, train_loss {loss}")

    print(f"{model}: {ask(client, model, args.ask)}")
    print(f"{job.fine_tuned_model}: {ask(client, job.fine_tuned_model, args.ask)}")

    if args.delete:
        client.models.delete(job.fine_tuned_model)
        client.files.delete(file.id)
        print("model and file are deleted")


if __name__ == "__main__":
    try:
        main()
    except (OpenAIError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
