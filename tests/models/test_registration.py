"""`import nestor` is quick, and the Auto classes know its models whatever is imported first."""

import subprocess
import sys

import pytest

import nestor


def run(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_transformers():
    assert run("import nestor, sys; print({'torch', 'transformers'} & set(sys.modules))") == "set()"


@pytest.mark.parametrize(
    "imports",
    [
        "import nestor\nfrom transformers import AutoModelForCausalLM as Model",
        "from transformers import AutoModelForCausalLM as Model\nimport nestor",
        "from nestor.models.decoder import NestorForCausalLM as Model",
        "import nestor\nfrom transformers import AutoConfig, AutoModelForCausalLM as Model",
    ],
)
def test_a_checkpoint_loads_after_any_order_of_imports(imports, tmp_path):
    nestor.NestorForCausalLM(nestor.preset("transformer", "quick", num_hidden_layers=1)).save_pretrained(
        tmp_path
    )
    program = f"import sys\n{imports}\nprint(type(Model.from_pretrained(sys.argv[1])).__name__)"
    assert run(program, str(tmp_path)) == "NestorForCausalLM"
