"""A model card in Markdown: what an audit says of a network, for the page of the network on a hub."""

from __future__ import annotations

from collections.abc import Iterator

from brittle.errors import MissingExtra
from brittle.reporting.tables import accuracies, in_markdown, layers, markdown_table
from brittle.results import Audit, Rate
from brittle.results.wording import budget, norm_name

TAGS = ("adversarial-robustness", "brittle")


def model_card(audit: Audit, *, data: str | None = None) -> str:
    """The card: metadata, verdict, accuracies, layers, what was not measured, and how it was measured.

    Args:
        audit: What was found.
        data: What hubs call the data; with it the metadata hold the accuracies, which hubs then list.

    Raises:
        MissingExtra: ``data`` is given, and huggingface_hub is not installed.
    """
    return f"---\n{_metadata(audit, data)}\n---\n\n" + "\n".join(_body(audit))


def _metadata(audit: Audit, data: str | None) -> str:
    """The card's head, as hubs read it."""
    if data is None:
        return "\n".join(["tags:", *(f"- {tag}" for tag in TAGS)])
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError:
        raise MissingExtra("huggingface_hub", "transformers", "the name of the data on a card") from None

    def result(kind: str, name: str, rate: Rate) -> EvalResult:
        return EvalResult(
            task_type="image-classification",
            dataset_type=data,
            dataset_name=data,
            metric_type=kind,
            metric_name=name,
            metric_value=rate.value,
        )

    measured = [norm.evaluation for norm in audit.norms if norm.evaluation]
    results = [result("accuracy", "Accuracy", found.clean_accuracy) for found in measured[:1]]
    results += [
        result("robust_accuracy", f"Robust accuracy ({norm_name(found.p)}, {budget(found.eps)})", found.robust_accuracy)
        for found in measured
    ]
    return ModelCardData(model_name=audit.model, tags=list(TAGS), eval_results=results or None).to_yaml()


def _body(audit: Audit) -> Iterator[str]:
    """The card's sections."""
    yield f"# {in_markdown(audit.model)}\n"
    yield f"## Robustness\n\n{in_markdown(audit.verdict.headline)}\n"
    yield "".join(f"- {in_markdown(finding)}\n" for finding in audit.verdict.findings)
    if (table := accuracies(audit)) is not None:
        yield f"{markdown_table(table)}\n{in_markdown(table.caption)}\n"
    table = layers(audit)
    if table.rows:
        yield f"## Compressibility\n\n{markdown_table(table)}\n{in_markdown(table.caption)}\n"
    if audit.not_measured:
        yield "## Not measured\n"
        for reason in dict.fromkeys(item.reason for item in audit.not_measured):
            names = ", ".join(item.name for item in audit.not_measured if item.reason == reason)
            yield f"- {in_markdown(names)}: {in_markdown(reason)}"
        yield ""
    yield f"## How this was measured\n\n{in_markdown(audit.signature.line)}\n"
