"""ki-doctor --train: the estimate against a machine's memory, and what would fit."""

import argparse
import json

import pytest

from ki_edge.config import TINY
from ki_edge.errors import ArgumentError, CheckpointError
from ki_runtime.doctor.cli import main
from ki_runtime.doctor.host import Host
from ki_runtime.doctor.training import add_arguments, examine_training, training_lines


class Machine(Host):
    """A machine without a GPU, with so many bytes of memory."""

    def __init__(self, gigabytes):
        self.gigabytes = gigabytes

    def driver(self):
        raise OSError("no driver")

    def run(self, *command):
        return None

    def read(self, path):
        if path == "/proc/meminfo":
            return (
                f"MemTotal: {int(self.gigabytes * 1e9 / 1024)} kB\nMemAvailable: 1000 kB\n" if self.gigabytes else None
            )
        return self.cpuinfo if path == "/proc/cpuinfo" else None

    cpuinfo = "flags : fpu avx2"

    def products(self):
        return 100e9


def ask(*flags, gigabytes=25.0, machine=Machine):
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", nargs="?")
    add_arguments(parser)
    return examine_training(parser.parse_args(["--train", *flags]), machine(gigabytes))


def test_a_small_model_fits():
    found = ask("--preset", "tiny", "--batch", "16", "--float32")
    assert found["fits"] is True and found["would_fit"] == {} and found["largest_batch"] > 100
    assert found["parameters"] == found["learning"] == 2_191_304
    lines = "\n".join(training_lines(found))
    assert (
        "training of the preset tiny: 2.2 M parameters" in lines and "fits" in lines and "products in float32" in lines
    )


def test_the_full_model_does_not_fit_here_and_is_told_what_would():
    found = ask("--batch", "4", gigabytes=64)
    assert found["fits"] is False and found["largest_batch"] == 0
    assert list(found["would_fit"])[-1].startswith("--checkpointing --optimizer adamw8bit")
    lines = "\n".join(training_lines(found))
    assert "does not fit" in lines and "would fit: --checkpointing" in lines


def test_what_would_fit_fits():
    found = ask("--preset", "base", "--batch", "64", "--float32")
    ((flags, batch),) = found["would_fit"].items()
    assert ask("--preset", "base", "--batch", str(batch), "--float32", *flags.split())["fits"] is True


def test_the_largest_batch_is_the_largest():
    found = ask("--preset", "base", "--float32", "--batch", "4")
    largest = found["largest_batch"]
    assert [ask("--preset", "base", "--float32", "--batch", str(b))["fits"] for b in (largest, largest + 1)] == [
        True,
        False,
    ]


def test_nothing_fits_is_said():
    lines = list(training_lines(ask(gigabytes=4)))
    assert lines[-1].startswith("nothing fits here")


def test_several_devices_share_the_batch_and_are_sharded_where_they_must():
    found = ask("--devices", "8", "--batch", "64", "--accumulate", "2")
    assert found["samples"]["batch"] == 4 and found["setup"]["strategy"] == "fsdp2"
    assert ask("--preset", "tiny", "--devices", "2")["setup"]["strategy"] == "ddp"


def test_a_machine_that_does_not_tell_its_memory():
    found = ask(gigabytes=0)
    assert found["fits"] is None and list(training_lines(found))[-1] == "this machine's memory is not known"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch", "33", "--devices", "2"), "batch 33: expected a multiple of 2"),
        (("--batch", "0"), "batch 0"),
        (("--devices", "0"), "0 devices with strategy ddp"),
        (("--lora", "backbone"), "--lora 'backbone': expected GROUP=RANK"),
        (("--lora", "head=3"), "lora head: no such group"),
        (("--freeze", "vision,all"), "freeze all: no such group"),
        (("--fast-tokens", "-1"), "postfix -1"),
        (("checkpoint", "--preset", "tiny"), "give one of them"),
    ],
)
def test_impossible_requests_are_one_line(flags, message):
    with pytest.raises(ArgumentError, match=message):
        ask(*flags)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError):
        ask(str(tmp_path))


def test_the_command(fetch_checkpoint, capsys):
    assert main(["--train", str(fetch_checkpoint), "--batch", "8", "--float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == str(fetch_checkpoint) and found["fits"] is True
    assert abs(found["parameters"] - 2_191_304) < 0.05 * 2_191_304 and TINY.vocab_size
    assert main(["--train", "--for", "thor"]) == 2
    assert "ask one after the other" in capsys.readouterr().err
    assert main(["--train", str(fetch_checkpoint / "none")]) == 2
    assert "expected a checkpoint" in capsys.readouterr().err


def test_a_recipe_and_what_is_given(fetch_checkpoint):
    found = ask("--preset", "tiny", "--recipe", "openpi", "--batch", "8")
    assert found["samples"]["postfix"] == 0 and found["samples"]["draws"] == 1 and found["setup"]["insulated"] is False
    assert ask("--preset", "tiny", "--recipe", "opentau", "--batch", "8")["setup"]["freeze"] == ("vision",)
    assert ask("--preset", "tiny", "--recipe", "opentau", "--ema", "0.9")["setup"]["average"] is True


def test_precision_is_what_the_trainer_would_take():
    """A processor without instructions for bfloat16 computes in float32."""

    class Newer(Machine):
        cpuinfo = "flags : fpu avx2 avx512_bf16"

    assert ask("--preset", "tiny")["setup"]["bfloat16"] is False
    assert ask("--preset", "tiny", "--bfloat16")["setup"]["bfloat16"] is True
    assert ask("--preset", "tiny", machine=Newer)["setup"]["bfloat16"] is True
    assert ask("--preset", "tiny", "--float32", machine=Newer)["setup"]["bfloat16"] is False


def test_samples_are_those_of_the_checkpoint(fetch_checkpoint):
    contract = json.loads((fetch_checkpoint / "contract.json").read_text())
    found = ask(str(fetch_checkpoint))
    assert found["samples"]["cameras"] == len(contract["cameras"]) == 2
    assert found["samples"]["prompt"] == contract["max_token_len"]
    assert found["samples"]["postfix"] == contract["fast"]["max_tokens"]
    assert any("2 cameras, 64 prompt" in line and "contract" in line for line in training_lines(found))
    assert ask(str(fetch_checkpoint), "--cameras", "1")["samples"]["cameras"] == 1


def test_processes_of_a_cpu_share_its_memory_and_cores():
    one, eight = (ask("--preset", "tiny", "--devices", str(count)) for count in (1, 8))
    assert eight["device"]["memory"] == one["device"]["memory"] // 8
    assert eight["time"]["samples_per_s"] == pytest.approx(one["time"]["samples_per_s"])
    lines = "\n".join(training_lines(eight))
    assert "shared by 8 processes" in lines and "on each device)" in lines


def test_time_follows_from_counted_operations():
    found = ask("--preset", "tiny", "--batch", "16", "--steps", "1000")
    time = found["time"]
    assert time["samples_per_s"] == pytest.approx(100e9 * time["utilisation"] / time["products"])
    assert time["hours"] == pytest.approx(16_000 / time["samples_per_s"] / 3600)
    assert any("h for 1000 steps of 16" in line and "measured here" in line for line in training_lines(found))


def test_a_gpu_of_the_table_is_found_by_its_name(monkeypatch):
    from ki_runtime.doctor import training_request
    from ki_runtime.doctor.gpu import Gpu

    def gpu(name):
        found = Gpu(name, (9, 0), 80_000_000_000, False, (13, 0), None)
        monkeypatch.setattr(training_request, "check_gpu", lambda host: (found, None))
        return ask("--batch", "8")

    known = gpu("NVIDIA H100 80GB HBM3")
    assert known["setup"]["bfloat16"] and known["time"]["rate"] == 989e12 and known["time"]["hours"] > 0
    unknown = gpu("NVIDIA Unheard 1")
    assert unknown["time"] is None and "no estimate" in list(training_lines(unknown))[-1]
