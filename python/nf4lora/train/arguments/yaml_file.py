"""A YAML file of options, read as its author wrote it.

YAML 1.1, which PyYAML reads, turns `no` into false, `010` into 8, `2024-01-01` into a date, `1e-4` into a string and
`1:30` into 90. Here a plain word stays the text that stands in the file, and the option that it is given to decides
what it means, as with a flag on the command line. Only `null`, `~` and nothing are null. Merge keys (`<<`) work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nf4lora.train.errors import UsageError


def read_yaml(path: Path) -> list[tuple[str, Any]]:
    """Names and values in the order of the file; values are text, null, lists and objects of these.

    Raises:
        UsageError: unreadable, no YAML, no object, or a name that stands there twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    merged: list[yaml.Node] = []  # objects that stand in the file to be merged into others

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
        keys = []
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                merged.extend(value.value if isinstance(value, yaml.SequenceNode) else [value])
            elif not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{path}: line {key.start_mark.line + 1}: a name must be a word")
            elif key.value in keys:
                raise UsageError(f"{path}: line {key.start_mark.line + 1}: {key.value} stands there twice")
            else:
                keys.append(key.value)
        loader.flatten_mapping(node)
        return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        loader = Loader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        content = loader.construct_document(node) if node is not None else None
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: must be UTF-8 text; save it so") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    except RecursionError:
        raise UsageError(f"{path}: an object holds itself, or is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", error))
        cure = "; write spaces in its place" if r"'\t'" in problem else ""
        raise UsageError(f"{path}: not valid YAML{place} ({problem}){cure}") from None
    if node is None or not isinstance(content, dict):
        raise UsageError(f"{path}: must hold `option: value` lines")
    templates = {key.value for key, value in node.value if any(value is template for template in merged)}
    return [(name, value) for name, value in content.items() if name not in templates]
