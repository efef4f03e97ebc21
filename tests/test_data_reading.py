"""TensorFlow starts without messages about GPUs that it has no use for, and beside triton."""

import importlib.util
import os
import subprocess
import sys

import pytest

from flm_jax.data import reading


@pytest.mark.integration
def test_tensorflow_starts_silently():
    code = "from flm_jax.data.reading import load_tensorflow; tf, _ = load_tensorflow(); print(tf.constant(1) + 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tf.Tensor(2" in done.stdout
    assert done.stderr == ""


@pytest.mark.integration
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this build of PyTorch brings no triton")
def test_triton_can_be_loaded_after_tensorflow():
    code = "from flm_jax.data.reading import load_tensorflow; load_tensorflow(); import triton._C.libtriton"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_lines_are_written_also_when_an_error_ends_it(capfd):
    with pytest.raises(KeyError), reading._without_start_up_messages():
        os.write(2, b"I0000 00:00:1 port.cc:153] oneDNN\nmine\n")
        raise KeyError
    assert capfd.readouterr().err == "mine\n"
