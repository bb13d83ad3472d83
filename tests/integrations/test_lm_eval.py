"""lm-evaluation-harness with our model on three local tasks: generate_until, multiple choice, loglikelihood_rolling."""

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Oracle, kept_mask
from torch import Tensor

from learnkv import Policy, attach, load_model, load_policy, prefill
from learnkv.cli.main import main
from learnkv.errors import UserError

MODULE = "learnkv.integrations.lm_eval"
TASKS = ("answers", "choices", "pages")
KEEP = 0.25
LENGTH = 72  # of a window, so that texts have several and contexts are cut

FILLING = "Rain fell on the hills all day and nobody went out of the house. "
ROWS = [
    {"name": name, "number": number, "text": FILLING * before + f"{name} has the number {number}. " + FILLING * after}
    for name, number, before, after in (("Ada", "48", 1, 1), ("Bert", "17", 2, 0), ("Carla", "5", 0, 3))
]
YAML = {
    "answers": """
output_type: generate_until
doc_to_text: "{{text}}The number of {{name}} is"
doc_to_target: "{{number}}"
generation_kwargs: {until: [".", "\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "choices": """
output_type: multiple_choice
doc_to_text: "{{text}}The number of {{name}} is "
doc_to_choice: ["48", "17", "5", " 17 and nobody went out"]
doc_to_target: "{{['48', '17', '5'].index(number)}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm, aggregation: mean,
  higher_is_better: true}]
""",
    "pages": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks on local rows."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in YAML.items():
        files = f"{{data_files: {{test: {folder / 'rows.jsonl'}}}}}"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {files}\ntest_split: test\n{text}"
        )
    return folder


@pytest.fixture(scope="module")
def harness() -> Any:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install learnkv[lm-eval]")
    return importlib.import_module(MODULE)


@pytest.fixture(scope="module")
def evaluate(harness: Any, folder: Path) -> Callable[..., dict[str, Any]]:
    """Results and answers of all tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    def evaluate(model: Any, **keys: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return simple_evaluate(model, tasks=[*TASKS], task_manager=manager, log_samples=True, bootstrap_iters=0, **keys)

    return evaluate


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Every number of the results, and every answer."""
    found: dict[str, Any] = {}
    for task in TASKS:
        of_task = {name: value for name, value in results["results"][task].items() if isinstance(value, float)}
        assert of_task
        found |= {f"{task} {name}": value for name, value in of_task.items()}
        for number, sample in enumerate(results["samples"][task]):
            for place, ((answer,),) in enumerate(zip(sample["resps"], strict=True)):
                found[f"{task} {number} {place}"] = answer
    return found


def _number(answer: Any) -> float:
    """The likelihood of an answer, which may come with whether it is the greedy one."""
    return float(answer[0] if isinstance(answer, list | tuple) else answer)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=0, abs=1e-4)), name


def masked_model(harness: Any, policy: Policy) -> Any:
    """HFLM whose model is dense, with the entries masked that the policy evicts of a context."""
    from lm_eval.models.huggingface import HFLM

    reader, (plain, tokenizer) = attach(load_model("reference")[0]), load_model("reference")
    oracle = Oracle(load_model("reference")[0])

    @functools.cache
    def of_context(*ids: int) -> tuple[Tensor, Tensor]:
        """Which entries of a context are kept, and its logits."""
        cache = policy.compress(prefill(reader, torch.tensor([ids]), policies=[policy]), keep=KEEP)
        return kept_mask(cache, 0), plain(torch.tensor([ids])).logits[0]

    def logits(ids: list[int], cut: int) -> Tensor:
        """[T, V] of all ids; those of the first `cut` from the plain model."""
        kept, before = of_context(*ids[:cut])
        return torch.cat([before, oracle(torch.tensor(ids[:cut]), kept, torch.tensor(ids[cut:]))])

    class MaskedLM(HFLM):
        @torch.no_grad()
        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            answers = []
            for texts, context, continuation in requests:
                ids = (context + continuation)[-(LENGTH + 1) :]
                cut = (len(ids) - 1) // 2 if texts is None else len(ids) - len(continuation) - 1
                predicted = logits(ids[:-1], cut)[-len(continuation) :].log_softmax(-1)
                wanted = torch.tensor(continuation)
                total = predicted.gather(1, wanted[:, None]).sum()
                answers.append((float(total), torch.equal(predicted.argmax(-1), wanted)))
            return answers

        @torch.no_grad()
        def _model_generate(self, context: Tensor, max_length: int, stop: Any, **settings: Any) -> Tensor:
            rows = []
            for row, mask in zip(context, settings["attention_mask"], strict=True):
                ids = row[mask.bool()].tolist()
                cut = len(ids) - 1
                for _ in range(max_length - len(row)):
                    ids.append(int(logits(ids, cut)[-1].argmax()))
                rows.append(torch.cat([row, torch.tensor(ids[cut + 1 :])]))
            return torch.stack(rows)

    return MaskedLM(plain, tokenizer=tokenizer, batch_size=2, max_length=LENGTH)


@pytest.fixture(scope="module")
def of_hflm(evaluate: Any) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model("reference")
    return numbers(evaluate(HFLM(model, tokenizer=tokenizer, batch_size=2, max_length=LENGTH)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_keeping_everything_gives_the_numbers_of_hflm(of_hflm: Any, evaluate: Any, batch_size: int) -> None:
    arguments = f"pretrained=reference,policy=snapkv,keep=1,max_length={LENGTH}"
    found = evaluate("learnkv", model_args=arguments, batch_size=batch_size)
    assert_equal(numbers(found), of_hflm)
    assert found["config"]["bytes"] == found["config"]["bytes_full"] > 0


def test_compressed_contexts_give_the_numbers_of_masked_entries(harness: Any, evaluate: Any, of_hflm: Any) -> None:
    policy = load_policy("adakv")
    expected = numbers(evaluate(masked_model(harness, policy)))
    arguments = f"pretrained=reference,policy=adakv,keep={KEEP},max_length={LENGTH}"
    results = evaluate("learnkv", model_args=arguments, batch_size=4)
    found, config = numbers(results), results["config"]
    assert_equal(found, expected)
    likelihoods = {name: value for name, value in found.items() if not isinstance(value, str) and name[-1].isdecimal()}
    assert len(likelihoods) == len(ROWS) * 5
    differ = {name.split()[0] for name in likelihoods if abs(_number(found[name]) - _number(of_hflm[name])) > 0.01}
    assert differ == {"choices", "pages"}
    assert (config["policy"], config["keep"], config["contexts_whole"]) == ("adakv", KEEP, 0)
    assert config["spent"] == pytest.approx(KEEP, abs=0.01)
    assert config["bytes"] < 0.35 * config["bytes_full"]


def test_the_choices_of_a_context_share_its_prefill(harness: Any, evaluate: Any, monkeypatch: Any) -> None:
    read: list[int] = []
    compressed = harness.CompressedModel.compressed

    def counted(self: Any, contexts: Any) -> Any:
        read.append(len(contexts))
        return compressed(self, contexts)

    monkeypatch.setattr(harness.CompressedModel, "compressed", counted)
    lm = harness.CompressedLM(policy="snapkv", keep=0.5)
    from lm_eval.api.instance import Instance

    args = [(ROWS[row]["text"], f" {choice}") for row in (0, 1) for choice in ("48", "17", "5", "of a house")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(args)]
    assert len(lm.loglikelihood(requests, disable_tqdm=True)) == 8
    assert read == [2]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"peft": "x"}, "model_args peft=x: not supported"),
        ({"max_len": 5}, "did you mean max_length"),
        ({"batch_size": "auto"}, "batch_size=auto: expected a number"),
        ({"keep": None}, "expected exactly one of them"),
        ({"keep": 2.0}, "keep=2: expected a fraction"),
        ({"pretrained": "./nowhere"}, "model=./nowhere"),
        ({"policy": "snapk"}, "snapkv"),
    ],
)
def test_other_arguments_are_refused(harness: Any, arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        harness.CompressedLM(**{"policy": "snapkv", "keep": 0.5, **arguments})


def test_several_processes_are_refused(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2: expected one process"):
        harness.CompressedLM(policy="snapkv", keep=0.5)


def test_the_command(
    harness: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["lm-eval", "model_args=pretrained=reference,policy=snapkv,bytes=0.3", f"include_path={folder}"]
    assert main([*words, "tasks=answers,choices", "limit=2", "log_samples=true", f"output={tmp_path / 'run'}"]) == 0
    assert "|choices|" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["n-samples"]["choices"] == {"original": 3, "effective": 2}
    config = results["config"]
    assert (config["policy"], config["bytes"] <= 0.3 * config["bytes_full"]) == ("snapkv", True)
    samples = (tmp_path / "run" / "samples-answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc"]["name"] for line in samples] == ["Ada", "Bert"]
    assert "model_args: pretrained=reference" in (tmp_path / "run" / "config.yaml").read_text()
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager.__init__", _without_defaults(importlib.import_module("lm_eval.tasks"))
    )
    assert main([*words, "tasks=answer"]) == 2
    assert "tasks=answer: not a task of lm-eval; did you mean answers?" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*words, "tasks=choices", f"output={tmp_path / 'file'}"]) == 2
    assert "expected a folder that can be written" in capsys.readouterr().err
    (missing := tmp_path / "tasks").mkdir()
    (missing / "lost.yaml").write_text("task: lost\ndataset_path: nobody/nothing\ntest_split: test\n" + YAML["answers"])
    assert main([words[0], words[1], f"include_path={missing}", "tasks=lost"]) == 2
    assert "tasks=lost: " in capsys.readouterr().err
    words[1] = "model_args=pretrained=reference,policy=snapkv,keep=0.01"
    assert main([*words, "tasks=choices"]) == 2
    assert "keep=0.01: leaves" in capsys.readouterr().err


def _without_defaults(tasks: Any) -> Callable[..., None]:
    """lm-eval's own index of tasks takes seconds to read."""
    original = tasks.TaskManager.__init__

    def init(self: Any, include_path: str, include_defaults: bool = True) -> None:
        original(self, include_path=include_path, include_defaults=False)

    return init
