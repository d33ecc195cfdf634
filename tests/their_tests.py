"""tuned-lens's own tests with the import changed: ``python tests/their_tests.py FOLDER``, a checkout of its repository.

They are run where no hub is: its models and tokenizers are small random ones of the same types. Those of the training
script are left out. Prints a row a file; what fails is said by pytest before.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent


def run(checkout: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in (checkout / "tests").rglob("*"):
            name = path.relative_to(checkout / "tests")
            if path.is_dir() or name.parts[0] == "scripts":
                continue
            copied = Path(folder, "tests", name)
            copied.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes()
            copied.write_bytes(
                re.sub(rb"\btuned_lens\b", b"tuned_lens_fast", content) if path.suffix == ".py" else content
            )
        environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-rA", "-q", "-p", Path(__file__).stem, "--tb=short", "tests"]
        said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout
    print(said)
    counts: dict[str, Counter[str]] = {}
    for outcome, file in re.findall(r"^(PASSED|FAILED|ERROR) tests/([\w/]+\.py)::", said, re.MULTILINE):
        counts.setdefault(file, Counter())[outcome] += 1
    print("| file | pass | of |\n|---|---|---|")
    for file, count in sorted(counts.items()):
        print(f"| {file} | {count['PASSED']} | {count.total()} |")
    total = sum(counts.values(), Counter())
    print(f"| all | {total['PASSED']} | {total.total()} |")


def stand_in_for_the_hub() -> None:
    """Small random models, and a tokenizer of bytes, by the names that the tests use."""
    import tiny_text_model
    import transformers as tr

    sys.modules.setdefault("mock", mock)  # a package that became the standard library's
    ends = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 300}
    local = {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4}
    configs = {
        "EleutherAI/pythia-70m-deduped": tr.GPTNeoXConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, **ends
        ),
        "bigscience/bloom-560m": tr.BloomConfig(hidden_size=64, n_layer=3, n_head=4, **ends),
        "EleutherAI/gpt-neo-125M": tr.GPTNeoConfig(hidden_size=64, **local, **ends),
        "facebook/opt-125m": tr.OPTConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=64, **ends
        ),
        "gpt2": tr.GPT2Config(n_embd=64, n_layer=3, n_head=4, **ends),
    }

    def tokenizer(name: str, **_: Any) -> Any:
        made = tiny_text_model.make()[1]
        made.add_special_tokens({"eos_token": "<|endoftext|>"})
        made.model_max_length = 1024
        return made

    def model(name: str, **_: Any) -> Any:
        return tr.AutoModelForCausalLM.from_config(configs[name]).eval()

    tr.AutoConfig.from_pretrained = lambda name, **_: copy.deepcopy(configs[name])
    tr.AutoTokenizer.from_pretrained = tokenizer
    tr.AutoModelForCausalLM.from_pretrained = model


if __name__ == "__main__":
    run(Path(sys.argv[1]))
elif any(argument == Path(__file__).stem for argument in sys.argv):
    stand_in_for_the_hub()
