"""The public endpoint of the real finetune service: followers, and messages that mean harm."""

from __future__ import annotations

import json
import os
import socket

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.protocol import public
from sglang_harli.protocol.public import VERBS
from support.service.service_fixture import dealer, pairs, request, submit_args, until


# ------------------------------------------------------------------ followers
def test_following_ends_with_the_job(rig):
    rig.scheduler.step_s = 0.02
    job = rig.client.submit(pairs())
    events = list(rig.client.events(job.id, follow=True))
    assert [e.id for e in events] == list(range(1, len(events) + 1))
    assert events[-1].type == "succeeded"


def test_a_follower_that_does_not_read_hinders_nobody(rig):
    context, idle = dealer(rig, RCVHWM=1, RCVBUF=1024)
    rig.scheduler.hold.clear()
    job = rig.client.submit(pairs(), n_epochs=100, checkpoint_every=0)
    for number in range(30):
        idle.send(request("events", {"job": job.id, "follow": True}, f"r{number}"))
    until(lambda: rig.client.status().service["followers"] >= 30, "the followers")
    rig.scheduler.hold.set()
    rig.done(job)
    idle.close()
    context.term()
    until(lambda: rig.client.status().service["followers"] == 0, "forgetting the follower")


def test_renewing_and_ending_a_subscription(rig):
    rig.scheduler.hold.clear()
    job = rig.client.submit(pairs(4))
    context, client = dealer(rig, RCVTIMEO=10_000)
    for _ in range(3):
        client.send(request("events", {"job": job.id, "follow": True}, "same"))
    answers = 0
    while answers < 3:  # requests are answered side by side: only what is answered is done
        answers += public.decode(client.recv(), public.Reply).event is None
    assert rig.client.status().service["followers"] == 1
    client.send(request("unsubscribe", {"id": "same"}, "end"))
    until(lambda: rig.client.status().service["followers"] == 0, "no follower")
    client.close()
    context.term()


# ------------------------------------------------------------------ hostile messages
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
ARGS = JSON | st.dictionaries(
    st.sampled_from(
        [
            "job",
            "after",
            "limit",
            "follow",
            "values",
            "filename",
            "size",
            "sha256",
            "hyperparameters",
            "suffix",
            "id",
        ]
    ),
    JSON,
)
HEADERS = st.binary(max_size=60) | st.builds(
    lambda v, number, verb, args: json.dumps({"v": v, "id": number, "verb": verb, "args": args}).encode(),
    st.sampled_from([1, 2, None, "1"]),
    st.text(max_size=8) | st.none(),
    st.sampled_from([*VERBS, "", "delete"]) | st.text(max_size=8),
    ARGS,
)
MESSAGES = st.builds(
    lambda header, rest: [header, *rest], HEADERS, st.lists(st.binary(max_size=50), max_size=3)
)


def test_fuzz(rig):
    context, client = dealer(rig)
    poller = zmq.Poller()
    poller.register(client, zmq.POLLIN)
    pid = rig.client.status().service["pid"]
    jobs = len(rig.client.list())

    @settings(deadline=None, max_examples=300)
    @given(st.lists(MESSAGES, max_size=4))
    def throw(messages):
        for message in messages:
            client.send_multipart(message)
        while poller.poll(0):
            reply = public.decode(client.recv_multipart()[-1], public.Reply)
            assert reply.ok or (reply.error is not None and reply.error.code != "internal"), reply.error

    throw()
    while poller.poll(300):
        reply = public.decode(client.recv_multipart()[-1], public.Reply)
        assert reply.ok or (reply.error is not None and reply.error.code != "internal"), reply.error
    client.close()
    context.term()
    assert rig.client.status().service["pid"] == pid
    assert len(rig.client.list()) == jobs


@pytest.mark.parametrize(
    ("header", "frames", "code"),
    [
        (b"", [], "bad_request"),
        (b"[" * 100_000, [], "bad_request"),
        (b'{"v":1,"id":"1","verb":"get","args":{"job":"' + b"x" * (1 << 20) + b'"}}', [], "bad_request"),
        (request("get", {"job": "x", "more": 1}), [], "bad_request"),
        (request("get", {"job": "x"}), [b"data"], "bad_request"),
        (b'{"v":7,"id":"1","verb":"list","args":{}}', [], "unsupported_version"),
        (request("submit", submit_args(b"abc")), [b"ab"], "data_mismatch"),
        (request("submit", submit_args(b"abc")), [b"ab", b"d"], "data_mismatch"),
        (request("submit", submit_args(b"abc") | {"size": 1 << 40}), [], "bad_request"),
        (request("submit", submit_args(b"abc") | {"suffix": "../x"}), [b"abc"], "bad_request"),
        (request("events", {"job": "x", "limit": 0}), [], "bad_request"),
        *(
            (
                request("submit", submit_args(b"abc") | {"hyperparameters": {name: value}}),
                [b"abc"],
                "invalid_value",
            )
            # what JSON or the store cannot hold, in texts that would become numbers
            for name, value in (
                ("max_grad_norm", "inf"),
                ("checkpoint_every", "1" + 20 * "0"),
                ("seed", "nan"),
            )
        ),
    ],
)
def test_malformed_requests_get_an_error(rig, header, frames, code):
    context, client = dealer(rig, RCVTIMEO=10_000)
    client.send_multipart([header, *frames])
    reply = public.decode(client.recv(), public.Reply)
    assert not reply.ok and reply.error is not None and reply.error.code == code, reply.error
    client.close()
    context.term()


def test_oversized_frames_raw_bytes_and_request_sockets(rig):
    context, client = dealer(rig)
    client.send_multipart([request("submit", submit_args(b"")), b"x" * (public.MAX_FRAME_BYTES * 2)])
    host, port = rig.service.endpoint.removeprefix("tcp://").split(":")
    for content in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 300, os.urandom(4096), b""):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(content)
    plain = context.socket(zmq.REQ)
    plain.setsockopt(zmq.RCVTIMEO, 10_000)
    plain.setsockopt(zmq.LINGER, 0)
    plain.connect(rig.service.endpoint)
    plain.send(request("list", {}))
    assert public.decode(plain.recv(), public.Reply).ok
    for each in (client, plain):
        each.close()
    context.term()
    assert rig.service.alive
