"""Files, uploads, fine-tuning and webhooks through the official client against a real HTTP server."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import openai
import pandas as pd
import pytest
import sqlalchemy as sa
from openai import OpenAI

from app.database import writing
from app.idempotency import keys_table
from app.training.job import JobError, StepMetrics, model_name
from app.training.jobs import result_csv
from tests.adapter_files import config_bytes
from tests.api.serving import weights_bytes
from tests.api.training_rig import Rig, chat_rows, jsonl, training_server

BASE = "tiny-llama"
GOOD = jsonl(*chat_rows(12))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with training_server(tmp_path_factory.mktemp("training")) as made:
        yield made


@pytest.fixture
def client(rig: Rig) -> OpenAI:
    return rig.serving.openai()


@pytest.fixture(autouse=True)
def _leave_no_job(rig: Rig) -> Iterator[None]:
    """Jobs of one test are none of the next one's claims."""
    yield
    for tenant in ("acme", "globex"):
        for job in rig.training.jobs.list(tenant, limit=1000).items:
            if not job.status.is_over and not job.is_publishing:
                rig.training.jobs.cancel(tenant, job.id)


def upload(client: OpenAI, data: bytes = GOOD) -> str:
    return client.files.create(file=("train.jsonl", data), purpose="fine-tune").id


def create(client: OpenAI, data: bytes = GOOD, **options: Any) -> Any:
    return client.fine_tuning.jobs.create(model=BASE, training_file=upload(client, data), **options)


def refusal(call: Callable[[], object], kind: type[openai.APIStatusError] = openai.BadRequestError) -> Any:
    """The error as the client shows it; its four fields and the request id are always there."""
    with pytest.raises(kind) as refused:
        call()
    error = refused.value
    assert error.type == "invalid_request_error"
    assert error.request_id
    assert error.code
    assert set(error.body or {}) == {"message", "type", "param", "code"}
    return error


# ---- the whole loop


def test_client_drives_a_job_from_file_to_result(rig: Rig, client: OpenAI, tmp_path: Path) -> None:
    job = create(client, suffix="Mine", seed=7, metadata={"team": "a"})
    assert (job.status, job.organization_id, job.seed) == ("validating_files", "acme", 7)
    assert job.hyperparameters.n_epochs == "auto"
    rig.validate()
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.training["queue_position"]) == ("queued", 1)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (8, 2)
    assert job.method.supervised.hyperparameters.n_epochs == 8
    assert job.training["report"]["training"]["examples"] == 12
    claim = rig.start()
    rig.queue.record_metrics(claim, [StepMetrics(1, train_loss=1.523474, train_mean_token_accuracy=0.0)])
    rig.queue.record_metrics(claim, [StepMetrics(2, train_loss=1.0, valid_loss=1.1, valid_mean_token_accuracy=0.5)])
    rig.queue.add_checkpoint(claim, StepMetrics(2, train_loss=1.0, full_valid_loss=1.2), {"digest": "d"})
    (point,) = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert (point.step_number, point.metrics.full_valid_loss) == (2, 1.2)
    path = tmp_path / "results.csv"
    path.write_bytes(result_csv(rig.training.jobs.metrics(job.id)))
    rig.succeed(claim, path)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.trained_tokens, job.error) == ("succeeded", 5, None)
    assert job.fine_tuned_model.startswith(f"ft:{BASE}:acme:Mine:")
    assert point.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-2"
    table = pd.read_csv(io.BytesIO(client.files.content(job.result_files[0]).read()))
    assert list(table.columns) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert table.train_loss.tolist() == [1.52347, 1.0]
    assert table.valid_loss.isna().tolist() == [True, False]


def test_bad_rows_fail_the_job_with_findings(rig: Rig, client: OpenAI) -> None:
    job = create(client, GOOD + b'{"messages": []}\nx\n')
    rig.validate()
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.error.code, job.error.param) == ("failed", "invalid_training_file", "training_file")
    assert "line 13" in job.error.message
    event = client.fine_tuning.jobs.list_events(job.id).data[0]
    assert event.level == "error"
    assert [(one["line"], one["code"]) for one in event.data["findings"]] == [
        (13, "missing_messages_list"),
        (14, "invalid_json"),
    ]
    assert job.finished_at


def test_too_few_examples_fail_the_job(rig: Rig, client: OpenAI) -> None:
    job = create(client, jsonl(*chat_rows(7)))
    rig.validate()
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert error.code == "invalid_n_examples"
    assert error.message == "Training file has 7 example(s), but must have at least 10 examples"


def test_warnings_do_not_stop_a_job(rig: Rig, client: OpenAI) -> None:
    valid = upload(client, jsonl(*chat_rows(10)))
    job = create(client, jsonl(*chat_rows(12), *chat_rows(1)), validation_file=valid)
    rig.validate()
    events = client.fine_tuning.jobs.list_events(job.id).data
    warning = next(event for event in events if event.level == "warn")
    assert warning.data["counts"] == {"duplicate": 1, "train_validation_overlap": 10}
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"


def test_dpo_job_reads_pairs(rig: Rig, client: OpenAI) -> None:
    pairs = [
        {
            "input": {"messages": [{"role": "user", "content": f"q{n}"}]},
            "preferred_output": [{"role": "assistant", "content": "yes"}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
        for n in range(10)
    ]
    job = create(client, jsonl(*pairs), method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}})
    rig.validate()
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.method.dpo.hyperparameters.beta) == ("queued", 0.2)


def test_old_hyperparameters_equal_the_method(rig: Rig, client: OpenAI) -> None:
    asked: Any = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    old = create(client, hyperparameters=asked)
    new = create(client, method={"type": "supervised", "supervised": {"hyperparameters": asked}})
    rig.validate()
    shown = [client.fine_tuning.jobs.retrieve(job.id) for job in (old, new)]
    assert shown[0].hyperparameters == shown[1].hyperparameters
    assert shown[0].method == shown[1].method
    assert shown[0].hyperparameters.n_epochs == 2


def test_own_options_are_taken_and_shown_resolved(rig: Rig, client: OpenAI) -> None:
    extra = {
        "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj"], "use_rslora": True},
        "training": {"max_seq_length": 64, "schedule": "cosine", "max_steps": 3, "early_stop": {"patience": 0}},
        "publish": {"name": "acme/support", "alias": "canary", "gate": {"hold": True}},
    }
    job = create(client, extra_body=extra)
    rig.validate()
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.lora == {
        "rank": 4, "alpha": 8.0, "dropout": 0.05, "target_modules": ["q_proj"], "init": "default", "use_rslora": True
    }  # fmt: skip
    assert (job.training["max_seq_length"], job.training["total_steps"]) == (64, 3)
    assert (job.publish["name"], job.publish["alias"], job.publish["gate"]["hold"]) == ("support", "canary", True)


def test_preflight_tells_all_and_makes_nothing(rig: Rig, client: OpenAI) -> None:
    body = {"model": BASE, "training_file": upload(client)}
    http = rig.serving.client()
    before = len(client.fine_tuning.jobs.list().data)
    told = http.post("/v1/fine_tuning/preflight", json=body).json()
    assert (told["valid"], told["error"]) == (True, None)
    assert told["estimate"]["steps"] == told["config"]["total_steps"] == 48
    assert told["estimate"]["peak_memory_bytes"] > 0
    bad = http.post("/v1/fine_tuning/preflight", json=body | {"training_file": upload(client, b"x\n")}).json()
    assert (bad["valid"], bad["error"]["code"]) == (False, "invalid_training_file")
    assert bad["report"]["findings"][0]["line"] == 1
    assert len(client.fine_tuning.jobs.list().data) == before


def test_job_may_continue_from_an_adapter(rig: Rig, client: OpenAI) -> None:
    parent = rig.serving.publish("acme", "parent")
    job = client.fine_tuning.jobs.create(model="parent@v1", training_file=upload(client))
    rig.validate()
    shown = client.fine_tuning.jobs.retrieve(job.id)
    assert (shown.model, shown.lora["rank"]) == ("parent@v1", parent.rank)
    assert rig.training.jobs.get("acme", job.id).spec.parent["digest"] == parent.digest  # type: ignore[index]


# ---- refusals


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"suffix": "with space"}, "invalid_value", "suffix"),
    ({"suffix": "x" * 65}, "invalid_value", "suffix"),
    ({"seed": -1}, "invalid_value", "seed"),
    ({"seed": "7"}, "invalid_value", "seed"),
    ({"hyperparameters": {"n_epochs": 51}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": "many"}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": 0}}, "invalid_value", "hyperparameters.batch_size"),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, "invalid_value", "hyperparameters.learning_rate_multiplier"),
    ({"hyperparameters": {"epochs": 3}}, "unknown_parameter", "hyperparameters.epochs"),
    ({"method": {"type": "reinforcement", "reinforcement": {}}}, "unsupported_method", "method.type"),
    ({"method": {"type": "supervised", "dpo": {}}}, "invalid_value", "method.dpo"),
    ({"metadata": {str(n): "x" for n in range(17)}}, "invalid_value", "metadata"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "unsupported_parameter", "integrations"),
    ({"extra_body": {"colour": "red"}}, "unknown_parameter", "colour"),
    ({"extra_body": {"lora": {"rank": 65}}}, "invalid_value", "lora.rank"),
    ({"extra_body": {"lora": {"target_modules": ["lm_head"]}}}, "invalid_value", "lora.target_modules"),
    ({"extra_body": {"lora": {"init": "pissa"}}}, "invalid_value", "lora.init"),
    ({"extra_body": {"lora": {"init": "orthogonal", "rank": 3}}}, "invalid_value", "lora.rank"),
    ({"extra_body": {"training": {"max_seq_length": 99999}}}, "invalid_value", "training.max_seq_length"),
    ({"extra_body": {"training": {"on_long": "cut"}}}, "invalid_value", "training.on_long"),
    ({"extra_body": {"publish": {"name": "globex/support"}}}, "invalid_value", "publish.name"),
    ({"extra_body": {"publish": {"name": "Base Model"}}}, "invalid_value", "publish.name"),
    ({"extra_body": {"publish": {"alias": "v3"}}}, "invalid_value", "publish.alias"),
    ({"extra_headers": {"Idempotency-Key": "x" * 256}}, "invalid_value", "Idempotency-Key"),
]


@pytest.mark.parametrize(("options", "code", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_bad_create_says_which_field(client: OpenAI, options: dict[str, Any], code: str, param: str | None) -> None:
    error = refusal(lambda: create(client, **options))
    assert (error.code, error.param) == (code, param)


def test_absent_things_are_404_and_foreign_ones_look_the_same(rig: Rig, client: OpenAI) -> None:
    stranger = rig.serving.openai("globex")
    job, file_id = create(client), upload(client)

    def calls(who: OpenAI, job_id: str, a_file: str) -> list[Callable[[], object]]:
        jobs, files = who.fine_tuning.jobs, who.files
        return [
            lambda: jobs.retrieve(job_id),
            lambda: jobs.cancel(job_id),
            lambda: jobs.pause(job_id),
            lambda: jobs.resume(job_id),
            lambda: jobs.list_events(job_id),
            lambda: jobs.checkpoints.list(job_id),
            lambda: files.retrieve(a_file),
            lambda: files.delete(a_file),
            lambda: files.content(a_file),
            lambda: rig.serving.openai("globex").uploads.cancel(a_file),
        ]

    foreign = [refusal(call, openai.NotFoundError).body for call in calls(stranger, job.id, file_id)]
    absent = [refusal(call, openai.NotFoundError).body for call in calls(stranger, "ftjob-none", "file-none")]
    assert foreign == absent
    error = refusal(lambda: create(stranger, validation_file=file_id), openai.NotFoundError)
    assert error.param == "validation_file"
    error = refusal(lambda: client.fine_tuning.jobs.create(model="gpt-4o", training_file=file_id), openai.NotFoundError)
    assert error.code == "model_not_found"


def test_requests_without_a_key_are_401(rig: Rig) -> None:
    nobody = OpenAI(base_url=f"{rig.serving.url}/v1", api_key="lk_wrong", max_retries=0)
    for call in (nobody.files.list, nobody.fine_tuning.jobs.list, nobody.webhooks.list):
        refusal(call, openai.AuthenticationError)


# ---- changing a job


def test_cancel_pause_and_resume_may_be_repeated(rig: Rig, client: OpenAI) -> None:
    job, jobs = create(client), client.fine_tuning.jobs
    assert refusal(lambda: jobs.pause(job.id)).code == "invalid_job_state"  # its files come first
    rig.validate()
    assert [jobs.pause(job.id).status, jobs.pause(job.id).status] == ["paused", "paused"]
    assert [jobs.resume(job.id).status, jobs.resume(job.id).status] == ["queued", "queued"]
    assert [jobs.cancel(job.id).status, jobs.cancel(job.id).status] == ["cancelled", "cancelled"]
    for act in (jobs.pause, jobs.resume):
        assert refusal(lambda act=act: act(job.id)).code == "invalid_job_state"


def test_running_job_is_cancelled_at_once(rig: Rig, client: OpenAI) -> None:
    job = create(client)
    rig.start()
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert (cancelled.status, cancelled.finished_at is not None) == ("cancelled", True)


# ---- lost answers


def test_lost_answer_makes_one_job(rig: Rig, client: OpenAI) -> None:
    """The first answer is lost: the client sends the same again and says that it is a retry."""
    body = {"model": BASE, "training_file": upload(client)}
    http = rig.serving.client()

    def send(**headers: str) -> Any:
        return http.post("/v1/fine_tuning/jobs", json=body, headers=headers).json()

    first = send(**{"x-stainless-retry-count": "0"})
    assert send(**{"x-stainless-retry-count": "1"})["id"] == first["id"]
    assert send(**{"x-stainless-retry-count": "0"})["id"] != first["id"]


def test_idempotency_key_makes_one_job(client: OpenAI) -> None:
    file_id = upload(client)
    key = {"Idempotency-Key": "once"}

    def send(**options: Any) -> Any:
        jobs = client.fine_tuning.jobs
        return jobs.create(model=BASE, training_file=file_id, extra_headers=key, **options)

    assert send().id == send().id
    assert refusal(lambda: send(seed=1)).code == "idempotency_key_reused"


def test_idempotency_key_keeps_one_file_and_says_when_the_first_call_is_at_work(rig: Rig, client: OpenAI) -> None:
    key = {"Idempotency-Key": "one-file"}

    def send(rows: bytes = b'{"prompt": "a", "completion": "b"}\n') -> Any:
        return client.files.create(file=("rows.jsonl", rows), purpose="fine-tune", extra_headers=key)

    first = send()
    assert send() == first
    assert [file.id for file in client.files.list() if file.filename == "rows.jsonl"] == [first.id]
    assert refusal(lambda: send(b'{"prompt": "c", "completion": "d"}\n')).code == "idempotency_key_reused"

    mine = keys_table.c.key == "one-file"
    with writing(rig.database) as connection:  # as if the first were still being stored
        connection.execute(sa.update(keys_table).where(mine).values(answer=None))
    error = refusal(send, openai.ConflictError)
    assert error.code == "idempotency_in_progress"
    assert int(error.response.headers["retry-after"]) >= 1


def test_quota_is_429_and_not_retried(rig: Rig) -> None:
    http = rig.serving.client()
    client = rig.serving.openai(max_retries=2)
    rig.serving.services.tenants.set_limits("acme", max_jobs=0)
    try:
        with pytest.raises(openai.RateLimitError) as refused:
            create(client)
        assert (refused.value.code, refused.value.type) == ("quota_exceeded", "rate_limit_error")
        assert refused.value.response.headers["x-should-retry"] == "false"
        assert refused.value.response.request.headers["x-stainless-retry-count"] == "0"
    finally:
        rig.serving.services.tenants.set_limits("acme", max_jobs=None)
    assert http.get("/v1/files").status_code == 200


# ---- lists


def test_thousand_events_page_once_each_while_new_ones_arrive(rig: Rig, client: OpenAI) -> None:
    job = create(client)
    claim = rig.start()
    rig.queue.record_metrics(claim, [StepMetrics(step, train_loss=1.0) for step in range(1, 1001)])
    stop = threading.Event()

    def add() -> None:
        while not stop.wait(0.01):
            rig.queue.record_event(claim, "new")

    thread = threading.Thread(target=add)
    thread.start()
    try:
        seen = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=90)]
    finally:
        stop.set()
        thread.join()
    assert len(seen) == len(set(seen)) >= 1004
    metrics = {event.data["step"] for event in client.fine_tuning.jobs.list_events(job.id, limit=1000) if event.data
               and event.type == "metrics"}  # fmt: skip
    assert metrics == set(range(1, 1001))


def test_jobs_are_filtered_by_metadata(rig: Rig, client: OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    both = create(client, metadata={"a b": "1", "c": ""})
    one = create(client, metadata={"a b": "1"})
    none = create(client)
    assert [job.id for job in jobs.list(metadata={"a b": "1"})] == [one.id, both.id]
    assert [job.id for job in jobs.list(metadata={"a b": "1", "c": ""})] == [both.id]
    unlabelled = [job.id for job in jobs.list(extra_query={"metadata": "null"})]
    assert none.id in unlabelled
    assert one.id not in unlabelled
    for query in ("metadata%5Bc%5D=&metadata=null", "metadata=x", "metadata[a]=1&metadata[a]=2"):
        answer = rig.serving.client().get(f"/v1/fine_tuning/jobs?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata")


def test_jobs_page_newest_first(client: OpenAI) -> None:
    made = [create(client).id for _ in range(5)]
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert listed[:5] == made[::-1]
    assert len(listed) == len(set(listed))
    refusal(lambda: client.fine_tuning.jobs.list(limit=0))
    refusal(lambda: client.fine_tuning.jobs.list(after="ftjob-none"))


def test_events_stream_from_first_to_last(rig: Rig, client: OpenAI) -> None:
    job = create(client)
    http = rig.serving.client()
    claim = rig.start()
    timer = threading.Timer(0.2, lambda: rig.queue.fail(claim, JobError("nan_loss", "step 3")))
    timer.start()
    text = http.get(f"/v1/fine_tuning/jobs/{job.id}/events/stream").text
    timer.join()
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    listed = [event.message for event in client.fine_tuning.jobs.list_events(job.id)][::-1]
    assert data[-1] == "[DONE]"
    assert [json.loads(one)["message"] for one in data[:-1]] == listed
    ids = [line.removeprefix("id: ") for line in text.splitlines() if line.startswith("id: ")]
    rest = http.get(f"/v1/fine_tuning/jobs/{job.id}/events/stream", headers={"Last-Event-ID": ids[-2]}).text
    assert rest.count("id: ") == 1


# ---- files


def test_file_is_shown_listed_read_and_deleted(client: OpenAI) -> None:
    file = client.files.create(
        file=("dätä.jsonl", GOOD), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (file.filename, file.bytes, file.status, file.object) == ("dätä.jsonl", len(GOOD), "processed", "file")
    assert file.expires_at == file.created_at + 3600
    assert client.files.wait_for_processing(file.id).id == file.id
    assert client.files.content(file.id).read() == GOOD
    assert file.id in [one.id for one in client.files.list(purpose="fine-tune", limit=3)]
    assert client.files.delete(file.id).deleted
    refusal(lambda: client.files.retrieve(file.id), openai.NotFoundError)


def test_bad_files_are_refused_by_name(client: OpenAI) -> None:
    files = client.files
    assert refusal(lambda: files.create(file=GOOD, purpose="batch")).param == "purpose"
    assert refusal(lambda: files.create(file=b"\xff\n", purpose="fine-tune")).code == "invalid_utf8"
    expiry: Any = {"anchor": "created_at", "seconds": 10}
    error = refusal(lambda: files.create(file=GOOD, purpose="fine-tune", expires_after=expiry))
    assert error.param == "expires_after.seconds"
    error = refusal(lambda: files.create(file=b"x" * ((1 << 20) + 1), purpose="fine-tune"), openai.APIStatusError)
    assert (error.status_code, error.code, error.param) == (413, "file_too_large", "file")


def test_unknown_and_missing_parts_are_refused(rig: Rig) -> None:
    http = rig.serving.client()
    answers = [
        http.post("/v1/files", data={"purpose": "fine-tune"}, files={"other": b"x"}),
        http.post("/v1/files", files={"file": b"{}\n"}),
        http.post("/v1/files", json={"purpose": "fine-tune"}),
        http.post("/v1/files", content=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=x"}),
    ]
    assert [answer.status_code for answer in answers] == [400] * 4
    assert answers[0].json()["error"]["code"] == "unknown_parameter"
    assert answers[1].json()["error"]["param"] == "purpose"


def test_large_file_goes_up_in_parts(client: OpenAI, rig: Rig, tmp_path: Path) -> None:
    line = jsonl(*chat_rows(1))
    data = line * ((65 << 20) // len(line))
    path = tmp_path / "large.jsonl"
    path.write_bytes(data)
    digest = hashlib.md5(data).hexdigest()
    upload = client.with_options(timeout=60).uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", md5=digest
    )
    assert (upload.status, upload.bytes) == ("completed", len(data))
    assert upload.file is not None
    assert client.files.retrieve(upload.file.id).bytes == len(data)
    assert rig.training.files.get("acme", upload.file.id).sha256 == hashlib.sha256(data).hexdigest()


# ---- sharing and webhooks


def test_checkpoint_is_shared_and_unshared(rig: Rig, client: OpenAI) -> None:
    create(client)
    claim = rig.start()
    point, _ = rig.queue.add_checkpoint(claim, StepMetrics(1), {})
    permissions = client.fine_tuning.checkpoints.permissions
    granted = list(permissions.create(point.name, project_ids=["globex"]))
    assert [(one.project_id, one.object) for one in granted] == [("globex", "checkpoint.permission")]
    assert rig.training.permissions.may_use("globex", point.name)
    assert [one.id for one in permissions.list(point.name)] == [granted[0].id]
    assert permissions.delete(granted[0].id, fine_tuned_model_checkpoint=point.name).deleted
    assert not rig.training.permissions.may_use("globex", point.name)
    stranger = rig.serving.openai("globex").fine_tuning.checkpoints.permissions
    refusal(lambda: stranger.create(point.name, project_ids=["globex"]), openai.NotFoundError)


def checkpoint(rig: Rig, client: OpenAI) -> str:
    """A promptable checkpoint of acme: its name."""
    create(client)
    claim = rig.start()
    manifest = replace(rig.serving.publish("acme", "source"), version=0, name=claim.job.adapter_name)
    point, _ = rig.queue.add_checkpoint(claim, StepMetrics(1), asdict(manifest))
    return point.name


def test_granted_tenant_prompts_a_checkpoint_and_nobody_else_does(rig: Rig, client: OpenAI) -> None:
    name, other = checkpoint(rig, client), rig.serving.openai("globex")
    answer = client.completions.create(model=name, prompt="x", max_tokens=2)
    assert answer.model == name  # can be asked for again
    refusal(lambda: other.completions.create(model=name, prompt="x", max_tokens=2), openai.NotFoundError)
    granted = list(client.fine_tuning.checkpoints.permissions.create(name, project_ids=["globex"]))
    assert other.completions.create(model=name, prompt="x", max_tokens=2).model == name
    request = rig.serving.engine.requests[-1]
    assert (request.tenant, request.adapter.tenant, request.is_shared) == ("globex", "acme", True)
    assert [other.models.retrieve(name).owned_by, client.models.retrieve(name).id] == ["acme", name]
    refusal(lambda: other.models.delete(name), openai.NotFoundError)
    client.fine_tuning.checkpoints.permissions.delete(granted[0].id, fine_tuned_model_checkpoint=name)
    refusal(lambda: other.completions.create(model=name, prompt="x", max_tokens=2), openai.NotFoundError)


def test_job_continues_from_a_checkpoint_of_its_own_tenant(rig: Rig, client: OpenAI) -> None:
    name = checkpoint(rig, client)
    job = client.fine_tuning.jobs.create(model=name, training_file=upload(client))
    assert job.model == name
    assert rig.training.jobs.get("acme", job.id).spec.parent["job_id"] is None  # the published source's
    other = rig.serving.openai("globex")
    refusal(lambda: other.fine_tuning.jobs.create(model=name, training_file=upload(other)), openai.NotFoundError)


def test_model_that_the_gate_held_back_is_listed_by_its_id_alone(rig: Rig, client: OpenAI, tmp_path: Path) -> None:
    create(client)
    claim = rig.start()
    name = model_name(BASE, claim.job)
    weights = tmp_path / "weights"
    weights.write_bytes(weights_bytes(3))
    adapter = claim.job.adapter_name
    extra = {"fine_tuned_model": name}
    services = rig.serving.services
    services.catalog.publish("acme", adapter, config_bytes(), weights, alias=None, source="training", extra=extra)
    path = tmp_path / "results.csv"
    path.write_bytes(b"step\n")
    rig.succeed(claim, path)
    listed = {model.id for model in client.models.list()}
    assert name in listed
    assert adapter not in listed
    for model in listed:
        assert client.models.retrieve(model).id == model


@pytest.mark.parametrize("bad", ["a\x00b", "\ud800"])
def test_text_that_no_database_keeps_is_refused(rig: Rig, client: OpenAI, bad: str) -> None:
    good = {"model": BASE, "training_file": upload(client)}
    quoted = json.dumps(bad)
    bodies = [
        json.dumps(good)[:-1] + f', "metadata": {{"team": {quoted}}}}}',
        json.dumps(good)[:-1] + f', "lora": {{"target_modules": [{quoted}]}}}}',
    ]
    with rig.serving.client() as http:
        for body in bodies:
            answer = http.post("/v1/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, answer.text
        assert http.get("/v1/files/file%00x").status_code == 404
        assert http.get("/v1/files?after=a%00b").status_code == 400


def test_repeated_create_finds_its_job_though_the_file_is_gone(rig: Rig, client: OpenAI) -> None:
    file_id = upload(client)
    ask = {"model": BASE, "training_file": file_id, "extra_headers": {"Idempotency-Key": "file-gone"}}
    first = client.fine_tuning.jobs.create(**ask)
    client.files.delete(file_id)
    assert client.fine_tuning.jobs.create(**ask).id == first.id
    again = lambda: client.fine_tuning.jobs.create(**ask, seed=5)
    assert refusal(again).code == "idempotency_key_reused"


def test_scaling_is_judged_by_the_rank_that_the_job_will_have(rig: Rig, client: OpenAI) -> None:
    parent = rig.serving.publish("acme", "narrow")  # of a small rank, which the job inherits
    alpha = 128.0 * parent.rank + 1
    ask = {"training_file": upload(client), "extra_body": {"lora": {"alpha": alpha}}}
    assert refusal(lambda: client.fine_tuning.jobs.create(model="narrow", **ask)).param == "lora.alpha"
    assert client.fine_tuning.jobs.create(model=BASE, **ask).id


def test_webhook_endpoints_are_managed(client: OpenAI) -> None:
    webhooks = client.webhooks
    made = webhooks.create(
        name="mine", url="https://example.com/hook", event_types=["fine_tuning.job.succeeded"]
    )  # fmt: skip
    assert made.signing_secret.startswith("whsec_")
    shown = webhooks.retrieve(made.id)
    assert (shown.url, shown.event_types) == (made.url, made.event_types)
    assert "signing_secret" not in shown.model_dump(exclude_none=True)
    assert [one.id for one in webhooks.list()] == [made.id]
    assert (
        webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True).signing_secret != made.signing_secret
    )
    assert webhooks.test(made.id, event_type="fine_tuning.job.failed").status_code == 204
    assert refusal(lambda: webhooks.update(made.id, url="http://example.com")).param == "url"
    assert (
        refusal(lambda: webhooks.create(name="x", url="https://10.0.0.1/", event_types=made.event_types)).param == "url"
    )
    assert webhooks.delete(made.id).deleted
