"""Writes trl_grpo_config.json: the fields of TRL's GRPOConfig that are TRL's own, with their defaults.

Fields that TrainingArguments of transformers has too are left out. Of TRL the source is read and nothing is run, so
that PyTorch is not needed:

    pip install --no-deps --target /tmp/trl trl==1.16.0
    python tests/golden/make_trl_config.py /tmp/trl
"""

import ast
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path


def fields_of(path: Path, name: str) -> dict[str, str]:
    """The annotated fields of a class in a file, and their defaults as Python writes them."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    [found] = [node for node in classes if node.name == name]
    fields = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            value = node.value
            if isinstance(value, ast.Call):
                value = next((key.value for key in value.keywords if key.arg == "default"), value)
            fields[node.target.id] = "" if value is None else ast.unparse(value)
    return fields


def main(target: Path) -> None:
    transformers = importlib.util.find_spec("transformers")
    assert transformers is not None and transformers.origin is not None
    inherited = fields_of(Path(transformers.origin).parent / "training_args.py", "TrainingArguments")
    own = fields_of(target / "trl" / "trainer" / "grpo_config.py", "GRPOConfig")
    [package] = importlib.metadata.distributions(name="trl", path=[str(target)])
    kept = {name: default for name, default in own.items() if name not in inherited}
    text = json.dumps({"version": package.version, "fields": kept}, indent=1)
    (Path(__file__).parent / "trl_grpo_config.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
