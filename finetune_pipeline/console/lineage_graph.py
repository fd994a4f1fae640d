"""The drawing of what a model version was made from, from the logs to the deployment."""

from finetune_pipeline.pipeline.lineage import Lineage
from finetune_pipeline.registry.model_versions import ModelVersion
from finetune_pipeline.settings import LoopSettings

_NODE = (
    'shape=box style="rounded" fontname="sans-serif" fontsize=11 color="#7b8794" fontcolor="#7b8794" margin="0.15,0.08"'
)


def lineage_graph(loop: LoopSettings, model: ModelVersion, made_from: Lineage, *, is_champion: bool) -> str:
    """Return the drawing in Graphviz's language."""
    dataset, report, training = made_from.dataset_manifest, made_from.report_manifest, made_from.training
    steps = [("logs", f"events {made_from.events}" if made_from.events else "events unknown")]
    if dataset is not None:
        steps.append(("dataset", f"{dataset.version[:8]}\n{dataset.train + dataset.validation:,} examples"))
    else:
        steps.append(("dataset", f"{(made_from.dataset or 'unknown')[:8]}\nfiles deleted"))
    method = f"{training.method}, {training.steps:,} steps" if training else model.mode
    steps.append(("adapter", f"{(made_from.adapter or 'unknown')[:8]}\n{method}"))
    steps.append(("GGUF", f"{model.sha256[:8]}\n{(model.size_bytes or 0) / 1e6:,.1f} MB"))
    accuracy = f"{model.accuracy:.1%}" if model.accuracy is not None else "not measured"
    steps.append(("comparison", f"{report.version[:8]}\n{accuracy}" if report else accuracy))
    steps.append((model.version, "champion" if is_champion else "does not serve"))
    nodes = [f"n{number} [label={_label(title, text)}]" for number, (title, text) in enumerate(steps)]
    edges = [f"n{number} -> n{number + 1}" for number in range(len(steps) - 1)]
    base = f"base [label={_label('base model', loop.base_model.rpartition('/')[2])}]"
    lines = [f"node [{_NODE}]", 'edge [color="#7b8794" arrowsize=0.6]', *nodes, base, *edges, "base -> n2"]
    return 'digraph { rankdir=LR bgcolor="transparent" ranksep=0.25 nodesep=0.2 ' + "; ".join(lines) + " }"


def _label(*lines: str) -> str:
    text = "\n".join(lines).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("\n", "\\n") + '"'
